"""Reads and writes adapter versions on disk, and the counters that give each version its number.

    adapters/TENANT/NAME/VERSION/weights     Orbax checkpoint, step = version: target → {"a": a_LRX, "b": b_LRY}
    adapters/TENANT/NAME/VERSION/meta        format, spec, base_hash, created, shapes, sha256

Each array is one file of plain float32 (a Zarr array of one chunk, not compressed: random weights do not compress), so
that a load is a read and a sha256.  Orbax reads it too, but takes four times the CPU, which a server needs to decode;
it reads the versions that were written compressed.

A version folder is renamed into place after its last byte, so a numbered folder is a complete version; the remains of
a killed save are elsewhere.

A counter holds the highest numbers of one name's versions: one small file, on disk before a number is used."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from jaxlora.core.atomic_files import make_folders, replace_file, sync, sync_tree
from jaxlora.core.errors import StorageFailed
from jaxlora.core.lora import NAME_PATTERN, Adapter, AdapterRef, LoraSpec
from jaxlora.storage.checkpoints import this_process_alone

FORMAT = 1
VERSION_PATTERN = re.compile(r"[1-9][0-9]{0,17}")
CHUNK = "0.0.0"  # file name of a Zarr array of three axes and one chunk
STORED = np.dtype("<f4")


def scan(adapters: Path) -> dict[tuple[str, str], set[int]]:
    """Returns (tenant, name) → complete versions.  Reads names only: 10,000 adapters take a fraction of a second."""
    found = {}
    for tenant in _folders(adapters):
        for name in _folders(adapters / tenant):
            versions = {int(v) for v in _folders(adapters / tenant / name) if VERSION_PATTERN.fullmatch(v)}
            if versions:
                found[tenant, name] = versions
    return found


def _folders(path: Path) -> list[str]:
    with os.scandir(path) as entries:
        return [e.name for e in entries if NAME_PATTERN.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]


def digest(spec: LoraSpec, base_hash: str, weights: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """Returns the sha256 over everything that determines what the adapter computes."""
    total = hashlib.sha256(json.dumps([spec.to_json(), base_hash], sort_keys=True).encode())
    for target in sorted(weights):
        for value in weights[target]:
            total.update(f"{target} {value.dtype.name} {value.shape}".encode())
            total.update(np.ascontiguousarray(value).data)
    return total.hexdigest()


def is_damage(error: StorageFailed) -> bool:
    """Returns whether a version's files are damaged, rather than unreadable for the moment."""
    cause = error.__cause__
    return not isinstance(cause, OSError) or isinstance(cause, FileNotFoundError | NotADirectoryError)


def save_version(folder: Path, adapter: Adapter, created: float, temporary: Path) -> None:
    """Writes one version under `folder`, the folder of its tenant and name, by way of `temporary` on the same disk.

    Raises what the file system raises.  An existing version is complete and is not rewritten: an earlier attempt may
    have failed after its rename.
    """
    target, staging = folder / str(adapter.ref.version), temporary / uuid.uuid4().hex
    meta = {
        "format": FORMAT,
        "spec": adapter.spec.to_json(),
        "base_hash": adapter.base_hash,
        "created": created,
        "shapes": {name: [list(a_LRX.shape), list(b_LRY.shape)] for name, (a_LRX, b_LRY) in adapter.weights.items()},
        "sha256": digest(adapter.spec, adapter.base_hash, adapter.weights),
    }
    tree = {name: {"a": a_LRX, "b": b_LRY} for name, (a_LRX, b_LRY) in adapter.weights.items()}
    make_folders(folder)
    if not target.is_dir():
        staging.mkdir()
        try:
            _write(staging, adapter.ref.version, tree, meta)
            sync_tree(staging)
            (staging / target.name).rename(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    sync(folder)


def _write(folder: Path, version: int, tree: Mapping, meta: Mapping) -> None:
    """Writes an Orbax checkpoint in a folder of its own: Orbax scans all files beside a checkpoint."""
    options = ocp.CheckpointManagerOptions(
        enable_async_checkpointing=False, create=False, multiprocessing_options=this_process_alone()
    )
    plain = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_compression=False, multiprocessing_options=this_process_alone()
    )
    handlers = {"weights": plain, "meta": ocp.JsonCheckpointHandler()}
    with _without_ocdbt(), ocp.CheckpointManager(folder, options=options, item_handlers=handlers) as manager:
        items = ocp.args.Composite(weights=ocp.args.PyTreeSave(tree), meta=ocp.args.JsonSave(meta))
        manager.save(version, args=items)


