"""Where the state of tenants without a slot waits: host RAM within a byte budget, past it files.

States come back bit for bit.  What was parked or read longest ago is spilled first.  The files are of
this process only (what must outlive it is a checkpoint): a new Parking removes those it finds.  Owned by one thread.
"""

from __future__ import annotations

import contextlib
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from jaxlora.core.atomic_files import replace_file
from jaxlora.core.errors import NotFound, StorageFailed
from train.state import SlotState

SUFFIX = ".parked"


@dataclass(slots=True)
class _Parked:
    state: SlotState  # of arrays, or once spilled of _Spilled
    nbytes: int
    checksum: int | None = None  # crc32 of the file; None: in RAM


@dataclass(frozen=True, slots=True)
class _Spilled:
    """A leaf that lies in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Parking:
    """States by key, most of them small enough for RAM.  Keys are file names."""

    def __init__(self, folder: Path, *, host_bytes: int):
        """At most `host_bytes` stay in RAM; `folder` takes the rest and belongs to this Parking alone."""
        self.folder, self.host_bytes = folder, host_bytes
        self.ram_bytes = 0
        self._parked: dict[str, _Parked] = {}  # least recently used first
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"*{SUFFIX}*"):
            left.unlink()

    def __contains__(self, key: str) -> bool:
        return key in self._parked

    def __len__(self) -> int:
        return len(self._parked)

    def put(self, key: str, state: SlotState) -> None:
        """Parks a state in RAM, over the budget if need be; replaces what was parked under this key."""
        self.discard(key)
        arrays = jax.tree.map(np.asarray, state)
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        self._parked[key] = _Parked(arrays, nbytes)
        self.ram_bytes += nbytes

    def spill(self) -> None:
        """Moves states to files until the rest fits the budget.

        Raises StorageFailed when a file cannot be written; then that state and all others are where they were.
        """
        for key, parked in list(self._parked.items()):
            if self.ram_bytes <= self.host_bytes:
                return
            if parked.checksum is None:
                self._spill(key, parked)

    def get(self, key: str) -> SlotState:
        """A parked state, which stays parked.  Raises NotFound, StorageFailed for a file that is gone or damaged."""
        if key not in self._parked:
            raise NotFound(f"nothing is parked as {key}")
        parked = self._parked[key] = self._parked.pop(key)
        return parked.state if parked.checksum is None else self._read(key, parked)

    def discard(self, key: str) -> None:
        """Forgets a state, if there is one."""
        parked = self._parked.pop(key, None)
        if parked is None:
            return
        if parked.checksum is None:
            self.ram_bytes -= parked.nbytes
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(key))

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _spill(self, key: str, parked: _Parked) -> None:
        data = b"".join(leaf.tobytes() for leaf in jax.tree.leaves(parked.state))
        try:
            replace_file(self._path(key), data)
        except OSError as e:
            raise StorageFailed(
                f"{self.ram_bytes} bytes are parked in RAM, over the limit of {self.host_bytes}, and {key} could not be "
                f"moved to a file: {e.strerror}; make room on that disk"
            ) from e
        parked.state = jax.tree.map(lambda leaf: _Spilled(leaf.shape, leaf.dtype), parked.state)
        parked.checksum = zlib.crc32(data)
        self.ram_bytes -= parked.nbytes

    def _read(self, key: str, parked: _Parked) -> SlotState:
        try:
            data = self._path(key).read_bytes()
        except OSError as e:
            raise StorageFailed(f"the parked state {key} cannot be read: {e.strerror}") from e
        if zlib.crc32(data) != parked.checksum:
            raise StorageFailed(f"the parked state {key} is damaged: its checksum differs")
        start = 0

        def leaf(spilled: _Spilled) -> np.ndarray:
            nonlocal start
            count = math.prod(spilled.shape)
            array = np.frombuffer(data, spilled.dtype, count, start).reshape(spilled.shape)
            start += array.nbytes
            return array

        return jax.tree.map(leaf, parked.state)
