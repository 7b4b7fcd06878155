"""Object storage of a test: a file system of fsspec in memory whose calls fail, hang or lie when they are told to."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from jaxlora.blobs import Blobs


class Faults:
    """What goes wrong with the next calls, of one URL or another."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail: list[Exception] = []  # raised by the next calls, one each
        self.down = False  # every call fails
        self.hang: threading.Event | None = None  # calls wait for it
        self.cut = 0  # of the next so many reads half arrives
        self.flip = 0  # in the next so many reads a byte is another

    def met(self, call: str) -> None:
        self.calls.append(call)
        if self.hang is not None:
            self.hang.wait(30)
        if self.down:
            raise ConnectionError("nobody there")
        if self.fail:
            raise self.fail.pop(0)


FAULTS = Faults()


class FaultyFileSystem(MemoryFileSystem):
    """Memory with FAULTS."""

    protocol = "faulty"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]

    def pipe_file(self, path, value, **kwargs):
        FAULTS.met("write")
        super().pipe_file(path, value, **kwargs)

    def put_file(self, lpath, rpath, *args, **kwargs):
        FAULTS.met("write")
        super().put_file(lpath, rpath, *args, **kwargs)

    def get_file(self, rpath, lpath, *args, **kwargs):
        FAULTS.met("read")
        data = bytearray(super().cat_file(rpath))
        if FAULTS.cut:
            FAULTS.cut -= 1
            data = data[: len(data) // 2]
        if FAULTS.flip:
            FAULTS.flip -= 1
            data[len(data) // 2] ^= 1
        Path(lpath).write_bytes(data)

    def cat_file(self, path, *args, **kwargs):
        FAULTS.met("read")
        return super().cat_file(path, *args, **kwargs)

    def info(self, path, **kwargs):
        FAULTS.met("info")
        return super().info(path, **kwargs)

    def find(self, path, *args, **kwargs):
        FAULTS.met("list")
        kept, FAULTS.down, FAULTS.hang = (FAULTS.down, FAULTS.hang), False, None  # it asks for info itself
        try:
            return super().find(path, *args, **kwargs)
        finally:
            FAULTS.down, FAULTS.hang = kept

    def rm(self, path, *args, **kwargs):
        FAULTS.met("remove")
        super().rm(path, *args, **kwargs)


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)


def faulty(prefix: str, timeout_s: float = 20.0) -> Blobs:
    """Objects of their own under faulty://PREFIX; FAULTS begins anew."""
    FAULTS.__init__()
    found = Blobs(f"faulty://{prefix}", timeout_s=timeout_s)
    FAULTS.calls.clear()
    return found
