"""Reads a base model from a Hugging Face directory: Llama, Mistral, Qwen2 and Qwen3.

`config.json` is parsed strictly: nothing a checkpoint decides has a default here, and what the decoder does not support
is refused by name.  No code of the checkpoint is ever run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxlora.checkpoints.safetensors import SafetensorsMap
from jaxlora.core.errors import ModelInvalid
from jaxlora.core.model_config import LINEARS, Llama3Rope, ModelConfig, check_tensors

MAX_JSON_BYTES = 64 << 20  # an index of a large model is a few MB
MAX_LAYERS = 1024
ROPE_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Properties that the `model_type` alone decides."""

    qkv_bias: bool
    qk_norm: bool
    head_dim_required: bool  # False: absent means hidden_size / num_attention_heads
    window_required: bool  # sliding_window must be present (null is full attention)
    must_be_false: tuple[str, ...]  # fields that may only be absent or false


FAMILIES = {
    "llama": Family(
        qkv_bias=False,
        qk_norm=False,
        head_dim_required=False,
        window_required=False,
        must_be_false=("attention_bias", "mlp_bias"),
    ),
    "mistral": Family(qkv_bias=False, qk_norm=False, head_dim_required=False, window_required=True, must_be_false=()),
    "qwen2": Family(
        qkv_bias=True,
        qk_norm=False,
        head_dim_required=False,
        window_required=False,
        must_be_false=("use_sliding_window",),
    ),
    "qwen3": Family(
        qkv_bias=False,
        qk_norm=True,
        head_dim_required=True,
        window_required=False,
        must_be_false=("use_sliding_window", "attention_bias"),
    ),
}

