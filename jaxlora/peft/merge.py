"""Merges one adapter into a base, W + scale * A B, as a Hugging Face checkpoint that transformers loads.

    config.json                  the base's own, or written from ModelConfig when the base is a GGUF file
    model.safetensors            or shards with their index; sums in float32, then cast
    tokenizer files              the base's own, or written from its tokenizer

Tensors are computed shard by shard, so that RAM holds one shard and not the model.

Shape letters: L layers, R LoRA rank, X features in, Y features out, V vocabulary, D model.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxlora.checkpoints.gguf import GgufSource
from jaxlora.checkpoints.hf import FAMILIES, TENSOR_NAMES, HfSource, parse_config, read_json
from jaxlora.checkpoints.load import TOKENIZER_FILES
from jaxlora.checkpoints.tokenizer import Tokenizer
from jaxlora.core.lora import HEAD_TARGET, Adapter
from jaxlora.core.model_config import LINEARS, ModelConfig, parameters
from jaxlora.peft.folder import held

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SHARD_BYTES = 5 * 10**9
COPIED = (*TOKENIZER_FILES, "vocab.json", "merges.txt", "added_tokens.json", "generation_config.json")
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of the merged checkpoint."""

    key: str  # in the file
    name: str  # of core.model_config.parameters; head also where the base has none
    layer: int | None
    size: int  # values


def unties(config: ModelConfig, adapter: Adapter) -> bool:
    """Returns whether the merged head differs from the embedding, which it equals in the base."""
    return config.tied and HEAD_TARGET in adapter.spec.targets


def write_merged(
    folder: Path,
    source: HfSource | GgufSource,
    adapter: Adapter,
    *,
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Fills an empty folder with the merged checkpoint in one of DTYPES; returns the number of weight files.

    A tied head that the adapter changes is stored separately from the embedding.
    Raises AdapterInvalid for a merged value that is not finite in `dtype`.
    """
    config = replace(source.config, tied=source.config.tied and not unties(source.config, adapter))
    if isinstance(source, HfSource):
        settings = _own_settings(source.path, config)
        for name in COPIED:
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, folder / name)
    else:
        tokenizer = Tokenizer.from_gguf(source.metadata)
        settings = _settings(config, tokenizer)
        tokenizer.save(folder)
    settings["torch_dtype"] = dtype  # older and newer transformers read it
    assert parse_config(settings) == config
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    shards = _shards(_tensors(config), DTYPES[dtype].itemsize, shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        tensors = {stored.key: _merged(source, adapter, stored, DTYPES[dtype]) for stored in shard}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {stored.key: name for name, shard in zip(names, shards, strict=True) for stored in shard}
        total = sum(stored.size for shard in shards for stored in shard) * DTYPES[dtype].itemsize
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return len(shards)


def _tensors(config: ModelConfig) -> list[Stored]:
    """Returns every tensor of a checkpoint, layer by layer."""
    of_layers, others = [], []
    for name, p in parameters(config).items():
        if p.axes[0] == "layers":
            size = math.prod(p.shape[1:])
            of_layers += [Stored(TENSOR_NAMES[name].format(i), name, i, size) for i in range(config.layers)]
        else:
            others.append(Stored(TENSOR_NAMES[name], name, None, math.prod(p.shape)))
    return others[:1] + sorted(of_layers, key=lambda stored: stored.layer or 0) + others[1:]


def _shards(tensors: list[Stored], itemsize: int, shard_bytes: int) -> list[list[Stored]]:
    """Groups the tensors into files of at most `shard_bytes`; a larger tensor has a file of its own."""
    shards: list[list[Stored]] = []
    left = 0
    for stored in tensors:
        nbytes = stored.size * itemsize
        if not shards or nbytes > left:
            shards.append([])
            left = shard_bytes
        shards[-1].append(stored)
        left -= nbytes
    return shards


def _merged(source: HfSource | GgufSource, adapter: Adapter, stored: Stored, dtype: np.dtype) -> np.ndarray:
    """Returns one tensor in the file's layout: [Y, X] where it is a linear."""
    of_embedding = stored.name == "head" and source.config.tied
    value = source.read("embed", None).T if of_embedding else source.read(stored.name, stored.layer)
    target = HEAD_TARGET if stored.name == "head" else stored.name
    layer = stored.layer or 0
    with np.errstate(over="ignore", invalid="ignore"):  # reported below
        if scale := adapter.spec.scale(target, layer):
            a_LRX, b_LRY = adapter.weights[target]
            value = value + np.float32(scale) * (a_LRX[layer].T @ b_LRY[layer])
    return held(value.T if stored.name in LINEARS else value, dtype, f"{stored.key} with {adapter.ref} merged in")


def _own_settings(base: Path, config: ModelConfig) -> dict[str, object]:
    """Returns the base's config.json; only whether the head is tied may have changed."""
    settings = {k: v for k, v in read_json(base / "config.json").items() if k != "dtype"}
    return settings | {"tie_word_embeddings": config.tied}


def _settings(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, object]:
    """Returns a config.json equivalent to a ModelConfig."""
    settings: dict[str, object] = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope(config),
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_ids[0],
        "pad_token_id": tokenizer.pad_id,
    }
    return settings | dict.fromkeys(FAMILIES[config.family].must_be_false, False)


def _rope(config: ModelConfig) -> Mapping[str, object] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context,
    }
