"""TPU body of `gathered_lora`: a Mosaic kernel that visits the step's tokens in the order of their slots.

One grid step, a visit, is a tile of 8 tokens and one slot of theirs: tokens lie in the order of slots, so T tokens of U
adapters take at most T/8 + U visits.  An adapter's rows are copied into the chip's memory once, when its first visit
begins, and the next adapter's while this one is computed: as many tiles of ROW_TILE rows as its rank has, of those targets
that it has, in two buffers that take turns.  Tiles hold the ends of neighbouring slots where ranks are no multiple of
them: those are selected away.  A token of the base model is never visited, and its row of the output is undefined.

`both` runs the two halves at one visit; `shrink` and `expand` are the halves, for meshes that sum h between them.

Compiled for TPU v5e and v6e and interpreted; never run on a TPU.

Shape letters: T tokens, V visits, L layers, S slots, N tiles of R rows, X Y F features in, out, any,
K tiles of the rows of the largest slot, M tiles of tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gathered_lora.pool_rows import PoolRows
from pallas_kernels.gathered_lora.rank_classes import ROW_TILE, first_rows, slot_ranks
from pallas_kernels.tiling_tpu import LANES, blocks, dot

TOKENS = 8  # of a visit
MOST_PARTS = 16  # of the features out of one target

Order = tuple[jax.Array, jax.Array, jax.Array]  # order_T, slot_T in that order, count
Rows = Sequence[PoolRows]


def fits(x_TX: jax.Array, rows: Rows) -> bool:
    """Returns whether the rows of the largest slot, twice, and a tile of tokens' input and outputs fit the chip.

    The features out of a target alone, as the head is, may be computed in parts.
    """
    return _parts(x_TX, rows) is not None


def _parts(x_TX: jax.Array, rows: Rows) -> list[int] | None:
    """Returns where the fewest parts of the features out begin that fit the chip, then where the last ends; None: none do."""
    if len(rows) > 1:
        return [0, max(row.b_LNRY.shape[3] for row in rows)] if _fits_in(x_TX, rows, None) else None
    whole = rows[0].b_LNRY.shape[3]
    for count in range(1, MOST_PARTS + 1):
        width = -(-whole // (count * LANES)) * LANES
        if _fits_in(x_TX, rows, width):
            return [*range(0, whole, width), whole]
    return None


def _fits_in(x_TX: jax.Array, rows: Rows, width: int | None) -> bool:
    """Returns whether a call fits the chip that computes so many features out; None: all."""
    out = [row.b_LNRY.shape[3] if width is None else min(width, row.b_LNRY.shape[3]) for row in rows]
    halves = [
        (n, half.dtype)
        for row, y in zip(rows, out, strict=True)
        for n, half in ((row.a_LNRX.shape[3], row.a_LNRX), (y, row.b_LNRY))
    ]
    buffers = sum(_row_tiles(rows[0]) * _tile_bytes(n, dtype) for n, dtype in halves)
    sums = max(_tile_bytes(y, jnp.float32) for y in out)
    return 2 * (buffers + sum(_tile_bytes(n, x_TX.dtype) for n in (x_TX.shape[1], *out))) + sums <= blocks().block_bytes


def both(x_TX: jax.Array, rows: Rows, layer: jax.Array, order: Order, *, interpret: bool) -> list[jax.Array]:
    """Returns what `gathered_lora` returns, undefined for tokens of the base model."""
    parts = _parts(x_TX, rows)
    assert parts is not None
    halves = [half for row in rows for half in (row.a_LNRX, row.b_LNRY)]
    tokens, got = [_tiled(x_TX, order)], []
    for start, end in itertools.pairwise(parts):
        outs = [jax.ShapeDtypeStruct((TOKENS, min(end, row.b_LNRY.shape[3]) - start), x_TX.dtype) for row in rows]
        columns = [
            n for row, y in zip(rows, outs, strict=True) for n in ((0, row.a_LNRX.shape[3]), (start, y.shape[1]))
        ]
        got.append(_visit(_both, order, layer, rows, tokens, halves, outs, interpret, "gathered_lora", columns))
    of_targets = [y[0] if len(y) == 1 else jnp.concatenate(y, -1) for y in zip(*got, strict=True)]
    return [_arrived(y.reshape(-1, y.shape[-1]), order) for y in of_targets]


def shrink(x_TX: jax.Array, rows: Rows, layer: jax.Array, order: Order, *, interpret: bool) -> list[jax.Array]:
    """Returns float32 [T, R] per target: x @ a.T, not scaled, by places in the tiles of the slot's rows."""
    K = _row_tiles(rows[0])
    outs = [jax.ShapeDtypeStruct((K, TOKENS, ROW_TILE), jnp.float32) for _ in rows]
    halves = [row.a_LNRX for row in rows]
    got = _visit(_shrink, order, layer, rows, [_tiled(x_TX, order)], halves, outs, interpret, "gathered_lora_shrink")
    return [_arrived(h.swapaxes(1, 2).reshape(-1, K * ROW_TILE), order) for h in got]


