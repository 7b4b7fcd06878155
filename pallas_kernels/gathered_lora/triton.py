"""CUDA body of `gathered_lora`: two Triton kernels that visit the step's tokens in the order of their slots.

    shrink   h = x @ a.T            a program per run of tokens, part of the input features and target
    expand   y = (scale * h) @ b    a program per run of tokens and block of output features of a target

A run is up to 16 tokens that follow each other in the order of visits and share a slot: its adapter's rows are read
once, from the pool in place.  A program whose token does not lead a run exits, so a token of the base model reads
nothing, and its row of the output is undefined.  The parts of h are summed in a fixed order.

Compiled for H100 and checked with Triton's interpreter; never run on a GPU.

A program reads its adapter's true rank of rows of a target, and none where the adapter lacks it.

Shape letters: T tokens, L layers, S slots, N rows of all slots, R rows of the largest slot (summed over targets where h
is of all), X Y features in, out, P parts of the input features.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import triton  # ty: ignore[import-not-found]
import triton.language as tl  # ty: ignore[import-not-found]

from pallas_kernels.gathered_lora.pool_rows import PoolRows
from pallas_kernels.gathered_lora.rank_classes import first_rows
from pallas_kernels.tiling_cuda import DOT, feature_block, power_of_two
from pallas_kernels.triton_launch import launch

Visits = tuple[jax.Array, jax.Array, jax.Array]  # order_T, slot_T in that order, count
Rows = Sequence[PoolRows]
PARTS = 8  # largest number of parts of the input features: one adapter alone should still use several processors


@triton.jit
def _run(order, slot, T: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    """Returns (slot, tokens [TILE], which of them are in the run, whether there is a run) of this program's visit."""
    i = tl.program_id(0)
    here = tl.load(slot + i)
    places = tl.arange(0, COLUMNS)
    slots = tl.load(slot + places, mask=places < T, other=-1)
    before = tl.sum(((slots == here) & (places < i)).to(tl.int32), axis=0)
    place = i + tl.arange(0, TILE)
    of_run = (place < T) & (tl.load(slot + place, mask=place < T, other=-1) == here)
    token = tl.load(order + place, mask=of_run, other=0)
    return here.to(tl.int64), token.to(tl.int64), of_run, (here >= 0) & (before % TILE == 0)


