"""TPU bodies of `segmented_lora`, forward and backward: Mosaic kernels over blocks of a lane's tokens.

    forward     h = scale * (x @ a.T), y = h @ b           all targets in one kernel: x is read once, h stays on the chip
    backward 1  dh = dy @ b.T, db = h.T @ dy               one kernel per target: dy is read once
    backward 2  dx = (scale * dh) @ a, da = (scale * dh).T @ x        all targets in one kernel: x is read once

Products in x's dtype, sums in float32.  Lanes are separate blocks, so what one lane holds reaches no other.

Shape letters: G lanes, J tokens of a lane, R LoRA rank (summed over targets where h is of all), X Y features in, out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import KEPT
from pallas_kernels.tiling_tpu import blocks, dot, feature_splits, padded_bytes, token_block

Cut = tuple[int, int]  # tokens of a block, number of blocks of the features


def forward_cut(x_GJX: jax.Array, rows: Sequence[tuple[jax.Array, jax.Array, jax.Array]]) -> Cut | None:
    """Returns how the forward kernel divides tokens and output features; None when nothing fits the chip."""
    J, X = x_GJX.shape[1:]
    ranks = [a.shape[1] for a, _, _ in rows]

    def needed(tokens: int, splits: int) -> int:
        inputs = padded_bytes(tokens, X, x_GJX.dtype) + sum(padded_bytes(a.shape[1], X, a.dtype) for a, _, _ in rows)
        expand = sum(
            padded_bytes(b.shape[1], b.shape[2] // splits, b.dtype)
            + padded_bytes(tokens, b.shape[2] // splits, x_GJX.dtype)
            for _, b, _ in rows
        )
        return 2 * (inputs + expand) + padded_bytes(tokens, sum(ranks), jnp.float32)

    return _first_cut(J, tuple(b.shape[2] for _, b, _ in rows), needed)


def expand_back_cut(tokens_of_lane: int, dtype: jnp.dtype, b_GRY: jax.Array) -> Cut | None:
    """Returns how the first backward kernel divides tokens and output features."""
    J, R = tokens_of_lane, b_GRY.shape[1]

    def needed(tokens: int, splits: int) -> int:
        part = b_GRY.shape[2] // splits
        rows = padded_bytes(R, part, b_GRY.dtype) + padded_bytes(R, part, jnp.float32)
        lane = padded_bytes(tokens, part, dtype) + padded_bytes(tokens, R, dtype)
        return 2 * (rows + lane + padded_bytes(J, R, jnp.float32))

    return _first_cut(J, (b_GRY.shape[2],), needed)


def shrink_back_cut(x_GJX: jax.Array, a_rows: Sequence[jax.Array]) -> Cut | None:
    """Returns how the second backward kernel divides tokens and input features."""
    J, X = x_GJX.shape[1:]
    R = sum(a.shape[1] for a in a_rows)

    def needed(tokens: int, splits: int) -> int:
        rows = sum(padded_bytes(a.shape[1], X // splits, a.dtype) for a in a_rows)
        rows += padded_bytes(R, X // splits, jnp.float32)
        return 2 * (rows + 2 * padded_bytes(tokens, X // splits, x_GJX.dtype) + padded_bytes(tokens, R, x_GJX.dtype))

    return _first_cut(J, (X,), needed)


def _first_cut(tokens: int, features: tuple[int, ...], needed: Callable[[int, int], int]) -> Cut | None:
    """Returns the largest token block, then the fewest feature blocks, that fit."""
    limit = blocks().tokens
    while True:
        block = token_block(tokens, limit)
        for splits in feature_splits(features):
            if needed(block, splits) <= blocks().block_bytes:
                return block, splits
        limit = min(limit, block) // 2
        if limit < 16:
            return None


def fits(x_GJX: jax.Array, rows: Sequence[tuple[jax.Array, jax.Array, jax.Array]]) -> bool:
    """Returns whether every kernel, forward and backward, has a cut that fits the chip."""
    cuts = [forward_cut(x_GJX, rows), shrink_back_cut(x_GJX, [a for a, _, _ in rows])]
    cuts += [expand_back_cut(x_GJX.shape[1], x_GJX.dtype, b) for _, b, _ in rows]
    return None not in cuts


def forward(
    x_GJX: jax.Array, rows: Sequence[tuple[jax.Array, jax.Array, jax.Array]], *, interpret: bool
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Returns ([G, J, Y] per target, scaled h_GJR of all targets side by side), in x's dtype."""
    G, J, X = x_GJX.shape
    dtype = x_GJX.dtype
    cut = forward_cut(x_GJX, rows)
    assert cut is not None
    tokens, splits = cut
    ranks = [a.shape[1] for a, _, _ in rows]
    ends = np.cumsum(ranks).tolist()
    K, R = len(rows), ends[-1]
    sq = pl.squeezed

    def body(*refs) -> None:
        scales, x, refs = refs[:K], refs[K], refs[K + 1 :]
        a, b, y, h_out, h_scratch = refs[:K], refs[K : 2 * K], refs[2 * K : 3 * K], refs[3 * K], refs[3 * K + 1]
        g = pl.program_id(0)

        @pl.when(pl.program_id(2) == 0)
        def shrink() -> None:
            a_RX = jnp.concatenate([half[...].astype(dtype) for half in a], axis=0)
            h = (dot(x[...], a_RX, (1, 1)) * _beside([s[g] for s in scales], ends)).astype(dtype)
            h_scratch[...] = h
            h_out[...] = h

        h = h_scratch[...]
        for k in range(K):
            part = h[:, ends[k] - ranks[k] : ends[k]]
            y[k][...] = dot(part, b[k][...].astype(dtype), (1, 0)).astype(dtype)

    def lane(g, j, y, *_):
        return g, 0, 0

    def token(g, j, y, *_):
        return g, j, 0

    out = pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct((G, J, b.shape[2]), dtype) for _, b, _ in rows]
        + [jax.ShapeDtypeStruct((G, J, R), dtype)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=K,
            grid=(G, J // tokens, splits),
            in_specs=[pl.BlockSpec((sq, tokens, X), token)]
            + [pl.BlockSpec((sq, *a.shape[1:]), lane) for a, _, _ in rows]
            + [pl.BlockSpec((sq, b.shape[1], b.shape[2] // splits), lambda g, j, y, *_: (g, 0, y)) for _, b, _ in rows],
            out_specs=[
                pl.BlockSpec((sq, tokens, b.shape[2] // splits), lambda g, j, y, *_: (g, j, y)) for _, b, _ in rows
            ]
            + [pl.BlockSpec((sq, tokens, R), token)],
            scratch_shapes=[pltpu.VMEM((tokens, R), dtype)],
        ),
        compiler_params=_compiler(),
        interpret=interpret,
        name="segmented_lora",
    )(*(s for _, _, s in rows), x_GJX, *(a for a, _, _ in rows), *(b for _, b, _ in rows))
    return tuple(out[:K]), checkpoint_name(out[K], KEPT)


def _beside(values: Sequence[jax.Array], ends: Sequence[int]) -> jax.Array:
    """Returns float32 [1, R]: value k in the columns before ends[k]."""
    column = lax.broadcasted_iota(jnp.int32, (1, ends[-1]), 1)
    out = jnp.full((1, ends[-1]), values[-1], jnp.float32)
    for value, end in list(zip(values, ends, strict=True))[-2::-1]:
        out = jnp.where(column < end, value, out)
    return out


def expand_back(
    dy_GJY: jax.Array, h_GJR: jax.Array, b_GRY: jax.Array, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns float32 (dh_GJR, db_GRY) of y = h @ b."""
    G, J, Y = dy_GJY.shape
    R = h_GJR.shape[2]
    cut = expand_back_cut(J, h_GJR.dtype, b_GRY)
    assert cut is not None
    tokens, splits = cut
    part = Y // splits
    sq = pl.squeezed

    def body(dy, h, b, dh, db) -> None:
        y, j = pl.program_id(1), pl.program_id(2)
        rows = pl.ds(pl.multiple_of(j * tokens, tokens), tokens)
        dy_JY = dy[...]
        new_dh = dot(dy_JY, b[...].astype(dy_JY.dtype), (1, 1))
        new_db = dot(h[...], dy_JY, (0, 0))
        dh[rows, :] = jnp.where(y == 0, new_dh, dh[rows, :] + new_dh)
        db[...] = jnp.where(j == 0, new_db, db[...] + new_db)

    dh, db = pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct((G, J, R), jnp.float32), jax.ShapeDtypeStruct((G, R, Y), jnp.float32)],
        grid=(G, splits, J // tokens),
        in_specs=[
            pl.BlockSpec((sq, tokens, part), lambda g, y, j: (g, j, y)),
            pl.BlockSpec((sq, tokens, R), lambda g, y, j: (g, j, 0)),
            pl.BlockSpec((sq, R, part), lambda g, y, j: (g, 0, y)),
        ],
        out_specs=[
            pl.BlockSpec((sq, J, R), lambda g, y, j: (g, 0, 0)),
            pl.BlockSpec((sq, R, part), lambda g, y, j: (g, 0, y)),
        ],
        compiler_params=_compiler(),
        interpret=interpret,
        name="segmented_lora_expand_back",
    )(dy_GJY, h_GJR, b_GRY)
    return dh, db


def shrink_back(
    dh_GJR: jax.Array, x_GJX: jax.Array, a_rows: Sequence[jax.Array], *, interpret: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns (dx_GJX, float32 da_GRX per target) of h = x @ a.T, targets side by side; dh is scaled, in x's dtype."""
    G, J, X = x_GJX.shape
    dtype = x_GJX.dtype
    cut = shrink_back_cut(x_GJX, a_rows)
    assert cut is not None
    tokens, splits = cut
    part = X // splits
    ranks = [a.shape[1] for a in a_rows]
    ends = np.cumsum(ranks).tolist()
    K, R = len(a_rows), ends[-1]
    sq = pl.squeezed

    def body(dh, x, *refs) -> None:
        a, dx, da = refs[:K], refs[K], refs[K + 1 :]
        j = pl.program_id(2)
        a_RX = jnp.concatenate([half[...].astype(dtype) for half in a], axis=0)
        dx[...] = dot(dh[...], a_RX, (1, 0)).astype(dtype)
        new_da = dot(dh[...], x[...], (0, 0))
        for k in range(K):
            new = new_da[ends[k] - ranks[k] : ends[k]]
            da[k][...] = jnp.where(j == 0, new, da[k][...] + new)

    def token(g, f, j):
        return g, j, f

    def row(g, f, j):
        return g, 0, f

    out = pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(x_GJX.shape, dtype)]
        + [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in a_rows],
        grid=(G, splits, J // tokens),
        in_specs=[pl.BlockSpec((sq, tokens, R), lambda g, f, j: (g, j, 0)), pl.BlockSpec((sq, tokens, part), token)]
        + [pl.BlockSpec((sq, r, part), row) for r in ranks],
        out_specs=[pl.BlockSpec((sq, tokens, part), token)] + [pl.BlockSpec((sq, r, part), row) for r in ranks],
        compiler_params=_compiler(),
        interpret=interpret,
        name="segmented_lora_shrink_back",
    )(dh_GJR, x_GJX, *a_rows)
    return out[0], tuple(out[1:])


def _compiler() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=blocks().vmem_bytes
    )
