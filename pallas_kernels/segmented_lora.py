"""LoRA for tokens grouped in lanes: every token of lane g belongs to one adapter.  Training and prefill.

    y_GJY[g] = scale_G[g] * (x_GJX[g] @ a_GRX[g].T) @ b_GRY[g]

The rows of a lane's adapter are gathered once per step (`take_rows`), for all layers, so that the step reads and
differentiates only the adapters that are present.  Differentiable by JAX: the frozen product stays one GEMM over all
lanes, only the low-rank parts are batched, and a NaN in one adapter stays in its lanes.

Shape letters: G lanes, J tokens of a lane, S slots, R LoRA rank, X Y features in, out, L layers.
Source: SGMV, Punica (arXiv 2310.18547), in a tenant-major layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import KEPT, NO_ADAPTER
from pallas_kernels.shapes import shaped


@shaped
def segmented_lora_oracle(x_GJX: jax.Array, a_GRX: jax.Array, b_GRY: jax.Array, scale_G: jax.Array) -> jax.Array:
    """The definition, float32 [G, J, Y]."""
    h_GJR = jnp.einsum("gjx,grx->gjr", x_GJX.astype(jnp.float32), a_GRX.astype(jnp.float32), precision="highest")
    y_GJY = jnp.einsum("gjr,gry->gjy", h_GJR, b_GRY.astype(jnp.float32), precision="highest")
    return scale_G[:, None, None] * y_GJY


@shaped
def segmented_lora(x_GJX: jax.Array, rows: Sequence[tuple[jax.Array, jax.Array, jax.Array]]) -> tuple[jax.Array, ...]:
    """One [G, J, Y] in x's dtype per (a_GRX, b_GRY, scale_G) of `rows`, which share one read of x.

    Products in x's dtype with float32 sums; scale is applied in float32 between them.
    """
    dtype = x_GJX.dtype
    a_GRX = jnp.concatenate([a for a, _, _ in rows], axis=1).astype(dtype)
    scale_GR = jnp.concatenate([jnp.repeat(s[:, None], a.shape[1], axis=1) for a, _, s in rows], axis=1)
    h_GJR = jnp.einsum("gjx,grx->gjr", x_GJX, a_GRX, preferred_element_type=jnp.float32)
    h_GJR = checkpoint_name((h_GJR * scale_GR[:, None, :]).astype(dtype), KEPT)
    parts = jnp.split(h_GJR, np.cumsum([a.shape[1] for a, _, _ in rows])[:-1].tolist(), axis=2)
    return tuple(
        jnp.einsum("gjr,gry->gjy", h, b.astype(dtype), preferred_element_type=jnp.float32).astype(dtype)
        for h, (_, b, _) in zip(parts, rows, strict=True)
    )


def take_rows(rows_LSRX: jax.Array, slot_G: jax.Array) -> jax.Array:
    """[L, G, R, X]: the rows of each lane's slot; zeros, read from nowhere that matters, where the slot is NO_ADAPTER."""
    safe_G = jnp.maximum(slot_G, 0)
    mask_G = (slot_G != NO_ADAPTER).reshape((1, -1) + (1,) * (rows_LSRX.ndim - 2))
    return jnp.where(mask_G, jnp.take(rows_LSRX, safe_G, axis=1, mode="clip"), jnp.zeros((), rows_LSRX.dtype))
