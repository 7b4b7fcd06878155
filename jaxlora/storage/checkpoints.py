"""Numbered checkpoints of training state on disk: complete or absent, never overwritten, restored bit for bit.

    FOLDER/STEP/arrays     the pytree
    FOLDER/STEP/meta       format, the caller's meta, shape and dtype of each leaf, sha256 of the arrays and of all this
    FOLDER/.damaged-STEP   one that could not be read, put aside for who wants to look at it

A step folder is renamed to its number after its last byte.  The remains of a killed save have another name, are never
restored and are removed by the next save.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, CustomSteps, LatestN

from jaxlora.core.atomic_files import sync, sync_tree
from jaxlora.core.errors import AlreadyExists, StateInvalid, StorageFailed
from jaxlora.storage.step_folders import steps_of

FORMAT = 1

type Tree = object  # a pytree of arrays, or of ShapeDtypeStructs


@dataclass(frozen=True, slots=True)
class Restored:
    """A restored checkpoint: what `save_state` received."""

    step: int
    arrays: Tree
    meta: dict  # JSON


def save_state(
    folder: Path, step: int, arrays: Tree, meta: Mapping[str, object], *, keep: int = 2, best: int | None = None
) -> None:
    """Writes step `step`, then removes all but the newest `keep` and step `best`.  On return it survives a power loss.

    `meta` is JSON.  Raises AlreadyExists for a step that exists, StateInvalid for one below the newest, for
    `keep` below 1 and for arrays without elements, StorageFailed when the files cannot be written; then the steps before
    it are unchanged.
    """
    if keep < 1:
        raise StateInvalid(f"keep must be at least 1, got {keep}")
    leaves = _describe(arrays)
    empty = [path for path, (shape, _) in leaves.items() if 0 in shape]
    if empty or not leaves:
        raise StateInvalid(f"arrays without elements cannot be saved: {', '.join(empty[:5]) or 'the tree is empty'}")
    stored = {"format": FORMAT, "meta": json.loads(json.dumps(dict(meta))), "leaves": leaves}
    stored |= {"arrays_sha256": _digest(arrays)}
    stored |= {"sha256": _digest_of_meta(stored)}
    policy = AnyPreservationPolicy([LatestN(keep), CustomSteps([] if best is None else [best])])
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy,
        enable_async_checkpointing=False,
        cleanup_tmp_directories=True,
        create=False,
        multiprocessing_options=this_process_alone(),
    )
    items = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(stored))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ocp.CheckpointManager(folder, options=options, item_names=("arrays", "meta")) as manager:
            newest = manager.latest_step()
            if step in manager.all_steps():
                raise AlreadyExists(f"step {step} of {folder.name} is saved; a step is never overwritten")
            if newest is not None and step < newest:
                raise StateInvalid(
                    f"step {step} is older than step {newest} of {folder.name}; restore that one instead"
                )
            manager.save(step, args=items, force=True)
        sync_tree(folder / str(step))
        sync(folder)
    except AlreadyExists:
        raise
    except (OSError, ValueError) as e:  # tensorstore raises ValueError for a full disk
        for left in folder.glob(f"{step}.orbax-checkpoint-tmp*"):  # it takes space that the next save needs
            shutil.rmtree(left, ignore_errors=True)
        raise StorageFailed(f"step {step} of {folder.name} could not be written: {_why(e)}") from e


def this_process_alone() -> ocp.options.MultiprocessingOptions:
    """Returns options by which Orbax waits for no other process: the callers decide which process writes."""
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )


def _why(error: OSError | ValueError) -> str:
    """Returns the system's error message without paths: tensorstore puts its number inside a text."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    code = int(number[1]) if number else getattr(error, "errno", None)
    return str(error) if code is None else os.strerror(code)


