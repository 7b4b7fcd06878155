"""CUDA body of `adamw`: a Triton kernel over runs of a due slot's numbers, a layer at a time, in place.

A program whose place of slot_U is unused exits and touches nothing.

Compiled for H100 and checked with Triton's interpreter; never run on a GPU.

Shape letters: L layers, S slots, R LoRA rank, X features, U due slots, N numbers of a turn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax_triton  # ty: ignore[import-not-found]
import triton  # ty: ignore[import-not-found]
import triton.language as tl  # ty: ignore[import-not-found]

RUN = 1024  # numbers of one program: 8 of each of its 128 threads, loaded 16 bytes at a time


@triton.jit
def _adamw(
    weight,
    grad,
    mu,
    nu,
    slot,
    turn,
    S: tl.constexpr,
    SIZE: tl.constexpr,
    N: tl.constexpr,
    RUN: tl.constexpr,
):
    u = tl.program_id(2)
    here = tl.load(slot + u)
    if here >= 0:
        place = tl.program_id(0) * RUN + tl.arange(0, RUN)
        inside = place < SIZE
        at = (tl.program_id(1).to(tl.int64) * S + here) * SIZE + place
        divisor, shrink, b1 = tl.load(turn + u * N), tl.load(turn + u * N + 1), tl.load(turn + u * N + 2)
        b2, c1, c2 = tl.load(turn + u * N + 3), tl.load(turn + u * N + 4), tl.load(turn + u * N + 5)
        eps, decay, lr = tl.load(turn + u * N + 6), tl.load(turn + u * N + 7), tl.load(turn + u * N + 8)
        w = tl.load(weight + at, mask=inside, other=0.0)
        g = tl.load(grad + at, mask=inside, other=0.0)
        m = tl.load(mu + at, mask=inside, other=0.0)
        v = tl.load(nu + at, mask=inside, other=0.0)
        g = tl.div_rn(g, divisor) * shrink
        new_m = b1 * m + (1 - b1) * g
        new_v = b2 * v + (1 - b2) * g * g
        root = tl.sqrt_rn(tl.div_rn(new_v, c2)) + eps
        step = -lr * (tl.div_rn(tl.div_rn(new_m, c1), root) + decay * w)
        fine = step - step == 0  # what is not finite leaves NaN
        tl.store(weight + at, w + step, mask=inside & fine)
        tl.store(mu + at, new_m, mask=inside & fine)
        tl.store(nu + at, new_v, mask=inside & fine)
        tl.store(grad + at, tl.zeros((RUN,), tl.float32), mask=inside)


@jax.named_scope("adamw")
def update(arrays: Sequence[jax.Array], slot_U: jax.Array, turn_UN: jax.Array) -> Sequence[jax.Array]:
    """Returns the arrays (weights, gradients, mu, nu) with the due slots updated."""
    L, S, R, X = arrays[0].shape
    U, N = turn_UN.shape
    return jax_triton.triton_call(
        *arrays,
        slot_U,
        turn_UN,
        kernel=_adamw,
        name="adamw",
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays],
        input_output_aliases={i: i for i in range(len(arrays))},
        grid=(math.ceil(R * X / RUN), L, U),
        S=S,
        SIZE=R * X,
        N=N,
        RUN=RUN,
    )