@triton.jit
def _shrink(
    x,
    layer,
    order,
    slot,
    first,
    a,
    ranks,
    h,
    T: tl.constexpr,
    N: tl.constexpr,
    X: tl.constexpr,
    RANKS: tl.constexpr,
    STARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    here, token, of_run, leads = _run(order, slot, T, COLUMNS, TILE)
    part = tl.program_id(1)
    if leads:
        rank = tl.arange(0, RANK)
        for k in tl.static_range(len(RANKS)):
            if tl.program_id(2) == k:
                row = tl.load(layer).to(tl.int64) * N + tl.load(first + here) + rank
                own = tl.load(ranks[k] + here)
                total = tl.zeros((TILE, RANK), tl.float32)
                for start in range(0, PART, BLOCK):
                    column = part * PART + start + tl.arange(0, BLOCK)
                    inside = column < X
                    x_TX = tl.load(
                        x + token[:, None] * X + column[None, :], mask=of_run[:, None] & inside[None, :], other=0.0
                    )
                    a_RX = tl.load(
                        a[k] + row[:, None] * X + column[None, :],
                        mask=(rank < own)[:, None] & inside[None, :],
                        other=0.0,
                    )
                    total = tl.dot(x_TX.to(DTYPE), tl.trans(a_RX.to(DTYPE)), total, input_precision="ieee")
                tl.store(
                    h + (part * T + token[:, None]) * STARTS[len(RANKS)] + STARTS[k] + rank[None, :],
                    total,
                    mask=of_run[:, None] & (rank < RANKS[k])[None, :],
                )


@triton.jit
def _expand(
    h,
    layer,
    order,
    slot,
    first,
    b,
    scale,
    ranks,
    y,
    T: tl.constexpr,
    N: tl.constexpr,
    S: tl.constexpr,
    PARTS: tl.constexpr,
    RANKS: tl.constexpr,
    STARTS: tl.constexpr,
    SIZES: tl.constexpr,
    Y_STARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
):
    here, token, of_run, leads = _run(order, slot, T, COLUMNS, TILE)
    block = tl.program_id(1)
    if leads:
        rank = tl.arange(0, RANK)
        own_layer = tl.load(layer).to(tl.int64)
        row = own_layer * N + tl.load(first + here) + rank
        for k in tl.static_range(len(RANKS)):
            if (block >= BLOCKS[k]) & (block < BLOCKS[k + 1]):
                own = tl.load(ranks[k] + here)
                total = tl.zeros((TILE, RANK), tl.float32)
                for part in range(PARTS):
                    total += tl.load(
                        h + (part * T + token[:, None]) * STARTS[len(RANKS)] + STARTS[k] + rank[None, :],
                        mask=of_run[:, None] & (rank < own)[None, :],
                        other=0.0,
                    )
                column = (block - BLOCKS[k]) * BLOCK + tl.arange(0, BLOCK)
                inside = column < SIZES[k]
                b_RY = tl.load(
                    b[k] + row[:, None] * SIZES[k] + column[None, :],
                    mask=(rank < own)[:, None] & inside[None, :],
                    other=0.0,
                )
                h_TR = (total * tl.load(scale[k] + own_layer * S + here)).to(b_RY.dtype)
                y_TY = tl.dot(h_TR, b_RY, input_precision="ieee")
                tl.store(
                    y + token[:, None] * Y_STARTS[len(RANKS)] + Y_STARTS[k] + column[None, :],
                    y_TY.to(y.dtype.element_ty),
                    mask=of_run[:, None] & inside[None, :],
                )


def both(x_TX: jax.Array, rows: Rows, layer: jax.Array, visits: Visits) -> list[jax.Array]:
    """Returns what `gathered_lora` returns, undefined for tokens of the base model."""
    return _expand_parts(_shrink_parts(x_TX, rows, layer, visits), rows, layer, visits, x_TX.dtype)


def shrink(x_TX: jax.Array, rows: Rows, layer: jax.Array, visits: Visits) -> list[jax.Array]:
    """Returns float32 [T, R] per target: x @ a.T, not scaled."""
    return _split(_shrink_parts(x_TX, rows, layer, visits).sum(0), [row.rank for row in rows])


def expand(
    h_TR: Sequence[jax.Array], rows: Rows, layer: jax.Array, visits: Visits, dtype: jnp.dtype
) -> list[jax.Array]:
    """Returns [T, Y] per target: (scale * h) @ b."""
    return _expand_parts(jnp.concatenate(h_TR, axis=1)[None], rows, layer, visits, dtype)


@jax.named_scope("gathered_lora_shrink")
def _shrink_parts(x_TX: jax.Array, rows: Rows, layer: jax.Array, visits: Visits) -> jax.Array:
    """Returns float32 [P, T, R] of all targets side by side."""
    T, X = x_TX.shape
    ranks = [row.rank for row in rows]
    block = feature_block(max(ranks), X)
    part = math.ceil(math.ceil(X / block) / PARTS) * block
    parts = math.ceil(X / part)
    dtype = jnp.result_type(x_TX, *(row.a_LNRX for row in rows))
    return launch(
        x_TX,
        layer.reshape(1),
        *visits[:2],
        jnp.asarray(first_rows(rows[0].classes)),
        tuple(row.a_LNRX for row in rows),
        tuple(row.rank_S for row in rows),
        kernel=_shrink,
        name="gathered_lora_shrink",
        out_type=jax.ShapeDtypeStruct((parts, T, sum(ranks)), jnp.float32),
        grid=(T, parts, len(rows)),
        X=X,
        PART=part,
        BLOCK=block,
        DTYPE=tl.float32 if dtype == jnp.float32 else tl.bfloat16,
        **_common(rows, T),
    )


@jax.named_scope("gathered_lora_expand")
def _expand_parts(h_PTR: jax.Array, rows: Rows, layer: jax.Array, visits: Visits, dtype: jnp.dtype) -> list[jax.Array]:
    T = h_PTR.shape[1]
    sizes = [row.b_LNRY.shape[3] for row in rows]
    block = feature_block(rows[0].rank, max(sizes))
    blocks = _starts([math.ceil(size / block) for size in sizes])
    y_TY = launch(
        h_PTR,
        layer.reshape(1),
        *visits[:2],
        jnp.asarray(first_rows(rows[0].classes)),
        tuple(row.b_LNRY for row in rows),
        tuple(row.scale_LS for row in rows),
        tuple(row.rank_S for row in rows),
        kernel=_expand,
        name="gathered_lora_expand",
        out_type=jax.ShapeDtypeStruct((T, sum(sizes)), dtype),
        grid=(T, blocks[-1]),
        S=rows[0].rank_S.shape[0],
        PARTS=h_PTR.shape[0],
        SIZES=tuple(sizes),
        Y_STARTS=_starts(sizes),
        BLOCKS=blocks,
        BLOCK=block,
        **_common(rows, T),
    )
    return _split(y_TY, sizes)


def _common(rows: Rows, tokens: int) -> dict[str, int | tuple[int, ...]]:
    """Returns the constants of both kernels."""
    ranks = tuple(row.rank for row in rows)
    return {
        "T": tokens,
        "N": rows[0].a_LNRX.shape[1] * rows[0].a_LNRX.shape[2],
        "RANKS": ranks,
        "STARTS": _starts(ranks),
        "COLUMNS": power_of_two(tokens),
        "TILE": DOT,
        "RANK": power_of_two(max(ranks)),
    }


def _starts(sizes: Sequence[int]) -> tuple[int, ...]:
    """Returns where each begins when they lie side by side, and the end."""
    return (0, *itertools.accumulate(sizes))


def _split(beside: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    starts = _starts(sizes)
    return [beside[:, start:end] for start, end in itertools.pairwise(starts)]
