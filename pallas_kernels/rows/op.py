"""RMS norm and log-sum-exp of rows.  `dispatch` states which body runs.

XLA's CPU backend sums a row in an order that depends on how many rows there are; the native bodies do not.

Shape letters: T rows, D V elements of a row.
"""

from __future__ import annotations

import functools

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
