"""Crash-safe file writes: a file is complete or absent, and survives a power loss."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Generator
from pathlib import Path

from jaxlora.core.errors import JaxLoraError, StorageFailed, StorageFull


def sync(path: Path) -> None:
    """Flushes one file, or the names in one folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flushes a folder and all that is in it to disk."""
    for path, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(path) / name)
        sync(Path(path))


def make_folders(folder: Path) -> None:
    """Makes a folder and its missing parents; their names are on disk on return."""
    if not folder.is_dir():
        make_folders(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def replace_file(path: Path, data: bytes) -> None:
    """Writes or replaces a file; a reader sees the old bytes or the new ones."""
    make_folders(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(data)
        sync(temporary)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Generator[Path]:
    """Yields a new folder to fill, which becomes `folder` when the block ends; it replaces an existing one then.

    When the block raises, the new folder is removed and `folder` is as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_folder(new: Path, folder: Path) -> None:
    """Renames `new`, a folder beside `folder`, to `folder`; moves an existing one away just before, removes it then."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def lock_folder(folder: Path, *, name: str = ".lock", wait: bool = False) -> int | None:
    """Locks FOLDER/NAME; returns a descriptor that holds it until closed or the process ends.  None when it is held.

    wait: waits until the lock is free.
    """
    descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def to_trash(path: Path, trash: Path) -> Path | None:
    """Renames a file or folder into the folder `trash` of the same disk; returns its new path, or None if absent."""
    out = trash / uuid.uuid4().hex
    try:
        path.rename(out)
    except FileNotFoundError:
        return None
    sync(path.parent)
    return out


def sha256_of(path: Path) -> str:
    """Returns the hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_full(error: BaseException) -> bool:
    """Returns whether a disk is full, or its user's quota is used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def disk_errors(what: str) -> Generator[None]:
    """Converts a disk's errors inside the block: StorageFull where it is full, else StorageFailed."""
    try:
        yield
    except OSError as error:
        if isinstance(error, JaxLoraError):  # some of ours are OSErrors too
            raise
        if is_full(error):
            raise StorageFull(
                f"the server's disk has no room for {what}; delete something, or tell its operator"
            ) from error
        raise StorageFailed(f"{what} could not be stored: {error.strerror or error}") from error
