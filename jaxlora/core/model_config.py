"""ModelConfig, the numbers a checkpoint decides, and the table of base arrays.  Pure: no jax.

Shape letters: T tokens, D model, F MLP, N query heads, K kv heads, H head, L layers, V vocabulary, X Y features in, out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from jaxlora.core.errors import ModelInvalid
from jaxlora.core.lora import HEAD_TARGET


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Rope:
    """Rope scaling of Llama 3.1 and later.  Source: the `llama3` rope type of Hugging Face configurations."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def scaled(self, frequency: np.ndarray) -> np.ndarray:
        """Returns the frequencies (radians a token): low ones divided by the factor, high ones kept, a ramp between."""
        turns = self.original_context * frequency / (2 * np.pi)
        ramp = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0)
        return (1 - ramp) * frequency / self.factor + ramp * frequency


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Numbers that a checkpoint decides.  No defaults: a reader that cannot find one raises an error."""

    family: str  # llama, mistral, qwen2, qwen3
    layers: int
    d_model: int
    d_ff: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int  # longest sequence, tokens
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Rope | None
    window: int | None  # sliding attention window, tokens; None is full attention
    qkv_bias: bool
    qk_norm: bool
    tied: bool  # the head is the embedding

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ModelInvalid(f"{self.heads} query heads do not divide into {self.kv_heads} kv heads")
        if self.head_dim % 2:
            raise ModelInvalid(f"head_dim must be even for rotary embeddings, got {self.head_dim}")


@dataclass(frozen=True, slots=True)
class Parameter:
    """Shape and logical axes (see model/mesh.py) of one base array.  A leading "layers" axis: one entry per layer."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


def parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Returns every array of the base, by our name.  Linear weights are [L, in, out]: y = x @ w."""
    c, L = config, config.layers
    attn, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim

    def linear(x: int, y: int, axes: tuple[str, str]) -> Parameter:
        return Parameter((L, x, y), ("layers", *axes))

    table = {
        "embed": Parameter((c.vocab, c.d_model), ("vocab", "embed")),
        "attn_norm": Parameter((L, c.d_model), ("layers", None)),
        "q_proj": linear(c.d_model, attn, ("embed", "heads")),
        "k_proj": linear(c.d_model, kv, ("embed", "kv_heads")),
        "v_proj": linear(c.d_model, kv, ("embed", "kv_heads")),
        "o_proj": linear(attn, c.d_model, ("heads", "embed")),
        "mlp_norm": Parameter((L, c.d_model), ("layers", None)),
        "gate_proj": linear(c.d_model, c.d_ff, ("embed", "mlp")),
        "up_proj": linear(c.d_model, c.d_ff, ("embed", "mlp")),
        "down_proj": linear(c.d_ff, c.d_model, ("mlp", "embed")),
        "norm": Parameter((c.d_model,), (None,)),
    }
    if c.qkv_bias:
        table["q_bias"] = Parameter((L, attn), ("layers", "heads"))
        table["k_bias"] = Parameter((L, kv), ("layers", "kv_heads"))
        table["v_bias"] = Parameter((L, kv), ("layers", "kv_heads"))
    if c.qk_norm:
        table["q_norm"] = Parameter((L, c.head_dim), ("layers", None))
        table["k_norm"] = Parameter((L, c.head_dim), ("layers", None))
    if not c.tied:
        table["head"] = Parameter((c.d_model, c.vocab), ("embed", "vocab"))
    return table


def parameter_count(config: ModelConfig) -> int:
    """Returns the number of values in the base; a tied head is the embedding and counts once."""
    return sum(math.prod(parameter.shape) for parameter in parameters(config).values())


# Checkpoints store these [out, in].
LINEARS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "head"})


def check_tensors(
    config: ModelConfig,
    names: Mapping[str, str],
    found: Mapping[str, tuple[int, ...]],
    *,
    unread: Collection[str],
    where: object,
) -> None:
    """Compares a checkpoint's tensors, name → shape, with those this model reads; `names` maps our names to its names.

    unread: names that may exist and are not read here.
    Raises ModelInvalid, naming the tensor, for one that is missing, has another shape or belongs to no such model.
    """
    extra = set(found) - set(unread)
    for name, parameter in parameters(config).items():
        layered = parameter.axes[0] == "layers"
        shape = parameter.shape[1:] if layered else parameter.shape
        want = shape[::-1] if name in LINEARS else shape
        for layer in range(config.layers) if layered else (None,):
            stored = names[name].format(layer)
            if stored not in found:
                raise ModelInvalid(f"{where} has no tensor {stored}, which {config.family} needs")
            if found[stored] != want:
                raise ModelInvalid(f"tensor {stored} has shape {list(found[stored])}, expected {list(want)}")
            extra.discard(stored)
    if extra:
        some = ", ".join(sorted(extra)[:5])
        raise ModelInvalid(f"{len(extra)} tensors this {config.family} does not have: {some[:500]}")


def target_features(config: ModelConfig, target: str) -> tuple[int, int]:
    """Returns (features in, features out) of an adaptable linear: one of lora.ALL_TARGETS."""
    if target == HEAD_TARGET:
        return config.d_model, config.vocab
    _, x, y = parameters(config)[target].shape
    return x, y


def layer_count(config: ModelConfig, target: str) -> int:
    """Returns the number of layers of a target's rows: one per layer, one for the head."""
    return 1 if target == HEAD_TARGET else config.layers
