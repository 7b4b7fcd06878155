"""Causal attention over packed lanes: a token attends to its own segment up to itself.  Training, forward and backward.

Blocks of queries meet blocks of keys under an online softmax, from the diagonal back to the first block that any lane's
segments still reach, so packed short examples cost their own length and not the lane's.  The [J, J] scores never exist;
the backward pass recomputes them from the saved log-sum.

Shape letters: G lanes, J tokens of a lane, N query heads, K kv heads, M queries per kv head (N = K * M), H head,
I rows of one kv head's query block (M * block), Z keys of a block.
A masked score is removed by selection, and so is whatever padding holds.  A lane holds one tenant's segments, so a NaN
stays with its owner; a block that another lane needs adds exact zeros to this one.
This describes the XLA body; `dispatch` states where another runs.
Source: FlashAttention (arXiv 2205.14135).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from pallas_kernels import KEPT, tiling_cuda
from pallas_kernels.attention import pallas_tpu as attention_tpu
from pallas_kernels.dispatch import by_platform, known_dtypes
from pallas_kernels.shapes import shaped
from pallas_kernels.sharding import Placement

MASKED = -1e30  # finite, so that a row without visible keys gives numbers


@shaped
def packed_attention_reference(
    q_GJNH: jax.Array, k_GJKH: jax.Array, v_GJKH: jax.Array, segment_GJ: jax.Array, *, window: int | None
) -> jax.Array:
    """Defines the op with all scores at once: returns float32 [G, J, N, H]; zeros for padding (segment 0)."""
    J, N, H = q_GJNH.shape[1:]
    q_GJNH, k_GJKH, v_GJKH = (jnp.where((segment_GJ != 0)[:, :, None, None], x, 0) for x in (q_GJNH, k_GJKH, v_GJKH))
    k, v = (jnp.repeat(x.astype(jnp.float32), N // x.shape[2], axis=2) for x in (k_GJKH, v_GJKH))
    score = jnp.einsum("ginh,gjnh->gnij", q_GJNH.astype(jnp.float32), k, precision="highest") / H**0.5
    i, j = jnp.arange(J)[:, None], jnp.arange(J)[None, :]
    seen = (segment_GJ[:, :, None] == segment_GJ[:, None, :]) & (j <= i)[None]
    if window is not None:
        seen &= (j > i - window)[None]
    weight = jax.nn.softmax(jnp.where(seen[:, None], score, MASKED), axis=-1)
    out = jnp.einsum("gnij,gjnh->ginh", weight, v, precision="highest")
    return jnp.where((segment_GJ != 0)[:, :, None, None], out, 0.0)


@shaped
def packed_attention(
    q_GJNH: jax.Array,
    k_GJKH: jax.Array,
    v_GJKH: jax.Array,
    segment_GJ: jax.Array,
    *,
    window: int | None,
    block: int = 32,
    placement: Placement | None = None,
) -> jax.Array:
    """Returns [G, J, N, H] in q's dtype, products and softmax in float32; zeros for padding (segment 0).

    segment_GJ: int32, non-decreasing runs within a lane apart from padding.
    window: a token attends to at most this many tokens, itself included; None is no limit.
    block: tokens of a block of the XLA body; a lane shorter than one is one block.  Must divide J.
    placement: mesh axes that split the arrays, on a mesh of several devices.
    Raises ValueError when block does not divide J.
    """
    J = q_GJNH.shape[1]
    block = min(block, J)
    if J % block:
        raise ValueError(f"packed_attention: block {block} does not divide the {J} tokens of a lane")
    q, k, v = (jnp.where((segment_GJ != 0)[:, :, None, None], x, 0) for x in (q_GJNH, k_GJKH, v_GJKH))
    return _flash(q, k, v, segment_GJ, window, block, placement)


def _by_head(x_GJNH: jax.Array, K: int) -> jax.Array:
    """Returns float32 [G, K, M, J, H]."""
    G, J, N, H = x_GJNH.shape
    return x_GJNH.astype(jnp.float32).reshape(G, J, K, N // K, H).transpose(0, 2, 3, 1, 4)


def _by_token(x_GKMJH: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns [G, J, N, H] in `dtype`."""
    G, K, M, J, H = x_GKMJH.shape
    return x_GKMJH.transpose(0, 3, 1, 2, 4).reshape(G, J, K * M, H).astype(dtype)


def _first_block(segment_GJ: jax.Array, i: jax.Array, block: int) -> jax.Array:
    """Returns the first key block that a query of block i attends to in any lane: where its first segment begins."""
    start_G = lax.dynamic_index_in_dim(segment_GJ, i * block, 1, keepdims=False)
    same_GJ = (segment_GJ == start_G[:, None]) & (start_G != 0)[:, None]
    first_G = jnp.where(same_GJ.any(1), same_GJ.argmax(1), i * block)
    return first_G.min() // block


