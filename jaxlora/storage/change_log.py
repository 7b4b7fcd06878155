"""The changes of a store's versions, for processes that read it while another writes: a line each in one file.

    ID            drawn whenever the file is begun: at each start of the store that writes, and when the file has grown
    +TENANT/NAME/VERSION    the version is complete on disk
    -TENANT/NAME/VERSION    it is deleted, or its deletion is promised

A reader that finds another ID than before reads the folder itself again; else the lines that are new to it.  A look at a
file that has not changed is one `stat`.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterable
from pathlib import Path

from jaxlora.core.atomic_files import replace_file
from jaxlora.core.lora import AdapterRef

MOST_BYTES = 2**20  # before the file is begun again
ID_BYTES = 33

type Change = tuple[bool, AdapterRef]  # whether the version came, else it left


class ChangeLog:
    """The file as the store writes it.  Thread-safe."""

    def __init__(self, path: Path):
        """Begins the file.  Raises OSError."""
        self._path, self._lock = path, threading.Lock()
        self._begin()

    def add(self, refs: Iterable[AdapterRef], *, came: bool) -> None:
        """Adds a line for each version, once the folder is as it says.  Raises OSError."""
        sign = "+" if came else "-"
        lines = "".join(f"{sign}{ref.tenant}/{ref.name}/{ref.version}\n" for ref in refs)
        with self._lock:
            with open(self._path, "ab", buffering=0) as file:
                file.write(lines.encode())
                grown = file.tell() > MOST_BYTES
            if grown:
                self._begin()

    def _begin(self) -> None:
        replace_file(self._path, f"{uuid.uuid4().hex}\n".encode())


class ChangeReader:
    """The file as another process reads it.  The caller serialises calls."""

    def __init__(self, path: Path):
        """At first everything is new."""
        self._path = path
        self._id = b""
        self._at = 0  # bytes that were read
        self._seen = (0, 0, 0)

    def news(self) -> list[Change] | None:
        """Returns the changes since the last call, oldest first; None: anything may have changed.  Raises OSError."""
        found = os.stat(self._path)
        seen = found.st_ino, found.st_size, found.st_mtime_ns
        if seen == self._seen:
            return []
        with open(self._path, "rb") as file:
            id, lines = file.read(ID_BYTES), file.read()
        is_same, skipped = id == self._id, max(self._at - ID_BYTES, 0)
        whole = lines.rfind(b"\n") + 1  # the last line may still be on its way
        self._seen, self._id, self._at = seen, id, ID_BYTES + whole
        return [_parsed(line) for line in lines[skipped:whole].decode().splitlines()] if is_same else None


def _parsed(line: str) -> Change:
    tenant, name, version = line[1:].split("/")
    return line[0] == "+", AdapterRef(tenant, name, int(version))
