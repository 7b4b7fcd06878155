"""Draws a token from each row's logits: one uniform number a row, and the inverse of the row's distribution.

    s_V = (x_V - max x_V) / temperature      share_V = exp(s_V) where top-k, then top-p of the rest, then min-p keep it
    token = the first one of which the shares up to it exceed uniform * their total

A filter is a threshold on s, so nothing is sorted and equal logits are kept or dropped together.  `dispatch` states which
body runs.

Shape letters: B rows, in A groups of C, V vocabulary, K blocks of a row, Q tokens of a block.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import by_platform
from pallas_kernels.native import library
from pallas_kernels.shapes import shaped

BLOCK = 256  # tokens of a block; a power of two that divides V if 32 or more of them do
TILE_ROWS = 8  # rows that lie side by side in a TPU's memory, 128 numbers of each in turn
UNSEEN = 17.0  # a uniform number has 2**24 values: shares of less than e**-17 of a row together are never drawn


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """How thresholds are looked for."""

    wide: int  # parts of what is left of a threshold's range in a pass over the logits
    passes: int
    keeps_shares: bool  # in memory from pass to pass; else each pass computes them anew


FEW_PASSES = Search(wide=8, passes=5, keeps_shares=False)  # where reading the logits is what a pass costs
FEW_SUMS = Search(wide=3, passes=11, keeps_shares=True)  # of the same accuracy, where each sum has its price: on a CPU


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
def draw_reference(x_BV: jax.Array, choices: Choices) -> tuple[jax.Array, jax.Array]:
    """Defines the op: returns (int32 [B] the tokens, float32 [B] their logits)."""
    scaled_BV = (x_BV - x_BV.max(axis=1, keepdims=True)) / _temperature(choices)[:, None]
    share_BV = jnp.where(scaled_BV >= _smallest_kept(scaled_BV, choices)[:, None], jnp.exp(scaled_BV), 0.0)
    upto_BV = jnp.cumsum(share_BV, axis=1)
    token_B = _first_above(upto_BV, choices.uniform_B * upto_BV[:, -1], share_BV > 0)
    return token_B, _at(x_BV, token_B)


def _smallest_kept(scaled_BV: jax.Array, choices: Choices) -> jax.Array:
    """Returns float32 [B]: the smallest scaled logit that top-k, then top-p of the rest, then min-p keep.  Sorts."""
    V = scaled_BV.shape[1]
    sorted_BV = -jnp.sort(-scaled_BV, axis=1)
    k_B = jnp.where(choices.top_k_B > 0, jnp.minimum(choices.top_k_B, V), V)
    by_k_B = _at(sorted_BV, k_B - 1)
    share_BV = jnp.where(sorted_BV >= by_k_B[:, None], jnp.exp(sorted_BV), 0.0)
    upto_BV = jnp.cumsum(share_BV, axis=1)
    short_B = (upto_BV < (choices.top_p_B * upto_BV[:, -1])[:, None]).sum(axis=1, dtype=jnp.int32)
    by_p_B = _at(sorted_BV, jnp.minimum(short_B, V - 1))
    floor_B = jnp.maximum(by_k_B, jnp.where(choices.top_p_B < 1, by_p_B, -jnp.inf))
    return jnp.maximum(floor_B, _by_min_p(choices))


@shaped
def draw(x_BV: jax.Array, most_B: jax.Array, choices: Choices, *, filtered: bool) -> tuple[jax.Array, jax.Array]:
    """Returns what the reference does of float32 rows, but for how sums are rounded.  Not differentiable.

    most_B: float32 the largest logits.  filtered: whether some row may have top-k or top-p; where none has, both give the same
    bits.  A row's token is one that is kept, whatever the rounding; any where a logit is NaN.  Without the native body
    logits that differ from the last one kept by less than 2**-9 of the temperature may be kept with it (`_floor`).
    """

    def native(x_BV: jax.Array, most_B: jax.Array, choices: Choices) -> tuple[jax.Array, jax.Array]:
        of = (choices.temperature_B, choices.top_p_B, choices.top_k_B, choices.min_p_B, choices.uniform_B)
        token_B = library.call("jaxlora_draw", [(x_BV.shape[:1], jnp.int32)], x_BV, *of)[0]
        return token_B, _at(x_BV, token_B)

    xla, xla_on_cpu = (
        functools.partial(_in_blocks, search=search if filtered else None, group=group)
        for search, group in ((FEW_PASSES, TILE_ROWS), (FEW_SUMS, 1))
    )
    return by_platform("draw", x_BV, most_B, choices, xla=xla, xla_on_cpu=xla_on_cpu, native=native)


def _in_blocks(
    x_BV: jax.Array, most_B: jax.Array, choices: Choices, *, search: Search | None, group: int
) -> tuple[jax.Array, jax.Array]:
    """Sums blocks of shares; then looks at the one block in which the token lies.

    It reads all logits once, and once more in each pass of the search.  search: None leaves out top-k and top-p.
    group: rows that lie side by side.  Blocks are then told apart where the logits lie, without a copy for another layout.
    """
    B, V = x_BV.shape
    Q = next((q for q in (BLOCK, 128, 64, 32) if V % q == 0), BLOCK)
    C = group if B % group == 0 else 1
    floor_B = most_B + _temperature(choices) * _by_min_p(choices)
    if search is not None:
        floor_B = jnp.maximum(floor_B, _floor(x_BV, most_B, choices, search))
    of_B = most_B, floor_B, 1 / _temperature(choices)
    padded_BV = jnp.pad(x_BV, ((0, 0), (0, -V % Q)), constant_values=-jnp.inf)
    x_AKCQ = padded_BV.reshape(B // C, C, -1, Q).swapaxes(1, 2)
    sum_AKC = _shares(x_AKCQ, *(of.reshape(-1, 1, C) for of in of_B)).sum(axis=3)
    sum_BK = sum_AKC.swapaxes(1, 2).reshape(B, -1)
    upto_BK = jnp.cumsum(sum_BK, axis=1)
    wanted_B = choices.uniform_B * upto_BK[:, -1]
    block_B = _first_above(upto_BK, wanted_B, sum_BK > 0)
    before_B = jnp.where(block_B > 0, _at(upto_BK, jnp.maximum(block_B - 1, 0)), 0.0)
    row_B = jnp.arange(B, dtype=jnp.int32)
    # Read once, whatever is made of it.
    x_BQ = lax.optimization_barrier(x_AKCQ.at[row_B // C, block_B, row_B % C].get(mode="promise_in_bounds"))
    share_BQ = _shares(x_BQ, *of_B)
    place_B = _first_above(jnp.cumsum(share_BQ, axis=1), wanted_B - before_B, share_BQ > 0)
    return block_B * Q + place_B, _at(x_BQ, place_B)


def _at(x_BN: jax.Array, place_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BN, place_B[:, None], axis=1)[:, 0]


def _first_above(upto_BN: jax.Array, wanted_B: jax.Array, has_BN: jax.Array) -> jax.Array:
    """Returns int32 [B]: the first place whose sum exceeds what is wanted, or the last that has a share."""
    N = has_BN.shape[1]
    last_B = jnp.where(has_BN, jnp.arange(N, dtype=jnp.int32), 0).max(axis=1)
    return jnp.minimum((upto_BN <= wanted_B[:, None]).sum(axis=1, dtype=jnp.int32), last_B)


def _temperature(choices: Choices) -> jax.Array:
    """Returns float32 [B], at least so large that its inverse is a number; 1 where nothing is drawn."""
    return jnp.where(choices.temperature_B > 0, jnp.maximum(choices.temperature_B, 1e-30), 1.0)


def _by_min_p(choices: Choices) -> jax.Array:
    """Returns float32 [B]: the smallest scaled logit that min-p keeps."""
    return jnp.log(jnp.maximum(choices.min_p_B, 0.0))


def _shares(x: jax.Array, most: jax.Array, floor: jax.Array, inverse: jax.Array) -> jax.Array:
    """Returns the shares of logits x [..., Q], not yet divided by their sum; those below the floor have none.

    most, floor, inverse (of the temperature): of each row, [...].
    """
    return jnp.where(x >= floor[..., None], jnp.exp((x - most[..., None]) * inverse[..., None]), 0.0)


@dataclass(frozen=True, kw_only=True)
class _Range:
    """Where the rows' thresholds lie, in scaled logits: from `low_B` on, below low_B + wide * part_B."""

    low_B: jax.Array
    part_B: jax.Array  # what it becomes in the next pass
    wide: int

    def tried(self) -> list[jax.Array]:
        """Returns the wide - 1 thresholds between its parts, each float32 [B]."""
        return [self.low_B + i * self.part_B for i in range(1, self.wide)]

    def narrowed(self, first_B: jax.Array, last_B: jax.Array) -> _Range:
        """Returns it from part `first_B` to part `last_B`."""
        part_B = (last_B - first_B + 1) * self.part_B / self.wide
        return _Range(low_B=self.low_B + first_B * self.part_B, part_B=part_B, wide=self.wide)