def _cut(x: jax.Array, i: jax.Array, block: int) -> jax.Array:
    """Returns block i of the token axis (the last but one, or the last of [G, J] and [G, K, M, J])."""
    axis = x.ndim - 2 if x.ndim in (5,) else x.ndim - 1
    return lax.dynamic_slice_in_dim(x, i * block, block, axis)


def _put(x: jax.Array, part: jax.Array, i: jax.Array, block: int) -> jax.Array:
    axis = x.ndim - 2 if x.ndim in (5,) else x.ndim - 1
    return lax.dynamic_update_slice_in_dim(x, part, i * block, axis)


def _scores(
    q: jax.Array, k: jax.Array, segment_GJ: jax.Array, i: jax.Array, j: jax.Array, window: int | None, block: int
) -> jax.Array:
    """Returns the masked float32 [G, K, M, block, block] scores of query block i (already scaled) and key block j."""
    score = jnp.einsum("gkmih,gkzh->gkmiz", q, k[:, :, 0])
    qi, kj = i * block + jnp.arange(block)[:, None], j * block + jnp.arange(block)[None, :]
    seen = kj <= qi if window is None else (kj <= qi) & (kj > qi - window)
    same = _cut(segment_GJ, i, block)[:, :, None] == _cut(segment_GJ, j, block)[:, None, :]
    return jnp.where((same & seen[None])[:, None, None], score, MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _flash(q_GJNH, k_GJKH, v_GJKH, segment_GJ, window: int | None, block: int, placement: Placement | None):
    return _flash_forward(q_GJNH, k_GJKH, v_GJKH, segment_GJ, window, block, placement)[0]


def _flash_forward(q_GJNH, k_GJKH, v_GJKH, segment_GJ, window, block, placement):
    args = q_GJNH, k_GJKH, v_GJKH, segment_GJ
    out_GJNH, lse = by_platform(
        "packed_attention",
        *args,
        xla=_on_each(functools.partial(_blocks_forward, window, block), placement, "hhhr", "hl"),
        pallas=functools.partial(_forward_tpu, window, placement) if known_dtypes(*args[:3]) else None,
        triton=functools.partial(_forward_cuda, window, placement) if fits_cuda(*args[:3]) else None,
    )
    out_GJNH, lse = checkpoint_name(out_GJNH, KEPT), checkpoint_name(lse, KEPT)
    return out_GJNH, (*args, out_GJNH, lse)


def _flash_backward(window, block, placement, saved, d_GJNH):
    gradients = by_platform(
        "packed_attention",
        *saved,
        d_GJNH,
        xla=_on_each(functools.partial(_blocks_backward, window, block), placement, "hhhrhlh", "hhh"),
        pallas=functools.partial(_backward_tpu, window, placement) if known_dtypes(*saved[:3]) else None,
        triton=functools.partial(_backward_cuda, window, placement) if fits_cuda(*saved[:3]) else None,
    )
    return *gradients, None


_flash.defvjp(_flash_forward, _flash_backward)


def fits_cuda(q: jax.Array, k: jax.Array, v: jax.Array) -> bool:
    """Returns whether Triton is installed and its attention takes these: heads that fit, one known dtype."""
    alike = known_dtypes(q) and q.dtype == k.dtype == v.dtype
    return tiling_cuda.installed() and q.shape[3] <= tiling_cuda.HEAD and alike


# ---- kernels ----------------------------------------------------------------------------------------------------------


def _on_each(body: Callable[..., tuple], placement: Placement | None, ins: str, outs: str) -> Callable[..., tuple]:
    """Runs the body on each device's lanes and heads.  Letters: h [G, J, heads, H], r [G, J], l [G, heads, M, J]."""
    if placement is None:
        return body
    rows, heads = placement.rows, placement.heads
    spec = {"h": P(rows, None, heads), "r": P(rows), "l": P(rows, heads)}
    return placement.on_each(body, tuple(spec[i] for i in ins), tuple(spec[o] for o in outs))


def _forward_tpu(window: int | None, placement: Placement | None, interpret: bool) -> Callable[..., tuple]:
    def body(q_GJNH, k_GJKH, v_GJKH, segment_GJ):
        out_GJNH, lse = attention_tpu.forward(q_GJNH, k_GJKH, v_GJKH, segment_GJ, window=window, interpret=interpret)
        return jnp.where((segment_GJ != 0)[:, :, None, None], out_GJNH, 0), lse

    return _on_each(body, placement, "hhhr", "hl")


def _backward_tpu(window: int | None, placement: Placement | None, interpret: bool) -> Callable[..., tuple]:
    def body(q_GJNH, k_GJKH, v_GJKH, segment_GJ, out_GJNH, lse, d_GJNH):
        d_GJNH = jnp.where((segment_GJ != 0)[:, :, None, None], d_GJNH, 0)
        kept = q_GJNH, k_GJKH, v_GJKH, segment_GJ, out_GJNH, lse
        return attention_tpu.backward(*kept, d_GJNH, window=window, interpret=interpret)

    return _on_each(body, placement, "hhhrhlh", "hhh")


def _forward_cuda(window: int | None, placement: Placement | None) -> Callable[..., tuple]:
    from pallas_kernels.attention import triton as attention_cuda  # imports Triton

    return _on_each(functools.partial(attention_cuda.forward, window=window), placement, "hhhr", "hl")


def _backward_cuda(window: int | None, placement: Placement | None) -> Callable[..., tuple]:
    from pallas_kernels.attention import triton as attention_cuda  # imports Triton

    return _on_each(functools.partial(attention_cuda.backward, window=window), placement, "hhhrhlh", "hhh")


# ---- XLA --------------------------------------------------------------------------------------------------------------


def _blocks_forward(window, block, q_GJNH, k_GJKH, v_GJKH, segment_GJ):
    """Runs the XLA body: returns ([G, J, N, H], float32 log-sums [G, K, M, J])."""
    G, J, N, H = q_GJNH.shape
    K = k_GJKH.shape[2]
    q, k, v = _by_head(q_GJNH, K) * H**-0.5, _by_head(k_GJKH, K), _by_head(v_GJKH, K)

    def query_block(i, carry):
        out, lse = carry
        q_i = _cut(q, i, block)
        last = i - _first_block(segment_GJ, i, block)

        def key_block(back, state):
            best, total, acc = state
            j = i - back
            score = _scores(q_i, _cut(k, j, block), segment_GJ, i, j, window, block)
            new_best = jnp.maximum(best, score.max(-1))
            weight, shrink = jnp.exp(score - new_best[..., None]), jnp.exp(best - new_best)
            part = jnp.einsum("gkmiz,gkzh->gkmih", weight, _cut(v, j, block)[:, :, 0])
            return new_best, total * shrink + weight.sum(-1), acc * shrink[..., None] + part

        shape = (G, K, N // K, block)
        start = jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, H))
        best, total, acc = lax.fori_loop(0, last + 1, key_block, start)
        return _put(out, acc / total[..., None], i, block), _put(lse, best + jnp.log(total), i, block)

    start = jnp.zeros(q.shape), jnp.zeros(q.shape[:-1])
    out, lse = lax.fori_loop(0, J // block, query_block, start)
    out = jnp.where((segment_GJ != 0)[:, None, None, :, None], out, 0.0)
    return _by_token(out, q_GJNH.dtype), lse


def _blocks_backward(window, block, q_GJNH, k_GJKH, v_GJKH, segment_GJ, out_GJNH, lse, d_GJNH):
    """Returns the gradients of q, k and v."""
    J, H = q_GJNH.shape[1], q_GJNH.shape[3]
    K = k_GJKH.shape[2]
    q, k, v = _by_head(q_GJNH, K) * H**-0.5, _by_head(k_GJKH, K), _by_head(v_GJKH, K)
    d = jnp.where((segment_GJ != 0)[:, None, None, :, None], _by_head(d_GJNH, K), 0.0)
    row = (d * _by_head(out_GJNH, K)).sum(-1)

    def query_block(i, carry):
        q_i, d_i, lse_i, row_i = (_cut(x, i, block) for x in (q, d, lse, row))
        last = i - _first_block(segment_GJ, i, block)

        def key_block(back, state):
            dq_i, dk, dv = state
            j = i - back
            k_j, v_j = _cut(k, j, block)[:, :, 0], _cut(v, j, block)[:, :, 0]
            score = _scores(q_i, _cut(k, j, block), segment_GJ, i, j, window, block)
            weight = jnp.exp(score - lse_i[..., None])
            d_weight = jnp.einsum("gkmih,gkzh->gkmiz", d_i, v_j)
            d_score = weight * (d_weight - row_i[..., None])
            dv_j = jnp.einsum("gkmiz,gkmih->gkzh", weight, d_i)[:, :, None]
            dk_j = jnp.einsum("gkmiz,gkmih->gkzh", d_score, q_i)[:, :, None]
            dq_i = dq_i + jnp.einsum("gkmiz,gkzh->gkmih", d_score, k_j)
            return dq_i, _put(dk, _cut(dk, j, block) + dk_j, j, block), _put(dv, _cut(dv, j, block) + dv_j, j, block)

        dq, dk, dv = carry
        dq_i, dk, dv = lax.fori_loop(0, last + 1, key_block, (jnp.zeros_like(q_i), dk, dv))
        return _put(dq, dq_i, i, block), dk, dv

    dq, dk, dv = lax.fori_loop(0, J // block, query_block, (jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v)))
    dtype = q_GJNH.dtype
    return _by_token(dq * H**-0.5, dtype), _by_token(dk, dtype), _by_token(dv, dtype)
