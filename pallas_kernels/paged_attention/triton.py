"""CUDA body of `paged_attention`: a Triton kernel that reads pages from the pool in place, for decode and prompts.

A program is a run of a lane's tokens with all query heads of one kv head: it reads each key and value of that head that
they attend to, once, and nothing else.  In decode, where a lane is one run, its keys are divided among several programs
(flash-decoding) as evenly as its own length allows, so a lane's result does not depend on its neighbours; XLA joins
the parts.  Products in q's dtype, sums and softmax in float32 and in a fixed order.

Why no existing kernel: cuDNN's, private to JAX, takes one layer's pages alone, which is a copy, and queries the GPU at
trace time; that of `jax.experimental.pallas.ops.gpu` uses Pallas' deprecated Triton backend and is for decode alone.

Compiled for H100 and checked with Triton's interpreter; never run on a GPU.

Shape letters: G lanes, J tokens of a lane, N query heads, K kv heads, M queries per kv head, H head, L layers, P pages,
Z tokens per page, C pages per sequence, F = K * H, I rows of a run (tokens * M), E keys of a block, S parts of a lane's keys.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import jax_triton  # ty: ignore[import-not-found]
import triton  # ty: ignore[import-not-found]
import triton.language as tl  # ty: ignore[import-not-found]

from pallas_kernels.attention.triton import MASKED, absorb
from pallas_kernels.tiling_cuda import PROGRAMS, STAGES, WARPS, power_of_two, row_block


@triton.jit
def _attend(
    q,
    k,
    v,
    layer,
    page,
    position,
    acc,
    best,
    total,
    G: tl.constexpr,
    J: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    Z: tl.constexpr,
    C: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    RUNS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD: tl.constexpr,
):
    """Attends with one run of a lane's rows to one part of the keys that it sees."""
    g, head, part = tl.program_id(0) // RUNS, tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) % RUNS * ROWS + tl.arange(0, ROWS)
    token, real_I = row // (N // K), row < J * (N // K)
    position_I = tl.load(position + g * J + token, mask=real_I, other=-1)
    last = tl.max(position_I, 0)
    oldest = tl.min(tl.where(position_I >= 0, position_I, last), 0) - WINDOW + 1
    first, end = tl.maximum(oldest, 0) // KEYS, (last + KEYS) // KEYS
    blocks = (end - first + tl.num_programs(2) - 1) // tl.num_programs(2)
    begin = first + part * blocks

    feature = tl.arange(0, HEAD)
    row_I = (g.to(tl.int64) * J + token) * N + head * (N // K) + row % (N // K)
    inside_IH = real_I[:, None] & (feature < H)[None, :]
    q_IH = tl.load(q + row_I[:, None] * H + feature[None, :], mask=inside_IH, other=0.0)
    best_I = tl.full((ROWS,), MASKED, tl.float32)
    total_I = tl.zeros((ROWS,), tl.float32)
    acc_IH = tl.zeros((ROWS, HEAD), tl.float32)
    pages = tl.load(layer).to(tl.int64) * P
    for block in range(begin, tl.minimum(begin + blocks, end)):
        key = block * KEYS + tl.arange(0, KEYS)
        held_E = (key >= oldest) & (key <= last)
        page_E = pages + tl.load(page + g * C + key // Z, mask=held_E, other=0)
        place_EH = ((page_E * Z + key % Z) * K + head)[:, None] * H + feature[None, :]
        inside_EH = held_E[:, None] & (feature < H)[None, :]
        k_EH = tl.load(k + place_EH, mask=inside_EH, other=0.0)
        v_EH = tl.load(v + place_EH, mask=inside_EH, other=0.0)
        score_IE = tl.dot(q_IH, tl.trans(k_EH), input_precision="ieee") * SCALE
        ahead_IE = position_I[:, None] - key[None, :]
        seen_IE = (ahead_IE >= 0) & (ahead_IE < WINDOW)
        best_I, total_I, acc_IH = absorb(score_IE, seen_IE, v_EH, best_I, total_I, acc_IH)
    to_I = part.to(tl.int64) * G * J * N + row_I
    tl.store(acc + to_I[:, None] * H + feature[None, :], acc_IH, mask=inside_IH)
    tl.store(best + to_I, best_I, mask=real_I)
    tl.store(total + to_I, total_I, mask=real_I)


@jax.named_scope("paged_attention")
def attend(
    q_GJNH: jax.Array,
    k_LPZF: jax.Array,
    v_LPZF: jax.Array,
    layer: jax.Array,
    page_GC: jax.Array,
    position_GJ: jax.Array,
    *,
    window: int | None,
) -> jax.Array:
    """Returns [G, J, N, H] in q's dtype; rows whose position is -1 are undefined."""
    G, J, N, H = q_GJNH.shape
    P, Z, F = k_LPZF.shape[1:]
    C, K = page_GC.shape[1], F // H
    size = q_GJNH.dtype.itemsize
    rows, keys = row_block(J * N // K, H, size), row_block(C * Z, H, size)
    runs = math.ceil(J * N // K / rows)
    parts = 1 if runs > 1 else min(math.ceil(PROGRAMS / (G * K)), math.ceil(C * Z / keys))
    acc_SGJNH, best_SGJN, total_SGJN = jax_triton.triton_call(
        *(q_GJNH, k_LPZF, v_LPZF, layer.reshape(1), page_GC, position_GJ),
        kernel=_attend,
        name="paged_attention",
        out_type=tuple(jax.ShapeDtypeStruct((parts, G, J, N, *more), jnp.float32) for more in ((H,), (), ())),
        grid=(G * runs, K, parts),
        G=G,
        J=J,
        N=N,
        K=K,
        H=H,
        P=P,
        Z=Z,
        C=C,
        WINDOW=C * Z if window is None else window,
        SCALE=H**-0.5,
        RUNS=runs,
        ROWS=rows,
        KEYS=keys,
        HEAD=power_of_two(H),
        num_warps=WARPS,
        num_stages=STAGES + 1,  # the page number has to be fetched before the page
    )
    share_SGJN = jnp.exp(best_SGJN - best_SGJN.max(0, keepdims=True))
    out_GJNH = (acc_SGJNH * share_SGJN[..., None]).sum(0) / (total_SGJN * share_SGJN).sum(0)[..., None]
    return out_GJNH.astype(q_GJNH.dtype)