# our name → the file's; {} is the layer
TENSOR_NAMES = {
    "embed": "model.embed_tokens.weight",
    "attn_norm": "model.layers.{}.input_layernorm.weight",
    "q_proj": "model.layers.{}.self_attn.q_proj.weight",
    "k_proj": "model.layers.{}.self_attn.k_proj.weight",
    "v_proj": "model.layers.{}.self_attn.v_proj.weight",
    "o_proj": "model.layers.{}.self_attn.o_proj.weight",
    "q_bias": "model.layers.{}.self_attn.q_proj.bias",
    "k_bias": "model.layers.{}.self_attn.k_proj.bias",
    "v_bias": "model.layers.{}.self_attn.v_proj.bias",
    "q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{}.self_attn.k_norm.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate_proj": "model.layers.{}.mlp.gate_proj.weight",
    "up_proj": "model.layers.{}.mlp.up_proj.weight",
    "down_proj": "model.layers.{}.mlp.down_proj.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}
HEAD = TENSOR_NAMES["head"]
OLD_BUFFER = ".rotary_emb.inv_freq"  # checkpoints of 2023 also store what rope_theta implies


def read_json(path: Path) -> dict[str, object]:
    """Returns the JSON object in a file.  Raises ModelInvalid when it is missing, too large, or not an object."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelInvalid(f"{path} is larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelInvalid(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelInvalid(f"{path} is not JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise ModelInvalid(f"{path} must hold a JSON object")
    return value


class HfSource:
    """The base model in a directory: `config`, and `read(name, layer)` by the names of parameters().

    Raises ModelInvalid, naming the field or the tensor, for anything missing, extra, wrong-shaped or unsupported.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.config = parse_config(read_json(self.path / "config.json"))
        self._home = _tensor_files(self.path)  # the file's tensor name → the file that holds it
        found = {name: file.tensors[name].shape for name, file in self._home.items()}
        unread = {name for name in found if name.endswith(OLD_BUFFER)}
        if self.config.tied:
            unread.add(HEAD)  # compared with the embedding when the embedding is read
        check_tensors(self.config, TENSOR_NAMES, found, unread=unread, where=self.path)

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """Returns one array of the base in float32: linears [X, Y], embed [V, D], norms and biases flat.

        `layer` is None for embed, norm and head.  Raises ModelInvalid for a dtype other than F32, F16 and BF16, for NaN
        and infinity, and when a tied checkpoint also stores a head that is not its embedding.
        """
        stored = TENSOR_NAMES[name].format(layer)
        weight = self._home[stored].read(stored)
        if name == "embed" and self.config.tied and HEAD in self._home:
            head = self._home[HEAD].read(HEAD)
            if head.shape != weight.shape or not np.array_equal(head, weight):
                raise ModelInvalid(f"config.json ties the head to the embedding, but {HEAD} differs from {stored}")
        with np.errstate(invalid="ignore"):  # a signalling NaN is reported below
            weight = weight.astype(np.float32)
        self._home[stored].let_go(stored)
        if not np.isfinite(weight).all():
            raise ModelInvalid(f"tensor {stored} has values that are NaN or infinite")
        return weight.T if name in LINEARS else weight


def _tensor_files(path: Path) -> dict[str, SafetensorsMap]:
    """Returns tensor name → open file, from the index when there is one, else from model.safetensors."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        single = path / "model.safetensors"
        if not single.exists():
            raise ModelInvalid(f"{path} has neither model.safetensors nor model.safetensors.index.json")
        file = SafetensorsMap(single)
        return dict.fromkeys(file.tensors, file)
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise ModelInvalid(f"{index} has no weight_map from tensor names to file names")
    files: dict[str, SafetensorsMap] = {}
    for name in sorted(set(where.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelInvalid(f"{index} names the file {name[:100]!r}; shards are .safetensors files beside the index")
        files[name] = SafetensorsMap(path / name)
    for tensor, name in where.items():
        if tensor not in files[name].tensors:
            raise ModelInvalid(f"{index} says {tensor[:200]} is in {name}, but it is not there")
    stray = {tensor for file in files.values() for tensor in file.tensors} - set(where)
    if stray:
        raise ModelInvalid(f"the shards hold {len(stray)} tensors the index does not list: {sorted(stray)[0][:200]}")
    return {tensor: files[name] for tensor, name in where.items()}


def parse_config(data: Mapping[str, object]) -> ModelConfig:
    """Returns the ModelConfig of a config.json.  Raises ModelInvalid naming the missing, wrong or unsupported field."""
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ModelInvalid(f"config.json: model_type {repr(kind)[:60]} is not supported: {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    _refuse(data, family)
    heads, d_model = _whole(data, "num_attention_heads"), _whole(data, "hidden_size")
    if data.get("head_dim") is not None or family.head_dim_required:
        head_dim = _whole(data, "head_dim")
    elif d_model % heads:
        raise ModelInvalid(f"config.json: no head_dim, and {heads} heads do not divide hidden_size {d_model}")
    else:
        head_dim = d_model // heads
    layers, window = _whole(data, "num_hidden_layers"), _window(data, family)
    if layers > MAX_LAYERS:
        raise ModelInvalid(f"config.json: num_hidden_layers is {layers}, at most {MAX_LAYERS} is accepted")
    _check_layer_types(data, layers, window)
    theta, scaling = _rope(data)
    return ModelConfig(
        family=kind,
        layers=layers,
        d_model=d_model,
        d_ff=_whole(data, "intermediate_size"),
        heads=heads,
        kv_heads=_whole(data, "num_key_value_heads"),
        head_dim=head_dim,
        vocab=_whole(data, "vocab_size"),
        context=_whole(data, "max_position_embeddings"),
        norm_eps=_real(data, "rms_norm_eps", "config.json"),
        rope_theta=theta,
        rope_scaling=scaling,
        window=window,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        tied=_flag(data, "tie_word_embeddings"),  # absent is false in these four families
    )


def _refuse(data: Mapping[str, object], family: Family) -> None:
    """Raises ModelInvalid for a field that needs something the decoder does not support."""
    for field in family.must_be_false:
        if _flag(data, field):
            raise ModelInvalid(f"config.json: {field} = true is not supported")
    if data.get("hidden_act") != "silu":
        raise ModelInvalid(f"config.json: hidden_act must be 'silu', got {repr(data.get('hidden_act'))[:60]}")
    if data.get("quantization_config") is not None:
        raise ModelInvalid("config.json: quantization_config is not supported; use an unquantised checkpoint or a GGUF")
    if data.get("auto_map") is not None:
        raise ModelInvalid("config.json: auto_map asks to run the checkpoint's own code, which is never done")


def _window(data: Mapping[str, object], family: Family) -> int | None:
    """Returns the sliding attention window in tokens, None for full attention."""
    if not family.window_required:
        return None  # Llama has none; Qwen's is off, as the check of use_sliding_window ensures
    if "sliding_window" not in data:
        raise ModelInvalid("config.json has no sliding_window; give it in tokens, or null for full attention")
    return None if data["sliding_window"] is None else _whole(data, "sliding_window")


def _check_layer_types(data: Mapping[str, object], layers: int, window: int | None) -> None:
    wanted = ["full_attention" if window is None else "sliding_attention"] * layers
    if data.get("layer_types") not in (None, wanted):
        raise ModelInvalid(f"config.json: layer_types is not supported unless all {layers} are {wanted[0]}")


def _rope(data: Mapping[str, object]) -> tuple[float, Llama3Rope | None]:
    """Returns (base, scaling), from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    old, new = data.get("rope_scaling"), data.get("rope_parameters")
    for field, value in (("rope_scaling", old), ("rope_parameters", new)):
        if value is not None and not isinstance(value, dict):
            raise ModelInvalid(f"config.json: {field} must be an object, got {repr(value)[:60]}")
    if old is not None and new is not None and old != new:
        raise ModelInvalid("config.json has both rope_scaling and rope_parameters, and they differ")
    rope = dict(new if isinstance(new, dict) else old if isinstance(old, dict) else {})
    outer = data.get("rope_theta")
    theta = rope.get("rope_theta", outer)
    if theta is None:
        raise ModelInvalid("config.json has no rope_theta, neither by itself nor in rope_parameters")
    if "rope_theta" in rope and outer is not None and outer != theta:
        raise ModelInvalid("config.json has two values of rope_theta, by itself and in rope_parameters")
    if rope.get("partial_rotary_factor", data.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise ModelInvalid("config.json: partial_rotary_factor is not supported unless it is 1")
    kind = rope.get("rope_type", rope.get("type", "default"))
    base = _real({"rope_theta": theta}, "rope_theta", "config.json")
    known = ROPE_KEYS | (set(LLAMA3_KEYS) if kind == "llama3" else set())
    if kind not in ("default", "llama3"):
        raise ModelInvalid(f"config.json: rope scaling {repr(kind)[:60]} is not supported; supported: default, llama3")
    if unknown := set(rope) - known:
        raise ModelInvalid(f"config.json: rope scaling {kind} has unknown fields {', '.join(sorted(unknown))[:200]}")
    if kind == "default":
        return base, None
    factor, low, high = (_real(rope, key, "config.json: llama3 rope scaling") for key in LLAMA3_KEYS[:3])
    if high <= low:
        raise ModelInvalid(f"config.json: high_freq_factor {high} must be above low_freq_factor {low}")
    context = _whole(rope, "original_max_position_embeddings")
    return base, Llama3Rope(factor=factor, low_freq_factor=low, high_freq_factor=high, original_context=context)


def _whole(data: Mapping[str, object], field: str) -> int:
    value = data.get(field)
    if type(value) is not int or not 0 < value < 1 << 31:
        raise ModelInvalid(f"config.json: {field} must be a positive whole number, got {repr(value)[:60]}")
    return value


def _real(data: Mapping[str, object], field: str, where: str) -> float:
    value = data.get(field)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        raise ModelInvalid(f"{where}: {field} must be a positive number, got {repr(value)[:60]}")
    return float(value)


def _flag(data: Mapping[str, object], field: str) -> bool:
    """Returns a true-or-false field; absent is false."""
    value = data.get(field, False)
    if value is None:
        return False
    if type(value) is not bool:
        raise ModelInvalid(f"config.json: {field} must be true or false, got {repr(value)[:60]}")
    return value