@contextlib.contextmanager
def _without_ocdbt() -> Generator[None]:
    """Suppresses Orbax's warning that there are no OCDBT files to merge."""
    absl = logging.getLogger("absl")

    def about_else(record: logging.LogRecord) -> bool:
        return "Skipping merge of OCDBT" not in str(record.msg)

    absl.addFilter(about_else)
    try:
        yield
    finally:
        absl.removeFilter(about_else)


def read_meta(folder: Path, ref: AdapterRef) -> Mapping:
    """Returns the metadata of a version.  Raises StorageFailed when it is damaged or of an unknown format."""
    path = folder / str(ref.version) / "meta"
    try:
        meta = ocp.JsonCheckpointHandler().restore(path, args=ocp.args.JsonRestore())  # ty: ignore[invalid-argument-type]
        found = meta["format"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise StorageFailed(f"{ref}: its description on disk cannot be read ({type(e).__name__})") from e
    if found != FORMAT:
        raise StorageFailed(f"{ref} is stored in format {found!r}; this build reads format {FORMAT}")
    return meta


# Of a version: when it was put (epoch seconds), its largest rank, its bytes in memory.
type About = tuple[float, int, int]


def describe(folder: Path, ref: AdapterRef) -> About:
    """Returns what a version's metadata describes, without reading its weights.

    Raises StorageFailed as read_meta does.
    """
    meta = read_meta(folder, ref)
    try:
        return float(meta["created"]), LoraSpec.from_json(meta["spec"]).max_rank, _nbytes(_shapes(meta))
    except Exception as e:  # any error that a damaged file causes in a reader
        raise StorageFailed(f"{ref}: its description on disk lacks its specification, date or shapes") from e


def load_version(
    folder: Path, ref: AdapterRef, make_room: Callable[[int], None] | None = None
) -> tuple[Adapter, float]:
    """Returns (the adapter, its creation time in epoch seconds).  Raises StorageFailed when any byte is wrong.

    make_room: called with the bytes of the weights before they are read; may wait.
    """
    meta = read_meta(folder, ref)
    try:
        spec = LoraSpec.from_json(meta["spec"])
        shapes = _shapes(meta)
        if make_room is not None:
            make_room(_nbytes(shapes))
        weights = _read_plain(folder / str(ref.version) / "weights", shapes)
        if weights is None:
            weights = _restore(folder, ref.version, shapes)
        right = digest(spec, meta["base_hash"], weights) == meta["sha256"]
        created = float(meta["created"])
    except Exception as e:  # any error that a damaged file causes in a reader
        raise StorageFailed(f"{ref}: its files on disk cannot be read ({type(e).__name__})") from e
    if not right:
        raise StorageFailed(f"{ref}: its bytes on disk do not match their checksum; restore it or use another version")
    return Adapter(ref=ref, spec=spec, base_hash=meta["base_hash"], weights=weights), created


type Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]  # of A and B of each target
type Weights = dict[str, tuple[np.ndarray, np.ndarray]]


def _shapes(meta: Mapping) -> Shapes:
    return {target: (tuple(a), tuple(b)) for target, (a, b) in meta["shapes"].items()}


def _nbytes(shapes: Shapes) -> int:
    return sum(math.prod(shape) for pair in shapes.values() for shape in pair) * STORED.itemsize


def _read_plain(folder: Path, shapes: Shapes) -> Weights | None:
    """Returns the arrays in files of their own; None if one is missing or incomplete.  Does not verify their bytes."""

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        value = np.empty(shape, STORED)
        with open(folder / name / CHUNK, "rb", buffering=0) as file:
            whole = os.fstat(file.fileno()).st_size == value.nbytes
            return value if whole and file.readinto(value.reshape(-1).view(np.uint8).data) == value.nbytes else None

    weights = {}
    try:
        for target, (a, b) in shapes.items():
            a_LRX, b_LRY = read(f"{target}.a", a), read(f"{target}.b", b)
            if a_LRX is None or b_LRY is None:
                return None
            weights[target] = a_LRX, b_LRY
    except FileNotFoundError:
        return None
    return weights


