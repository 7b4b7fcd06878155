"""Attention of new tokens over their sequence's KV pages.  Decode (J = 1) and chunked prefill.

The keys and values of the new tokens are already written.  A lane is a run of tokens of one sequence; several lanes may
belong to one sequence.  The loop runs over page columns with an online softmax, and its trip count is the pages of the
longest lane, so one compiled program serves every length.  `dispatch` states which body runs.

Shape letters: G lanes, J tokens of a lane, N query heads, K kv heads, M queries per kv head, H head,
L layers, P pages, Z tokens per page, C pages per sequence, F = K * H features of a token's keys.
Source: online softmax (arXiv 1805.02867); paged KV, vLLM (arXiv 2309.06180).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention.op import MASKED, fits_cuda
from pallas_kernels.dispatch import by_platform, known_dtypes
from pallas_kernels.native import library
from pallas_kernels.paged_attention import pallas_tpu as paged_attention_tpu
from pallas_kernels.shapes import shaped
from pallas_kernels.sharding import Placement

HEAD_PART, HEAD_MOST = 8, 256  # features of a head that the native body takes: a multiple of a vector, and at most


@shaped
def paged_attention_reference(
    q_GJNH: jax.Array,
    k_LPZF: jax.Array,
    v_LPZF: jax.Array,
    layer: jax.Array,
    page_GC: jax.Array,
    position_GJ: jax.Array,
    *,
    window: int | None,
) -> jax.Array:
    """Defines the op: gathers every page, then attends.  Returns float32 [G, J, N, H]."""
    G, J, N, H = q_GJNH.shape
    Z, K = k_LPZF.shape[2], k_LPZF.shape[3] // H
    k = k_LPZF[layer][page_GC].reshape(G, -1, K, H).astype(jnp.float32)
    v = v_LPZF[layer][page_GC].reshape(G, -1, K, H).astype(jnp.float32)
    seen = _visible(position_GJ, jnp.arange(page_GC.shape[1] * Z), window)
    held = (jnp.arange(page_GC.shape[1] * Z)[None, :] <= position_GJ.max(1)[:, None])[:, :, None, None]
    q = q_GJNH.astype(jnp.float32).reshape(G, J, K, N // K, H)
    score = jnp.einsum("gjkmh,gskh->gkmjs", q, jnp.where(held, k, 0), precision="highest") * H**-0.5
    weight = jax.nn.softmax(jnp.where(seen[:, None, None], score, MASKED), axis=-1)
    out = jnp.einsum("gkmjs,gskh->gjkmh", weight, jnp.where(held, v, 0), precision="highest").reshape(G, J, N, H)
    return jnp.where((position_GJ >= 0)[:, :, None, None], out, 0)


@shaped
def paged_attention(
    q_GJNH: jax.Array,
    k_LPZF: jax.Array,
    v_LPZF: jax.Array,
    layer: jax.Array,
    page_GC: jax.Array,
    position_GJ: jax.Array,
    *,
    window: int | None,
    placement: Placement | None = None,
) -> jax.Array:
    """Returns [G, J, N, H] in q's dtype; zeros where position is -1 (padding).  Softmax in float32.

    page_GC: int32 page of each column of a lane's sequence; entries past its length are never read.
    position_GJ: int32 place of the token in its sequence, -1 for padding.  The contents of unused pages, NaN too,
    change nothing: values are selected, not multiplied by a zero weight.
    placement: mesh axes that split the arrays, on a mesh of several devices.
    """
    args = (q_GJNH, k_LPZF, v_LPZF, layer, page_GC, position_GJ)
    return by_platform(
        "paged_attention",
        *args,
        xla=functools.partial(_columns, window),
        native=functools.partial(_attend_native, window) if _fits_native(placement, *args) else None,
        pallas=functools.partial(_attend_tpu, window, placement) if _fits_tpu(placement, *args) else None,
        triton=functools.partial(_attend_cuda, window, placement) if fits_cuda(*args[:3]) else None,
    )


def _specs(placement: Placement) -> tuple:
    rows, pages = P(placement.rows), P(None, None, None, placement.heads)
    return P(placement.rows, None, placement.heads), pages, pages, P(), rows, rows


def _fits_native(placement: Placement | None, *args: jax.Array) -> bool:
    q, k, v, *_ = args
    same = known_dtypes(q, k, v) and q.dtype == k.dtype == v.dtype
    return placement is None and same and q.shape[3] % HEAD_PART == 0 and q.shape[3] <= HEAD_MOST


def _attend_native(window: int | None, *args: jax.Array) -> jax.Array:
    (out_GJNH,) = library.call(
        "jaxlora_attention", [(args[0].shape, args[0].dtype)], *args, window=np.int64(window or 0)
    )
    return out_GJNH


def _fits_tpu(placement: Placement | None, *args: jax.Array) -> bool:
    q, k, _, _, page, _ = args if placement is None else placement.local(_specs(placement), args)
    return known_dtypes(q, k) and paged_attention_tpu.cut(q, k, page) is not None


def _attend_tpu(window: int | None, placement: Placement | None, interpret: bool) -> Callable[..., jax.Array]:
    attend = functools.partial(paged_attention_tpu.attend, window=window, interpret=interpret)
    return functools.partial(_attend_kernel, attend, placement)


def _attend_cuda(window: int | None, placement: Placement | None) -> Callable[..., jax.Array]:
    from pallas_kernels.paged_attention import triton as paged_attention_cuda  # imports Triton

    return functools.partial(_attend_kernel, functools.partial(paged_attention_cuda.attend, window=window), placement)


def _attend_kernel(attend: Callable[..., jax.Array], placement: Placement | None, *arrays: jax.Array) -> jax.Array:
    """Runs a kernel; masks its padding rows, which are undefined, by selection."""

    def body(q_GJNH, k_LPZF, v_LPZF, layer, page_GC, position_GJ) -> jax.Array:
        out_GJNH = attend(q_GJNH, k_LPZF, v_LPZF, layer, page_GC, position_GJ)
        return jnp.where((position_GJ >= 0)[:, :, None, None], out_GJNH, 0)

    if placement is None:
        return body(*arrays)
    specs = _specs(placement)
    return placement.on_each(body, specs, specs[0])(*arrays)


def _columns(
    window: int | None,
    q_GJNH: jax.Array,
    k_LPZF: jax.Array,
    v_LPZF: jax.Array,
    layer: jax.Array,
    page_GC: jax.Array,
    position_GJ: jax.Array,
) -> jax.Array:
    """Runs the XLA body: a loop over page columns, as many as the longest lane has."""
    G, J, N, H = q_GJNH.shape
    Z, K = k_LPZF.shape[2], k_LPZF.shape[3] // H
    M = N // K
    q = (q_GJNH.reshape(G, J, K, M, H) * H**-0.5).astype(q_GJNH.dtype)
    last_G = position_GJ.max(axis=1)

    def column(c: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        best, total, acc = carry
        page_G = lax.dynamic_index_in_dim(page_GC, c, 1, keepdims=False)
        key_Z = c * Z + jnp.arange(Z)
        held = (key_Z[None, :] <= last_G[:, None])[:, :, None, None]
        k = jnp.where(held, k_LPZF[layer, page_G].reshape(G, Z, K, H), 0)
        v = jnp.where(held, v_LPZF[layer, page_G].reshape(G, Z, K, H), 0)
        score = jnp.einsum("gjkmh,gzkh->gkmjz", q, k, preferred_element_type=jnp.float32)
        score = jnp.where(_visible(position_GJ, key_Z, window)[:, None, None], score, MASKED)
        new_best = jnp.maximum(best, score.max(-1))
        weight = jnp.exp(score - new_best[..., None])
        shrink = jnp.exp(best - new_best)
        part = jnp.einsum("gkmjz,gzkh->gkmjh", weight.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return new_best, total * shrink + weight.sum(-1), acc * shrink[..., None] + part

    start = (
        jnp.full((G, K, M, J), MASKED, jnp.float32),
        jnp.zeros((G, K, M, J), jnp.float32),
        jnp.zeros((G, K, M, J, H), jnp.float32),
    )
    columns = jnp.maximum(last_G.max(), 0) // Z + 1
    _, total, acc = lax.fori_loop(0, columns, column, start)
    out = (acc / total[..., None]).transpose(0, 3, 1, 2, 4).reshape(G, J, N, H)
    return jnp.where((position_GJ >= 0)[:, :, None, None], out, 0).astype(q_GJNH.dtype)


def _visible(position_GJ: jax.Array, key_Z: jax.Array, window: int | None) -> jax.Array:
    """Returns bool [G, J, Z]: whether the token at this position attends to the key at that place of its sequence."""
    position, key = position_GJ[:, :, None], key_Z[None, None, :]
    return key <= position if window is None else (key <= position) & (key > position - window)
