"""The changes of a store's versions, for processes that read it while another writes: a line each.

    ID            drawn whenever the lines are begun: at each start of the store that writes, and when they have grown
    +TENANT/NAME/VERSION    the version is complete
    -TENANT/NAME/VERSION    it is deleted, or its deletion is promised

A reader that finds another ID than before reads the folder itself again; else the lines that are new to it.  On a disk they
are a file; a look at one that has not changed is one `stat`.  With object storage they are an object as well, which is
written again whenever it has changed.
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
MOST_OBJECT_BYTES = 2**16  # all of it is written each time
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


class ChangeObject:
    """Such lines as an object, where a version that came is called as its own object is.  The caller serialises calls."""

    def __init__(self) -> None:
        """Begins them."""
        self._begin()

    def add(self, line: str) -> None:
        """Adds a line."""
        self._data += f"{line}\n".encode()
        if len(self._data) > MOST_OBJECT_BYTES:
            self._begin()

    def data(self) -> bytes:
        """Returns the object."""
        return bytes(self._data)

    def _begin(self) -> None:
        self._data = bytearray(f"{uuid.uuid4().hex}\n".encode())


def lines_after(before: bytes, data: bytes) -> list[str] | None:
    """Returns the lines of an object since it was `before`; None: anything may have changed."""
    return data[len(before) :].decode().splitlines() if before and data.startswith(before) else None


def _parsed(line: str) -> Change:
    tenant, name, version = line[1:].split("/")
    return line[0] == "+", AdapterRef(tenant, name, int(version))
