"""Imports and exports PEFT adapter folders, the exchange format with Hugging Face PEFT.

    adapter_config.json          what is adapted, rank, alpha            → LoraSpec
    adapter_model.safetensors    lora_A [R, X] and lora_B [Y, R] a module → a_LRX, b_LRY (B is transposed)
    jaxlora.json                 our own: base hash, version, sha256 of the weights, the adapter's size

A file that cannot be represented exactly is refused with every reason; nothing is sliced, dropped or assumed.
Shape letters: L layers, R LoRA rank, X features in, Y features out, V vocabulary, D model.
Source: the file format of Hugging Face PEFT 0.21.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxlora.checkpoints.safetensors import StoredTensor
from jaxlora.core.adapter_size import AdapterSize, adapter_size
from jaxlora.core.atomic_files import sha256_of, whole_folder
from jaxlora.core.errors import AdapterInvalid, AdapterNotFinite, AlreadyExists, BaseMismatch
from jaxlora.core.lora import HEAD_TARGET, Adapter, AdapterWeights, LoraSpec
from jaxlora.core.model_config import ModelConfig, layer_count, target_features
from jaxlora.peft.config import HEAD_LORA, PeftConfig, not_linear, read_config, replaces_base
from jaxlora.peft.misfit import another_base
from jaxlora.peft.reasons import Reasons
from jaxlora.peft.targets import Module, choose_modules, linear_modules, make_spec
from jaxlora.peft.tensors import (
    PICKLE,
    PREFIX,
    AdapterKeys,
    parse_json,
    read_tensor,
    read_tensors,
    sort_keys,
)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
OWN_FILE = "jaxlora.json"
OWN_FORMAT = 1
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl")
MAX_JSON_BYTES = 1_000_000
# Limit of |scale| * norm(A) * norm(B), which bounds the norm of the change, and of either norm, as a huge one makes
# infinities on the way to a small product.  A base matrix has a norm in the hundreds.
MAX_NORM = 1e6
EXPORT_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One adapted module as it was read."""

    module: str  # path in the Transformers model
    rank: int
    scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportReport:
    """Result of an import: what was read, what was ignored, what could not be checked."""

    modules: tuple[ModuleReport, ...]
    parameters: int  # values of A and B together
    ignored: tuple[str, ...]  # set fields of the config that have no effect on a loaded adapter
    notes: tuple[str, ...]  # messages for the owner
    base_verified: bool  # the file recorded the hash of this base
    base_name: str | None  # the base's name in the file


@dataclass(frozen=True, slots=True)
class _Plan:
    """What to read once every check that needs no values has passed."""

    peft: PeftConfig
    modules: dict[str, tuple[int, float]]  # path → (rank, alpha)
    keys: AdapterKeys


def import_peft(
    path: Path,
    config: ModelConfig,
    *,
    base_hash: str,
    base_name: str = "",
    max_rank: int,
    head_supported: bool,
    read_head: Callable[[], np.ndarray] | None = None,
    any_base: bool = False,
) -> tuple[AdapterWeights, ImportReport]:
    """Reads the adapter in a PEFT folder; returns it in float32, with a report.

    `path` is the folder, or one that contains only it.  base_name: what a refusal calls the base.  PEFT saves a copy of
    the base's lm_head beside a LoRA on it; with `read_head`, which returns the head [V, D] of this base, an exact copy
    is accepted, else any copy is refused.
    any_base: accepts a file that records another base, if names and shapes fit; the user takes responsibility.

    Raises AdapterInvalid, whose message says the most telling reason in a sentence and whose details are all reasons:
    first what is not supported; then BaseMismatch for another base; then all else, AdapterNotFinite when that is a
    value that is NaN or infinite.
    """
    folder = _find_folder(path)
    reasons = Reasons()
    raw = _read_json(folder / CONFIG_FILE)
    own = _read_json(folder / OWN_FILE) if (folder / OWN_FILE).is_file() else None
    if own is not None:
        _check_own(own, None if any_base else base_hash, reasons)
    peft = read_config(raw, reasons)
    with _open_weights(folder, reasons) as file:
        header = _header(file, reasons)
        keys = sort_keys(header or {}, str(raw.get("bias") or "none"), reasons)
        _check_features(config, keys, reasons)
        plan = None
        if peft is not None and header is not None:
            plan = _plan(peft, config, keys, max_rank, head_supported, reasons)
            if plan is not None and keys.head_copy is not None:
                _check_head_copy(file, keys.head_copy, HEAD_TARGET in plan.modules, read_head, reasons)
        if mismatches := reasons.another_base:
            made_for = raw.get("base_model_name_or_path")
            reasons.raise_if_any(another_base(keys.pairs, made_for, mismatches, config, base_name))
        reasons.raise_if_any()
        if plan is None:
            raise RuntimeError("no plan and no reason: a check above forgot to say why")
        if own is not None:
            _check_own_hash(file, own)
        spec = make_spec(plan.peft, plan.modules, config)
        weights = _read_weights(file, plan, spec, config)
    adapter = AdapterWeights(spec=spec, base_hash=base_hash, weights=weights)
    return adapter, _report(plan, spec, config, base=None if own is None else own.get("base_hash") == base_hash)


