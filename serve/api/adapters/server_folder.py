"""Adapters in folders of this machine that an admin names: their files are copied before they are read.

    lora_path ─every link followed─▶ inside a root? ─opened part by part, no link followed─▶ copy

Who may write below a root can put a link in the place of anything at any time.  What is copied was opened without
following one, so it is inside; what is read is the copy, which nobody else can change.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from jaxlora.core.atomic_files import disk_errors
from jaxlora.core.errors import AdapterInvalid, Forbidden, InvalidRequest, NotFound
from jaxlora.peft.archive import FILES, UploadLimits
from jaxlora.peft.folder import CONFIG_FILE, PICKLE_SUFFIXES


def copy_inside(path: str, roots: Sequence[Path], target: Path, limits: UploadLimits) -> None:
    """Copies what an import reads of the folder at `path` into `target`, an empty folder; a pickle is copied by name.

    roots: resolved.  Raises Forbidden without roots, or when a file is outside of them, InvalidRequest for a path that is
    none, NotFound where nothing is, AdapterInvalid for a file that is too large, StorageFull, StorageFailed.
    """
    if not roots:
        raise Forbidden("this server loads no folders; its operator may name some under lora_roots")
    if not os.path.isabs(path) or "\0" in path or "://" in path:
        raise InvalidRequest(
            "lora_path must be the absolute path of a folder on the server; no address and no hub id is fetched",
            param="lora_path",
        )
    try:
        folder = Path(path).resolve()
        root = next((r for r in roots if folder.is_relative_to(r)), None)
        if root is None:
            raise Forbidden("lora_path must lie inside one of the server's lora_roots")
        if not folder.is_dir():
            raise NotFound("there is no folder at lora_path", param="lora_path")
        inner = []
        if not os.path.lexists(folder / CONFIG_FILE):
            inner = [p.name for p in folder.iterdir() if p.is_dir() and os.path.lexists(p / CONFIG_FILE)]
        for home in (".", *inner):
            (target / home).mkdir(exist_ok=True)
            for name in os.listdir(folder / home):
                copy = target / home / name
                if name in FILES and len(inner) <= 1:
                    _copy(root, folder / home / name, copy, limits.of(name))
                elif name == CONFIG_FILE or name.endswith(PICKLE_SUFFIXES):
                    copy.touch()  # the import says what is wrong with it
    except OSError as error:  # a name that is too long, a folder that may not be read
        if isinstance(error, NotFound):
            raise
        raise NotFound("there is no folder at lora_path that can be read", param="lora_path") from error


def _copy(root: Path, path: Path, copy: Path, most_bytes: int) -> None:
    real = path.resolve()
    if not real.is_relative_to(root):
        raise Forbidden("lora_path holds a link that leads out of the server's lora_roots")
    with open(open_inside(root, real), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            return
        if found.st_size > most_bytes:
            raise AdapterInvalid(f"{path.name} has more than {most_bytes} bytes, the most that this base takes")
        with disk_errors("the adapter"), copy.open("xb") as out:
            shutil.copyfileobj(file, out)


def open_inside(root: Path, path: Path) -> int:
    """Opens a file below `root` for reading.  Raises OSError when a part of the way is a link or is not there."""
    *folders, name = path.relative_to(root).parts
    at = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for folder in folders:
            below = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = below
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
    finally:
        os.close(at)