def expand(
    h_TR: Sequence[jax.Array], rows: Rows, layer: jax.Array, order: Order, dtype: jnp.dtype, *, interpret: bool
) -> list[jax.Array]:
    """Returns [T, Y] per target: (scale * h) @ b."""
    outs = [jax.ShapeDtypeStruct((TOKENS, row.b_LNRY.shape[3]), dtype) for row in rows]
    tiled = [_tiled(h, order).reshape(-1, TOKENS, h.shape[1] // ROW_TILE, ROW_TILE).swapaxes(1, 2) for h in h_TR]
    got = _visit(
        _expand, order, layer, rows, tiled, [row.b_LNRY for row in rows], outs, interpret, "gathered_lora_expand"
    )
    return [_arrived(y.reshape(-1, y.shape[-1]), order) for y in got]


def _tile_bytes(features: int, dtype: jnp.dtype) -> int:
    """Returns the bytes on the chip of 8 rows, of whatever dtype."""
    return -(-features // LANES) * LANES * ROW_TILE * jnp.dtype(dtype).itemsize


def _row_tiles(row: PoolRows) -> int:
    """Returns the tiles of rows in which the slot with the most of them lies."""
    first, ranks = first_rows(row.classes), slot_ranks(row.classes)
    return int((-(-(first + ranks) // ROW_TILE) - first // ROW_TILE).max())


def _tiled(x_TF: jax.Array, order: Order) -> jax.Array:
    """Returns tokens in the order of slots, [M, TOKENS, F]."""
    T, F = x_TF.shape
    place_T = jnp.pad(order[0], (0, -T % TOKENS))
    return x_TF[place_T].reshape(-1, TOKENS, F)


def _arrived(y_TF: jax.Array, order: Order) -> jax.Array:
    """Returns tokens, which lie in the order of slots, in the order of arrival."""
    return y_TF[_inverse(order[0])]


def _inverse(number_T: jax.Array) -> jax.Array:
    """Returns int32 [T]: where each number lies, 0 for one that does not.  T is small, and a TPU sorts slowly."""
    wanted_T = jnp.arange(number_T.shape[0], dtype=jnp.int32)
    return jnp.argmax(number_T[None] == wanted_T[:, None], axis=1).astype(jnp.int32)


@dataclass(frozen=True, kw_only=True)
class _Visits:
    """A tile of tokens and a slot of theirs each.  The same in every layer, so XLA computes them once a step."""

    count: jax.Array
    place_V: jax.Array  # int32 first token, in the order of slots
    slot_V: jax.Array
    fetch_V: jax.Array  # int32 the number of the slot among the step's distinct ones
    next_V: jax.Array  # int32 the first visit of the next slot; -1: there is none


def visits_of(order: Order) -> _Visits:
    """Returns at most T/8 + U visits of the tokens of U distinct slots; those past `count` are arbitrary."""
    _, slot_T, count = order
    place_T = jnp.arange(slot_T.shape[0], dtype=jnp.int32)
    is_new_T = (place_T == 0) | (slot_T != jnp.roll(slot_T, 1))
    starts_T = (is_new_T | (place_T % TOKENS == 0)) & (place_T < count)
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

    def own(self, k: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
        """Returns which rows of tile k are the adapter's, along this axis of a shape."""
        place = k * ROW_TILE + lax.broadcasted_iota(jnp.int32, shape, axis)
        return (place >= self.first) & (place < self.first + self.rank)


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


def _both(target: _Target, x_ref, put) -> None:
    a, b = target.refs
    x_TX = x_ref[...]
    put(_expanded(target, lambda k: dot(x_TX, a[k], (1, 1)), b, (TOKENS, b.shape[2])))


def _shrink(target: _Target, x_ref, put) -> None:
    (a,) = target.refs
    x_TX = x_ref[...]

    def tile(k: jax.Array, _: None) -> None:
        put(dot(x_TX, a[k], (1, 1)), k)

    lax.fori_loop(0, target.tiles, tile, None)


def _expand(target: _Target, h_ref, put) -> None:
    (b,) = target.refs
    put(_expanded(target, lambda k: h_ref[k], b, (TOKENS, b.shape[2])))


def _visit(
    compute,
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
    """Runs compute(target, ref of its tokens, put) for each target at every visit; returns [M, ...] of each of `outs`.

    tokens: [M, ...] of all targets together, or of each.  halves: one or two arrays [L, N, R, F] of each target.
    put(value, *place): writes the visit's own tokens.
    columns: where the features of each half begin that are read, and how many they are; None: all.
    """
    visits = visits_of(order)
    first_V = jnp.asarray(first_rows(rows[0].classes))[visits.slot_V]
    ranks, scales = [row.rank_S[visits.slot_V] for row in rows], [row.scale_LS[layer, visits.slot_V] for row in rows]
    if not interpret:  # else a small pool would be copied whole into the chip's memory
        halves = [pltpu.with_memory_space_constraint(half, pltpu.HBM) for half in halves]
    scalars = [layer.reshape(1), visits.place_V, visits.slot_V, first_V, visits.fetch_V, visits.next_V]
    slot_MT1 = jnp.pad(order[1], (0, -order[1].shape[0] % TOKENS), constant_values=-1).reshape(-1, TOKENS, 1)
    columns = [(0, half.shape[3]) for half in halves] if columns is None else columns
    each, targets, K = len(halves) // len(rows), range(len(rows)), _row_tiles(rows[0])

    def block(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec(
            (pl.squeezed, *shape), lambda v, _, place, *rest: (_quotient(place[v], TOKENS), *(0 for _ in shape))
        )

    def body(*refs) -> None:
        at = iter(refs)
        layer_ref, place, slot, first, fetch, next_visit = (next(at) for _ in scalars)
        rank_refs, scale_refs = [next(at) for _ in targets], [next(at) for _ in targets]
        slot_ref, token_refs = next(at), [next(at) for _ in tokens]
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

        opens = _remainder(place[v], TOKENS) == 0  # of a tile of tokens the first visit: nothing is in its output yet
        mine_T1 = slot_ref[...] == slot[v]

        for i in targets:
            near = [b.at[_remainder(fetch[v], 2)] for b in buffers[i * each : (i + 1) * each]]
            target = _Target(
                refs=near, first=_remainder(first[v], ROW_TILE), rank=rank_refs[i][v], scale=scale_refs[i][v]
            )

            def put(value: jax.Array, *place: jax.Array, ref=out_refs[i]) -> None:
                before = jnp.where(opens, jnp.zeros_like(ref[place or ...]), ref[place or ...])
                ref[place or ...] = jnp.where(mine_T1, value.astype(ref.dtype), before)

            compute(target, token_refs[i % len(token_refs)], put)

    return pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct((slot_MT1.shape[0], *o.shape), o.dtype) for o in outs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars) + 2 * len(rows),
            grid=(visits.count,),
            in_specs=[block((TOKENS, 1)), *(block(x.shape[1:]) for x in tokens)]
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
    )(*scalars, *ranks, *scales, slot_MT1, *tokens, *halves)
