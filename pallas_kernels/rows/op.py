"""Reductions of rows: RMS norm, log-sum-exp, what is said of logits, the best k.  `dispatch` states which body runs.

XLA's CPU backend sums a row in an order that depends on how many rows there are; the native bodies do not.

Shape letters: T rows, D V elements of a row, M best elements, K blocks of a row, Q elements of a block, C elements of M blocks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.dispatch import by_platform, known_dtypes
from pallas_kernels.native import library
from pallas_kernels.shapes import shaped


@shaped
def rms_norm_reference(x_TD: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """Defines the op: x / rms(x) in float32, cast to x's dtype, times the weight.  Source: arXiv 1910.07467."""
    wide_TD = x_TD.astype(jnp.float32)
    wide_TD = wide_TD * lax.rsqrt(jnp.mean(wide_TD * wide_TD, axis=-1, keepdims=True) + eps)
    return wide_TD.astype(x_TD.dtype) * weight_D[None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
@shaped
def rms_norm(x_TD: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """Returns what the reference does; so is the gradient."""

    def native(x_TD: jax.Array, weight_D: jax.Array) -> jax.Array:
        return library.call("jaxlora_norm", [(x_TD.shape, x_TD.dtype)], x_TD, weight_D, eps=np.float32(eps))[0]

    fits = known_dtypes(x_TD) and weight_D.dtype == x_TD.dtype
    xla = functools.partial(rms_norm_reference, eps=eps)
    return by_platform("rms_norm", x_TD, weight_D, xla=xla, native=native if fits else None)


def _norm_forward(x_TD: jax.Array, weight_D: jax.Array, eps: float) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return rms_norm(x_TD, weight_D, eps), (x_TD, weight_D)


def _norm_backward(eps: float, saved: tuple[jax.Array, jax.Array], d_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(functools.partial(rms_norm_reference, eps=eps), *saved)[1](d_TD)


rms_norm.defvjp(_norm_forward, _norm_backward)


@shaped
def logsumexp_reference(x_TV: jax.Array) -> jax.Array:
    """Defines the op: returns float32 [T], the logarithm of the sum of each row's exponentials."""
    most_T1 = lax.stop_gradient(x_TV.max(axis=-1, keepdims=True))
    return jnp.log(jnp.exp(x_TV - most_T1).sum(axis=-1)) + most_T1[:, 0]


@shaped
def logsumexp(x_TV: jax.Array) -> jax.Array:
    """Returns what the reference does, of float32 rows.  Not differentiable."""

    def native(x_TV: jax.Array) -> jax.Array:
        return library.call("jaxlora_logsumexp", [(x_TV.shape[:1], jnp.float32)], x_TV)[0]

    return by_platform("logsumexp", x_TV, xla=logsumexp_reference, native=native)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RowSummary:
    """What is said of rows of logits.  `most_T` and `best_T` mean nothing where an element is NaN."""

    most_T: jax.Array  # float32 the largest element
    best_T: jax.Array  # int32 the first place of it
    logsumexp_T: jax.Array  # float32
    finite_T: jax.Array  # bool: all elements are


@shaped
def row_summary(x_TV: jax.Array) -> RowSummary:
    """Returns the summary of float32 rows.  Not differentiable."""
    return by_platform("row_summary", x_TV, xla=_joint_reduction, xla_on_cpu=_reductions, native=_reductions)


def _reductions(x_TV: jax.Array) -> RowSummary:
    """Plain reductions over float32: XLA's CPU backend computes `argmax` element by element.  Indices are exact below 2**24."""
    V = x_TV.shape[1]
    most_T = x_TV.max(axis=-1)
    best_T = jnp.where(x_TV == most_T[:, None], jnp.arange(V, dtype=jnp.float32), float(V - 1)).min(axis=-1)
    return RowSummary(
        most_T=most_T,
        best_T=best_T.astype(jnp.int32),
        logsumexp_T=logsumexp(x_TV),
        finite_T=jnp.isfinite(x_TV).all(axis=-1),
    )


def _joint_reduction(x_TV: jax.Array) -> RowSummary:
    """One reduction, which moves the sum of exponentials to the larger of two parts' largest elements.

    Source: online softmax, arXiv 1805.02867.
    """
    Part = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

    def join(one: Part, two: Part) -> Part:
        most = jnp.maximum(one[0], two[0])
        first = jnp.where(one[0] == two[0], jnp.minimum(one[1], two[1]), jnp.where(one[0] > two[0], one[1], two[1]))
        sums = [jnp.where(part[0] == most, part[2], part[2] * jnp.exp(part[0] - most)) for part in (one, two)]
        return most, first, sums[0] + sums[1], one[3] & two[3]

    V = x_TV.shape[1]
    places_TV = lax.broadcasted_iota(jnp.int32, x_TV.shape, 1)
    parts = x_TV, places_TV, jnp.ones_like(x_TV), jnp.isfinite(x_TV)
    nothing = jnp.float32(-jnp.inf), jnp.int32(V - 1), jnp.float32(0), jnp.bool_(True)
    most_T, best_T, sum_T, finite_T = lax.reduce(parts, nothing, join, (1,))
    return RowSummary(most_T=most_T, best_T=best_T, logsumexp_T=most_T + jnp.log(sum_T), finite_T=finite_T)


BLOCKS = (128, 64, 32)  # elements of a block: the most that divide a row
FEWEST = 4  # blocks for each that is kept: below, all is sorted


@shaped
def top_k(x_TV: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns (float32 [T, M], int32 [T, M]): each row's `count` largest elements and their places, the first of equals first."""
    size = next((q for q in BLOCKS if x_TV.shape[1] % q == 0 and x_TV.shape[1] >= FEWEST * count * q), None)

    def whole(x_TV: jax.Array) -> tuple[jax.Array, jax.Array]:
        value_TM, place_TM = lax.top_k(x_TV, count)
        return value_TM, place_TM

    def of_blocks(x_TV: jax.Array) -> tuple[jax.Array, jax.Array]:
        return whole(x_TV) if size is None else _top_of_blocks(x_TV, count, size)

    return by_platform("top_k", x_TV, xla=of_blocks, xla_on_cpu=whole)


def _top_of_blocks(x_TV: jax.Array, count: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Looks only at the blocks whose largest elements are the largest: the best elements lie in these."""
    T, V = x_TV.shape
    x_TKQ = x_TV.reshape(T, V // size, size)
    _, block_TM = lax.top_k(x_TKQ.max(axis=2), count)
    block_TM = jnp.sort(block_TM, axis=1)  # so that the first of equals comes first
    x_TC = jnp.take_along_axis(x_TKQ, block_TM[:, :, None], axis=1).reshape(T, -1)
    value_TM, place_TM = lax.top_k(x_TC, count)
    return value_TM, jnp.take_along_axis(block_TM, place_TM // size, axis=1) * size + place_TM % size
