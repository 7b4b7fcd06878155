"""TPU body of `adamw`: a Mosaic kernel over blocks of features of each due slot's rank rows, a layer at a time.

Results lie where their inputs lay, so a block of a slot is fetched once and stored once.  Unused places of slot_U come
last: they stay at the last block that was visited, which the pipeline neither fetches nor stores again.

Shape letters: L layers, S slots, R LoRA rank, X features, U due slots, N numbers of a turn, C features of a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import NO_ADAPTER
from pallas_kernels.tiling_tpu import LANES, blocks, padded_bytes

ARRAYS = 4  # weights, gradients, both moments
COPIES = 3 * 2 * ARRAYS  # of a block: in and out, double-buffered, and what is computed


def fits(rank: int) -> bool:
    """Returns whether the narrowest block of so many rank rows has room on the chip."""
    return COPIES * padded_bytes(rank, LANES, jnp.float32) <= blocks().vmem_bytes


def _width(rank: int, features: int) -> int:
    """Returns the features of a block."""
    most = blocks().vmem_bytes // (COPIES * padded_bytes(rank, LANES, jnp.float32))
    return features if features <= most * LANES else most * LANES


def update(
    arrays: Sequence[jax.Array], slot_U: jax.Array, turn_UN: jax.Array, *, interpret: bool
) -> Sequence[jax.Array]:
    """Returns the arrays (weights, gradients, mu, nu) with the due slots updated."""
    L, _, R, X = arrays[0].shape
    U, N = turn_UN.shape
    C = _width(R, X)
    parts = math.ceil(X / C)
    last = jnp.maximum((slot_U != NO_ADAPTER).sum() - 1, 0)
    at_U = jnp.maximum(jnp.where(slot_U == NO_ADAPTER, slot_U[last], slot_U), 0)

    def block(u, layer, part, slot, at, turn):
        due = slot[u] != NO_ADAPTER
        return jnp.where(due, layer, L - 1), at[u], 0, jnp.where(due, part, parts - 1)

    def body(slot, at, turn, *refs) -> None:
        u = pl.program_id(0)
        due = slot[u] != NO_ADAPTER
        first = (u == 0) & (pl.program_id(1) == 0) & (pl.program_id(2) == 0)
        inputs, outputs = refs[:ARRAYS], refs[ARRAYS:]

        @pl.when(due)
        def _():
            divisor, shrink, b1, b2, c1, c2, eps, decay, lr = (turn[u * N + i] for i in range(N))
            weight, grad, mu, nu = (ref[...] for ref in inputs)
            g = grad / divisor * shrink
            new_mu, new_nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g * g
            step = -lr * (new_mu / c1 / (jnp.sqrt(new_nu / c2) + eps) + decay * weight)
            fine = step - step == 0  # what is not finite leaves NaN
            new = (weight + step, jnp.zeros_like(grad), new_mu, new_nu)
            old = (weight, jnp.zeros_like(grad), mu, nu)
            for ref, value, kept in zip(outputs, new, old, strict=True):
                ref[...] = jnp.where(fine, value, kept)

        @pl.when(first & ~due)
        def _():
            for out, ref in zip(outputs, inputs, strict=True):
                out[...] = ref[...]

    spec = pl.BlockSpec((pl.squeezed, pl.squeezed, R, C), block)
    if not interpret:  # else small arrays would be copied whole into the chip's memory
        arrays = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in arrays]
    return pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3, grid=(U, L, parts), in_specs=[spec] * ARRAYS, out_specs=[spec] * ARRAYS
        ),
        input_output_aliases={3 + i: i for i in range(ARRAYS)},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",) * 3, vmem_limit_bytes=blocks().vmem_bytes
        ),
        interpret=interpret,
        name="adamw",
    )(slot_U, at_U, turn_UN.reshape(-1), *arrays)