def _find_folder(path: Path) -> Path:
    """Returns the folder that holds the config: `path`, or its only sub-folder that has one."""
    if path.is_file() and path.suffix in PICKLE_SUFFIXES:
        raise AdapterInvalid(PICKLE)
    if (path / CONFIG_FILE).is_file():
        return path
    inner = [p for p in sorted(path.iterdir()) if (p / CONFIG_FILE).is_file()] if path.is_dir() else []
    if len(inner) == 1:
        return inner[0]
    if len(inner) > 1:
        names = ", ".join(p.name for p in inner[:5])
        raise AdapterInvalid(f"the folder holds several adapters ({names}); import one at a time")
    raise AdapterInvalid(f"no {CONFIG_FILE} found: a PEFT adapter is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")


def _read_json(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise AdapterInvalid(f"{path.name} is larger than {MAX_JSON_BYTES} bytes")
    return parse_json(text, path.name)


def _open_weights(folder: Path, reasons: Reasons) -> BufferedReader:
    if not (folder / WEIGHTS_FILE).is_file():
        pickles = any(p.suffix in PICKLE_SUFFIXES for p in folder.iterdir())
        reasons.add(PICKLE if pickles else f"{WEIGHTS_FILE} is missing")
        reasons.raise_if_any()
    return (folder / WEIGHTS_FILE).open("rb")


def _header(file: BinaryIO, reasons: Reasons) -> dict[str, StoredTensor] | None:
    try:
        return read_tensors(file, os.fstat(file.fileno()).st_size)
    except AdapterInvalid as e:
        reasons.add(e.message)
        return None


def _check_own(own: dict[str, object], base_hash: str | None, reasons: Reasons) -> None:
    if own.get("format") != OWN_FORMAT:
        reasons.add(f"{OWN_FILE} has format {own.get('format')!r}; this build reads format {OWN_FORMAT}")
    elif base_hash not in (None, own.get("base_hash")):
        reasons.add("it was trained on other weights than those of the base here", error=BaseMismatch)


def _check_own_hash(file: BufferedReader, own: dict[str, object]) -> None:
    file.seek(0)
    if hashlib.file_digest(file, "sha256").hexdigest() != own.get("sha256"):
        raise AdapterInvalid(
            f"{WEIGHTS_FILE} is not the file that {OWN_FILE} describes: it is damaged or was edited; "
            f"remove {OWN_FILE} to import it as a plain PEFT adapter"
        )


def _plan(
    peft: PeftConfig, config: ModelConfig, keys: AdapterKeys, max_rank: int, head_supported: bool, reasons: Reasons
) -> _Plan | None:
    """Returns the modules to read, after comparing names and shapes.  Adds a reason for each that does not fit."""
    chosen = choose_modules(peft, config, keys.pairs, reasons)
    if chosen is None:
        return None
    if HEAD_TARGET in chosen and not head_supported:
        reasons.unsupported(HEAD_LORA)
    for path, (rank, _) in chosen.items():
        if rank > max_rank:
            reasons.add(f"rank {rank} of {path} exceeds the limit {max_rank}")
        _check_rank(path, rank, keys.pairs.get(path, {}), reasons)
        for half in "AB":
            if half not in keys.pairs.get(path, {}):
                reasons.add(f"missing tensor: {path}.lora_{half}.weight")
    modules = linear_modules(config)
    passed_over = [pair for path, pair in keys.pairs.items() if path in modules and path not in chosen]
    for name in (*keys.extra, *(entry.name for pair in passed_over for entry in pair.values())):
        reasons.add(f"unexpected tensor: {name[:200]}")
    if not chosen and not reasons:
        reasons.add(f"{WEIGHTS_FILE} holds no LoRA tensors")
    return _Plan(peft, chosen, keys)


def _check_features(config: ModelConfig, keys: AdapterKeys, reasons: Reasons) -> None:
    """Adds a reason for each module that this base lacks, and for each tensor that does not have its features."""
    modules = linear_modules(config)
    for path, pair in keys.pairs.items():
        if path not in modules:
            reasons.add(not_linear(path), error=BaseMismatch)
            continue
        module = modules[path]
        for half, axis, need in (("A", 1, module.features_in), ("B", 0, module.features_out)):
            if half not in pair:
                continue
            got = pair[half].shape
            if len(got) != 2 or got[axis] != need:
                rank = got[1 - axis] if len(got) == 2 else "rank"
                wanted = f"[{rank}, {need}]" if half == "A" else f"[{need}, {rank}]"
                reasons.add(f"{path}: lora_{half} is {list(got)}, this base needs {wanted}", error=BaseMismatch)


def _check_rank(path: str, rank: int, pair: dict[str, StoredTensor], reasons: Reasons) -> None:
    for half, axis in (("A", 0), ("B", 1)):
        if half in pair and len(pair[half].shape) == 2 and pair[half].shape[axis] != rank:
            reasons.add(f"{path}: tensors have rank {pair[half].shape[axis]}, config says {rank}")


def _check_head_copy(
    file: BinaryIO,
    entry: StoredTensor,
    head_adapted: bool,
    read_head: Callable[[], np.ndarray] | None,
    reasons: Reasons,
) -> None:
    """Adds a reason unless the file's lm_head is this base's, bit for bit, in one of the two dtypes."""
    same = False
    base_head_VD = read_head() if head_adapted and read_head is not None else None
    if base_head_VD is not None and entry.shape == base_head_VD.shape:
        copy_VD = read_tensor(file, entry)
        with np.errstate(all="ignore"):  # a copy with extreme values is refused below, without a warning
            in_file = (copy_VD, base_head_VD.astype(copy_VD.dtype))
            in_base = (copy_VD.astype(base_head_VD.dtype), base_head_VD)
        same = any(x.tobytes() == y.tobytes() for x, y in (in_file, in_base))
    if not same:
        reasons.unsupported(replaces_base([HEAD_TARGET]))


def _read_weights(
    file: BinaryIO, plan: _Plan, spec: LoraSpec, config: ModelConfig
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns target → (a_LRX, b_LRY).  Raises AdapterNotFinite, or AdapterInvalid for implausible values."""
    weights = empty_weights(spec, config)
    table = linear_modules(config)
    wrong = Reasons()
    for path, (rank, _) in plan.modules.items():
        module = table[path]
        a_LRX, b_LRY = weights[module.target]
        norms = []
        for half in "AB":
            entry = plan.keys.pairs[path][half]
            value = read_tensor(file, entry).astype(np.float32)
            if not np.isfinite(value).all():
                wrong.add(f"{entry.name} has non-finite values", error=AdapterNotFinite)
            if half == "A":
                a_LRX[module.layer, :rank] = value
            else:
                b_LRY[module.layer, :rank] = value.T
            norms.append(float(np.sqrt(np.square(value, dtype=np.float64).sum())))
        if not np.isfinite(norms).all():
            continue  # said above: float64 holds the norm of any finite float32 values
        change = abs(spec.scale(module.target, module.layer)) * norms[0] * norms[1]
        for what, norm in (("scale * norm(A) * norm(B)", change), ("norm(A)", norms[0]), ("norm(B)", norms[1])):
            if norm > MAX_NORM:
                wrong.add(f"{path}: {what} is {norm:.3g}, more than {MAX_NORM:g}")
    wrong.raise_if_any()
    return weights


def empty_weights(spec: LoraSpec, config: ModelConfig) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns target → (a_LRX, b_LRY) of zeros, in the shapes of an Adapter of this spec."""
    weights = {}
    for target in spec.targets:
        L, R = layer_count(config, target), spec.max_rank
        x, y = target_features(config, target)
        weights[target] = np.zeros((L, R, x), np.float32), np.zeros((L, R, y), np.float32)
    return weights


def _report(plan: _Plan, spec: LoraSpec, config: ModelConfig, *, base: bool | None) -> ImportReport:
    """Returns the import report.  base: whether the file records this base; None: it records none."""
    table = linear_modules(config)
    notes = []
    if not plan.keys.prefixed:
        notes.append(f"no key has the prefix {PREFIX}; PEFT itself would drop every tensor of this file")
    if plan.peft.targets is None and set(spec.targets) != {"q_proj", "v_proj"}:
        notes.append("target_modules is missing: taken from the tensors; PEFT itself would load only q_proj and v_proj")
    if base is not True:
        says = "does not record its base" if base is None else "records another base"
        notes.append(f"the file {says}: only names and shapes were compared")
    modules = tuple(
        ModuleReport(path, rank, spec.scale(table[path].target, table[path].layer))
        for path, (rank, _) in plan.modules.items()
    )
    return ImportReport(
        modules=modules,
        parameters=adapter_size(config, spec).trainable_parameters,
        ignored=plan.peft.ignored,
        notes=tuple(notes),
        base_verified=base is True,
        base_name=plan.peft.base_name,
    )


def export_peft(
    adapter: Adapter,
    folder: Path,
    config: ModelConfig,
    *,
    base_name: str,
    dtype: str = "float32",
    replace: bool = False,
) -> AdapterSize:
    """Writes the adapter as a PEFT folder, which is complete or absent; returns its size, as jaxlora.json says it.

    Tensors have their true ranks.  base_name: what PEFT will load as the base.  dtype: one of EXPORT_DTYPES.
    replace: removes an existing folder once the new one is complete.

    Raises AlreadyExists when `folder` exists and `replace` is off, AdapterInvalid for an unknown dtype or values not
    representable in it, BaseMismatch when the shapes are not those of `config`.
    """
    if dtype not in EXPORT_DTYPES:
        raise AdapterInvalid(f"export dtype must be one of {', '.join(EXPORT_DTYPES)}; got {dtype!r}")
    if folder.exists() and not replace:
        raise AlreadyExists(f"{folder.name} exists; export into a new folder")
    tensors = export_tensors(adapter, config, EXPORT_DTYPES[dtype])
    with whole_folder(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        (temporary / CONFIG_FILE).write_text(json.dumps(export_config(adapter.spec, config, base_name), indent=2))
        return describe(temporary, adapter, config, {"sha256": sha256_of(temporary / WEIGHTS_FILE)})


def describe(folder: Path, adapter: Adapter, config: ModelConfig, about: Mapping[str, str]) -> AdapterSize:
    """Writes jaxlora.json beside the files of an export, which are all there; returns the size that it says."""
    size = adapter_size(config, adapter.spec)
    size = dataclasses.replace(size, nbytes=sum(file.stat().st_size for file in folder.iterdir()))
    own = {
        "format": OWN_FORMAT,
        "name": adapter.ref.name,
        "version": adapter.ref.version,
        "base_hash": adapter.base_hash,
        **about,
        **size.to_json(),
    }
    (folder / OWN_FILE).write_text(json.dumps(own, indent=2))
    return size


def check_fits(adapter: Adapter, config: ModelConfig) -> None:
    """Raises BaseMismatch when an array does not have the shape of this base."""
    for target, expected in empty_weights(adapter.spec, config).items():
        got = adapter.weights.get(target, ())
        if [w.shape for w in got] != [w.shape for w in expected]:
            raise BaseMismatch(
                f"{target} of {adapter.ref} has shapes {[w.shape for w in got]}, "
                f"this base needs {[w.shape for w in expected]}"
            )


def export_tensors(adapter: Adapter, config: ModelConfig, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Returns PEFT key → contiguous tensor of its true rank, in torch layout.

    Raises BaseMismatch when an array does not have this base's shape, AdapterInvalid when a value overflows `dtype`.
    """
    check_fits(adapter, config)
    return {
        f"{PREFIX}{module.path}.lora_{half}.weight": held(value, dtype, f"lora_{half} of {module.path}")
        for module, *halves in adapted(adapter, config)
        for half, value in zip("AB", halves, strict=True)
    }


def adapted(adapter: Adapter, config: ModelConfig) -> Iterator[tuple[Module, np.ndarray, np.ndarray]]:
    """Yields each adapted module with its A [R, X] and B [Y, R] of its true rank, in torch layout."""
    for module in linear_modules(config).values():
        rank, _ = adapter.spec.module(module.target, module.layer)
        if rank:
            a_LRX, b_LRY = adapter.weights[module.target]
            yield module, a_LRX[module.layer, :rank], b_LRY[module.layer, :rank].T


def held(value: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
    """Returns the contiguous value in `dtype`.  Raises AdapterInvalid, naming `what`, when it overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        cast = np.ascontiguousarray(value.astype(dtype))
    if not np.isfinite(cast).all():
        raise AdapterInvalid(f"{what} has values that {dtype.name} cannot hold")
    return cast


def export_config(spec: LoraSpec, config: ModelConfig, base_name: str) -> dict[str, object]:
    """Returns the adapter_config.json of a spec: short target names where all layers are adapted, else whole paths.

    Pattern keys are whole paths with escaped dots, so no key matches a neighbour.
    """
    by_target: dict[str, list[tuple[str, int, float]]] = {t: [] for t in spec.targets}
    for module in linear_modules(config).values():
        if module.target in by_target:
            by_target[module.target].append((module.path, *spec.module(module.target, module.layer)))
    names: list[str] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for target, places in by_target.items():
        adapted = [p for p in places if p[1] > 0]
        names += [target] if len(adapted) == len(places) else [path for path, _, _ in adapted]
        ranks |= {re.escape(path): rank for path, rank, _ in adapted if rank != spec.rank}
        alphas |= {re.escape(path): _number(alpha) for path, _, alpha in adapted if alpha != spec.alpha}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": _number(spec.alpha),
        "use_rslora": spec.rslora,
        "lora_dropout": spec.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": sorted(names),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "modules_to_save": None,
    }


def _number(value: float) -> int | float:
    """Returns a whole alpha as an integer, as PEFT writes it."""
    return int(value) if value == int(value) else value
