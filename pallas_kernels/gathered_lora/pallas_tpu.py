"""TPU body of `gathered_lora`: a Mosaic kernel that visits the step's tokens in the order of their slots.

One grid step is one token of an adapter.  The pipeline fetches a block only when its index changes, so an adapter's rows
are read once however many tokens it has, from the pool in place.  The grid is as long as there are tokens with an
adapter: a token of the base model is never visited, and its row of the output is undefined.

`both` runs the two halves at one visit; `shrink` and `expand` are the halves, for meshes that sum h between them.

Shape letters: T tokens, L layers, S slots, R LoRA rank, X Y F features in, out, any.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tiling_tpu import blocks, dot, padded_bytes

Visits = tuple[jax.Array, jax.Array, jax.Array]  # order_T, slot_T in that order, count
Rows = Sequence[tuple[jax.Array, jax.Array, jax.Array]]  # a_LSRX, b_LSRY, scale_LS of each target


def fits(x_TX: jax.Array, rows: Rows) -> bool:
    """Returns whether the rows of one adapter, twice, and a token's input and outputs fit the chip."""
    a_and_b = sum(padded_bytes(*half.shape[2:], half.dtype) for a, b, _ in rows for half in (a, b))
    features = [x_TX.shape[1], *(b.shape[-1] for _, b, _ in rows)]
    return 2 * (a_and_b + sum(padded_bytes(1, n, x_TX.dtype) for n in features)) <= blocks().block_bytes


def both(x_TX: jax.Array, rows: Rows, layer: jax.Array, visits: Visits, *, interpret: bool) -> list[jax.Array]:
    """Returns what `gathered_lora` returns, undefined for tokens of the base model."""

    def compute(scales, tokens, halves) -> list[jax.Array]:
        h = [dot(tokens[0], a_RX, (1, 1)) * scale for scale, a_RX in zip(scales, halves[::2], strict=True)]
        return [dot(h_1R.astype(b_RY.dtype), b_RY, (1, 0)) for h_1R, b_RY in zip(h, halves[1::2], strict=True)]

    halves = [half for a, b, _ in rows for half in (a, b)]
    outs = [jax.ShapeDtypeStruct((b.shape[-1],), x_TX.dtype) for _, b, _ in rows]
    scales = _scales(rows, layer, visits)
    return _visit(compute, visits, layer, scales, [x_TX], halves, outs, interpret, "gathered_lora")


def shrink(x_TX: jax.Array, rows: Rows, layer: jax.Array, visits: Visits, *, interpret: bool) -> list[jax.Array]:
    """Returns float32 [T, R] per target: x @ a.T, not scaled."""

    def compute(scales, tokens, a_rows) -> list[jax.Array]:
        return [dot(tokens[0], a_RX, (1, 1)) for a_RX in a_rows]

    outs = [jax.ShapeDtypeStruct((a.shape[2],), jnp.float32) for a, _, _ in rows]
    return _visit(compute, visits, layer, [], [x_TX], [a for a, _, _ in rows], outs, interpret, "gathered_lora_shrink")


def expand(
    h_TR: Sequence[jax.Array], rows: Rows, layer: jax.Array, visits: Visits, dtype: jnp.dtype, *, interpret: bool
) -> list[jax.Array]:
    """Returns [T, Y] per target: (scale * h) @ b."""

    def compute(scales, tokens, b_rows) -> list[jax.Array]:
        scaled = [(h * scale).astype(b.dtype) for h, scale, b in zip(tokens, scales, b_rows, strict=True)]
        return [dot(h_1R, b_RY, (1, 0)) for h_1R, b_RY in zip(scaled, b_rows, strict=True)]

    outs = [jax.ShapeDtypeStruct((b.shape[-1],), dtype) for _, b, _ in rows]
    scales, b_rows = _scales(rows, layer, visits), [b for _, b, _ in rows]
    return _visit(compute, visits, layer, scales, h_TR, b_rows, outs, interpret, "gathered_lora_expand")


def _scales(rows: Rows, layer: jax.Array, visits: Visits) -> list[jax.Array]:
    """Returns float32 [T] per target, in the order of visits; slot 0's, unused, where there is none."""
    safe_T = jnp.maximum(visits[1], 0)
    return [scale_LS[layer, safe_T] for _, _, scale_LS in rows]


def _visit(
    compute: Callable[[Sequence[jax.Array], Sequence[jax.Array], Sequence[jax.Array]], list[jax.Array]],
    visits: Visits,
    layer: jax.Array,
    scales: Sequence[jax.Array],
    tokens: Sequence[jax.Array],
    rows: Sequence[jax.Array],
    outs: Sequence[jax.ShapeDtypeStruct],
    interpret: bool,
    name: str,
) -> list[jax.Array]:
    """Runs compute(scales, [1, F] of each token array, [R, F] of each pool array) at every visit; returns [T, F]s.

    Output rows that are not visited are undefined.
    """
    order_T, slot_T, count = visits
    slot_T = jnp.maximum(slot_T, 0)  # without visits the first fetch may still begin: of a slot that exists
    T = order_T.shape[0]
    if not interpret:  # else a small pool would be copied whole into the chip's memory
        rows = [pltpu.with_memory_space_constraint(r, pltpu.HBM) for r in rows]
    token_spec = functools.partial(pl.BlockSpec, index_map=lambda i, order, slot, *_: (order[i], 0, 0))
    row_spec = functools.partial(pl.BlockSpec, index_map=lambda i, order, slot, layer, *_: (layer[0], slot[i], 0, 0))
    sq = pl.squeezed

    def body(*refs) -> None:
        scalars, refs = refs[3 : 3 + len(scales)], refs[3 + len(scales) :]
        i = pl.program_id(0)
        token_refs, refs = refs[: len(tokens)], refs[len(tokens) :]
        row_refs, out_refs = refs[: len(rows)], refs[len(rows) :]
        got = compute([s[i] for s in scalars], [t[...] for t in token_refs], [r[...] for r in row_refs])
        for ref, value in zip(out_refs, got, strict=True):
            ref[...] = value.astype(ref.dtype)

    got = pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct((T, 1, *o.shape), o.dtype) for o in outs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3 + len(scales),
            grid=(count,),
            in_specs=[token_spec((sq, 1, x.shape[1])) for x in tokens]
            + [row_spec((sq, sq, *r.shape[2:])) for r in rows],
            out_specs=[token_spec((sq, 1, *o.shape)) for o in outs],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=blocks().vmem_bytes),
        interpret=interpret,
        name=name,
    )(order_T, slot_T, layer.reshape(1), *scales, *(x[:, None] for x in tokens), *rows)
    return [o[:, 0] for o in got]
