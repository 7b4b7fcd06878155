"""XLA body of `gathered_lora`, for CPUs: a loop over the step's tokens with adapters, two of one slot at a time.

Rows are widened to float32 as they are read and multiply both tokens; slots' odd tokens follow, one at a time, with the
same bits.  The goal is that XLA's CPU compiler makes one kernel of each half, which reads the rows in place and uses
whole vectors:

- A slice of the pool with many readers is copied first.  So each row of B, each column block of A, is its own slice.
- Sums over features are not vectorised.  So A's product sums blocks of columns elementwise, and the final sum is the
  second, small kernel.
- A kernel has one output.  So the two tokens are one complex number, or two 16-bit numbers in one word.
- A small kernel that fills an array is run by other threads, which takes longer than the kernel.  One that updates
  a part of an array is not.
- Kernels of a loop that may run in parallel wait for other threads, too.  So each target has a loop of its own.

Shapes are fixed, so a visit reads all rows that its slot owns, and slots of each size have loops of their own.

`both` runs the two halves at one visit; `shrink` and `expand` are the halves, for meshes that sum h between them.

Shape letters: T tokens, L layers, S slots, N rows of all slots, R rows of a slot (in the pool: N tiles of R rows), X Y features in, out, C columns of a block.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gathered_lora.pool_rows import Order, PoolRows
from pallas_kernels.gathered_lora.rank_classes import first_rows, slot_starts

UNROLLED_RANK = 64  # largest rank whose second product is unrolled: the program grows with the rank
COLUMNS = 24  # smallest block of A's columns: fewer are slower
FEWEST, MOST = 8, 64  # column blocks of A: a short row does not justify a program that grows with them

Rows = Sequence[PoolRows]

_slice = functools.partial(lax.dynamic_slice, allow_negative_indices=False)
_update = functools.partial(lax.dynamic_update_slice, allow_negative_indices=False)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _Visit:
    """One or two tokens of a slot."""

    number: jax.Array
    tokens: list[jax.Array]
    slot: jax.Array
    row: jax.Array  # the slot's first


@dataclass(frozen=True, kw_only=True, slots=True)
class _Class:
    """Slots of one size that follow each other."""

    slot: int  # the first
    end: int
    row: int  # the first slot's first
    rank: int  # rows of each slot


@dataclass(frozen=True, kw_only=True)
class _Visits:
    """Which tokens are visited together (pairs first), and where each token's result lies.

    They are the same in every layer, so XLA computes them once a step.
    """

    tokens_2T: jax.Array  # int32 of each visit
    slot_T: jax.Array  # int32 of each visit
    pairs: jax.Array  # int32 number of visits with two tokens
    count: jax.Array  # int32 number of visits
    visit_T: jax.Array  # int32 the visit of each token; arbitrary for one of the base model
    is_second_T: jax.Array
    alone: bool  # whether a slot's odd token is visited alone, and not as a pair with itself
    of: _Class

    def at(self, i: jax.Array, tokens: int) -> _Visit:
        """Returns visit i, which has so many tokens."""
        of_visit = [_slice(self.tokens_2T, (j, i), (1, 1))[0, 0] for j in range(tokens)]
        slot = _slice(self.slot_T, (i,), (1,))[0]
        row = self.of.row + (slot - self.of.slot) * self.of.rank
        return _Visit(number=i, tokens=of_visit, slot=slot, row=row)


def _visits(order: Order, alone: bool, of: _Class) -> _Visits:
    order_T, slot_T, count = order
    place_T = jnp.arange(order_T.shape[0], dtype=jnp.int32)
    is_new_T = slot_T != jnp.roll(slot_T, 1)
    is_second_T = (place_T - lax.cummax(jnp.where(is_new_T, place_T, 0))) % 2 == 1
    has_second_T = (jnp.roll(slot_T, -1) == slot_T) & (place_T + 1 < count)
    is_first_T = ~is_second_T & (place_T < count)
    is_pair_T = is_first_T & has_second_T
    kind_T = jnp.where(is_pair_T, 0, jnp.where(is_first_T, 1, 2))
    first_T = jnp.argsort(kind_T, stable=True)  # places of the first tokens, in the order of visits
    visit_T = jnp.argsort(first_T)
    place_of_T = jnp.argsort(order_T)
    return _Visits(
        tokens_2T=jnp.stack([order_T, jnp.where(is_pair_T, jnp.roll(order_T, -1), order_T)])[:, first_T],
        slot_T=slot_T[first_T],
        pairs=(is_pair_T if alone else is_first_T).sum(dtype=jnp.int32),
        count=is_first_T.sum(dtype=jnp.int32),
        visit_T=visit_T[place_of_T - is_second_T[place_of_T]],
        is_second_T=is_second_T[place_of_T],
        alone=alone,
        of=of,
    )


def _by_class(rows: Rows, order: Order, compute: Callable[[_Class, Order], list[jax.Array]]) -> list[jax.Array]:
    """Returns what `compute` gives for the tokens of each class of slots, together."""
    classes = rows[0].classes
    starts, first = slot_starts(classes), first_rows(classes)
    order_T, slot_T, count = order
    found: list[jax.Array] = []
    for (slot, end), (_, rank) in zip(itertools.pairwise(starts), classes, strict=True):
        of = _Class(slot=slot, end=end, row=int(first[slot]), rank=rank)
        if len(classes) == 1:
            return compute(of, order)
        here_T = (slot_T >= slot) & (slot_T < end)
        place_T = jnp.argsort(~here_T, stable=True)
        some = compute(of, (order_T[place_T], slot_T[place_T], jnp.minimum(here_T.sum(dtype=jnp.int32), count)))
        here_T1 = here_T[jnp.argsort(order_T)][:, None]
        found = [jnp.where(here_T1, new, old) for new, old in zip(some, found or some, strict=True)]
    return found


def both(x_TX: jax.Array, rows: Rows, layer: jax.Array, order: Order) -> list[jax.Array]:
    """Returns what `gathered_lora` returns, undefined for tokens of the base model."""
    wide_TX, dtype = _wide(x_TX), x_TX.dtype

    def compute(of: _Class, order: Order) -> list[jax.Array]:
        visits = _visits(order, _has_blocks(x_TX), of)

        def target(row: PoolRows) -> jax.Array:
            def halves(visit: _Visit, scratch: jax.Array) -> tuple[jax.Array, jax.Array]:
                h_R, scratch = _shrunk(wide_TX, _rows(row.a_LNRX), layer, visit, scratch)
                return _expanded(h_R, row, layer, visit, dtype), scratch

            return _visited(halves, visits, row.b_LNRY.shape[-1], dtype, _scratch(_rows(row.a_LNRX), of.rank))

        return [target(row) for row in rows]

    return _by_class(rows, order, compute)


def shrink(x_TX: jax.Array, rows: Rows, layer: jax.Array, order: Order) -> list[jax.Array]:
    """Returns float32 [T, R] per target: x @ a.T, not scaled; R of the largest slot."""
    wide_TX = _wide(x_TX)

    def compute(of: _Class, order: Order) -> list[jax.Array]:
        visits = _visits(order, _has_blocks(x_TX), of)

        def target(row: PoolRows) -> jax.Array:
            def half(visit: _Visit, scratch: jax.Array) -> tuple[jax.Array, jax.Array]:
                h_R, scratch = _shrunk(wide_TX, _rows(row.a_LNRX), layer, visit, scratch)
                return _packed(_parts(h_R[None]), wide_TX.dtype), scratch

            h_TR = _visited(half, visits, of.rank, wide_TX.dtype, _scratch(_rows(row.a_LNRX), of.rank))
            return jnp.pad(h_TR, ((0, 0), (0, row.rank - of.rank)))

        return [target(row) for row in rows]

    return _by_class(rows, order, compute)


def expand(h_TR: Sequence[jax.Array], rows: Rows, layer: jax.Array, order: Order, dtype: jnp.dtype) -> list[jax.Array]:
    """Returns [T, Y] per target: (scale * h) @ b."""

    def compute(of: _Class, order: Order) -> list[jax.Array]:
        visits = _visits(order, False, of)

        def target(own_TR: jax.Array, row: PoolRows) -> jax.Array:
            def half(visit: _Visit, scratch: jax.Array) -> tuple[jax.Array, jax.Array]:
                h_R = _joined([_slice(own_TR, (t, 0), (1, of.rank))[0] for t in visit.tokens])
                return _expanded(h_R, row, layer, visit, dtype), scratch

            return _visited(half, visits, row.b_LNRY.shape[-1], jnp.dtype(dtype), jnp.zeros(()))

        return [target(h, row) for h, row in zip(h_TR, rows, strict=True)]

    return _by_class(rows, order, compute)


def _visited(
    compute: Callable[[_Visit, jax.Array], tuple[jax.Array, jax.Array]],
    visits: _Visits,
    features: int,
    dtype: jnp.dtype,
    scratch: jax.Array,
) -> jax.Array:
    """Runs `compute` at every visit and returns [T, features], in arrival order.

    compute: returns (a visit's packed row, the scratch for the next visit).
    """

    def step(tokens: int, i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, scratch = carry
        row, scratch = compute(visits.at(i, tokens), scratch)
        return _update(out, row, (i, 0)), scratch

    packed = jnp.uint32 if dtype.itemsize == 2 else jnp.complex64
    out = jnp.zeros((visits.slot_T.shape[0], features), packed)
    out, _ = lax.fori_loop(0, visits.pairs, functools.partial(step, 2), (out, scratch))
    if visits.alone:
        single = lax.real(scratch)
        out, _ = lax.fori_loop(visits.pairs, visits.count, functools.partial(step, 1), (out, single))
    return _parted(out, visits, dtype)


def _rows(half_LNRX: jax.Array) -> jax.Array:
    """Returns the pool's rows without their tiles, [L, rows, X], which copies nothing."""
    return half_LNRX.reshape(half_LNRX.shape[0], -1, half_LNRX.shape[3])


def _wide(x_TX: jax.Array) -> jax.Array:
    """Returns float32 stored in memory: else every visit and target would widen it again."""
    return lax.optimization_barrier(x_TX.astype(jnp.float32))


def _columns(features: int) -> int | None:
    """Returns a block's columns: the fewest that divide the features, in whole vectors; None if none do."""
    fits = (c for c in range(COLUMNS, features + 1, 8) if features % c == 0 and FEWEST <= features // c <= MOST)
    return next(fits, None)


def _has_blocks(x_TX: jax.Array) -> bool:
    """Returns whether A's product is in blocks: only then a separate loop for odd tokens is worth its compile time."""
    return _columns(x_TX.shape[1]) is not None


def _scratch(a_LNX: jax.Array, rank: int) -> jax.Array:
    """Returns the scratch of A's product, for two visits: a fully updated array is a new one, which threads fill."""
    return jnp.zeros((2, rank, _columns(a_LNX.shape[2]) or 0), jnp.complex64)


@jax.jit  # traced once for all targets of one shape
def _shrunk(
    x_TX: jax.Array, a_LNX: jax.Array, layer: jax.Array, visit: _Visit, scratch_2RC: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns (A's product with the visit's tokens, joined, [R]; the scratch)."""
    R, X = scratch_2RC.shape[1], a_LNX.shape[2]
    if not scratch_2RC.size:
        a_RX = _slice(a_LNX, (layer, visit.row, 0), (1, R, X))[0].astype(jnp.float32)
        x = [_slice(x_TX, (t, 0), (1, X))[0] for t in visit.tokens]
        return _joined(_dots(x, a_RX.T)), scratch_2RC
    C = scratch_2RC.shape[2]
    starts = range(0, X, C)
    blocks = [_slice(a_LNX, (layer, visit.row, c), (1, R, C))[0].astype(jnp.float32) for c in starts]
    sums = [
        _sum([a_RC * _slice(x_TX, (t, c), (1, C)) for a_RC, c in zip(blocks, starts, strict=True)])
        for t in visit.tokens
    ]
    # From the second visit on, index `number` means the last.
    scratch_2RC = _update(scratch_2RC, _joined(sums)[None], (visit.number, 0, 0))
    return _sum([_slice(scratch_2RC, (visit.number, 0, c), (1, R, 1))[0, :, 0] for c in range(C)]), scratch_2RC


@functools.partial(jax.jit, static_argnames="dtype")
def _expanded(h_R: jax.Array, row: PoolRows, layer: jax.Array, visit: _Visit, dtype: jnp.dtype) -> jax.Array:
    """Returns [1, Y], packed: the tokens' scaled h times B's rows."""
    R, Y = h_R.shape[0], row.b_LNRY.shape[3]
    scale = _slice(row.scale_LS, (layer, visit.slot), (1, 1))[0, 0]
    # In memory, else B's kernel would compute it for every feature.  A complex product would mix the two tokens.
    h_R = lax.optimization_barrier(_joined([part * scale for part in _parts(h_R)]))
    if R > UNROLLED_RANK:
        b_RY = _slice(_rows(row.b_LNRY), (layer, visit.row, 0), (1, R, Y))[0].astype(jnp.float32)
        return _packed([y_Y[None] for y_Y in _dots(_parts(h_R), b_RY)], dtype)
    b = [_slice(_rows(row.b_LNRY), (layer, visit.row + r, 0), (1, 1, Y))[0].astype(jnp.float32) for r in range(R)]
    h = [_parts(h_R[r]) for r in range(R)]
    return _packed([_sum([h_r * b_1Y for h_r, b_1Y in zip(of, b, strict=True)]) for of in zip(*h, strict=True)], dtype)


def _dots(rows: list[jax.Array], matrix: jax.Array) -> list[jax.Array]:
    """Returns each row's product.  Always one product of two rows: one row would use another kernel and bits."""
    return list(lax.dot(jnp.stack([rows[0], rows[-1]]), matrix, precision="highest"))[: len(rows)]


def _sum(terms: list[jax.Array]) -> jax.Array:
    """Returns the sum of the terms, in their order."""
    return functools.reduce(operator.add, terms)


def _joined(parts: list[jax.Array]) -> jax.Array:
    """Returns one or two float32 arrays as one array."""
    return parts[0] if len(parts) == 1 else lax.complex(*parts)


def _parts(joined: jax.Array) -> list[jax.Array]:
    """Returns the arrays that `_joined` joined."""
    return [lax.real(joined), lax.imag(joined)] if jnp.iscomplexobj(joined) else [joined]


def _packed(parts: list[jax.Array], dtype: jnp.dtype) -> jax.Array:
    """Packs one or two float32 into one element as `_visited` collects it, rounded to the dtype if that has 16 bits."""
    if dtype.itemsize != 2:
        return _joined(parts).astype(jnp.complex64)
    bits = [lax.bitcast_convert_type(y.astype(dtype), jnp.uint16).astype(jnp.uint32) for y in parts]
    return bits[0] if len(bits) == 1 else bits[0] | (bits[1] << 16)


def _parted(packed_TY: jax.Array, visits: _Visits, dtype: jnp.dtype) -> jax.Array:
    """Returns [T, Y] in arrival order."""
    both_TY, is_second_T1 = packed_TY[visits.visit_T], visits.is_second_T[:, None]
    if dtype.itemsize != 2:
        return jnp.where(is_second_T1, lax.imag(both_TY), lax.real(both_TY)).astype(dtype)
    half_TY = jnp.where(is_second_T1, both_TY >> 16, both_TY).astype(jnp.uint16)
    return lax.bitcast_convert_type(half_TY, dtype)
