"""What of object storage lies on this machine too: brought when it is used, the least recently used leaves first."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from jaxlora.blobs import Blobs


class DiskCopies:
    """Paths of files and folders that object storage holds, within a number of bytes.  From any thread."""

    def __init__(self, most_bytes: int | None):
        """most_bytes: of all copies that nobody uses; None: none ever leaves."""
        self._most_bytes = most_bytes
        self._changed = threading.Condition()
        self._moving: set[Path] = set()  # being brought or removed
        self._users: Counter[Path] = Counter()
        self._copies: OrderedDict[Path, tuple[int, Callable[[Path], None]]] = OrderedDict()  # the newest use last
        self._bytes = 0

    @contextlib.contextmanager
    def using(self, path: Path, bring: Callable[[Path], None]) -> Generator[None]:
        """Inside, the path is there and stays.  Raises what `bring` raises, which is called where it is not there."""
        with self._changed:
            self._changed.wait_for(lambda: path not in self._moving)
            self._users[path] += 1
            missing = not path.exists()
            if missing:
                self._moving.add(path)
            elif path in self._copies:
                self._copies.move_to_end(path)
        try:
            if missing:
                try:
                    bring(path)
                finally:
                    self._moved(path)
            yield
        finally:
            with self._changed:
                self._users[path] -= 1
                if not self._users[path]:
                    del self._users[path]
            self._trim()

    def add(self, path: Path, remove: Callable[[Path], None]) -> None:
        """The path may leave from now on: `remove` takes it away whole, so that no part of it is left."""
        if self._most_bytes is None:
            return
        try:
            size = _size(path)
        except FileNotFoundError:  # it has left already
            return
        with self._changed:
            self._drop(path)
            self._copies[path] = size, remove
            self._bytes += size
        self._trim()

    def forget(self, path: Path) -> None:
        """The path is no copy any more."""
        with self._changed:
            self._drop(path)

    def _drop(self, path: Path) -> None:
        size, _ = self._copies.pop(path, (0, None))
        self._bytes -= size

    def _moved(self, path: Path) -> None:
        with self._changed:
            self._moving.discard(path)
            self._changed.notify_all()

    def _trim(self) -> None:
        """Removes copies until the rest fits."""
        while (found := self._next()) is not None:
            path, remove = found
            try:
                remove(path)
            finally:
                self._moved(path)

    def _next(self) -> tuple[Path, Callable[[Path], None]] | None:
        """A copy that leaves now; nobody can use it until `_moved`."""
        if self._most_bytes is None:
            return None
        with self._changed:
            idle = (p for p in self._copies if not self._users[p] and p not in self._moving)
            path = next(idle, None) if self._bytes > self._most_bytes else None
            if path is None:
                return None
            _, remove = self._copies[path]
            self._drop(path)
            self._moving.add(path)
            return path, remove


@dataclass(frozen=True, kw_only=True, slots=True)
class Remote:
    """Object storage, and what of it lies here."""

    blobs: Blobs
    copies: DiskCopies


def _size(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
