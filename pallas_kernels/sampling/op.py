"""Draws a token from each row's logits: one uniform number a row, and the inverse of the row's distribution.

    s_V = (x_V - max x_V) / temperature      share_V = exp(s_V) where top-k, then top-p of the rest, then min-p keep it
    token = the first one of which the shares up to it exceed uniform * their total

A filter is a threshold on s, so nothing is sorted and equal logits are kept or dropped together.  `dispatch` states which
body runs.

Shape letters: B rows, V vocabulary, K blocks of a row, Q tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import by_platform
from pallas_kernels.native import library
from pallas_kernels.shapes import shaped

BLOCK = 256  # tokens of a block; the last one is filled up


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Choices:
    """How each row's token is drawn."""

    temperature_B: jax.Array  # float32; what is drawn for one that is not above 0 means nothing
    top_p_B: jax.Array  # float32 in (0, 1]
    top_k_B: jax.Array  # int32; 0 is all
    min_p_B: jax.Array  # float32 in [0, 1]
    uniform_B: jax.Array  # float32 in [0, 1)


@shaped
def draw_reference(x_BV: jax.Array, choices: Choices) -> jax.Array:
    """Defines the op: returns int32 [B]."""
    share_BV = _shares(*_scaled(x_BV, choices))
    upto_BV = jnp.cumsum(share_BV, axis=1)
    return _first_above(upto_BV, choices.uniform_B * upto_BV[:, -1], share_BV > 0)


@shaped
def draw(x_BV: jax.Array, choices: Choices) -> jax.Array:
    """Returns what the reference does, int32 [B], of float32 rows, but for how sums are rounded.  Not differentiable.

    A row's token is one that is kept, whatever the rounding; any where a logit is NaN.
    """

    def native(x_BV: jax.Array, choices: Choices) -> jax.Array:
        of = (choices.temperature_B, choices.top_p_B, choices.top_k_B, choices.min_p_B, choices.uniform_B)
        return library.call("jaxlora_draw", [(x_BV.shape[:1], jnp.int32)], x_BV, *of)[0]

    return by_platform("draw", x_BV, choices, xla=_in_blocks, native=native)


def _in_blocks(x_BV: jax.Array, choices: Choices) -> jax.Array:
    """Sums blocks of shares; then looks at the one block in which the token lies."""
    scaled_BV, floor_B = _scaled(x_BV, choices)
    padded_BV = jnp.pad(scaled_BV, ((0, 0), (0, -x_BV.shape[1] % BLOCK)), constant_values=-jnp.inf)
    scaled_BKQ = padded_BV.reshape(x_BV.shape[0], -1, BLOCK)
    sum_BK = _shares(scaled_BKQ, floor_B[:, None]).sum(axis=2)
    upto_BK = jnp.cumsum(sum_BK, axis=1)
    wanted_B = choices.uniform_B * upto_BK[:, -1]
    block_B = _first_above(upto_BK, wanted_B, sum_BK > 0)
    before_B = jnp.where(block_B > 0, jnp.take_along_axis(upto_BK, (block_B - 1)[:, None], axis=1)[:, 0], 0.0)
    scaled_BQ = jnp.take_along_axis(scaled_BKQ, block_B[:, None, None], axis=1)[:, 0]
    share_BQ = _shares(scaled_BQ, floor_B)
    return block_B * BLOCK + _first_above(jnp.cumsum(share_BQ, axis=1), wanted_B - before_B, share_BQ > 0)


def _first_above(upto_BN: jax.Array, wanted_B: jax.Array, has_BN: jax.Array) -> jax.Array:
    """Returns int32 [B]: the first place whose sum exceeds what is wanted, or the last that has a share."""
    N = has_BN.shape[1]
    last_B = jnp.where(has_BN, jnp.arange(N, dtype=jnp.int32), 0).max(axis=1)
    return jnp.minimum((upto_BN <= wanted_B[:, None]).sum(axis=1, dtype=jnp.int32), last_B)


def _scaled(x_BV: jax.Array, choices: Choices) -> tuple[jax.Array, jax.Array]:
    """Returns (float32 [B, V] of which the largest of a row is 0, [B] the smallest that is kept)."""
    # The best is 0, so that a tiny temperature cannot make several logits infinite.
    hot_B = choices.temperature_B > 0
    temperature_B = jnp.where(hot_B, choices.temperature_B, 1.0)
    scaled_BV = (x_BV - x_BV.max(axis=-1, keepdims=True)) / temperature_B[:, None]
    filters_B = (choices.top_k_B > 0) | (choices.top_p_B < 1) | (choices.min_p_B > 0)
    everything = jnp.full(x_BV.shape[:1], -jnp.inf)
    return scaled_BV, lax.cond((filters_B & hot_B).any(), _floor, lambda s, c: everything, scaled_BV, choices)


def _shares(scaled: jax.Array, floor: jax.Array) -> jax.Array:
    return jnp.where(scaled >= floor[..., None], jnp.exp(scaled), 0.0)


def _floor(scaled_BV: jax.Array, choices: Choices) -> jax.Array:
    """Returns float32 [B]: the smallest scaled logit that top-k, then top-p of the rest, then min-p keep.

    Each threshold is found by bisection over the ordered bits of float32.
    """
    bits_BV = _ordered(scaled_BV)
    k_B = jnp.where(choices.top_k_B > 0, choices.top_k_B, scaled_BV.shape[1])
    by_k_B = _largest_with(bits_BV, jnp.ones_like(scaled_BV), jnp.minimum(k_B, scaled_BV.shape[1]).astype(jnp.float32))
    share_BV = jnp.where(bits_BV >= by_k_B[:, None], jnp.exp(scaled_BV), 0.0)
    wanted_B = choices.top_p_B * share_BV.sum(-1)
    by_p_B = jnp.where(choices.top_p_B < 1, _largest_with(bits_BV, share_BV, wanted_B), by_k_B)
    floor_B = _value(jnp.maximum(by_k_B, by_p_B))
    return jnp.maximum(floor_B, jnp.log(jnp.maximum(choices.min_p_B, 0.0)))


def _ordered(x: jax.Array) -> jax.Array:
    """Returns uint32 numbers in the order of the floats."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _value(bits: jax.Array) -> jax.Array:
    """Returns the float of an ordered number."""
    raw = jnp.where(bits >> 31 == 1, bits & jnp.uint32((1 << 31) - 1), ~bits)
    return lax.bitcast_convert_type(raw, jnp.float32)


def _largest_with(bits_BV: jax.Array, mass_BV: jax.Array, wanted_B: jax.Array) -> jax.Array:
    """Returns uint32 [B]: the largest threshold whose entries at or above it hold at least the wanted mass."""

    def one_bit(i: jax.Array, found_B: jax.Array) -> jax.Array:
        tried_B = found_B | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        mass_B = jnp.where(bits_BV >= tried_B[:, None], mass_BV, 0.0).sum(-1)
        return jnp.where(mass_B >= wanted_B, tried_B, found_B)

    return lax.fori_loop(0, 32, one_bit, jnp.zeros(bits_BV.shape[0], jnp.uint32))