def _floor(x_BV: jax.Array, most_B: jax.Array, choices: Choices, search: Search) -> jax.Array:
    """Returns float32 [B]: the smallest logit that top-k, then top-p of the rest keep.

    Each pass tries `search.wide` - 1 thresholds of each, in one reduction.  How much top-p must keep is known as well as what
    top-k keeps.  The last range's lower end is kept, so that a row keeps what it should and what lies in the same last part:
    1 / wide**passes of the range, which leaves out only what is never drawn.  The best logit alone is told exactly.
    """
    V, wide, N, temperature_B = x_BV.shape[1], search.wide, search.wide - 1, _temperature(choices)
    has_k_B = (choices.top_k_B > 0) & (choices.top_k_B < V)
    k_B = jnp.where(has_k_B, choices.top_k_B, V).astype(jnp.float32)
    has_p_B = choices.top_p_B < 1
    log_V = math.log(V)
    deep_B = jnp.full_like(most_B, log_V + UNSEEN)
    by_k = _Range(low_B=-deep_B, part_B=deep_B / wide, wide=wide)
    deep_B = jnp.minimum(deep_B, log_V - jnp.log1p(-jnp.minimum(choices.top_p_B, 1.0)))
    by_p = _Range(low_B=-deep_B, part_B=deep_B / wide, wide=wide)
    least_B = all_B = jnp.zeros_like(most_B)  # between which lies the sum of the shares that top-k keeps
    kept_BV = None
    if search.keeps_shares:
        kept_BV = lax.optimization_barrier(jnp.exp((x_BV - most_B[:, None]) / temperature_B[:, None]))
    for number in range(search.passes):
        tried = *by_k.tried(), *by_p.tried(), *([by_k.low_B] if number == 0 else [])
        # Without the barrier the shares of all passes are one array, written and read.
        top_B, inverse_B, *tried = lax.optimization_barrier(
            (most_B, 1 / temperature_B, *(most_B + temperature_B * t_B for t_B in tried))
        )
        share_BV = jnp.exp((x_BV - top_B[:, None]) * inverse_B[:, None]) if kept_BV is None else kept_BV
        above = [x_BV >= t_B[:, None] for t_B in tried]
        counts = [jnp.where(above_BV, 1.0, 0.0) for above_BV in above[:N]]
        sums = _sums([*counts, *(jnp.where(above_BV, share_BV, 0.0) for above_BV in above)])
        count_BN, share_k_BN, share_p_BN = (jnp.stack(sums[i * N : (i + 1) * N], axis=1) for i in range(3))
        all_B = sums[-1] if number == 0 else all_B
        part_B = (count_BN >= k_B[:, None]).sum(axis=1, dtype=jnp.int32)
        ends_BN = jnp.concatenate([all_B[:, None], share_k_BN, least_B[:, None]], axis=1)
        all_B, least_B = _at(ends_BN, part_B), _at(ends_BN, part_B + 1)
        by_k = by_k.narrowed(part_B, part_B)
        first_B, last_B = (
            (share_p_BN >= (choices.top_p_B * kept_B)[:, None]).sum(axis=1, dtype=jnp.int32)
            for kept_B in (all_B, least_B)
        )
        by_p = by_p.narrowed(first_B, last_B)
    floor_k_B = jnp.where(k_B > 1, by_k.low_B, 0.0)
    floor_p_B = jnp.where(choices.top_p_B * all_B > 1, by_p.low_B, 0.0)
    floor_B = jnp.maximum(jnp.where(has_k_B, floor_k_B, -jnp.inf), jnp.where(has_p_B, floor_p_B, -jnp.inf))
    return most_B + temperature_B * floor_B


def _sums(terms: list[jax.Array]) -> list[jax.Array]:
    """Returns the sums of float32 rows, all in one reduction: what they are made of is read once."""
    zeros = (jnp.float32(0),) * len(terms)
    return list(lax.reduce(tuple(terms), zeros, lambda x, y: tuple(map(jnp.add, x, y)), (1,)))