def restore_state(folder: Path, like: Tree, *, step: int | None = None) -> Restored | None:
    """Restores step `step`, or the newest, with structure, dtypes and shardings of `like`; None if it was not saved.

    Leaves of `like` are jax arrays or ShapeDtypeStructs (without a sharding: the default device), or NumPy arrays,
    returned as such.  Raises StateInvalid when the saved arrays are not those of `like`, StorageFailed for an unknown
    format or damaged files.
    """
    if not folder.is_dir():
        return None
    options = ocp.CheckpointManagerOptions(create=False, multiprocessing_options=this_process_alone())
    with ocp.CheckpointManager(folder, options=options, item_names=("arrays", "meta")) as manager:
        if step is None:
            step = manager.latest_step()
        if step is None or step not in manager.all_steps():
            return None
        stored = _stored(manager, step, folder)
        _compare(stored["leaves"], _describe(like), f"step {step} of {folder.name}")
        try:
            items = ocp.args.Composite(arrays=ocp.args.StandardRestore(jax.tree.map(_placed, like)))
            arrays = manager.restore(step, args=items)["arrays"]
        except Exception as e:  # see above; names and shapes are known to be right
            raise StorageFailed(f"step {step} of {folder.name} cannot be read ({type(e).__name__})") from e
    wanted = stored.get("arrays_sha256")  # none in checkpoints of the first releases
    if wanted is not None and _digest(arrays) not in (None, wanted):
        raise StorageFailed(f"step {step} of {folder.name} is damaged: its arrays do not match their checksum")
    return Restored(step, arrays, stored["meta"])


def read_meta(folder: Path, *, step: int | None = None) -> dict | None:
    """Returns the meta of step `step`, or of the newest, without its arrays; None where nothing was saved.

    Raises StorageFailed for an unknown format or a damaged file.
    """
    if step is None:
        step = max(steps_of(folder), default=None)
    if step is None:
        return None
    options = ocp.CheckpointManagerOptions(create=False, multiprocessing_options=this_process_alone())
    with ocp.CheckpointManager(folder, options=options, item_names=("arrays", "meta")) as manager:
        return _stored(manager, step, folder)["meta"]


def _stored(manager: ocp.CheckpointManager, step: int, folder: Path) -> dict:
    """Returns what is saved besides the arrays of a step."""
    try:
        stored = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        found = stored["format"]
    except Exception as e:  # any error that a damaged file causes in a reader
        raise StorageFailed(f"step {step} of {folder.name}: its meta cannot be read ({type(e).__name__})") from e
    if found != FORMAT:
        raise StorageFailed(f"step {step} of {folder.name} has format {found!r}; this build reads format {FORMAT}")
    if _digest_of_meta(stored) != stored.get("sha256", _digest_of_meta(stored)) or not _has_form(stored):
        raise StorageFailed(f"step {step} of {folder.name} is damaged: its meta does not match its checksum")
    return stored


def _has_form(stored: dict) -> bool:
    """Returns whether what the first releases wrote without a checksum is what they wrote, as far as types tell."""
    leaves = stored.get("leaves")
    return isinstance(stored.get("meta"), dict) and isinstance(leaves, dict) and bool(leaves)


def _digest_of_meta(stored: dict) -> str:
    """Returns the sha256 of all that is stored besides the arrays."""
    rest = {key: value for key, value in stored.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _digest(arrays: Tree) -> str | None:
    """Returns the sha256 of a tree's bytes; None where a part of it is on another process's devices."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return None
        total.update(jax.tree_util.keystr(path).encode())
        total.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def _describe(tree: Tree) -> dict[str, list]:
    """Returns path → [shape, dtype] of each leaf."""
    return {
        jax.tree_util.keystr(path): [list(leaf.shape), np.dtype(leaf.dtype).name]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _compare(saved: dict[str, list], wanted: dict[str, list], what: str) -> None:
    """Raises StateInvalid, naming up to five leaves that differ."""
    wrong = [
        f"{path or 'the array'}: saved {saved.get(path, 'nothing')}, wanted {wanted.get(path, 'nothing')}"
        for path in sorted(saved.keys() | wanted.keys())
        if saved.get(path) != wanted.get(path)
    ]
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise StateInvalid(f"{what} was saved by another configuration: {'; '.join(wrong[:5])}{more}")


def _placed(leaf: jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic) -> jax.ShapeDtypeStruct | np.ndarray:
    if isinstance(leaf, np.ndarray | np.generic):
        return np.asarray(leaf)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
