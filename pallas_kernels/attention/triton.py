"""CUDA bodies of `packed_attention`, forward and backward: three Triton kernels over blocks of a lane's tokens.

    forward          out, log-sums     a program per block of queries and query head
    queries' part    dq                likewise
    keys' part       dk, dv            a program per block of keys and kv head, which sums over its query heads

All recompute the scores, only of blocks with a key that one of their queries attends to: neither later blocks nor those
beyond the window, nor those of other segments alone.  Products in q's dtype, sums and softmax in float32 and in a
fixed order.  Lanes are separate programs, so what one lane holds reaches no other; q, k and v hold zeros in padding.

Why no existing kernel: cuDNN's (`jax.nn.dot_product_attention`) takes one segment a lane and queries the GPU at trace
time; those of `jax.experimental.pallas.ops.gpu` use Pallas' deprecated Triton backend or know no segments.

Compiled for H100 and checked with Triton's interpreter; never run on a GPU.

Shape letters: G lanes, J tokens of a lane, N query heads, K kv heads, M queries per kv head, H head, B blocks of a lane,
I queries of a block, Z keys of a block.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import triton  # ty: ignore[import-not-found]
import triton.language as tl  # ty: ignore[import-not-found]

from pallas_kernels.tiling_cuda import STAGES, WARPS, power_of_two, row_block
from pallas_kernels.triton_launch import launch

MASKED = tl.constexpr(-1e30)  # as in attention/op.py


@triton.jit
def absorb(score_IZ, seen_IZ, v_ZH, best_I, total_I, acc_IH):
    """Returns an online softmax's state after these keys: (maximum score, sum of weights, sum of weighted values)."""
    score_IZ = tl.where(seen_IZ, score_IZ, MASKED)
    new_best_I = tl.maximum(best_I, tl.max(score_IZ, 1))
    # Selected again: a row without visible keys so far has no larger score to subtract.
    weight_IZ = tl.where(seen_IZ, tl.exp(score_IZ - new_best_I[:, None]), 0.0)
    shrink_I = tl.exp(best_I - new_best_I)
    acc_IH = tl.dot(weight_IZ.to(v_ZH.dtype), v_ZH, acc_IH * shrink_I[:, None], input_precision="ieee")
    return new_best_I, total_I * shrink_I + tl.sum(weight_IZ, 1), acc_IH


@triton.jit
def _place(token, head, J: tl.constexpr, HEADS: tl.constexpr, H: tl.constexpr, HEAD: tl.constexpr):
    """Returns (offsets, which exist) of a head's [token, feature] tile in this program's lane of [G, J, HEADS, H]."""
    feature = tl.arange(0, HEAD)
    lane = tl.program_id(2).to(tl.int64) * J
    inside = (token < J)[:, None] & (feature < H)[None, :]
    return ((lane + token[:, None]) * HEADS + head) * H + feature[None, :], inside


@triton.jit
def _tile(x, token, head, J: tl.constexpr, HEADS: tl.constexpr, H: tl.constexpr, HEAD: tl.constexpr):
    """Loads that tile; zero where nothing exists."""
    place, inside = _place(token, head, J, HEADS, H, HEAD)
    return tl.load(x + place, mask=inside, other=0.0)


