"""Extracts the files of a PEFT adapter from an upload: a zip, a tar, a tar.gz, or the files themselves.

    upload ──magic──▶ members, one by one ──name, kind, size──▶ FOLDER/{adapter_config.json, adapter_model.safetensors, …}

Members are copied under our own names, so none of theirs becomes a path.  Sizes are counted while bytes are inflated:
the sizes an archive declares are only a first check.  Pure host code.
"""

from __future__ import annotations

import gzip
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from jaxlora.core.errors import AdapterInvalid, JaxLoraError
from jaxlora.core.model_config import ModelConfig
from jaxlora.peft.folder import CONFIG_FILE, MAX_JSON_BYTES, OWN_FILE, PICKLE_SUFFIXES, WEIGHTS_FILE
from jaxlora.peft.reasons import shown
from jaxlora.peft.targets import linear_modules
from jaxlora.peft.tensors import MAX_HEADER_BYTES, PICKLE

FILES = (CONFIG_FILE, WEIGHTS_FILE, OWN_FILE)  # the files an import reads
LEFT_OUT = (  # other files of adapter folders; never opened
    "README.md",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    ".gitattributes",
    ".gitignore",
    ".DS_Store",
    # The tokenizer and the chat template are the base's, whatever files an adapter brings.
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
MAC_FOLDER = "__MACOSX"
MAX_MEMBERS = 64
MAX_NAME_CHARS = 256
CHUNK_BYTES = 64 * 1024
# No archive reader needs more at once, except for a directory or header of unbounded size.
MAX_READ_BYTES = 256 * 1024
OVERHEAD_BYTES = 8 * 2**20  # of an archive besides the files that are kept: headers, and skipped files
KINDS = "a zip, tar or tar.gz of a PEFT folder"
DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    struct.error,
    EOFError,
    LookupError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    ValueError,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class UploadLimits:
    """Size limits, in bytes, of the adapters that one base accepts."""

    weights_bytes: int  # of adapter_model.safetensors

    @property
    def total_bytes(self) -> int:
        """Returns the limit of a whole upload, packed or not."""
        return self.weights_bytes + OVERHEAD_BYTES

    def of(self, name: str) -> int:
        """Returns the limit of one of FILES."""
        return self.weights_bytes if name == WEIGHTS_FILE else MAX_JSON_BYTES


def upload_limits(config: ModelConfig, max_rank: int) -> UploadLimits:
    """Returns limits for float32 A and B of this rank on every module, PEFT's copy of the head, and the header."""
    values = sum(max_rank * (m.features_in + m.features_out) for m in linear_modules(config).values())
    return UploadLimits(weights_bytes=4 * (values + config.vocab * config.d_model) + MAX_HEADER_BYTES + 8)


@dataclass(frozen=True, slots=True)
class _Member:
    """One member of an archive, with its checked properties."""

    name: str
    declared_bytes: int
    data: BinaryIO


def file_name(name: str) -> str | None:
    """Returns which of FILES a name means; None for a file that is skipped.  Raises AdapterInvalid for any other."""
    if name in FILES:
        return name
    if name in LEFT_OUT or name.startswith("._"):
        return None
    if Path(name).suffix.lower() in PICKLE_SUFFIXES:
        raise AdapterInvalid(f"{shown(name)}: {PICKLE}")
    raise AdapterInvalid(f"{shown(name)} is no file of an adapter; send {CONFIG_FILE} and {WEIGHTS_FILE} only")


def unpack(archive: Path, folder: Path, limits: UploadLimits) -> tuple[str, ...]:
    """Writes an archive's adapter files into an empty `folder`; returns the names of the members that were skipped.

    Raises AdapterInvalid unless it is a plain PEFT folder, with at most one folder around its files; OSError when
    `folder` cannot be written.
    """
    left_out: list[str] = []
    homes: dict[str, str] = {}  # file → the folder of the archive that holds it
    with archive.open("rb") as file:
        members = _members(file, limits)
        while (member := _unharmed(lambda: next(members, None))) is not None:
            home, _, last = _checked_path(member.name).rpartition("/")
            name = None if home.startswith(MAC_FOLDER) else file_name(last)
            if name is None:
                left_out.append(last[:80])
                continue
            if name in homes:
                raise AdapterInvalid(f"the archive holds {name} twice; send one adapter at a time")
            homes[name] = home
            if member.declared_bytes > limits.of(name):
                raise _too_large(name, limits)
            _copy(member.data, folder / name, name, limits)
    if len(set(homes.values())) > 1:
        raise AdapterInvalid("the archive's files lie in different folders; send one PEFT folder")
    return tuple(left_out)


def _unharmed[T](read: Callable[[], T]) -> T:
    """Returns what `read` reads of the archive.  Raises AdapterInvalid for whatever a damaged one causes."""
    try:
        return read()
    except JaxLoraError:
        raise
    except (*DAMAGED, OSError) as error:
        kind = type(error).__name__
        raise AdapterInvalid(f"the archive is damaged or of an unusual kind ({kind}); send {KINDS}") from error


def _too_large(name: str, limits: UploadLimits) -> AdapterInvalid:
    return AdapterInvalid(f"{name} has more than {limits.of(name)} bytes, the most that this base takes")


def _copy(data: BinaryIO, path: Path, name: str, limits: UploadLimits) -> None:
    """Copies a member; raises AdapterInvalid when it is larger than its limit."""
    left = limits.of(name)
    with path.open("xb") as out:
        while chunk := _unharmed(lambda: data.read(CHUNK_BYTES)):
            left -= len(chunk)
            if left < 0:
                raise _too_large(name, limits)
            out.write(chunk)


def _checked_path(name: str) -> str:
    """Returns the member's path: relative, at most one folder deep.  Raises AdapterInvalid for any other."""
    parts = [p for p in name.split("/") if p not in ("", ".")]
    strange = len(name) > MAX_NAME_CHARS or "\0" in name or "\\" in name or ":" in name or not name.isprintable()
    if strange or name.startswith("/") or ".." in parts or not parts:
        raise AdapterInvalid(f"the archive has a member of the path {shown(name)!a}; paths must stay inside its folder")
    if len(parts) > 2 and parts[0] != MAC_FOLDER:
        raise AdapterInvalid(f"the archive nests {shown(name)} too deep; send the files of one folder")
    return "/".join(parts)


def _members(file: BinaryIO, limits: UploadLimits) -> Iterator[_Member]:
    """Yields the files of an archive, in its order.  Raises AdapterInvalid for other kinds of archives and members."""
    start = file.read(512)
    file.seek(0)
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        yield from _zip_members(_Reader(file, limits.total_bytes, forward=False))
    elif start[:2] == b"\x1f\x8b":
        with gzip.GzipFile(fileobj=file, mode="rb") as inflated:
            yield from _tar_members(_Reader(inflated, limits.total_bytes, forward=True))
    elif start[257:262] == b"ustar":
        yield from _tar_members(_Reader(file, limits.total_bytes, forward=False))
    elif start[:1] == b"\x80":
        raise AdapterInvalid(PICKLE)
    else:
        raise AdapterInvalid(f"the upload is no archive that is read here; send {KINDS}")


def _zip_members(reader: _Reader) -> Iterator[_Member]:
    with zipfile.ZipFile(reader) as archive:
        infos = archive.infolist()
        _check_count(len(infos))
        for info in infos:
            name = info.orig_filename  # as stored in the file; the other one ends at a NUL
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _not_plain(name)
            if info.flag_bits & 1:
                raise AdapterInvalid(f"{shown(name)} is encrypted; send {KINDS}")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise AdapterInvalid(f"{shown(name)} is compressed in an unusual way; use store or deflate")
            if name.endswith("/"):
                _checked_path(name)
                continue
            with archive.open(info) as data:
                yield _Member(name, info.file_size, data)  # ty: ignore[invalid-argument-type]


def _tar_members(reader: _Reader) -> Iterator[_Member]:
    with tarfile.open(fileobj=reader, mode="r:") as archive:  # ty: ignore[no-matching-overload]
        count = 0
        while (info := archive.next()) is not None:
            count += 1
            _check_count(count)
            if info.isdir():
                if info.name not in ("", "."):
                    _checked_path(info.name)
                continue
            data = archive.extractfile(info) if info.isreg() and not info.issparse() else None
            if data is None:
                raise _not_plain(info.name)
            yield _Member(info.name, info.size, data)


def _check_count(count: int) -> None:
    if count > MAX_MEMBERS:
        raise AdapterInvalid(f"the archive has over {MAX_MEMBERS} members; send the files of one PEFT folder")


def _not_plain(name: str) -> AdapterInvalid:
    return AdapterInvalid(
        f"{shown(name)} is a link, a device or another special member; archives must hold plain files"
    )


class _Reader:
    """A file object for the archive libraries: bounds each read, and all reads together by the upload limit.

    forward: the file is inflated as it is read, so seeking back would start again.
    """

    def __init__(self, file: BinaryIO | gzip.GzipFile, most_bytes: int, *, forward: bool):
        self._file, self._left, self._forward = file, most_bytes, forward

    def read(self, size: int = -1) -> bytes:
        """Reads from here.  Raises AdapterInvalid for more than a valid archive needs."""
        if size > MAX_READ_BYTES:
            raise AdapterInvalid("the archive has a directory or a header that is too large")
        data = self._file.read(min(size, MAX_READ_BYTES) if size >= 0 else MAX_READ_BYTES)
        if self._forward:
            self._left -= len(data)
            if self._left < 0:
                raise AdapterInvalid("the archive inflates to more bytes than an adapter of this base has")
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """Seeks; forwards by reading where the file is inflated, so that it counts."""
        if not self._forward:
            return self._file.seek(offset, whence)
        ahead = offset - self._file.tell()
        if whence != 0 or ahead < 0:
            raise AdapterInvalid("the archive cannot be read from its beginning to its end")
        while ahead > 0 and (data := self.read(min(ahead, CHUNK_BYTES))):
            ahead -= len(data)
        return self._file.tell()

    def tell(self) -> int:
        """Returns the position."""
        return self._file.tell()

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def close(self) -> None:
        """Does nothing: the caller that opened the file closes it."""
