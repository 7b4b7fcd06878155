"""LoRA for tokens grouped in lanes: every token of lane g belongs to one adapter.  Training.

    y_GJY[g] = scale_G[g] * (x_GJX[g] @ a_GRX[g].T) @ b_GRY[g]

The rows of a lane's adapter are gathered beforehand, so that the step reads and differentiates only the adapters that are
present: layer by layer where one program runs all (`take_layer_rows`), which keeps them in the cache, or for all layers at
once where microsteps share them (`take_rows`).  The frozen product stays one GEMM over all lanes, only the low-rank
products are batched, and a NaN in one adapter stays in its lanes.  The backward pass starts from h, which is saved,
and is dispatched as the forward is (`dispatch` states which body runs).

Shape letters: G lanes, J tokens of a lane, S slots, R LoRA rank, X Y features in, out, L layers.
Source: SGMV, Punica (arXiv 2310.18547), in a tenant-major layout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from pallas_kernels import KEPT, NO_ADAPTER, tiling_cuda
from pallas_kernels.dispatch import by_platform, known_dtypes
from pallas_kernels.segmented_lora import pallas_tpu as segmented_lora_tpu
from pallas_kernels.shapes import shaped
from pallas_kernels.sharding import Placement

LaneRows = tuple[jax.Array, jax.Array, jax.Array]  # a_GRX, b_GRY, scale_G


@shaped
def segmented_lora_reference(x_GJX: jax.Array, a_GRX: jax.Array, b_GRY: jax.Array, scale_G: jax.Array) -> jax.Array:
    """Defines the op: returns float32 [G, J, Y]."""
    h_GJR = jnp.einsum("gjx,grx->gjr", x_GJX.astype(jnp.float32), a_GRX.astype(jnp.float32), precision="highest")
    y_GJY = jnp.einsum("gjr,gry->gjy", h_GJR, b_GRY.astype(jnp.float32), precision="highest")
    return scale_G[:, None, None] * y_GJY


@shaped
def segmented_lora(
    x_GJX: jax.Array, rows: Sequence[LaneRows], placement: Placement | None = None
) -> tuple[jax.Array, ...]:
    """Returns one [G, J, Y] in x's dtype per (a_GRX, b_GRY, scale_G) of `rows`, which share one read of x.

    placement: mesh axes that split the arrays, on a mesh of several devices.
    Products in x's dtype with float32 sums; scale is applied in float32 between them.
    """
    return _segmented(placement, x_GJX, tuple(tuple(r) for r in rows))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _segmented(placement: Placement | None, x_GJX: jax.Array, rows: tuple[LaneRows, ...]) -> tuple[jax.Array, ...]:
    return _forward(placement, x_GJX, rows)[0]


def _forward(placement, x_GJX, rows):
    y_GJY, h_GJR = _dispatched(_forward_kernels, placement, x_GJX, rows)
    return y_GJY, (x_GJX, rows, h_GJR)


def _backward(placement, saved, dy_GJY):
    return _dispatched(_backward_kernels, placement, *saved, dy_GJY)


_segmented.defvjp(_forward, _backward)


def _dispatched(run: Callable[..., tuple], placement: Placement | None, x_GJX, rows, *more) -> tuple:
    """Runs `_forward_kernels` or `_backward_kernels` with the platform's kernels."""

    def placed(kernels: SegmentedKernels) -> Callable[..., tuple]:
        return functools.partial(run, kernels, placement)

    return by_platform(
        "segmented_lora",
        *(x_GJX, rows, *more),
        xla=functools.partial(run, _xla(), None),
        pallas=(lambda interpret: placed(_tpu(interpret))) if _fits_tpu(placement, x_GJX, rows) else None,
        triton=(lambda: placed(_cuda())) if _fits_cuda(x_GJX, rows) else None,
    )


def _specs(placement: Placement, targets: int) -> tuple:
    """Returns the specs of x and rows."""
    a, b, scale = P(placement.rows, None, placement.x), P(placement.rows, None, placement.y), P(placement.rows)
    return P(placement.rows, None, placement.x), ((a, b, scale),) * targets


def _fits_tpu(placement: Placement | None, x_GJX: jax.Array, rows: tuple[LaneRows, ...]) -> bool:
    part = (x_GJX, rows) if placement is None else placement.local(_specs(placement, len(rows)), (x_GJX, rows))
    return _known(x_GJX, rows) and segmented_lora_tpu.fits(*part)


