"""AdamW of one tenant in Optax, with every hyper-parameter a value; `update` maps it over the slots that are due.

Changing a learning rate, a beta or a clip never retraces, and nothing is shared between tenants: each has its own norm,
its own moments, its own step count.

Shape letters: U slots due in this update, L layers, R LoRA rank, X features; E scales of blocks.
Source: AdamW (arXiv 1711.05101), LoRA+ (arXiv 2402.12354), stochastic rounding (arXiv 1502.02551, 2010.06192).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxlora.config.training import NO_CLIP, Optimizer
from jaxlora.core.lora import ALL_TARGETS
from train.step.moments_8bit import Blocks, quantised_mu, quantised_nu

__all__ = ["IDLE", "NO_CLIP", "Halves", "Hyper", "Moments", "Optimizer", "adamw"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Hyper:
    """Hyper-parameters, one row per due slot, float32 [U]."""

    lr: jax.Array  # of this step: the schedule is computed on the host
    decay: jax.Array  # decoupled weight decay
    b1: jax.Array
    b2: jax.Array
    eps: jax.Array
    clip: jax.Array  # limit of the tenant's own global gradient norm; infinity disables clipping
    b_ratio: jax.Array  # lr of B over lr of A
    divisor: jax.Array  # the summed gradient is divided by this: the window's sum of |weights|

    @staticmethod
    def stack(rows: list[dict[str, float]]) -> Hyper:
        """Returns the rows as NumPy arrays, one per field."""
        columns = {f.name: np.array([r[f.name] for r in rows], np.float32) for f in fields(Hyper)}
        return Hyper(**columns)  # ty: ignore[invalid-argument-type]


IDLE = {"lr": 0.0, "decay": 0.0, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "clip": NO_CLIP, "b_ratio": 1.0, "divisor": 1.0}


Halves = dict[str, tuple[jax.Array, jax.Array]]  # target → (a, b)
BlockHalves = dict[str, tuple[Blocks, Blocks]]  # the same in 8 bits


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Moments:
    """AdamW's state of one slot (or all, with a slot axis): float32, bfloat16 or Blocks moments, int32 update count."""

    mu: Halves | BlockHalves
    nu: Halves | BlockHalves
    count: jax.Array


def adamw(
    weight: jax.Array, grad: jax.Array, mu: jax.Array, nu: jax.Array, count: jax.Array, hyper: Hyper, norm: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (what is added to the weight, the new moments), float32, of some numbers of ONE tenant.

    grad: summed over the window.  norm: of the tenant's whole gradient, divided, before clipping.
    """
    grad = grad / hyper.divisor
    # Optax's clip_by_global_norm would take the norm of these numbers alone.
    grad = jnp.where(norm < hyper.clip, grad, grad / norm * hyper.clip)
    chain = optax.chain(
        optax.scale_by_adam(b1=hyper.b1, b2=hyper.b2, eps=hyper.eps),
        optax.add_decayed_weights(hyper.decay),
        optax.scale_by_learning_rate(hyper.lr),
    )
    empty = optax.EmptyState()
    state = (optax.ScaleByAdamState(count=count, mu=mu, nu=nu), empty, empty)
    update, (adam, _, _) = chain.update(grad, state, weight)  # ty: ignore[not-iterable]
    return cast("tuple[jax.Array, jax.Array, jax.Array]", (update, adam.mu, adam.nu))  # ty: ignore[missing-union-attribute]


def in_float32(kept: jax.Array | Blocks, read: Callable[[Blocks], jax.Array]) -> jax.Array:
    """Returns a moment in float32, however it is stored.  read: `mu_of` or `nu_of`."""
    return read(kept) if isinstance(kept, Blocks) else kept.astype(jnp.float32)


def rounding_bits(count: jax.Array, target: str, half: int, shape: tuple[int, ...]) -> jax.Array:
    """Returns uint32 random numbers of this update, target and half (0 is A): the lower 16 bits for the first moment,
    the rest for the second.

    They are the same for all tenants and slots: training depends on no other tenant, and resumes exactly.
    """
    key = jax.random.key(0)
    for number in (count, ALL_TARGETS.index(target), half):
        key = jax.random.fold_in(key, number)
    return jax.random.bits(key, shape)


def kept_mu(mu: jax.Array, like: jax.Array | Blocks, bits: jax.Array) -> jax.Array | Blocks:
    """Returns the first moment in the storage format of `like`."""
    if isinstance(like, Blocks):
        return quantised_mu(lax.optimization_barrier(mu))  # else XLA computes it again for each block's scale
    return stochastic_bfloat16(mu, bits & 0xFFFF) if like.dtype == jnp.bfloat16 else mu


def kept_nu(nu: jax.Array, like: jax.Array | Blocks, bits: jax.Array) -> jax.Array | Blocks:
    """Returns the second moment in the storage format of `like`."""
    if isinstance(like, Blocks):
        return quantised_nu(lax.optimization_barrier(nu), bits >> 16)
    return stochastic_bfloat16(nu, bits >> 16) if like.dtype == jnp.bfloat16 else nu


def stochastic_bfloat16(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Returns bfloat16: of the two neighbours of a finite float32 x the nearer more often, so that the mean is x.

    bits: uint32 below 2^16, uniform.  Rounding to the nearest would lose each change below 0.2 %; at b2 = 0.999 the
    second moment changes by 0.1 % of its distance to the new value.
    """
    whole = lax.bitcast_convert_type(x, jnp.uint32) + bits
    return lax.bitcast_convert_type((whole >> 16).astype(jnp.uint16), jnp.bfloat16)
