"""CUDA bodies of `segmented_lora`, forward and backward: Triton kernels over tiles of a lane's tokens.

    shrink        h = x @ a.T                                 all targets at once: x is read once
    expand        y = h @ b                                   a call per target
    expand_back   dh = dy @ b.T, db = h.T @ dy                a call per target: dy is read once
    shrink_back   dx = (scale * dh) @ a, da = (scale * dh).T @ x        all targets at once: x is read once

Where a shrink's tokens are too few to occupy a GPU, its features are split into parts, which XLA adds up: how many
depends on the shapes alone.  Products in x's dtype, sums in float32 and in a fixed order.  Lanes are separate programs, so
what one lane holds reaches no other.  Where targets are computed together XLA concatenates their a first.

Compiled for H100 and checked with Triton's interpreter; never run on a GPU.

Shape letters: G lanes, J tokens of a lane, R LoRA rank (summed over targets where h is of all), X Y F features in,
out, any, P parts of the features in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import triton  # ty: ignore[import-not-found]
import triton.language as tl  # ty: ignore[import-not-found]
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import KEPT
from pallas_kernels.tiling_cuda import PROGRAMS, TOKENS, feature_block, power_of_two
from pallas_kernels.triton_launch import launch

LaneRows = tuple[jax.Array, jax.Array, jax.Array]  # a_GRX, b_GRY, scale_G


@triton.jit
def lane_tile(matrix, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Loads the [row, column] tile of this lane's [ROWS, COLUMNS] matrix of such an array; zero beyond its ends."""
    inside = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    lane = tl.program_id(0).to(tl.int64) * ROWS * COLUMNS
    return tl.load(matrix + lane + row[:, None] * COLUMNS + column[None, :], mask=inside, other=0.0)