def _fits_cuda(x_GJX: jax.Array, rows: tuple[LaneRows, ...]) -> bool:
    rank = sum(a.shape[1] for a, _, _ in rows)
    return tiling_cuda.installed() and rank <= tiling_cuda.RANK and _known(x_GJX, rows)


def _known(x_GJX: jax.Array, rows: tuple[LaneRows, ...]) -> bool:
    return known_dtypes(x_GJX, *(half for a, b, _ in rows for half in (a, b)))


def _split(h_GJR: jax.Array, rows: tuple[LaneRows, ...]) -> list[jax.Array]:
    """Returns each target's h."""
    return jnp.split(h_GJR, np.cumsum([a.shape[1] for a, _, _ in rows])[:-1].tolist(), axis=2)


# ---- XLA --------------------------------------------------------------------------------------------------------------


def _shrink_plain(x_GJX: jax.Array, a_rows: Sequence[jax.Array], axis: str | None = None) -> jax.Array:
    """Returns float32 x @ a.T of all targets side by side, summed over the mesh axis that splits x."""
    a_GRX = jnp.concatenate(a_rows, axis=1).astype(x_GJX.dtype)
    h_GJR = jnp.einsum("gjx,grx->gjr", x_GJX, a_GRX, preferred_element_type=jnp.float32)
    return h_GJR if axis is None else lax.psum(h_GJR, axis)


def shrink(x_GJX: jax.Array, a_and_scale: list[tuple[jax.Array, jax.Array]], axis: str | None = None) -> jax.Array:
    """Returns h of all targets side by side, in x's dtype."""
    scale_GR = jnp.concatenate([jnp.repeat(s[:, None], a.shape[1], axis=1) for a, s in a_and_scale], axis=1)
    h_GJR = _shrink_plain(x_GJX, [a for a, _ in a_and_scale], axis)
    return (h_GJR * scale_GR[:, None, :]).astype(x_GJX.dtype)


def _expand(h_GJR: list[jax.Array], b_GRY: list[jax.Array]) -> tuple[jax.Array, ...]:
    """Returns [G, J, Y] per target, in h's dtype: with that as output dtype XLA sums in float32 and rounds once."""
    return tuple(
        jnp.einsum("gjr,gry->gjy", h, b.astype(h.dtype), preferred_element_type=h.dtype)
        for h, b in zip(h_GJR, b_GRY, strict=True)
    )


