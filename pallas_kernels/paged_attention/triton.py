"""CUDA body of `paged_attention`: two Triton kernels that read pages from the pool in place, for decode and prompts.

    attend   softmax(q @ k.T) @ v and its log-sum   a program per run of a lane's tokens, kv head and share of the parts
    join     the parts, by their log-sums           a program per ROWS rows of queries

A run is read with all query heads of one kv head, so each key and value that they attend to is read once, and nothing
else.  Parts are of a fixed number of keys from the sequence's first on (flash-decoding, as split-K): how many exist hangs on
the lane's own context alone, and a row's bits depend neither on its neighbours nor on the width of the page table.  The
programs of a run take its parts in turn, so one long lane occupies all of its own, and those without a part end at once.
The join reads the parts that exist; where the table has one part there is nothing to join.  Products in q's dtype, sums and
softmax in float32 and in a fixed order.

Why no existing kernel: cuDNN's, private to JAX, takes one layer's pages alone, which is a copy, and queries the GPU at
trace time; that of `jax.experimental.pallas.ops.gpu` uses Pallas' deprecated Triton backend and is for decode alone.

Compiled for H100 and checked with Triton's interpreter; never run on a GPU.

Shape letters: G lanes, J tokens of a lane, N query heads, K kv heads, M queries per kv head, H head, L layers, P pages,
Z tokens per page, C pages per sequence, F = K * H, I rows of queries, E keys of a block, S parts of a table's keys, U parts
of a block of them.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import triton  # ty: ignore[import-not-found]
import triton.language as tl  # ty: ignore[import-not-found]

from pallas_kernels.attention.triton import MASKED, absorb
from pallas_kernels.tiling_cuda import (
    ACCUMULATOR,
    ATTENDING,
    PART_KEYS,
    PARTS_JOINED,
    PROMPT_PART_KEYS,
    STAGES,
    WARPS,
    power_of_two,
    row_block,
)
from pallas_kernels.triton_launch import launch


@triton.jit
def _attend(
    q,
    k,
    v,
    layer,
    page,
    position,
    out,
    lse,
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
    PART: tl.constexpr,
    HEAD: tl.constexpr,
):
    """Attends with one run of a lane's rows to every num_programs(2)-th part of the keys that they see."""
    g, head = tl.program_id(0) // RUNS, tl.program_id(1)
    row = tl.program_id(0) % RUNS * ROWS + tl.arange(0, ROWS)
    token, real_I = row // (N // K), row < J * (N // K)
    position_I = tl.load(position + g * J + token, mask=real_I, other=-1)
    last = tl.max(position_I, 0)
    oldest = tl.min(tl.where(position_I >= 0, position_I, last), 0) - WINDOW + 1
    first, end = tl.maximum(oldest, 0) // PART, (last + PART) // PART
    for part in range(first + tl.program_id(2), end, tl.num_programs(2)):
        feature = tl.arange(0, HEAD)
        row_I = (g.to(tl.int64) * J + token) * N + head * (N // K) + row % (N // K)
        inside_IH = real_I[:, None] & (feature < H)[None, :]
        q_IH = tl.load(q + row_I[:, None] * H + feature[None, :], mask=inside_IH, other=0.0)
        best_I = tl.full((ROWS,), MASKED, tl.float32)
        total_I = tl.zeros((ROWS,), tl.float32)
        acc_IH = tl.zeros((ROWS, HEAD), tl.float32)
        pages = tl.load(layer).to(tl.int64) * P
        begin = tl.maximum(tl.maximum(oldest, 0) // KEYS, part * (PART // KEYS))
        for block in range(begin, tl.minimum((last + KEYS) // KEYS, (part + 1) * (PART // KEYS))):
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
        # A row that sees no key of this part is undefined: the join does not read it.
        total_I = tl.where(total_I == 0.0, 1.0, total_I)
        to_I = row_I + part * (G * J * N)
        out_IH = (acc_IH / total_I[:, None]).to(out.dtype.element_ty)
        tl.store(out + to_I[:, None] * H + feature[None, :], out_IH, mask=inside_IH)
        tl.store(lse + to_I, best_I + tl.log(total_I), mask=real_I)


@triton.jit
def _join(
    part_out,
    part_lse,
    position,
    out,
    I: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    WINDOW: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD: tl.constexpr,
):
    """Joins the parts that ROWS rows of [G * J * N, H] see, each its own."""
    row, feature = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, HEAD)
    position_I = tl.load(position + row // N, mask=row < I, other=-1)
    first_I, end_I = tl.maximum(position_I - WINDOW + 1, 0) // PART, (position_I + PART) // PART
    best_I = tl.full((ROWS,), MASKED, tl.float32)
    total_I = tl.zeros((ROWS,), tl.float32)
    acc_IH = tl.zeros((ROWS, HEAD), tl.float32)
    for start in range(0, tl.max(end_I, 0), PARTS):
        part = start + tl.arange(0, PARTS)
        there_UI = (part[:, None] >= first_I[None, :]) & (part[:, None] < end_I[None, :])
        place_UI = part.to(tl.int64)[:, None] * I + row[None, :]
        lse_UI = tl.load(part_lse + place_UI, mask=there_UI, other=MASKED)
        inside_UIH = there_UI[:, :, None] & (feature < H)[None, None, :]
        out_UIH = tl.load(part_out + place_UI[:, :, None] * H + feature[None, None, :], mask=inside_UIH, other=0.0)
        new_I = tl.maximum(best_I, tl.max(lse_UI, 0))
        # Selected again: a row without parts so far has no larger log-sum to subtract.
        share_UI = tl.where(there_UI, tl.exp(lse_UI - new_I[None, :]), 0.0)
        shrink_I = tl.exp(best_I - new_I)
        total_I = total_I * shrink_I + tl.sum(share_UI, 0)
        acc_IH = acc_IH * shrink_I[:, None] + tl.sum(share_UI[:, :, None] * out_UIH, 0)
        best_I = new_I
    total_I = tl.where(end_I > 0, total_I, 1.0)  # padding, which is undefined
    inside_IH = (end_I > 0)[:, None] & (feature < H)[None, :]
    out_IH = (acc_IH / total_I[:, None]).to(out.dtype.element_ty)
    tl.store(out + row.to(tl.int64)[:, None] * H + feature[None, :], out_IH, mask=inside_IH)


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
    rows, keys = row_block(J * N // K, H, size), row_block(PART_KEYS, H, size)
    runs = math.ceil(J * N // K / rows)
    part = PART_KEYS if J == 1 else PROMPT_PART_KEYS
    parts = math.ceil(C * Z / part)
    seen = C * Z if window is None else window
    out_SGJNH, lse_SGJN = launch(
        *(q_GJNH, k_LPZF, v_LPZF, layer.reshape(1), page_GC, position_GJ),
        kernel=_attend,
        name="paged_attention",
        out_type=(
            jax.ShapeDtypeStruct((parts, G, J, N, H), q_GJNH.dtype if parts == 1 else jnp.float32),
            jax.ShapeDtypeStruct((parts, G, J, N), jnp.float32),
        ),
        grid=(G * runs, K, min(parts, math.ceil(ATTENDING / (G * runs * K)))),
        G=G,
        J=J,
        N=N,
        K=K,
        H=H,
        P=P,
        Z=Z,
        C=C,
        WINDOW=seen,
        SCALE=H**-0.5,
        RUNS=runs,
        ROWS=rows,
        KEYS=keys,
        PART=part,
        HEAD=power_of_two(H),
        num_warps=WARPS,
        num_stages=STAGES + 1,  # the page number has to be fetched before the page
    )
    if parts == 1:
        return out_SGJNH[0]
    return _joined(out_SGJNH, lse_SGJN, position_GJ, part, seen, q_GJNH.dtype)


@jax.named_scope("paged_attention_join")
def _joined(
    out_SGJNH: jax.Array, lse_SGJN: jax.Array, position_GJ: jax.Array, part: int, window: int, dtype: jnp.dtype
) -> jax.Array:
    """Returns [G, J, N, H] in this dtype."""
    G, J, N, H = out_SGJNH.shape[1:]
    rows = ACCUMULATOR // (PARTS_JOINED * power_of_two(H))
    return launch(
        *(out_SGJNH, lse_SGJN, position_GJ),
        kernel=_join,
        name="paged_attention_join",
        out_type=jax.ShapeDtypeStruct((G, J, N, H), dtype),
        grid=(math.ceil(G * J * N / rows),),
        I=G * J * N,
        N=N,
        H=H,
        WINDOW=window,
        PART=part,
        PARTS=PARTS_JOINED,
        ROWS=rows,
        HEAD=power_of_two(H),
    )
