"""The steps in a folder of checkpoints, told by their names alone.  Pure."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from jaxlora.core.atomic_files import sync

STEP_PATTERN = re.compile(r"0|[1-9][0-9]*")  # the name of a step's folder


def steps_of(folder: Path) -> list[int]:
    """Returns the complete steps in a folder, oldest first; of damaged ones too."""
    return sorted(int(path.name) for path in folder.glob("*") if STEP_PATTERN.fullmatch(path.name))


def set_aside(folder: Path, step: int) -> None:
    """Renames a damaged step, so that it is neither restored nor in the way of the next save.  Raises OSError."""
    aside = folder / f".damaged-{step}"
    shutil.rmtree(aside, ignore_errors=True)
    (folder / str(step)).rename(aside)
    sync(folder)
