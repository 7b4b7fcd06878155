"""Optimizer moments in 8 bits: codes of a dynamic map, and a float32 scale for each 128 features of a rank row.

A code stands for a share of its block's scale.  The map has seven decades, each with twice as many levels as the one below:
decade h = 0 … 6 is the interval from 10^(h-7) to 10^(h-6), and its levels are the midpoints of 2^h equal parts (2^(h+1)
where no bit goes to the sign); besides there are 0 and 1.  Numbered from the smallest on, decade h begins at number 2^h
(2^(h+1)), so a level's number gives its share: no table is looked up, and nothing is compared with all 256 levels.

    first moment    the number, and 128 more for a share below zero    code 0 is zero, 128 is 1
    second moment   one less than the number                           code 0 is zero, 255 is 1

A block reaches over no other row, so rows past a true rank stay zero, and a slot's blocks are its own.

Shape letters: L layers, R LoRA rank, X features, N blocks of a row, Q = 128 features of a block, E = N * R scales of a layer.
Source: block-wise dynamic quantisation (arXiv 2110.02861) with the map of arXiv 1511.04561; no moment above zero becomes zero
(arXiv 2309.01507).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

BLOCK = 128  # features; a TPU's registers are as wide
MU_BITS, NU_BITS = 7, 8  # of a level's number; the first moment's eighth bit is the sign


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Blocks:
    """One moment of half a target, of one slot; of many slots with an axis S after L.  Zero arrays are zero moments."""

    code_LRX: jax.Array  # uint8
    scale_LE: jax.Array  # float32, block after block: the block's number of largest magnitude, with its sign


def block_count(features: int) -> int:
    """Returns the number of blocks of a row; the last may be shorter."""
    return -(-features // BLOCK)


def scale_shape(code_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns […, E] for codes [..., R, X].  Flat, since a TPU pads short last axes to 128."""
    *outer, rank, features = code_shape
    return (*outer, block_count(features) * rank)


def quantised_mu(x_LRX: jax.Array) -> Blocks:
    """Returns the first moment in blocks, rounded to the nearest level: a step changes it by a tenth."""
    share_LRX, scale_LE = _shares(x_LRX)
    size = jnp.abs(share_LRX)
    k, low, high = _around(size, MU_BITS)
    k = k + (size - low > high - size)
    code = jnp.where((share_LRX < 0) & (k > 0), 128 + jnp.minimum(k, 127), k)  # 1 exists with one sign only
    return Blocks(code.astype(jnp.uint8), scale_LE)


def quantised_nu(x_LRX: jax.Array, bits_LRX: jax.Array) -> Blocks:
    """Returns the second moment in blocks, rounded by the bits (uint32 below 2^16, uniform) so that the mean is x.

    Rounded to the nearest level it would never change again: a step changes it by a thousandth.
    A number above zero stays above zero, or the update would be divided by eps alone.
    """
    share_LRX, scale_LE = _shares(x_LRX)
    k, low, high = _around(share_LRX, NU_BITS)
    up = (share_LRX - low) * 2.0**16 > (high - low) * bits_LRX.astype(jnp.float32)
    k = k + (up | ((k == 1) & (share_LRX > 0)))
    return Blocks((k - 1).astype(jnp.uint8), scale_LE)


def mu_of(blocks: Blocks) -> jax.Array:
    """Returns float32 [L, R, X]: the decoded first moment."""
    code = blocks.code_LRX.astype(jnp.int32)
    negative = code > 128
    share = _share(jnp.where(negative, code - 128, code), MU_BITS)
    return jnp.where(negative, -share, share) * _spread(blocks.scale_LE, blocks.code_LRX.shape)


def nu_of(blocks: Blocks) -> jax.Array:
    """Returns float32 [L, R, X]: the decoded second moment."""
    share = _share(blocks.code_LRX.astype(jnp.int32) + 1, NU_BITS)
    return share * _spread(blocks.scale_LE, blocks.code_LRX.shape)


def _shares(x_LRX: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (shares between -1 and 1 [L, R, X], scales [L, E])."""
    *outer, R, X = x_LRX.shape
    padded = jnp.pad(x_LRX, [*[(0, 0)] * (x_LRX.ndim - 1), (0, -X % BLOCK)])
    x_LRNQ = padded.reshape(*outer, R, -1, BLOCK)
    large_LRN, small_LRN = x_LRNQ.max(-1), x_LRNQ.min(-1)
    scale_LRN = jnp.where(large_LRN >= -small_LRN, large_LRN, small_LRN)
    scale_LE = scale_LRN.swapaxes(-1, -2).reshape(*outer, -1)
    share_LRX = x_LRX / _spread(jnp.where(scale_LE == 0, 1.0, scale_LE), x_LRX.shape)
    return jnp.clip(share_LRX, -1, 1), scale_LE


def _spread(scale_LE: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns each feature's scale, [L, R, X], laid out in axis order: else a TPU compiler puts the slot axis first and
    copies all arrays with slots into that layout."""
    *outer, R, X = shape
    scale_LRN = scale_LE.reshape(*outer, -1, R).swapaxes(-1, -2)
    spread_LRX = jnp.repeat(scale_LRN, BLOCK, axis=-1)[..., :X]
    return with_layout_constraint(spread_LRX, Layout(tuple(range(len(shape)))))


def _share(k: jax.Array, bits: int) -> jax.Array:
    """Returns the float32 share of level k, rounded once.  Numbers before the first decade are zero, 2^bits is 1."""
    h = 31 - jax.lax.clz(jnp.maximum(k, 1))
    share = (18 * k + 9 - (16 << h)).astype(jnp.float32) / _parts(h, bits)
    return jnp.where(k < 1 << (bits - MU_BITS), 0.0, jnp.where(k == 1 << bits, 1.0, share))


def _parts(h: jax.Array, bits: int) -> jax.Array:
    """Returns 2 * 10^(bits-h) * 2^h as exact float32: from 2^h on, level k is (18 k + 9 - 16 * 2^h) divided by it."""
    left = bits - h
    fives = [jnp.where(left & n, 5.0**n, 1.0) for n in (1, 2, 4, 8)]
    return fives[0] * fives[1] * fives[2] * fives[3] * 2.0 ** (bits + 1)


def _around(share: jax.Array, bits: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (number of the last level not above the share, its share, the next level's); below 1 for a share of 1."""
    h = jnp.full(share.shape, bits - MU_BITS, jnp.int32)
    for n in range(1, 7):
        h = h + (share >= 10.0**-n)
    k = jnp.floor((share * _parts(h, bits) + ((16 << h) - 9).astype(jnp.float32)) / 18).astype(jnp.int32)
    k = jnp.clip(k, (1 << h) - 1, (2 << h) - 1)
    return k, _share(k, bits), _share(k + 1, bits)
