"""Checks that `import train` and the like find our packages, and not a stranger's or a file of the user's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from jaxlora.core.errors import PackageHidden

HOME = Path(__file__).resolve().parents[1]  # the folder that holds the four packages
NEIGHBOURS = ("pallas_kernels", "train", "serve")  # names that others use, too


def check_neighbours(home: Path = HOME) -> None:
    """Raises PackageHidden with what `hidden_neighbours` returns, if that is anything."""
    if why := hidden_neighbours(home):
        raise PackageHidden(why)


def hidden_neighbours(home: Path = HOME) -> str:
    """Returns which packages of ours would be imported from elsewhere than `home`, and what to do; "" when none would."""
    wrong = []
    for name in NEIGHBOURS:
        spec = importlib.util.find_spec(name)  # finds, does not import
        found = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or [spec.origin or "?"]]
        if not found:
            wrong.append(f"no package {name} was found beside {home / 'jaxlora'}; install jaxlora again")
        elif found[0].resolve() != (home / name).resolve():
            wrong.append(
                f"`import {name}` finds {found[0]}, a stranger; jaxlora's own is {home / name}.  Rename the stranger, "
                "run from another folder, or uninstall the package that brought it"
            )
    return "; ".join(wrong)
