"""LoRA for tokens grouped in lanes: every token of lane g belongs to one adapter.  Training and prefill.

    y_GJY[g] = scale_G[g] * (x_GJX[g] @ a_GRX[g].T) @ b_GRY[g]

The rows of a lane's adapter are gathered once per step (`take_rows`), for all layers, so that the step reads and
differentiates only the adapters that are present.  The frozen product stays one GEMM over all lanes, only the low-rank
parts are batched, and a NaN in one adapter stays in its lanes.  The backward pass starts from h, which is kept, and is
dispatched as the forward is (`dispatch` says which body runs).

Shape letters: G lanes, J tokens of a lane, S slots, R LoRA rank, X Y features in, out, L layers.
Source: SGMV, Punica (arXiv 2310.18547), in a tenant-major layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import KEPT, NO_ADAPTER, segmented_lora_tpu
from pallas_kernels.dispatch import by_platform, known_dtypes
from pallas_kernels.shapes import shaped

LaneRows = tuple[jax.Array, jax.Array, jax.Array]  # a_GRX, b_GRY, scale_G


@shaped
def segmented_lora_oracle(x_GJX: jax.Array, a_GRX: jax.Array, b_GRY: jax.Array, scale_G: jax.Array) -> jax.Array:
    """The definition, float32 [G, J, Y]."""
    h_GJR = jnp.einsum("gjx,grx->gjr", x_GJX.astype(jnp.float32), a_GRX.astype(jnp.float32), precision="highest")
    y_GJY = jnp.einsum("gjr,gry->gjy", h_GJR, b_GRY.astype(jnp.float32), precision="highest")
    return scale_G[:, None, None] * y_GJY


@shaped
def segmented_lora(x_GJX: jax.Array, rows: Sequence[LaneRows]) -> tuple[jax.Array, ...]:
    """One [G, J, Y] in x's dtype per (a_GRX, b_GRY, scale_G) of `rows`, which share one read of x.

    Products in x's dtype with float32 sums; scale is applied in float32 between them.
    """
    return _segmented(x_GJX, tuple(tuple(r) for r in rows))


@jax.custom_vjp
def _segmented(x_GJX: jax.Array, rows: tuple[LaneRows, ...]) -> tuple[jax.Array, ...]:
    return _forward(x_GJX, rows)[0]


def _forward(x_GJX, rows):
    y_GJY, h_GJR = by_platform(
        "segmented_lora", x_GJX, rows, xla=_forward_xla, pallas=_forward_pallas, fits=_fits(x_GJX, rows)
    )
    return y_GJY, (x_GJX, rows, h_GJR)


def _backward(saved, dy_GJY):
    x_GJX, rows, h_GJR = saved
    return by_platform(
        "segmented_lora",
        x_GJX,
        rows,
        h_GJR,
        dy_GJY,
        xla=_backward_xla,
        pallas=_backward_pallas,
        fits=_fits(x_GJX, rows),
    )


_segmented.defvjp(_forward, _backward)


def _fits(x_GJX: jax.Array, rows: tuple[LaneRows, ...]) -> bool:
    halves = [half for a, b, _ in rows for half in (a, b)]
    return known_dtypes(x_GJX, *halves) and segmented_lora_tpu.fits(x_GJX, rows)


def _split(h_GJR: jax.Array, rows: tuple[LaneRows, ...]) -> list[jax.Array]:
    """h of each target."""
    return jnp.split(h_GJR, np.cumsum([a.shape[1] for a, _, _ in rows])[:-1].tolist(), axis=2)


# ---- XLA --------------------------------------------------------------------------------------------------------------


def _shrink(x_GJX: jax.Array, a_and_scale: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """h of all targets side by side, in x's dtype."""
    dtype = x_GJX.dtype
    a_GRX = jnp.concatenate([a for a, _ in a_and_scale], axis=1).astype(dtype)
    scale_GR = jnp.concatenate([jnp.repeat(s[:, None], a.shape[1], axis=1) for a, s in a_and_scale], axis=1)
    h_GJR = jnp.einsum("gjx,grx->gjr", x_GJX, a_GRX, preferred_element_type=jnp.float32)
    return (h_GJR * scale_GR[:, None, :]).astype(dtype)


