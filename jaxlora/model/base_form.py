"""How the base's weights lie on the device, decided here alone by platform and mesh.  Pure: no jax.

    PACKED    one CPU device: linears of all layers packed for the native bodies, norms stacked
    STACKED   TPUs and other CPUs: an array of all layers, scanned; both compilers read a layer's part where it lies
    UNROLLED  GPUs: an array for each layer, layers one after the other in the program; linears that read the same input
              are joined.  Under a scan XLA copies each weight before a product reads it, and two products of one
              input it makes one by writing their weights side by side, in every step.

A joined array is [X, P, Y]: P parts, so that a tensor axis leaves each device whole heads, or the same features of both
halves of an MLP.  `qkv_proj` has a part for each kv head, of its query heads' features, its keys' and its values'.
`gate_up_proj` has two parts.

Shape letters: X Y features in, out, P parts, T tokens.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from jaxlora.core.model_config import ModelConfig, parameters


class Form(enum.Enum):
    """The form of a base's layers."""

    PACKED = "packed"
    STACKED = "stacked"
    UNROLLED = "unrolled"


JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
JOINED_BY_TARGETS = {targets: name for name, targets in JOINED.items()}


def form_of(platform: str, devices: int, *, native: bool, quantized: bool) -> Form:
    """Returns the form on so many devices.  native: whether this process has native bodies; quantized: 8-bit weights."""
    if platform == "cpu" and devices == 1 and (native or quantized):
        return Form.PACKED
    return Form.UNROLLED if platform == "gpu" else Form.STACKED


@dataclass(frozen=True, slots=True)
class LayerArray:
    """One array of a layer in the form UNROLLED."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical, see model/mesh.py


def layer_arrays(config: ModelConfig) -> dict[str, LayerArray]:
    """Returns the arrays of a layer in the form UNROLLED, by the names of `parameters` and of JOINED."""
    c = config
    table = {n: LayerArray(p.shape[1:], p.axes[1:]) for n, p in parameters(c).items() if p.axes[0] == "layers"}
    group = (c.heads // c.kv_heads + 2) * c.head_dim
    joined = {
        "qkv_proj": LayerArray((c.d_model, c.kv_heads, group), ("embed", "kv_heads", None)),
        "gate_up_proj": LayerArray((c.d_model, 2, c.d_ff), ("embed", None, "mlp")),
    }
    alone = {n: a for n, a in table.items() if not any(n in targets for targets in JOINED.values())}
    return alone | joined


def places(config: ModelConfig, joined: str) -> Iterator[tuple[str, tuple[int | slice, int | slice]]]:
    """Yields (target, its index in the last two axes, [P, Y], of the joined array or of a product with it)."""
    if joined == "gate_up_proj":
        yield from (("gate_proj", (0, slice(None))), ("up_proj", (1, slice(None))))
        return
    H = config.head_dim
    queries = config.heads // config.kv_heads * H
    for target, start, end in (
        ("q_proj", 0, queries),
        ("k_proj", queries, queries + H),
        ("v_proj", queries + H, queries + 2 * H),
    ):
        yield target, (slice(None), slice(start, end))
