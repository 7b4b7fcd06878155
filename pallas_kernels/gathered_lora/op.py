"""LoRA of a server's steps: lanes of as many tokens each, one slot a lane.  Decode has one token a lane, prompts have several.

    y_TY[t] = scale_LS[l, s] * (x_TX[t] @ a_RX.T) @ b_RY      s the slot of t's lane; zero where s is NO_ADAPTER
    a_RX, b_RY = as many of the slot's rows in layer l of a_LNRX, b_LNRY as rank_S[s] (`pool_rows`)

Rows are read from the pool in place: nothing of the pool is copied, its number of slots costs nothing, a token of the
base model reads nothing, an adapter its own rank's rows, and a NaN in one adapter reaches only that adapter's tokens.
XLA's form of prompts alone takes each lane's rows first.
`dispatch` states which runs.  Serving alone computes it, so it has no gradient.

Shape letters: T tokens, G lanes, J tokens of a lane, L layers, S slots, N tiles of rows, R LoRA rank, X Y features in, out.
Source: BGMV, Punica (arXiv 2310.18547).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from pallas_kernels import NO_ADAPTER, tiling_cuda
from pallas_kernels.dispatch import by_platform, known_dtypes
from pallas_kernels.gathered_lora import pallas_tpu as gathered_lora_tpu
from pallas_kernels.gathered_lora import xla_cpu as xla
from pallas_kernels.gathered_lora.pool_rows import PoolRows, lane_rows, order_of_parts
from pallas_kernels.gathered_lora.rank_classes import first_rows
from pallas_kernels.native import library
from pallas_kernels.segmented_lora.op import forward_xla
from pallas_kernels.shapes import shaped
from pallas_kernels.sharding import Placement

NATIVE_PART = 16  # the native body takes features that it divides


@shaped
def gathered_lora_reference(
    x_TX: jax.Array, a_SRX: jax.Array, b_SRY: jax.Array, scale_S: jax.Array, slot_T: jax.Array
) -> jax.Array:
    """Defines the op for one layer and target of slots that are full: returns float32 [T, Y]."""
    safe_T = jnp.maximum(slot_T, 0)
    a_TRX, b_TRY = a_SRX[safe_T].astype(jnp.float32), b_SRY[safe_T].astype(jnp.float32)
    h_TR = jnp.einsum("tx,trx->tr", x_TX.astype(jnp.float32), a_TRX, precision="highest")
    y_TY = scale_S[safe_T][:, None] * jnp.einsum("tr,try->ty", h_TR, b_TRY, precision="highest")
    return jnp.where((slot_T != NO_ADAPTER)[:, None], y_TY, 0.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Visits:
    """The order in which a step's lanes are visited, computed once for all its layers and targets.

    Where lanes are split over devices, every device has its own.
    """

    order_G: jax.Array  # int32 lanes by slot, those of the base model last
    slot_G: jax.Array  # int32 their slots
    count_1: jax.Array  # int32 number of lanes with an adapter: the others are not visited


def visits_by_slot(slot_G: jax.Array, placement: Placement | None = None) -> Visits:
    """Returns the order in which lanes of one slot follow each other, in arrival order."""
    if placement is not None and placement.rows:
        return placement.on_each(visits_by_slot, (P(placement.rows),), _visits_spec(placement))(slot_G)
    key_G = jnp.where(slot_G == NO_ADAPTER, jnp.iinfo(jnp.int32).max, slot_G)
    order_G = jnp.argsort(key_G, stable=True).astype(jnp.int32)
    count_1 = (slot_G != NO_ADAPTER).sum(keepdims=True, dtype=jnp.int32)
    return Visits(order_G=order_G, slot_G=slot_G[order_G], count_1=count_1)


def _visits_spec(placement: Placement) -> Visits:
    rows = P(placement.rows)
    return Visits(order_G=rows, slot_G=rows, count_1=rows)  # ty: ignore[invalid-argument-type]


@shaped
def gathered_lora(
    x_TX: jax.Array,
    rows: Sequence[PoolRows],
    layer: jax.Array,
    slot_G: jax.Array,
    visits: Visits | None = None,
    placement: Placement | None = None,
) -> tuple[jax.Array, ...]:
    """Returns one [T, Y] in x's dtype per target of `rows`, which share one read of x and the same slots.

    slot_G: of each lane; lanes have T / G tokens each, which follow each other.
    visits: `visits_by_slot(slot_G, placement)`, for callers that reuse the same slots.
    placement: mesh axes that split the arrays, on a mesh of several devices; with `apart` each result is [parts, T, Y], to be
    summed.
    Sums in float32.  Raises ValueError where lanes do not divide the tokens.
    """
    tokens, uneven = divmod(x_TX.shape[0], slot_G.shape[0])
    if uneven:
        raise ValueError(
            f"gathered_lora: slot_G has {slot_G.shape[0]} lanes, which do not divide the {x_TX.shape[0]} tokens of x_TX"
        )
    visits = visits_by_slot(slot_G, placement) if visits is None else visits
    args = (x_TX, tuple(rows), layer, slot_G, visits)
    part = args if placement is None else placement.local(_specs(placement, rows), args)
    known = known_dtypes(x_TX, *(half for row in rows for half in (row.a_LNRX, row.b_LNRY)))
    on_tpu = gathered_lora_tpu.fits(part[0], part[1], tokens)

    def run(kernels: GatheredKernels) -> Callable[..., tuple[jax.Array, ...]]:
        return functools.partial(_visited, kernels, placement)

    return by_platform(
        "gathered_lora",
        *args,
        xla=_prompts_xla if tokens > 1 else run(_xla()),
        native=_native if known and fits_native(placement, x_TX, rows) else None,
        pallas=(lambda interpret: run(_tpu(interpret))) if known and on_tpu else None,
        triton=(lambda: run(_cuda())) if known and _fits_cuda(part[1], tokens, part[3].shape[0]) else None,
    )


def _specs(placement: Placement, targets: Sequence[PoolRows]) -> tuple:
    """Returns the specs of x, rows, layer, slots and visits."""
    a, b, whole, rows = P(None, None, None, placement.x), P(None, None, None, placement.y), P(), P(placement.rows)
    of_rows = tuple(replace(row, a_LNRX=a, b_LNRY=b, scale_LS=whole, rank_S=whole) for row in targets)
    return P(placement.rows, placement.x), of_rows, whole, rows, _visits_spec(placement)


@dataclass(frozen=True, kw_only=True, slots=True)
class GatheredKernels:
    """The whole product, and its halves for meshes that sum h over devices between them."""

    both: Callable[..., list[jax.Array]]
    shrink: Callable[..., list[jax.Array]]
    expand: Callable[..., list[jax.Array]]


def _xla() -> GatheredKernels:
    return GatheredKernels(both=xla.both, shrink=xla.shrink, expand=xla.expand)


def _prompts_xla(
    x_TX: jax.Array, rows: tuple[PoolRows, ...], layer: jax.Array, slot_G: jax.Array, visits: Visits
) -> tuple[jax.Array, ...]:
    """Runs XLA's products over each lane's rows, of all that the largest slot owns."""
    x_GJX = x_TX.reshape(slot_G.shape[0], -1, x_TX.shape[1])
    y_GJY, _ = forward_xla(x_GJX, tuple(lane_rows(row, layer, slot_G) for row in rows), None)
    return tuple(y.reshape(x_TX.shape[0], -1) for y in y_GJY)


def _tpu(interpret: bool) -> GatheredKernels:
    tpu = gathered_lora_tpu
    both, shrink, expand = (functools.partial(half, interpret=interpret) for half in (tpu.both, tpu.shrink, tpu.expand))
    return GatheredKernels(both=both, shrink=shrink, expand=expand)


def _cuda() -> GatheredKernels:
    from pallas_kernels.gathered_lora import triton as cuda  # imports Triton

    return GatheredKernels(both=cuda.both, shrink=cuda.shrink, expand=cuda.expand)


def fits_native(placement: Placement | None, x_TX: jax.Array, rows: Sequence[PoolRows]) -> bool:
    """Returns whether the native body takes these, where it is built.  It does for many tokens of a slot as well as for one."""
    features = [size for row in rows for size in (row.a_LNRX.shape[3], row.b_LNRY.shape[3])]
    stored = {half.dtype for row in rows for half in (row.a_LNRX, row.b_LNRY)}
    same = len(stored) == 1 and (x_TX.dtype == jnp.bfloat16 or x_TX.dtype in stored)
    return placement is None and same and not any(size % NATIVE_PART for size in features)


def _native(*args) -> tuple[jax.Array, ...]:
    x_TX, rows, layer, slot_G, visits = args
    results = [((x_TX.shape[0], row.b_LNRY.shape[3]), x_TX.dtype) for row in rows]
    first_S = jnp.asarray(first_rows(rows[0].classes))
    order = order_of_parts((visits.order_G, visits.slot_G, visits.count_1), x_TX.shape[0] // slot_G.shape[0])
    arrays = [x for row in rows for x in (row.a_LNRX, row.b_LNRY, row.scale_LS, row.rank_S)]
    return tuple(library.call("jaxlora_lora", results, x_TX, layer, *order, first_S, *arrays))


def _fits_cuda(rows: tuple[PoolRows, ...], tokens: int, lanes: int) -> bool:
    """tokens: of a lane."""
    few = tokens > 1 or lanes <= tiling_cuda.VISITS
    return tiling_cuda.installed() and rows[0].rank <= tiling_cuda.RANK and few


def _visited(
    kernels: GatheredKernels,
    placement: Placement | None,
    x_TX: jax.Array,
    rows: tuple[PoolRows, ...],
    layer: jax.Array,
    slot_G: jax.Array,
    visits: Visits,
) -> tuple[jax.Array, ...]:
    """Runs the bodies that visit tokens; output rows that were not visited are undefined, so selection masks them."""

    def body(x_TX, rows, layer, slot_G, visits) -> tuple[jax.Array, ...]:
        order = visits.order_G, visits.slot_G, visits.count_1[0]
        if placement is None or placement.x is None or placement.apart:
            y_TY = kernels.both(x_TX, rows, layer, order)
        else:
            h_TR = lax.psum(kernels.shrink(x_TX, rows, layer, order), placement.x)
            y_TY = kernels.expand(h_TR, rows, layer, order, x_TX.dtype)
        has_T = jnp.repeat(slot_G != NO_ADAPTER, x_TX.shape[0] // slot_G.shape[0])
        own = tuple(jnp.where(has_T[:, None], y, 0) for y in y_TY)
        return tuple(y[None] for y in own) if placement is not None and placement.apart else own

    if placement is None:
        return body(x_TX, rows, layer, slot_G, visits)
    spec = P(placement.x, placement.rows, None) if placement.apart else P(placement.rows, placement.y)
    out = (spec,) * len(rows)
    return placement.on_each(body, _specs(placement, rows), out)(x_TX, rows, layer, slot_G, visits)
