"""Local copies of files and folders in object storage: fetched on use, evicted least recently used first."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from jaxlora.storage.object_store import Blobs
from jaxlora.storage.single_flight import SingleFlight


class DiskCopies:
    """Local copies of files and folders in object storage, limited to a number of bytes.  Thread-safe."""

    def __init__(self, most_bytes: int | None):
        """most_bytes: limit of all copies not in use; None: nothing is evicted."""
        self._most_bytes = most_bytes
        self._changed = threading.Condition()
        self._bringing: SingleFlight[Path, Path] = SingleFlight()
        self._leaving: set[Path] = set()  # being removed; not in use
        self._users: Counter[Path] = Counter()
        self._copies: OrderedDict[Path, tuple[int, Callable[[Path], None]]] = OrderedDict()  # most recently used last
        self._bytes = 0

    @contextlib.contextmanager
    def using(self, path: Path, bring: Callable[[Path], None]) -> Generator[None]:
        """Keeps the path on disk inside the block; calls `bring` if it is missing.  Raises what `bring` raises."""

        def brought() -> Path:
            bring(path)
            return path

        with self._changed:
            self._changed.wait_for(lambda: path not in self._leaving)
            self._users[path] += 1
            if path in self._copies:
                self._copies.move_to_end(path)
        try:
            self._bringing.get(path, lambda: path if path.exists() else None, brought)
            yield
        finally:
            with self._changed:
                self._users[path] -= 1
                if not self._users[path]:
                    del self._users[path]
            self._trim()

    def add(self, path: Path, remove: Callable[[Path], None]) -> None:
        """Allows the path to be evicted from now on: `remove` deletes it completely."""
        if self._most_bytes is None:
            return
        try:
            size = _size(path)
        except FileNotFoundError:  # it was evicted already
            return
        with self._changed:
            self._drop(path)
            self._copies[path] = size, remove
            self._bytes += size
        self._trim()

    def forget(self, path: Path) -> None:
        """Stops treating the path as a copy."""
        with self._changed:
            self._drop(path)

    def _drop(self, path: Path) -> None:
        size, _ = self._copies.pop(path, (0, None))
        self._bytes -= size

    def _trim(self) -> None:
        """Evicts copies until the rest fits."""
        while (found := self._next()) is not None:
            path, remove = found
            try:
                remove(path)
            finally:
                with self._changed:
                    self._leaving.discard(path)
                    self._changed.notify_all()

    def _next(self) -> tuple[Path, Callable[[Path], None]] | None:
        """Returns a copy to evict now; it cannot be used until it is removed."""
        if self._most_bytes is None:
            return None
        with self._changed:
            idle = (p for p in self._copies if not self._users[p] and p not in self._leaving)
            path = next(idle, None) if self._bytes > self._most_bytes else None
            if path is None:
                return None
            _, remove = self._copies[path]
            self._drop(path)
            self._leaving.add(path)
            return path, remove


@dataclass(frozen=True, kw_only=True, slots=True)
class Remote:
    """Object storage, and the local copies of its objects."""

    blobs: Blobs
    copies: DiskCopies


def _size(path: Path) -> int:
    """Returns the bytes of a file, or of all files of a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
