"""LoRA for tokens grouped in lanes: every token of lane g belongs to one adapter.  Training and prefill.

    y_GJY[g] = scale_G[g] * (x_GJX[g] @ a_GRX[g].T) @ b_GRY[g]

The rows of a lane's adapter are gathered once per step (`take_rows`), for all layers, so that the step reads and
differentiates only the adapters that are present.  Differentiable by JAX: the frozen product stays one GEMM over all
lanes, only the low-rank parts are batched, and a NaN in one adapter stays in its lanes.

Shape letters: G lanes, J tokens of a lane, S slots, R LoRA rank, X Y features in, out, L layers.
Source: SGMV, Punica (arXiv 2310.18547), in a tenant-major layout.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import NO_ADAPTER
from pallas_kernels.shapes import shaped


@shaped
def segmented_lora_oracle(x_GJX: jax.Array, a_GRX: jax.Array, b_GRY: jax.Array, scale_G: jax.Array) -> jax.Array:
    """The definition, float32 [G, J, Y]."""
    h_GJR = jnp.einsum("gjx,grx->gjr", x_GJX.astype(jnp.float32), a_GRX.astype(jnp.float32), precision="highest")
    y_GJY = jnp.einsum("gjr,gry->gjy", h_GJR, b_GRY.astype(jnp.float32), precision="highest")
    return scale_G[:, None, None] * y_GJY


@shaped
def segmented_lora(x_GJX: jax.Array, a_GRX: jax.Array, b_GRY: jax.Array, scale_G: jax.Array) -> jax.Array:
    """[G, J, Y] in x's dtype; products in x's dtype with float32 sums, scale applied in float32 between them."""
    dtype = x_GJX.dtype
    h_GJR = jnp.einsum("gjx,grx->gjr", x_GJX, a_GRX.astype(dtype), preferred_element_type=jnp.float32)
    h_GJR = (h_GJR * scale_G[:, None, None]).astype(dtype)
    return jnp.einsum("gjr,gry->gjy", h_GJR, b_GRY.astype(dtype), preferred_element_type=jnp.float32).astype(dtype)


def take_rows(rows_LSRX: jax.Array, slot_G: jax.Array) -> jax.Array:
    """[L, G, R, X]: the rows of each lane's slot; zeros, read from nowhere that matters, where the slot is NO_ADAPTER."""
    safe_G = jnp.maximum(slot_G, 0)
    mask_G = (slot_G != NO_ADAPTER).reshape((1, -1) + (1,) * (rows_LSRX.ndim - 2))
    return jnp.where(mask_G, jnp.take(rows_LSRX, safe_G, axis=1, mode="clip"), jnp.zeros((), rows_LSRX.dtype))