@triton.jit
def _put(x, values, token, head, J: tl.constexpr, HEADS: tl.constexpr, H: tl.constexpr, HEAD: tl.constexpr):
    place, inside = _place(token, head, J, HEADS, H, HEAD)
    tl.store(x + place, values.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _segments(segment, token, J: tl.constexpr):
    return tl.load(segment + tl.program_id(2).to(tl.int64) * J + token, mask=token < J, other=0)


@triton.jit
def _of_queries(x, token, head, J: tl.constexpr, N: tl.constexpr):
    """Loads this lane's numbers of an array [G, N, J]."""
    return tl.load(x + (tl.program_id(2).to(tl.int64) * N + head) * J + token, mask=token < J, other=0.0)


@triton.jit
def _sees(query, key, query_segment, key_segment, WINDOW: tl.constexpr):
    """Returns whether the query sees the key.  Padding may see padding: all zeros, as is its output's gradient."""
    return (key <= query) & (key > query - WINDOW) & (query_segment == key_segment)


@triton.jit
def _forward(
    q,
    k,
    v,
    segment,
    first,
    out,
    lse,
    J: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD: tl.constexpr,
):
    i, n = tl.program_id(0), tl.program_id(1)
    query = i * BLOCK + tl.arange(0, BLOCK)
    q_IH, segment_I = _tile(q, query, n, J, N, H, HEAD), _segments(segment, query, J)
    best_I = tl.full((BLOCK,), MASKED, tl.float32)
    total_I = tl.zeros((BLOCK,), tl.float32)
    acc_IH = tl.zeros((BLOCK, HEAD), tl.float32)
    for j in range(tl.load(first + tl.program_id(2) * tl.num_programs(0) + i), i + 1):
        key = j * BLOCK + tl.arange(0, BLOCK)
        k_ZH, v_ZH = _tile(k, key, n // (N // K), J, K, H, HEAD), _tile(v, key, n // (N // K), J, K, H, HEAD)
        score_IZ = tl.dot(q_IH, tl.trans(k_ZH), input_precision="ieee") * SCALE
        segment_Z = _segments(segment, key, J)
        seen_IZ = _sees(query[:, None], key[None, :], segment_I[:, None], segment_Z[None, :], WINDOW)
        best_I, total_I, acc_IH = absorb(score_IZ, seen_IZ, v_ZH, best_I, total_I, acc_IH)
    total_I = tl.where(segment_I != 0, total_I, 1.0)  # padding, which is masked later
    _put(out, acc_IH / total_I[:, None], query, n, J, N, H, HEAD)
    place = (tl.program_id(2).to(tl.int64) * N + n) * J + query
    tl.store(lse + place, best_I + tl.log(total_I), mask=query < J)


@triton.jit
def _backward_queries(
    q,
    k,
    v,
    segment,
    lse,
    row,
    d,
    first,
    dq,
    J: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD: tl.constexpr,
):
    i, n = tl.program_id(0), tl.program_id(1)
    query = i * BLOCK + tl.arange(0, BLOCK)
    q_IH, d_IH = _tile(q, query, n, J, N, H, HEAD), _tile(d, query, n, J, N, H, HEAD)
    segment_I = _segments(segment, query, J)
    lse_I, row_I = _of_queries(lse, query, n, J, N), _of_queries(row, query, n, J, N)
    dq_IH = tl.zeros((BLOCK, HEAD), tl.float32)
    for j in range(tl.load(first + tl.program_id(2) * tl.num_programs(0) + i), i + 1):
        key = j * BLOCK + tl.arange(0, BLOCK)
        k_ZH, v_ZH = _tile(k, key, n // (N // K), J, K, H, HEAD), _tile(v, key, n // (N // K), J, K, H, HEAD)
        score_IZ = tl.dot(q_IH, tl.trans(k_ZH), input_precision="ieee") * SCALE
        segment_Z = _segments(segment, key, J)
        seen_IZ = _sees(query[:, None], key[None, :], segment_I[:, None], segment_Z[None, :], WINDOW)
        weight_IZ = tl.exp(tl.where(seen_IZ, score_IZ - lse_I[:, None], MASKED))
        d_weight_IZ = tl.dot(d_IH, tl.trans(v_ZH), input_precision="ieee")
        d_score_IZ = weight_IZ * (d_weight_IZ - row_I[:, None])
        dq_IH = tl.dot(d_score_IZ.to(k_ZH.dtype), k_ZH, dq_IH, input_precision="ieee")
    _put(dq, dq_IH * SCALE, query, n, J, N, H, HEAD)


@triton.jit
def _backward_keys(
    q,
    k,
    v,
    segment,
    lse,
    row,
    d,
    last,
    dk,
    dv,
    J: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD: tl.constexpr,
):
    j, head = tl.program_id(0), tl.program_id(1)
    key = j * BLOCK + tl.arange(0, BLOCK)
    k_ZH, v_ZH = _tile(k, key, head, J, K, H, HEAD), _tile(v, key, head, J, K, H, HEAD)
    segment_Z = _segments(segment, key, J)
    dk_ZH = tl.zeros((BLOCK, HEAD), tl.float32)
    dv_ZH = tl.zeros((BLOCK, HEAD), tl.float32)
    end = tl.load(last + tl.program_id(2) * tl.num_programs(0) + j) + 1
    for n in range(head * (N // K), (head + 1) * (N // K)):
        for i in range(j, end):
            query = i * BLOCK + tl.arange(0, BLOCK)
            q_IH, d_IH = _tile(q, query, n, J, N, H, HEAD), _tile(d, query, n, J, N, H, HEAD)
            lse_I, row_I = _of_queries(lse, query, n, J, N), _of_queries(row, query, n, J, N)
            score_ZI = tl.dot(k_ZH, tl.trans(q_IH), input_precision="ieee") * SCALE
            segment_I = _segments(segment, query, J)
            seen_ZI = _sees(query[None, :], key[:, None], segment_I[None, :], segment_Z[:, None], WINDOW)
            weight_ZI = tl.exp(tl.where(seen_ZI, score_ZI - lse_I[None, :], MASKED))
            dv_ZH = tl.dot(weight_ZI.to(d_IH.dtype), d_IH, dv_ZH, input_precision="ieee")
            d_weight_ZI = tl.dot(v_ZH, tl.trans(d_IH), input_precision="ieee")
            d_score_ZI = weight_ZI * (d_weight_ZI - row_I[None, :])
            dk_ZH = tl.dot(d_score_ZI.to(q_IH.dtype), q_IH, dk_ZH, input_precision="ieee")
    _put(dk, dk_ZH * SCALE, key, head, J, K, H, HEAD)
    _put(dv, dv_ZH, key, head, J, K, H, HEAD)


@jax.named_scope("packed_attention_forward")
def forward(
    q_GJNH: jax.Array, k_GJKH: jax.Array, v_GJKH: jax.Array, segment_GJ: jax.Array, *, window: int | None
) -> tuple[jax.Array, jax.Array]:
    """Returns ([G, J, N, H] in q's dtype, zeros for padding; float32 log-sums [G, K, M, J])."""
    G, J, N, H = q_GJNH.shape
    K = k_GJKH.shape[2]
    constants = _common(q_GJNH, k_GJKH, window)
    first_GB, _ = bounds(segment_GJ, constants["BLOCK"], constants["WINDOW"])
    out_GJNH, lse_GNJ = launch(
        *(q_GJNH, k_GJKH, v_GJKH, segment_GJ, first_GB),
        kernel=_forward,
        name="packed_attention_forward",
        out_type=(
            jax.ShapeDtypeStruct(q_GJNH.shape, q_GJNH.dtype),
            jax.ShapeDtypeStruct((G, N, J), jnp.float32),
        ),
        grid=(first_GB.shape[1], N, G),
        SCALE=H**-0.5,
        **constants,
    )
    # XLA runs a kernel twice if its own output is both stacked by a scan and used: the selected copy is not its own.
    out_GJNH = jnp.where((segment_GJ != 0)[:, :, None, None], out_GJNH, 0)
    lse_GNJ = jnp.where((segment_GJ != 0)[:, None, :], lse_GNJ, 0)
    return out_GJNH, lse_GNJ.reshape(G, K, N // K, J)


def backward(
    q_GJNH: jax.Array,
    k_GJKH: jax.Array,
    v_GJKH: jax.Array,
    segment_GJ: jax.Array,
    out_GJNH: jax.Array,
    lse_GKMJ: jax.Array,
    d_GJNH: jax.Array,
    *,
    window: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of q, k and v in their dtype."""
    G, _, N, H = q_GJNH.shape
    constants = _common(q_GJNH, k_GJKH, window)
    first_GB, last_GB = bounds(segment_GJ, constants["BLOCK"], constants["WINDOW"])
    d_GJNH = jnp.where((segment_GJ != 0)[:, :, None, None], d_GJNH, 0)
    row_GNJ = (d_GJNH.astype(jnp.float32) * out_GJNH.astype(jnp.float32)).sum(3).transpose(0, 2, 1)
    args = q_GJNH, k_GJKH, v_GJKH, segment_GJ, lse_GKMJ, row_GNJ, d_GJNH
    with jax.named_scope("packed_attention_backward_queries"):
        dq_GJNH = launch(
            *args,
            first_GB,
            kernel=_backward_queries,
            name="packed_attention_backward_queries",
            out_type=jax.ShapeDtypeStruct(q_GJNH.shape, q_GJNH.dtype),
            grid=(first_GB.shape[1], N, G),
            SCALE=H**-0.5,
            **constants,
        )
    with jax.named_scope("packed_attention_backward_keys"):
        dk_GJKH, dv_GJKH = launch(
            *args,
            last_GB,
            kernel=_backward_keys,
            name="packed_attention_backward_keys",
            out_type=(jax.ShapeDtypeStruct(k_GJKH.shape, k_GJKH.dtype),) * 2,
            grid=(last_GB.shape[1], k_GJKH.shape[2], G),
            SCALE=H**-0.5,
            **constants,
        )
    return dq_GJNH, dk_GJKH, dv_GJKH


def bounds(segment_GJ: jax.Array, block: int, window: int) -> tuple[jax.Array, jax.Array]:
    """Returns int32 [G, B]: (the first block a block's queries attend to, the last whose queries attend to its keys).

    The other end is the block itself; for a block of padding only, the first is one later and the last is -1.
    """
    G, J = segment_GJ.shape
    B = math.ceil(J / block)
    filled_GBI = jnp.pad(segment_GJ, ((0, 0), (0, B * block - J))).reshape(G, B, block)
    high_GB = filled_GBI.max(2)
    low_GB = jnp.where(filled_GBI != 0, filled_GBI, jnp.iinfo(jnp.int32).max).min(2)
    i, j = jnp.arange(B, dtype=jnp.int32)[None, :, None], jnp.arange(B, dtype=jnp.int32)[None, None, :]
    near = (j <= i) & ((j + 1) * block - 1 > i * block - window)
    # Segments do not decrease, so a block of earlier keys holds one of ours if its last reaches our first.
    meet_GBB = near & (high_GB[:, None, :] >= low_GB[:, :, None])
    first_GB = jnp.where(meet_GBB, j, i + 1).min(2)
    return first_GB, jnp.where(meet_GBB, i, -1).max(1)


def _common(q_GJNH: jax.Array, k_GJKH: jax.Array, window: int | None) -> dict[str, int]:
    """Returns the constants of all kernels."""
    J, N, H = q_GJNH.shape[1:]
    return {
        "J": J,
        "N": N,
        "K": k_GJKH.shape[2],
        "H": H,
        "WINDOW": J if window is None else min(window, J),
        "BLOCK": row_block(J, H, q_GJNH.dtype.itemsize),
        "HEAD": power_of_two(H),
        "num_warps": WARPS,
        "num_stages": STAGES,
    }
