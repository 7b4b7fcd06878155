"""Are `train`, `serve` and `pallas_kernels` ours?  `train` is also the name of a published package, and of many a folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from jaxlora.core.errors import ConfigInvalid

NEIGHBOURS = ("pallas_kernels", "train", "serve")


def own_home() -> Path:
    """The folder that holds the four packages."""
    return Path(__file__).resolve().parent.parent.parent


def check_neighbours(home: Path) -> None:
    """Raises ConfigInvalid, naming both folders, when one of our packages would be imported from elsewhere than `home`."""
    for name in NEIGHBOURS:
        spec = importlib.util.find_spec(name)  # finds, does not import
        folders = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or [spec.origin or "?"]]
        if not folders:
            raise ConfigInvalid(f"no package {name} was found beside {home / 'jaxlora'}; install jaxlora again")
        if folders[0].resolve() != (home / name).resolve():
            raise ConfigInvalid(
                f"`import {name}` finds {folders[0]}, a stranger; jaxlora's own is {home / name}.  Run from another "
                f"folder, or uninstall the package that brought the other {name}"
            )