def _restore(folder: Path, version: int, shapes: Shapes) -> Weights:
    """Returns the arrays as Orbax reads them, in whatever format it wrote them."""
    zero = np.float32(0)
    like = {t: {"a": np.broadcast_to(zero, a), "b": np.broadcast_to(zero, b)} for t, (a, b) in shapes.items()}
    options = ocp.CheckpointManagerOptions(create=False, multiprocessing_options=this_process_alone())
    with ocp.CheckpointManager(folder, options=options, item_names=("weights", "meta")) as manager:
        items = ocp.args.Composite(weights=ocp.args.StandardRestore(like))
        tree = manager.restore(version, args=items)["weights"]
    return {target: (pair["a"], pair["b"]) for target, pair in tree.items()}


COUNTER_FORMAT = 1


class Counters:
    """(last minted, last deleted) version of every name, in ROOT/TENANT/NAME.json.  The caller serialises calls."""

    def __init__(self, root: Path):
        self._root = root
        self._known: dict[tuple[str, str], tuple[int, int]] = {}  # as on disk, for names used so far

    def known(self, tenant: str, name: str) -> bool:
        """Returns whether a number of this name was ever written here."""
        return (tenant, name) in self._known or self._path(tenant, name).exists()

    def read(self, tenant: str, name: str, at_least: int) -> tuple[int, int]:
        """Returns both numbers, zeros without a file; the minted one is at least `at_least`, in case the file was lost.

        Raises StorageFailed for a damaged file.
        """
        if (tenant, name) not in self._known:
            minted, deleted = self._read(self._path(tenant, name), f"{tenant}/{name}")
            self._known[tenant, name] = max(minted, at_least), deleted
        return self._known[tenant, name]

    def write(self, tenant: str, name: str, minted: int, deleted: int) -> None:
        """Writes both numbers; they are on disk on return.  Raises OSError."""
        data = {"format": COUNTER_FORMAT, "minted": minted, "deleted": deleted, "crc32": _crc32(minted, deleted)}
        replace_file(self._path(tenant, name), json.dumps(data).encode())
        self._known[tenant, name] = minted, deleted

    def _path(self, tenant: str, name: str) -> Path:
        return self._root / tenant / f"{name}.json"

    def _read(self, path: Path, whose: str) -> tuple[int, int]:
        if not path.exists():
            return 0, 0
        try:
            data = json.loads(path.read_bytes())
            found, minted, deleted = data["format"], int(data["minted"]), int(data["deleted"])
            wanted = _crc32(minted, deleted)
            if data.get("crc32", wanted) != wanted:  # none in those of the first releases
                raise ValueError("its numbers do not match their checksum")
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise StorageFailed(f"the version counter of {whose} is damaged: {e}") from e
        if found != COUNTER_FORMAT:
            raise StorageFailed(
                f"the version counter of {whose} has format {found!r}; this build reads {COUNTER_FORMAT}"
            )
        return minted, deleted


def _crc32(minted: int, deleted: int) -> int:
    return zlib.crc32(f"{minted} {deleted}".encode())


class Tombstones:
    """Versions whose deletion is promised but not complete: an empty file ROOT/TENANT/NAME/VERSION each."""

    def __init__(self, root: Path):
        self._root = root

    def all(self) -> list[AdapterRef]:
        """Returns the versions, of an earlier process at the start."""
        found = [path for path in self._root.glob("*/*/*") if VERSION_PATTERN.fullmatch(path.name)]
        return [AdapterRef(path.parts[-3], path.parts[-2], int(path.name)) for path in found]

    def add(self, ref: AdapterRef) -> None:
        """Promises a deletion; it is on disk on return.  Raises OSError."""
        path = self._path(ref)
        make_folders(path.parent)
        path.touch()
        sync(path)
        sync(path.parent)

    def remove(self, ref: AdapterRef) -> None:
        """Ends a promise that is kept, if there is one."""
        self._path(ref).unlink(missing_ok=True)

    def _path(self, ref: AdapterRef) -> Path:
        return self._root / ref.tenant / ref.name / str(ref.version)
