"""The paged key/value arrays, and how a step writes and reads them.

Shape letters: L layers, P pages, Z tokens per page, K kv heads, H head, G lanes, J tokens of a lane, C pages per
sequence, T = G * J tokens, N query heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlora.mesh import sharding
from jaxlora.model_config import ModelConfig
from pallas_kernels.paged_attention import paged_attention


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVPages:
    """Keys and values of every running sequence, in pages any sequence may own.  Donated to every step."""

    k_LPZKH: jax.Array
    v_LPZKH: jax.Array


def empty_pages(config: ModelConfig, mesh: Mesh, *, pages: int, page_tokens: int, dtype: jnp.dtype) -> KVPages:
    """Pages of zeros, placed on the mesh: kv heads are split over tensor."""
    shape = (config.layers, pages, page_tokens, config.kv_heads, config.head_dim)
    placed = sharding(mesh, ("layers", "pages", None, "kv_heads", None))
    return KVPages(k_LPZKH=jnp.zeros(shape, dtype, device=placed), v_LPZKH=jnp.zeros(shape, dtype, device=placed))


def paged_attend(
    page_GC: jax.Array, position_GJ: jax.Array, window: int | None
) -> Callable[..., tuple[jax.Array, KVPages]]:
    """An `Attend` (see model.py) that writes the new keys and values, then attends over the pages.

    page_GC: int32 page of each column of the lane's sequence; position_GJ: int32 place in the sequence, -1 is padding,
    which is written nowhere.
    """
    G, J = position_GJ.shape

    def attend(
        layer: jax.Array, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, cache: KVPages
    ) -> tuple[jax.Array, KVPages]:
        pages, page_tokens = cache.k_LPZKH.shape[1:3]
        place = jnp.maximum(position_GJ, 0)
        page_GJ = jnp.take_along_axis(page_GC, place // page_tokens, axis=1)
        page_T = jnp.where(position_GJ >= 0, page_GJ, pages).reshape(-1)  # out of range: dropped
        offset_T = (place % page_tokens).reshape(-1)
        cache = KVPages(
            k_LPZKH=cache.k_LPZKH.at[layer, page_T, offset_T].set(k_TKH, mode="drop"),
            v_LPZKH=cache.v_LPZKH.at[layer, page_T, offset_T].set(v_TKH, mode="drop"),
        )
        q_GJNH = q_TNH.reshape(G, J, *q_TNH.shape[1:])
        out = paged_attention(q_GJNH, cache.k_LPZKH, cache.v_LPZKH, layer, page_GC, position_GJ, window=window)
        return out.reshape(q_TNH.shape), cache

    return attend
