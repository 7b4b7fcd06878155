"""TPU body of `gathered_lora`: a Mosaic kernel that visits the step's tokens in the order of their slots.

One grid step, a visit, is a tile of tokens and one slot of theirs.  Where lanes have one token, tokens lie in the order of
slots, 8 in a tile: T tokens of U adapters take at most T/8 + U visits.  Else a tile is a part of a lane, where it lies.
An adapter's rows are copied into the chip's memory once, when its first visit begins, and the next adapter's while this
one is computed: as many tiles of ROW_TILE rows as its rank has, of those targets that it has, in two buffers that take
turns.  Tiles hold the ends of neighbouring slots where ranks are no multiple of them: those are selected away.  A token of
the base model is never visited, and its row of the output is undefined.

8 tokens are multiplied by one tile of rows at a time, as many as there are.  A part of a lane is multiplied by all rows that
the largest slot may have, the others zero: up to 128 of them take a TPU as long as 8.

`both` runs the two halves at one visit; `shrink` and `expand` are the halves, for meshes that sum h between them.

Compiled for TPU v5e and v6e and interpreted; never run on a TPU.

Shape letters: T tokens, J tokens of a lane, V visits, L layers, S slots, N tiles of R rows, X Y F features in, out, any,
K tiles of the rows of the largest slot, Q their rows, M tiles of tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gathered_lora.pool_rows import Order, PoolRows, order_of_parts
from pallas_kernels.gathered_lora.rank_classes import ROW_TILE, first_rows, slot_ranks
from pallas_kernels.tiling_tpu import LANES, blocks, dot, token_block

TOKENS = 8  # of a visit, where lanes have one
MOST_TOKENS = (128, 64, 32, 16)  # of a part of a lane, the most that fits
MOST_PARTS = 16  # of the features out of one target

Rows = Sequence[PoolRows]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cut:
    """How a call is divided."""

    tokens: int  # of a tile
    whole: bool  # a tile is a part of a lane, so all its tokens have one slot
    parts: tuple[int, ...]  # where parts of the features out begin, then where the last ends


def fits(x_TX: jax.Array, rows: Rows, tokens_of_lane: int) -> bool:
    """Returns whether the rows of the largest slot, twice, and a tile of tokens' input and outputs fit the chip.

    The features out of a target alone, as the head is, may be computed in parts.
    """
    return _cut(x_TX, rows, tokens_of_lane) is not None


def _cut(x_TX: jax.Array, rows: Rows, tokens_of_lane: int) -> _Cut | None:
    """Returns the cut of the most tokens, then of the fewest parts, that fits the chip; None: none does."""
    whole = tokens_of_lane > 1
    for tokens in [token_block(tokens_of_lane, most) for most in MOST_TOKENS] if whole else [TOKENS]:
        if parts := _parts(x_TX, rows, tokens):
            return _Cut(tokens=tokens, whole=whole, parts=parts)
    return None


def _parts(x_TX: jax.Array, rows: Rows, tokens: int) -> tuple[int, ...] | None:
    """Returns where the fewest parts of the features out begin that fit the chip, then where the last ends; None: none do."""
    if len(rows) > 1:
        return (0, max(row.b_LNRY.shape[3] for row in rows)) if _fits_in(x_TX, rows, tokens, None) else None
    features = rows[0].b_LNRY.shape[3]
    for count in range(1, MOST_PARTS + 1):
        width = -(-features // (count * LANES)) * LANES
        if _fits_in(x_TX, rows, tokens, width):
            return *range(0, features, width), features
    return None


def _fits_in(x_TX: jax.Array, rows: Rows, tokens: int, width: int | None) -> bool:
    """Returns whether a call fits the chip that computes so many features out; None: all."""
    out = [row.b_LNRY.shape[3] if width is None else min(width, row.b_LNRY.shape[3]) for row in rows]
    halves = [
        (n, half.dtype)
        for row, y in zip(rows, out, strict=True)
        for n, half in ((row.a_LNRX.shape[3], row.a_LNRX), (y, row.b_LNRY))
    ]
    buffers = sum(_row_tiles(rows[0]) * _tile_bytes(ROW_TILE, n, dtype) for n, dtype in halves)
    ends = sum(_tile_bytes(tokens, n, x_TX.dtype) for n in (x_TX.shape[1], *out))
    sums = max(_tile_bytes(tokens, y, jnp.float32) for y in out)
    return 2 * (buffers + ends) + sums <= blocks().block_bytes


def both(x_TX: jax.Array, rows: Rows, layer: jax.Array, order: Order, *, interpret: bool) -> list[jax.Array]:
    """Returns what `gathered_lora` returns, undefined for tokens of the base model."""
    cut = _cut_of(x_TX, rows, order)
    halves = [half for row in rows for half in (row.a_LNRX, row.b_LNRY)]
    tokens, got = [_tiled(x_TX, order, cut)], []
    for start, end in itertools.pairwise(cut.parts):
        outs = [jax.ShapeDtypeStruct((cut.tokens, min(end, row.b_LNRY.shape[3]) - start), x_TX.dtype) for row in rows]
        columns = [
            n for row, y in zip(rows, outs, strict=True) for n in ((0, row.a_LNRX.shape[3]), (start, y.shape[1]))
        ]
        got.append(_visit(_both, cut, order, layer, rows, tokens, halves, outs, interpret, "gathered_lora", columns))
    of_targets = [y[0] if len(y) == 1 else jnp.concatenate(y, -1) for y in zip(*got, strict=True)]
    return [_arrived(y, order, cut) for y in of_targets]


def shrink(x_TX: jax.Array, rows: Rows, layer: jax.Array, order: Order, *, interpret: bool) -> list[jax.Array]:
    """Returns float32 [T, Q] per target: x @ a.T, not scaled, by places in the tiles of the slot's rows."""
    cut = _cut_of(x_TX, rows, order)
    outs = [jax.ShapeDtypeStruct(_tile_of_h(rows, cut), jnp.float32) for _ in rows]
    tokens, halves = [_tiled(x_TX, order, cut)], [row.a_LNRX for row in rows]
    got = _visit(_shrink, cut, order, layer, rows, tokens, halves, outs, interpret, "gathered_lora_shrink")
    return [_arrived(h if cut.whole else h.swapaxes(1, 2).reshape(*tokens[0].shape[:2], -1), order, cut) for h in got]