@triton.jit
def _put(matrix, lane, row, column, values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    inside = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    place = matrix + lane.to(tl.int64) * ROWS * COLUMNS + row[:, None] * COLUMNS + column[None, :]
    tl.store(place, values.to(matrix.dtype.element_ty), mask=inside)


@triton.jit
def _shrink(
    x,
    a,
    h,
    J: tl.constexpr,
    X: tl.constexpr,
    R: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    PART: tl.constexpr,
):
    """Computes the sums over PART features of a tile of tokens."""
    part = tl.program_id(2)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    rank = tl.arange(0, RANK)
    total = tl.zeros((TOKENS, RANK), tl.float32)
    for start in range(0, PART, BLOCK):
        column = part * PART + start + tl.arange(0, BLOCK)
        x_JX, a_RX = lane_tile(x, token, column, J, X), lane_tile(a, rank, column, R, X)
        total = tl.dot(x_JX, tl.trans(a_RX), total, input_precision="ieee")
    _put(h, part * tl.num_programs(0) + tl.program_id(0), token, rank, total, J, R)


@triton.jit
def _expand(
    h,
    b,
    y,
    J: tl.constexpr,
    Y: tl.constexpr,
    R: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
):
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    rank = tl.arange(0, RANK)
    h_JR, b_RY = lane_tile(h, token, rank, J, R), lane_tile(b, rank, column, R, Y)
    y_JY = tl.dot(h_JR, b_RY.to(h_JR.dtype), input_precision="ieee")
    _put(y, tl.program_id(0), token, column, y_JY, J, Y)


@triton.jit
def _expand_back(
    dy,
    h,
    b,
    dh,
    db,
    G: tl.constexpr,
    J: tl.constexpr,
    Y: tl.constexpr,
    R: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
):
    """Computes dh of this block of features only, and the whole db."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rank = tl.arange(0, RANK)
    b_RY = lane_tile(b, rank, column, R, Y)
    total = tl.zeros((RANK, BLOCK), tl.float32)
    for start in range(0, J, TOKENS):
        token = start + tl.arange(0, TOKENS)
        dy_JY, h_JR = lane_tile(dy, token, column, J, Y), lane_tile(h, token, rank, J, R)
        dh_JR = tl.dot(dy_JY, tl.trans(b_RY.to(dy_JY.dtype)), input_precision="ieee")
        _put(dh, tl.program_id(1) * G + tl.program_id(0), token, rank, dh_JR, J, R)
        total = tl.dot(tl.trans(h_JR), dy_JY, total, input_precision="ieee")
    _put(db, tl.program_id(0), rank, column, total, R, Y)


@triton.jit
def _shrink_back(
    dh,
    x,
    a,
    dx,
    da,
    J: tl.constexpr,
    X: tl.constexpr,
    R: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rank = tl.arange(0, RANK)
    a_RX = lane_tile(a, rank, column, R, X)
    total = tl.zeros((RANK, BLOCK), tl.float32)
    for start in range(0, J, TOKENS):
        token = start + tl.arange(0, TOKENS)
        dh_JR, x_JX = lane_tile(dh, token, rank, J, R), lane_tile(x, token, column, J, X)
        _put(dx, tl.program_id(0), token, column, tl.dot(dh_JR, a_RX, input_precision="ieee"), J, X)
        total = tl.dot(tl.trans(dh_JR), x_JX, total, input_precision="ieee")
    _put(da, tl.program_id(0), rank, column, total, R, X)


def forward(x_GJX: jax.Array, rows: Sequence[LaneRows]) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Returns ([G, J, Y] per target, scaled h_GJR of all targets side by side), in x's dtype."""
    scale_GR = jnp.concatenate([jnp.repeat(s[:, None], a.shape[1], axis=1) for a, _, s in rows], axis=1)
    h_GJR = _shrunk(x_GJX, [a for a, _, _ in rows]) * scale_GR[:, None, :]
    h_GJR = checkpoint_name(h_GJR.astype(x_GJX.dtype), KEPT)
    parts = _split(h_GJR, [b.shape[1] for _, b, _ in rows], axis=2)
    return tuple(_expanded(h, b) for h, (_, b, _) in zip(parts, rows, strict=True)), h_GJR


@jax.named_scope("segmented_lora_shrink")
def _shrunk(x_GJX: jax.Array, a_rows: Sequence[jax.Array]) -> jax.Array:
    """Returns float32 h_GJR of all targets side by side, not scaled.

    XLA computes a kernel's result twice if the kernel's own output is both stacked by a scan and used: this avoids it.
    """
    G, J, X = x_GJX.shape
    a_GRX = jnp.concatenate([a.astype(x_GJX.dtype) for a in a_rows], axis=1)
    R = a_GRX.shape[1]
    constants = _common(J, R, X)
    tiles, blocks = math.ceil(J / TOKENS), math.ceil(X / constants["BLOCK"])
    part = math.ceil(blocks / max(1, PROGRAMS // (G * tiles)))  # blocks of a part
    parts = math.ceil(blocks / part)
    h_PGJR = launch(
        x_GJX,
        a_GRX,
        kernel=_shrink,
        name="segmented_lora_shrink",
        out_type=jax.ShapeDtypeStruct((parts, G, J, R), jnp.float32),
        grid=(G, tiles, parts),
        X=X,
        PART=part * constants["BLOCK"],
        **constants,
    )
    return h_PGJR.sum(0)


@jax.named_scope("segmented_lora_expand")
def _expanded(h_GJR: jax.Array, b_GRY: jax.Array) -> jax.Array:
    """Returns [G, J, Y]."""
    G, J, R = h_GJR.shape
    Y = b_GRY.shape[2]
    constants = _common(J, R, Y)
    return launch(
        h_GJR,
        b_GRY,
        kernel=_expand,
        name="segmented_lora_expand",
        out_type=jax.ShapeDtypeStruct((G, J, Y), h_GJR.dtype),
        grid=(G, math.ceil(J / TOKENS), math.ceil(Y / constants["BLOCK"])),
        Y=Y,
        **constants,
    )


@jax.named_scope("segmented_lora_expand_back")
def expand_back(dy_GJY: jax.Array, h_GJR: jax.Array, b_GRY: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns float32 (dh_GJR, db_GRY) of y = h @ b."""
    G, J, Y = dy_GJY.shape
    R = h_GJR.shape[2]
    constants = _common(J, R, Y)
    blocks = math.ceil(Y / constants["BLOCK"])
    parts, db = launch(
        dy_GJY,
        h_GJR,
        b_GRY,
        kernel=_expand_back,
        name="segmented_lora_expand_back",
        out_type=(
            jax.ShapeDtypeStruct((blocks, G, J, R), jnp.float32),
            jax.ShapeDtypeStruct((G, R, Y), jnp.float32),
        ),
        grid=(G, blocks),
        G=G,
        Y=Y,
        **constants,
    )
    return parts.sum(0), db


@jax.named_scope("segmented_lora_shrink_back")
def shrink_back(
    dh_GJR: jax.Array, x_GJX: jax.Array, a_rows: Sequence[jax.Array]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns (dx_GJX, float32 da_GRX per target) of h = x @ a.T, targets side by side; dh is scaled, in x's dtype."""
    G, J, X = x_GJX.shape
    a_GRX = jnp.concatenate([a.astype(x_GJX.dtype) for a in a_rows], axis=1)
    R = a_GRX.shape[1]
    constants = _common(J, R, X)
    dx_GJX, da_GRX = launch(
        dh_GJR,
        x_GJX,
        a_GRX,
        kernel=_shrink_back,
        name="segmented_lora_shrink_back",
        out_type=(
            jax.ShapeDtypeStruct(x_GJX.shape, x_GJX.dtype),
            jax.ShapeDtypeStruct((G, R, X), jnp.float32),
        ),
        grid=(G, math.ceil(X / constants["BLOCK"])),
        X=X,
        **constants,
    )
    return dx_GJX, tuple(_split(da_GRX, [a.shape[1] for a in a_rows], axis=1))


def _split(beside: jax.Array, sizes: Sequence[int], axis: int) -> list[jax.Array]:
    """Returns each target's part."""
    return jnp.split(beside, np.cumsum(sizes)[:-1].tolist(), axis=axis)


def _common(tokens: int, rank: int, features: int) -> dict[str, int]:
    """Returns the constants of all kernels."""
    return {
        "J": tokens,
        "R": rank,
        "TOKENS": TOKENS,
        "BLOCK": feature_block(rank, features),
        "RANK": power_of_two(rank),
    }
