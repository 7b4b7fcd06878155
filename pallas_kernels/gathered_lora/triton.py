"""CUDA body of `gathered_lora`: two Triton kernels that visit the step's lanes in the order of their slots.

    shrink   h = x @ a.T            a program per run of tokens, part of the input features and target
    expand   y = (scale * h) @ b    a program per run of tokens and block of output features of a target

Where lanes have one token a run is up to 16 that follow each other in the order of visits and share a slot; else it is 32
tokens of a lane.  A run reads its adapter's rows once, from the pool in place: the programs of a run's targets, and of the
runs of an adapter, are near each other, so that one of them finds what another has read.  A program whose token does not
lead a run exits, so a token of the base model reads nothing, and its row of the output is undefined.  The parts of h are
summed in a fixed order; how many depends on the shapes alone.

Compiled for H100 and checked with Triton's interpreter; never run on a GPU.

A program reads its adapter's true rank of rows of a target, and none where the adapter lacks it.

Shape letters: T tokens, G lanes, J tokens of a lane, L layers, S slots, N rows of all slots, R rows of the largest slot (summed over targets where h
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

from pallas_kernels.gathered_lora.pool_rows import Order, PoolRows
from pallas_kernels.gathered_lora.rank_classes import first_rows
from pallas_kernels.tiling_cuda import DOT, PROGRAMS, TOKENS, feature_block, power_of_two
from pallas_kernels.triton_launch import launch

Rows = Sequence[PoolRows]
PARTS = 8  # largest number of parts of the input features: one adapter alone should still use several processors


@triton.jit
def _run(order, slot, G: tl.constexpr, J: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    """Returns (slot, tokens [TILE], which of them are in the run, whether there is a run) of this program's visit."""
    visit = tl.program_id(1)
    if J == 1:
        here = tl.load(slot + visit)
        places = tl.arange(0, COLUMNS)
        slots = tl.load(slot + places, mask=places < G, other=-1)
        before = tl.sum(((slots == here) & (places < visit)).to(tl.int32), axis=0)
        place = visit + tl.arange(0, TILE)
        of_run = (place < G) & (tl.load(slot + place, mask=place < G, other=-1) == here)
        token = tl.load(order + place, mask=of_run, other=0).to(tl.int64)
        leads = (here >= 0) & (before % TILE == 0)
    else:
        runs = tl.cdiv(J, TILE)
        here = tl.load(slot + visit // runs)
        place = visit % runs * TILE + tl.arange(0, TILE)
        of_run = place < J
        token = tl.load(order + visit // runs).to(tl.int64) * J + place
        leads = here >= 0
    return here.to(tl.int64), token, of_run, leads


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
    G: tl.constexpr,
    J: tl.constexpr,
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
    here, token, of_run, leads = _run(order, slot, G, J, COLUMNS, TILE)
    part = tl.program_id(2)
    if leads:
        rank = tl.arange(0, RANK)
        for k in tl.static_range(len(RANKS)):
            if tl.program_id(0) == k:
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
                    h + (part * G * J + token[:, None]) * STARTS[len(RANKS)] + STARTS[k] + rank[None, :],
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
    G: tl.constexpr,
    J: tl.constexpr,
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
    here, token, of_run, leads = _run(order, slot, G, J, COLUMNS, TILE)
    block = tl.program_id(0)
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
                        h + (part * G * J + token[:, None]) * STARTS[len(RANKS)] + STARTS[k] + rank[None, :],
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


def both(x_TX: jax.Array, rows: Rows, layer: jax.Array, visits: Order) -> list[jax.Array]:
    """Returns what `gathered_lora` returns, undefined for tokens of the base model."""
    return _expand_parts(_shrink_parts(x_TX, rows, layer, visits), rows, layer, visits, x_TX.dtype)


def shrink(x_TX: jax.Array, rows: Rows, layer: jax.Array, visits: Order) -> list[jax.Array]:
    """Returns float32 [T, R] per target: x @ a.T, not scaled."""
    return _split(_shrink_parts(x_TX, rows, layer, visits).sum(0), [row.rank for row in rows])


def expand(h_TR: Sequence[jax.Array], rows: Rows, layer: jax.Array, visits: Order, dtype: jnp.dtype) -> list[jax.Array]:
    """Returns [T, Y] per target: (scale * h) @ b."""
    return _expand_parts(jnp.concatenate(h_TR, axis=1)[None], rows, layer, visits, dtype)


@jax.named_scope("gathered_lora_shrink")
def _shrink_parts(x_TX: jax.Array, rows: Rows, layer: jax.Array, visits: Order) -> jax.Array:
    """Returns float32 [P, T, R] of all targets side by side."""
    T, X = x_TX.shape
    constants, visited = _common(rows, T, visits)
    ranks = constants["RANKS"]
    block = feature_block(max(ranks), X)
    wanted = PARTS if constants["J"] == 1 else min(PARTS, max(1, PROGRAMS // (visited * len(rows))))
    part = math.ceil(math.ceil(X / block) / wanted) * block
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
        grid=(len(rows), visited, parts),
        X=X,
        PART=part,
        BLOCK=block,
        DTYPE=tl.float32 if dtype == jnp.float32 else tl.bfloat16,
        **constants,
    )


@jax.named_scope("gathered_lora_expand")
def _expand_parts(h_PTR: jax.Array, rows: Rows, layer: jax.Array, visits: Order, dtype: jnp.dtype) -> list[jax.Array]:
    T = h_PTR.shape[1]
    constants, visited = _common(rows, T, visits)
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
        grid=(blocks[-1], visited),
        S=rows[0].rank_S.shape[0],
        PARTS=h_PTR.shape[0],
        SIZES=tuple(sizes),
        Y_STARTS=_starts(sizes),
        BLOCKS=blocks,
        BLOCK=block,
        **constants,
    )
    return _split(y_TY, sizes)


def _common(rows: Rows, tokens: int, visits: Order) -> tuple[dict, int]:
    """Returns (the constants of both kernels, the visits of each)."""
    ranks, G = tuple(row.rank for row in rows), visits[0].shape[0]
    J = tokens // G
    constants = {
        "G": G,
        "J": J,
        "N": rows[0].a_LNRX.shape[1] * rows[0].a_LNRX.shape[2],
        "RANKS": ranks,
        "STARTS": _starts(ranks),
        "COLUMNS": power_of_two(G),
        "TILE": DOT if J == 1 else TOKENS,
        "RANK": power_of_two(max(ranks)),
    }
    return constants, G if J == 1 else G * math.ceil(J / TOKENS)


def _starts(sizes: Sequence[int]) -> tuple[int, ...]:
    """Returns where each begins when they lie side by side, and the end."""
    return (0, *itertools.accumulate(sizes))


def _split(beside: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    starts = _starts(sizes)
    return [beside[:, start:end] for start, end in itertools.pairwise(starts)]