def expand(
    h_TQ: Sequence[jax.Array], rows: Rows, layer: jax.Array, order: Order, dtype: jnp.dtype, *, interpret: bool
) -> list[jax.Array]:
    """Returns [T, Y] per target: (scale * h) @ b."""
    cut = _cut_of(jax.ShapeDtypeStruct((h_TQ[0].shape[0], rows[0].a_LNRX.shape[3]), dtype), rows, order)
    outs = [jax.ShapeDtypeStruct((cut.tokens, row.b_LNRY.shape[3]), dtype) for row in rows]
    tiled = [_tiled(h, order, cut) for h in h_TQ]
    if not cut.whole:
        tiled = [h.reshape(-1, TOKENS, h.shape[2] // ROW_TILE, ROW_TILE).swapaxes(1, 2) for h in tiled]
    halves = [row.b_LNRY for row in rows]
    got = _visit(_expand, cut, order, layer, rows, tiled, halves, outs, interpret, "gathered_lora_expand")
    return [_arrived(y, order, cut) for y in got]


def _cut_of(x_TX: jax.Array | jax.ShapeDtypeStruct, rows: Rows, order: Order) -> _Cut:
    cut = _cut(x_TX, rows, x_TX.shape[0] // order[0].shape[0])  # ty: ignore[invalid-argument-type]
    assert cut is not None
    return cut


def _tile_of_h(rows: Rows, cut: _Cut) -> tuple[int, ...]:
    K = _row_tiles(rows[0])
    return (cut.tokens, K * ROW_TILE) if cut.whole else (K, TOKENS, ROW_TILE)


def _tile_bytes(rows: int, features: int, dtype: jnp.dtype) -> int:
    """Returns the bytes on the chip of so many rows, 8 of whatever dtype in a tile."""
    return -(-rows // ROW_TILE) * ROW_TILE * -(-features // LANES) * LANES * jnp.dtype(dtype).itemsize


def _row_tiles(row: PoolRows) -> int:
    """Returns the tiles of rows in which the slot with the most of them lies."""
    first, ranks = first_rows(row.classes), slot_ranks(row.classes)
    return int((-(-(first + ranks) // ROW_TILE) - first // ROW_TILE).max())


def _tiled(x_TF: jax.Array, order: Order, cut: _Cut) -> jax.Array:
    """Returns tokens in tiles [M, tokens, F]: parts of lanes where they lie, else in the order of slots."""
    T, F = x_TF.shape
    if not cut.whole:
        x_TF = x_TF[jnp.pad(order[0], (0, -T % TOKENS))]
    return x_TF.reshape(-1, cut.tokens, F)


def _arrived(y_MTF: jax.Array, order: Order, cut: _Cut) -> jax.Array:
    """Returns tokens, which lie in tiles, in the order of arrival."""
    y_TF = y_MTF.reshape(-1, y_MTF.shape[-1])
    return y_TF if cut.whole else y_TF[_inverse(order[0])]


def _inverse(number_T: jax.Array) -> jax.Array:
    """Returns int32 [T]: where each number lies, 0 for one that does not.  T is small, and a TPU sorts slowly."""
    wanted_T = jnp.arange(number_T.shape[0], dtype=jnp.int32)
    return jnp.argmax(number_T[None] == wanted_T[:, None], axis=1).astype(jnp.int32)


@dataclass(frozen=True, kw_only=True)
class _Visits:
    """A tile of tokens and a slot of theirs each.  The same in every layer, so XLA computes them once a step."""

    count: jax.Array
    place_V: jax.Array  # int32 first token, as tokens lie in tiles
    slot_V: jax.Array
    fetch_V: jax.Array  # int32 the number of the slot among the step's distinct ones
    next_V: jax.Array  # int32 the first visit of the next slot; -1: there is none


def visits_of_lanes(order: Order, tiles: int, tokens: int) -> _Visits:
    """Returns the visits of lanes of so many tiles of so many tokens, one of each tile that has a slot."""
    order_M = order_of_parts(order, tiles)
    visits = visits_of(order_M, 1)
    return replace(visits, place_V=order_M[0][visits.place_V] * tokens)


def visits_of(order: Order, tokens: int = TOKENS) -> _Visits:
    """Returns at most T/tokens + U visits of the tokens of U distinct slots; those past `count` are arbitrary.

    tokens: of a tile.
    """
    _, slot_T, count = order
    place_T = jnp.arange(slot_T.shape[0], dtype=jnp.int32)
    is_new_T = (place_T == 0) | (slot_T != jnp.roll(slot_T, 1))
    starts_T = (is_new_T | (place_T % tokens == 0)) & (place_T < count)
    place_V = _inverse(jnp.where(starts_T, jnp.cumsum(starts_T, dtype=jnp.int32) - 1, -1))
    fetch_V = jnp.cumsum(is_new_T, dtype=jnp.int32)[place_V] - 1
    visits = starts_T.sum(dtype=jnp.int32)
    # Visits are by slot, so the next slot's first is as many on as visits are of slots up to this one.
    next_V = (place_T[None] < visits) & (fetch_V[None] <= fetch_V[:, None])
    next_V = next_V.sum(1, dtype=jnp.int32)
    return _Visits(
        count=visits,
        place_V=place_V,
        slot_V=jnp.maximum(slot_T[place_V], 0),
        fetch_V=fetch_V,
        next_V=jnp.where(next_V < visits, next_V, -1),
    )


@dataclass(frozen=True, kw_only=True)
class _Target:
    """What a visit sees of a target: its rows in tiles, which of them are its adapter's, and its scale."""

    refs: Sequence  # [K, ROW_TILE, F] in the chip's memory: a, b or the one that is wanted
    first: jax.Array  # place of its first row in the first tile
    rank: jax.Array
    scale: jax.Array

    @property
    def tiles(self) -> jax.Array:
        """Returns how many tiles hold its rows."""
        return _tile_count(self.first, self.rank)

    def own(self, k: jax.Array | int, shape: tuple[int, ...], axis: int) -> jax.Array:
        """Returns which rows of tile k are the adapter's, along this axis of a shape."""
        place = k * ROW_TILE + lax.broadcasted_iota(jnp.int32, shape, axis)
        return (place >= self.first) & (place < self.first + self.rank)

    def all_rows(self, half) -> jax.Array:
        """Returns [Q, F]: the rows of all tiles of one of its halves, zero where they are not the adapter's."""
        rows_QF = jnp.concatenate([half[k] for k in range(half.shape[0])], axis=0)
        return jnp.where(self.own(0, rows_QF.shape, 0), rows_QF, jnp.zeros_like(rows_QF))


def _tile_count(first: jax.Array, rank: jax.Array) -> jax.Array:
    return jnp.where(rank > 0, _quotient(_remainder(first, ROW_TILE) + rank + ROW_TILE - 1, ROW_TILE), 0)


def _quotient(number: jax.Array, by: int) -> jax.Array:
    """Returns number // by of a number that is not negative: `//` asks for the sign, and that for the kind of chip."""
    return lax.div(number, np.int32(by))


def _remainder(number: jax.Array, by: int) -> jax.Array:
    return lax.rem(number, np.int32(by))


def _expanded(target: _Target, h_of, b, out: tuple[int, int]) -> jax.Array:
    """Returns float32 [TOKENS, Y]: the sum over tiles of (scale * h) @ b.  h_of: a tile's number → its h, not scaled."""

    def add(k: jax.Array, y_TY: jax.Array) -> jax.Array:
        b_RY = b[k]
        h_TR = jnp.where(target.own(k, (TOKENS, ROW_TILE), 1), h_of(k) * target.scale, 0)
        b_RY = jnp.where(target.own(k, b_RY.shape, 0), b_RY, jnp.zeros_like(b_RY))
        return y_TY + dot(h_TR.astype(b_RY.dtype), b_RY, (1, 0))

    return lax.fori_loop(0, target.tiles, add, jnp.zeros(out, jnp.float32))


def _both(target: _Target, cut: _Cut, x_ref, put) -> None:
    a, b = target.refs
    x_TX = x_ref[...]
    if cut.whole:
        h_TQ = (dot(x_TX, target.all_rows(a), (1, 1)) * target.scale).astype(b.dtype)
        put(dot(h_TQ, target.all_rows(b), (1, 0)))
    else:
        put(_expanded(target, lambda k: dot(x_TX, a[k], (1, 1)), b, (TOKENS, b.shape[2])))


def _shrink(target: _Target, cut: _Cut, x_ref, put) -> None:
    (a,) = target.refs
    x_TX = x_ref[...]
    if cut.whole:
        put(dot(x_TX, target.all_rows(a), (1, 1)))
        return

    def tile(k: jax.Array, _: None) -> None:
        put(dot(x_TX, a[k], (1, 1)), k)

    lax.fori_loop(0, target.tiles, tile, None)


def _expand(target: _Target, cut: _Cut, h_ref, put) -> None:
    (b,) = target.refs
    if cut.whole:
        put(dot((h_ref[...] * target.scale).astype(b.dtype), target.all_rows(b), (1, 0)))
    else:
        put(_expanded(target, lambda k: h_ref[k], b, (TOKENS, b.shape[2])))


def _visit(
    compute,
    cut: _Cut,
    order: Order,
    layer: jax.Array,
    rows: Rows,
    tokens: Sequence[jax.Array],
    halves: Sequence[jax.Array],
    outs: Sequence[jax.ShapeDtypeStruct],
    interpret: bool,
    name: str,
    columns: Sequence[tuple[int, int]] | None = None,
) -> list[jax.Array]:
    """Runs compute(target, cut, ref of its tokens, put) for each target at every visit; returns [M, ...] of each of `outs`.

    tokens: [M, ...] of all targets together, or of each.  halves: one or two arrays [L, N, R, F] of each target.
    put(value, *place): writes the visit's own tokens.
    columns: where the features of each half begin that are read, and how many they are; None: all.
    """
    M = tokens[0].shape[0]
    visits = visits_of_lanes(order, M // order[0].shape[0], cut.tokens) if cut.whole else visits_of(order)
    first_V = jnp.asarray(first_rows(rows[0].classes))[visits.slot_V]
    ranks, scales = [row.rank_S[visits.slot_V] for row in rows], [row.scale_LS[layer, visits.slot_V] for row in rows]
    if not interpret:  # else a small pool would be copied whole into the chip's memory
        halves = [pltpu.with_memory_space_constraint(half, pltpu.HBM) for half in halves]
    scalars = [layer.reshape(1), visits.place_V, visits.slot_V, first_V, visits.fetch_V, visits.next_V]
    slots = []  # of the tokens of a tile that may have several
    if not cut.whole:
        slots = [jnp.pad(order[1], (0, M * TOKENS - order[1].shape[0]), constant_values=-1).reshape(M, TOKENS, 1)]
    columns = [(0, half.shape[3]) for half in halves] if columns is None else columns
    each, targets, K = len(halves) // len(rows), range(len(rows)), _row_tiles(rows[0])

    def block(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec(
            (pl.squeezed, *shape), lambda v, _, place, *rest: (_quotient(place[v], cut.tokens), *(0 for _ in shape))
        )

    def body(*refs) -> None:
        at = iter(refs)
        layer_ref, place, slot, first, fetch, next_visit = (next(at) for _ in scalars)
        rank_refs, scale_refs = [next(at) for _ in targets], [next(at) for _ in targets]
        slot_refs, token_refs = [next(at) for _ in slots], [next(at) for _ in tokens]
        pool_refs, out_refs = [next(at) for _ in halves], [next(at) for _ in outs]
        buffers, semaphores = [next(at) for _ in halves], next(at)
        v = pl.program_id(0)

        def copies(visit: jax.Array, act: str) -> None:
            """Starts the copies of the rows of a visit's slot, or waits for them."""
            buffer = _remainder(fetch[visit], 2)
            tile = _quotient(first[visit], ROW_TILE)
            for i, (whole, near, of) in enumerate(zip(pool_refs, buffers, columns, strict=True)):

                def one(k: jax.Array, _: None, whole=whole, near=near, of=of) -> None:
                    rows_RF = whole.at[layer_ref[0], tile + k, :, pl.ds(*of)]
                    copy = pltpu.make_async_copy(rows_RF, near.at[buffer, k], semaphores.at[buffer])
                    getattr(copy, act)()

                lax.fori_loop(0, _tile_count(first[visit], rank_refs[i // each][visit]), one, None)

        begins = (v == 0) | (fetch[v] != fetch[jnp.maximum(v - 1, 0)])

        @pl.when(v == 0)
        def _() -> None:
            copies(v, "start")

        @pl.when(begins)
        def _() -> None:
            copies(v, "wait")

            @pl.when(next_visit[v] >= 0)
            def _() -> None:
                copies(next_visit[v], "start")

        opens = _remainder(place[v], cut.tokens) == 0  # a tile's first visit: nothing is in its output yet

        for i in targets:
            near = [b.at[_remainder(fetch[v], 2)] for b in buffers[i * each : (i + 1) * each]]
            target = _Target(
                refs=near, first=_remainder(first[v], ROW_TILE), rank=rank_refs[i][v], scale=scale_refs[i][v]
            )

            def put(value: jax.Array, *place: jax.Array, ref=out_refs[i]) -> None:
                value = value.astype(ref.dtype)
                for slot_ref in slot_refs:
                    before = jnp.where(opens, jnp.zeros_like(ref[place or ...]), ref[place or ...])
                    value = jnp.where(slot_ref[...] == slot[v], value, before)
                ref[place or ...] = value

            compute(target, cut, token_refs[i % len(token_refs)], put)

    return pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct((M, *o.shape), o.dtype) for o in outs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars) + 2 * len(rows),
            grid=(visits.count,),
            in_specs=[block(x.shape[1:]) for x in (*slots, *tokens)]
            + [pl.BlockSpec(memory_space=pltpu.HBM) for _ in halves],
            out_specs=[block(o.shape) for o in outs],
            scratch_shapes=[
                pltpu.VMEM((2, K, ROW_TILE, width), t.dtype) for t, (_, width) in zip(halves, columns, strict=True)
            ]
            + [pltpu.SemaphoreType.DMA((2,))],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=blocks().vmem_bytes),
        interpret=interpret,
        name=name,
    )(*scalars, *ranks, *scales, *slots, *tokens, *halves)