def forward_xla(
    x_GJX: jax.Array, rows: tuple[LaneRows, ...], axis: str | None
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Returns ([G, J, Y] per target, scaled h_GJR of all targets side by side), in x's dtype.

    axis: the mesh axis that splits x, where it runs on each device's part; XLA partitions it over a mesh by itself.
    """
    h_GJR = checkpoint_name(shrink(x_GJX, [(a, s) for a, _, s in rows], axis), KEPT)
    return _expand(_split(h_GJR, rows), [b for _, b, _ in rows]), h_GJR


def _expand_back_xla(dy_GJY: jax.Array, h_GJR: jax.Array, b_GRY: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns float32 (dh, db)."""
    dh_GJR = jnp.einsum("gjy,gry->gjr", dy_GJY, b_GRY.astype(dy_GJY.dtype), preferred_element_type=jnp.float32)
    return dh_GJR, jnp.einsum("gjr,gjy->gry", h_GJR, dy_GJY, preferred_element_type=jnp.float32)


def _shrink_back_xla(
    dh_GJR: jax.Array, x_GJX: jax.Array, a_rows: Sequence[jax.Array]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns (dx in x's dtype, float32 da of each target)."""
    a_GRX = jnp.concatenate(a_rows, axis=1).astype(x_GJX.dtype)
    dx_GJX = jnp.einsum("gjr,grx->gjx", dh_GJR, a_GRX, preferred_element_type=x_GJX.dtype)
    da_GRX = jnp.einsum("gjr,gjx->grx", dh_GJR, x_GJX, preferred_element_type=jnp.float32)
    return dx_GJX, tuple(jnp.split(da_GRX, np.cumsum([a.shape[1] for a in a_rows])[:-1].tolist(), axis=1))


# ---- kernels ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentedKernels:
    """Kernels for the forward product, and for the gradients of its second and first half."""

    forward: Callable[..., tuple[tuple[jax.Array, ...], jax.Array]]
    expand_back: Callable[..., tuple[jax.Array, jax.Array]]
    shrink_back: Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]


def _xla() -> SegmentedKernels:
    """Returns XLA's products, which need no placement: XLA partitions them over a mesh by itself."""
    forward = functools.partial(forward_xla, axis=None)
    return SegmentedKernels(forward=forward, expand_back=_expand_back_xla, shrink_back=_shrink_back_xla)


def _tpu(interpret: bool) -> SegmentedKernels:
    return SegmentedKernels(
        forward=functools.partial(segmented_lora_tpu.forward, interpret=interpret),
        expand_back=functools.partial(segmented_lora_tpu.expand_back, interpret=interpret),
        shrink_back=functools.partial(segmented_lora_tpu.shrink_back, interpret=interpret),
    )


def _cuda() -> SegmentedKernels:
    from pallas_kernels.segmented_lora import triton as cuda  # imports Triton

    return SegmentedKernels(forward=cuda.forward, expand_back=cuda.expand_back, shrink_back=cuda.shrink_back)


def _forward_kernels(kernels: SegmentedKernels, placement: Placement | None, x_GJX, rows):
    def body(x_GJX, rows):
        if placement is None or placement.x is None:
            return kernels.forward(x_GJX, rows)
        # The sum over devices separates the halves, so there is nothing to fuse: XLA's products.
        return forward_xla(x_GJX, rows, placement.x)

    if placement is None:
        return body(x_GJX, rows)
    out = (P(placement.rows, None, placement.y),) * len(rows), P(placement.rows)
    return placement.on_each(body, _specs(placement, len(rows)), out)(x_GJX, rows)


def _backward_kernels(kernels: SegmentedKernels, placement: Placement | None, x_GJX, rows, h_GJR, dy_GJY):
    def body(x_GJX, rows, h_GJR, dy_GJY):
        a_rows, b_rows, scale = zip(*rows, strict=True)
        back = [kernels.expand_back(dy, h, b) for dy, h, b in zip(dy_GJY, _split(h_GJR, rows), b_rows, strict=True)]
        dh_GJR = jnp.concatenate([dh for dh, _ in back], axis=2)
        if placement is not None and placement.y is not None:
            dh_GJR = lax.psum(dh_GJR, placement.y)
        dh = _split(dh_GJR, rows)
        scaled = jnp.concatenate([d * s[:, None, None] for d, s in zip(dh, scale, strict=True)], axis=2)
        dx_GJX, da = kernels.shrink_back(scaled.astype(x_GJX.dtype), x_GJX, a_rows)
        # Scale is not trained: XLA drops this product unless a caller differentiates by it.
        plain = _split(_shrink_plain(x_GJX, a_rows, None if placement is None else placement.x), rows)
        dscale = [(d * h).sum((1, 2)) for d, h in zip(dh, plain, strict=True)]
        drows = zip(da, (db for _, db in back), dscale, strict=True)
        return dx_GJX, tuple(
            tuple(new.astype(old.dtype) for new, old in zip(d, r, strict=True))
            for d, r in zip(drows, rows, strict=True)
        )

    if placement is None:
        return body(x_GJX, rows, h_GJR, dy_GJY)
    x, r = _specs(placement, len(rows))
    dy = (P(placement.rows, None, placement.y),) * len(rows)
    return placement.on_each(body, (x, r, P(placement.rows), dy), (x, r))(x_GJX, rows, h_GJR, dy_GJY)


def take_rows(rows_LSRX: jax.Array, slot_G: jax.Array) -> jax.Array:
    """Returns [L, G, R, X]: the rows of each lane's slot; zeros where the slot is NO_ADAPTER."""
    return _taken(rows_LSRX, jnp.arange(rows_LSRX.shape[0])[:, None], slot_G[None])


def take_layer_rows(rows_LSRX: jax.Array, layer: jax.Array, slot_G: jax.Array) -> jax.Array:
    """Returns [G, R, X]: the rows `take_rows` takes, of one layer.  Nothing else of the pool is read."""
    return _taken(rows_LSRX, layer, slot_G)


def _taken(rows_LSRX: jax.Array, layer: jax.Array, slot: jax.Array) -> jax.Array:
    """Indexes layer and slot by one number: XLA's CPU backend copies such rows whole, and others number by number."""
    L, S, *row = rows_LSRX.shape
    taken = rows_LSRX.reshape(L * S, *row).at[layer * S + jnp.maximum(slot, 0)].get(mode="clip")
    has_rows = (slot != NO_ADAPTER).reshape(*slot.shape, *(1 for _ in row))
    return jnp.where(has_rows, taken, jnp.zeros((), taken.dtype))
