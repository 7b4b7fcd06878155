"""Copies of checkpoints in object storage: ROOT/…/STEP, a folder of checkpoints.py, as KEY/…/STEP.zip."""

from __future__ import annotations

import re
import shutil
import threading
from pathlib import Path

from jaxlora.storage.object_store import FOLDER_SUFFIX, Blobs
from jaxlora.storage.step_folders import set_aside

STEP_PATTERN = re.compile(r"[0-9]+")  # the name of a step's folder


class StateCopies:
    """Mirrors the steps of local folders in object storage.  Thread-safe, with one caller per folder at a time."""

    def __init__(self, blobs: Blobs, root: Path, key: str):
        """root: of all folders.  key: prefix in object storage.  Lists once.  Raises StorageAway, StorageFailed."""
        self._blobs, self._root, self._key = blobs, root.absolute(), key
        self._guard = threading.Lock()
        self._there: dict[str, set[int]] = {}  # stored steps of a folder, by its path under the root
        for found in blobs.list(key + "/"):
            name, _, step = found.removeprefix(key + "/").removesuffix(FOLDER_SUFFIX).rpartition("/")
            if STEP_PATTERN.fullmatch(step):
                self._there.setdefault(name, set()).add(int(step))
        self._moving = self._root / ".moving"
        shutil.rmtree(self._moving, ignore_errors=True)
        self._moving.mkdir(parents=True)

    def folders(self) -> list[Path]:
        """Returns the folders of which object storage has a step."""
        with self._guard:
            return [self._root / name for name, steps in self._there.items() if steps]

    def send(self, folder: Path) -> None:
        """Updates object storage to the folder's steps.  Raises StorageAway, StorageFailed, StorageFull."""
        name, steps = self._name(folder), _steps(folder)
        for step in sorted(steps - self._known(name)):
            self._blobs.put_folder(self._at(name, step), folder / str(step), self._moving)
            with self._guard:
                self._there.setdefault(name, set()).add(step)
        self._remove(name, self._known(name) - steps)

    def bring(self, folder: Path) -> None:
        """Fetches all steps of a folder that is not on disk; one that is not stored either stays absent.

        Raises StorageAway, StorageFailed, StorageFull, NotFound.
        """
        if _steps(folder):
            return
        name = self._name(folder)
        for step in sorted(self._known(name)):  # the newest last, so that an incomplete fetch lacks it
            self._blobs.get_folder(self._at(name, step), folder / str(step), self._moving)

    def bring_again(self, folder: Path, step: int) -> bool:
        """Replaces a damaged step by its copy; returns False where there is none.  Raises as `bring` does."""
        name = self._name(folder)
        if step not in self._known(name):
            return False
        set_aside(folder, step)
        self._blobs.get_folder(self._at(name, step), folder / str(step), self._moving)
        return True

    def delete(self, folder: Path) -> None:
        """Removes the stored steps.  Raises StorageAway, StorageFailed."""
        self._remove(self._name(folder), self._known(self._name(folder)))

    def _remove(self, name: str, steps: set[int]) -> None:
        self._blobs.delete([self._at(name, step) + FOLDER_SUFFIX for step in steps])
        with self._guard:
            self._there.get(name, set()).difference_update(steps)

    def _known(self, name: str) -> set[int]:
        with self._guard:
            return set(self._there.get(name, ()))

    def _name(self, folder: Path) -> str:
        return folder.absolute().relative_to(self._root).as_posix()

    def _at(self, name: str, step: int) -> str:
        return f"{self._key}/{name}/{step}"


def _steps(folder: Path) -> set[int]:
    """Returns the complete steps on disk."""
    return {int(p.name) for p in folder.glob("*") if STEP_PATTERN.fullmatch(p.name)}
