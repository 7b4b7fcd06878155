"""The paged key/value arrays, and how a step writes and reads them.

Shape letters: L layers, P pages, Z tokens per page, K kv heads, H head, F = K * H, G lanes, J tokens of a lane, C pages
per sequence, T tokens, N query heads.
A token's keys of all heads are one row, and the layout is fixed (`page_format`): a TPU would keep an array that ends in
[K, H] in one layout and write it in another, with four copies of the cache per step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh

from jaxlora.core.model_config import ModelConfig
from jaxlora.model.mesh import sharding
from pallas_kernels.paged_attention.op import paged_attention
from pallas_kernels.sharding import Placement

KV_AXES = ("layers", "pages", None, "kv_heads")  # a head's features are contiguous, so these split as heads do


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVPages:
    """Keys and values of every running sequence, in pages that any sequence may own.  Donated to every step."""

    k_LPZF: jax.Array
    v_LPZF: jax.Array


def page_format(mesh: Mesh) -> Format:
    """Returns sharding and layout of the pages: rows of features in order, whatever other layout would pad less.

    Every program that takes or returns pages must use it: a TPU's compiler is free to choose otherwise, and copies the
    cache wherever two choices meet.
    """
    return Format(Layout(major_to_minor=(0, 1, 2, 3)), sharding(mesh, KV_AXES))


def empty_pages(config: ModelConfig, mesh: Mesh, *, pages: int, page_tokens: int, dtype: jnp.dtype) -> KVPages:
    """Returns pages of zeros, placed on the mesh: kv heads are split over tensor.  Compiles once for each shape."""
    zeros = _zeros((config.layers, pages, page_tokens, config.kv_heads * config.head_dim), dtype, page_format(mesh))
    return KVPages(k_LPZF=zeros(), v_LPZF=zeros())


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, where: Format) -> jax.stages.Wrapped:
    return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=where)


@dataclass(frozen=True, kw_only=True)
class PagedLanes:
    """Where the new tokens of a batch's lanes lie."""

    page_GC: jax.Array  # int32 page of each column of the lane's sequence
    position_GJ: jax.Array  # int32 place in the sequence; -1 is padding, which is not written


def paged_attend(
    batches: Sequence[PagedLanes], window: int | None, placement: Placement | None = None
) -> Callable[..., tuple[jax.Array, KVPages]]:
    """Returns an `Attend` (see decoder.py) that writes the new keys and values, then attends over the pages.

    batches: whose tokens follow each other, T = the sum of G * J; all are written before any attends.
    placement: of attention, on a mesh of several devices.  Products are in the pages' dtype.
    """

    def attend(
        layer: jax.Array, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, cache: KVPages
    ) -> tuple[jax.Array, KVPages]:
        pages, page_tokens = cache.k_LPZF.shape[1:3]
        T, dtype = q_TNH.shape[0], cache.k_LPZF.dtype
        page_T, offset_T = (
            jnp.concatenate(x) for x in zip(*(_places(b, pages, page_tokens) for b in batches), strict=True)
        )
        cache = KVPages(
            k_LPZF=cache.k_LPZF.at[layer, page_T, offset_T].set(k_TKH.reshape(T, -1).astype(dtype), mode="drop"),
            v_LPZF=cache.v_LPZF.at[layer, page_T, offset_T].set(v_TKH.reshape(T, -1).astype(dtype), mode="drop"),
        )
        kv, out, start = (cache.k_LPZF, cache.v_LPZF), [], 0
        for batch in batches:
            end = start + batch.position_GJ.size
            q_GJNH = q_TNH[start:end].reshape(*batch.position_GJ.shape, *q_TNH.shape[1:]).astype(dtype)
            out_GJNH = paged_attention(
                q_GJNH, *kv, layer, batch.page_GC, batch.position_GJ, window=window, placement=placement
            )
            out.append(out_GJNH.reshape(-1, *q_TNH.shape[1:]).astype(q_TNH.dtype))
            start = end
        return jnp.concatenate(out), cache

    return attend


def _places(batch: PagedLanes, pages: int, page_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Returns each token's page, out of range where it is padding, and its place there."""
    place = jnp.maximum(batch.position_GJ, 0)
    page_GJ = jnp.take_along_axis(batch.page_GC, place // page_tokens, axis=1)
    return jnp.where(batch.position_GJ >= 0, page_GJ, pages).reshape(-1), (place % page_tokens).reshape(-1)