def _expand(h_GJR: list[jax.Array], b_GRY: list[jax.Array]) -> tuple[jax.Array, ...]:
    """[G, J, Y] per target."""
    return tuple(
        jnp.einsum("gjr,gry->gjy", h, b.astype(h.dtype), preferred_element_type=jnp.float32).astype(h.dtype)
        for h, b in zip(h_GJR, b_GRY, strict=True)
    )


def _forward_xla(x_GJX: jax.Array, rows: tuple[LaneRows, ...]) -> tuple[tuple[jax.Array, ...], jax.Array]:
    h_GJR = checkpoint_name(_shrink(x_GJX, [(a, s) for a, _, s in rows]), KEPT)
    return _expand(_split(h_GJR, rows), [b for _, b, _ in rows]), h_GJR


def _backward_xla(x_GJX, rows, h_GJR, dy_GJY):
    _, pull = jax.vjp(lambda h, b: _expand(_split(h, rows), b), h_GJR, [b for _, b, _ in rows])
    dh_GJR, db = pull(dy_GJY)
    _, pull = jax.vjp(_shrink, x_GJX, [(a, s) for a, _, s in rows])
    dx_GJX, da_and_dscale = pull(dh_GJR)
    return dx_GJX, tuple((da, db, ds) for (da, ds), db in zip(da_and_dscale, db, strict=True))


# ---- Pallas -----------------------------------------------------------------------------------------------------------


def _forward_pallas(x_GJX, rows, interpret: bool):
    y_GJY, h_GJR = segmented_lora_tpu.forward(x_GJX, rows, interpret=interpret)
    return y_GJY, checkpoint_name(h_GJR, KEPT)


def _backward_pallas(x_GJX, rows, h_GJR, dy_GJY, interpret: bool):
    parts = _split(h_GJR, rows)
    back = [
        segmented_lora_tpu.expand_back(dy, h, b, interpret=interpret)
        for dy, h, (_, b, _) in zip(dy_GJY, parts, rows, strict=True)
    ]
    scaled = [dh * s[:, None, None] for (dh, _), (_, _, s) in zip(back, rows, strict=True)]
    dh_GJR = jnp.concatenate(scaled, axis=2).astype(x_GJX.dtype)
    dx_GJX, da = segmented_lora_tpu.shrink_back(dh_GJR, x_GJX, [a for a, _, _ in rows], interpret=interpret)
    drows = []
    for (a, b, s), da_GRX, (dh, db_GRY) in zip(rows, da, back, strict=True):
        # Scale is not trained: unless somebody asks for its gradient, XLA drops this product.
        plain_GJR = jnp.einsum("gjx,grx->gjr", x_GJX, a.astype(x_GJX.dtype), preferred_element_type=jnp.float32)
        drows.append((da_GRX.astype(a.dtype), db_GRY.astype(b.dtype), (dh * plain_GJR).sum((1, 2)).astype(s.dtype)))
    return dx_GJX, tuple(drows)


def take_rows(rows_LSRX: jax.Array, slot_G: jax.Array) -> jax.Array:
    """[L, G, R, X]: the rows of each lane's slot; zeros, read from nowhere that matters, where the slot is NO_ADAPTER."""
    safe_G = jnp.maximum(slot_G, 0)
    mask_G = (slot_G != NO_ADAPTER).reshape((1, -1) + (1,) * (rows_LSRX.ndim - 2))
    return jnp.where(mask_G, jnp.take(rows_LSRX, safe_G, axis=1, mode="clip"), jnp.zeros((), rows_LSRX.dtype))
