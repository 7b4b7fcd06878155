"""AdamW over the slots that are due: Optax, vmapped, every number of it a value per slot.

Changing a learning rate, a beta or a clip never retraces, and nothing is shared between tenants: each has its own norm,
its own moments, its own step count.

Shape letters: U slots due in this update, L layers, R LoRA rank, X features.
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

from jaxlora.config import NO_CLIP, Optimizer
from jaxlora.lora import ALL_TARGETS
from train.blockwise import Blocks, mu_of, nu_of, quantised_mu, quantised_nu

__all__ = ["IDLE", "NO_CLIP", "Halves", "Hyper", "Moments", "Optimizer", "adamw"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Hyper:
    """One row per due slot, float32 [U]."""

    lr: jax.Array  # of this very step: the schedule is computed on the host
    decay: jax.Array  # decoupled weight decay
    b1: jax.Array
    b2: jax.Array
    eps: jax.Array
    clip: jax.Array  # limit of the tenant's own global gradient norm; infinity is none
    b_ratio: jax.Array  # lr of B over lr of A
    divisor: jax.Array  # the summed gradient is divided by this: the window's sum of |weights|

    @staticmethod
    def stack(rows: list[dict[str, float]]) -> Hyper:
        """The rows as NumPy arrays, one per field."""
        columns = {f.name: np.array([r[f.name] for r in rows], np.float32) for f in fields(Hyper)}
        return Hyper(**columns)  # ty: ignore[invalid-argument-type]


IDLE = {"lr": 0.0, "decay": 0.0, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "clip": NO_CLIP, "b_ratio": 1.0, "divisor": 1.0}


Halves = dict[str, tuple[jax.Array, jax.Array]]  # target → (a, b)
BlockHalves = dict[str, tuple[Blocks, Blocks]]  # the same of moments in 8 bits


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Moments:
    """AdamW's state of one slot (or of all, with a slot axis): moments, float32, bfloat16 or Blocks, and the int32 number of updates."""

    mu: Halves | BlockHalves
    nu: Halves | BlockHalves
    count: jax.Array


def adamw(
    weights: Halves, grads: Halves, moments: Moments, hyper: Hyper
) -> tuple[Halves, Moments, jax.Array, jax.Array]:
    """(new weights, new moments, float32 gradient norm before clipping, bool finite) of ONE tenant.

    Where loss gradient or update is not finite, weights and moments come back as they were.  Moments that are kept in
    fewer bits are used in float32 and rounded as they are kept.
    """
    grads = jax.tree.map(lambda g: g / hyper.divisor, grads)
    norm = optax.tree.norm(grads)
    chain = optax.chain(
        optax.clip_by_global_norm(hyper.clip),
        optax.scale_by_adam(b1=hyper.b1, b2=hyper.b2, eps=hyper.eps),
        optax.add_decayed_weights(hyper.decay),
        optax.scale_by_learning_rate(hyper.lr),
    )
    empty = optax.EmptyState()
    mu, nu = _in_float32(moments)
    state = (empty, optax.ScaleByAdamState(count=moments.count, mu=mu, nu=nu), empty, empty)
    updates, (_, adam, _, _) = chain.update(grads, state, weights)  # ty: ignore[not-iterable]
    updates = {t: (a, b * hyper.b_ratio) for t, (a, b) in cast("Halves", updates).items()}
    finite = jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates))
    new_moments = _rounded(cast("Halves", adam.mu), cast("Halves", adam.nu), adam.count, like=moments)  # ty: ignore[missing-union-attribute]
    new = optax.apply_updates(weights, updates), new_moments
    kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, (weights, moments))
    return *kept, norm, finite


def _in_float32(moments: Moments) -> tuple[Halves, Halves]:
    """(mu, nu), however they are kept.  Blocks are read once: without the barrier XLA does it again for each who asks."""

    def of(kept: Halves | BlockHalves, read: Callable[[Blocks], jax.Array]) -> Halves:
        def half(x: jax.Array | Blocks) -> jax.Array:
            return lax.optimization_barrier(read(x)) if isinstance(x, Blocks) else x.astype(jnp.float32)

        return {target: (half(a), half(b)) for target, (a, b) in kept.items()}

    return of(moments.mu, mu_of), of(moments.nu, nu_of)


def _rounded(mu: Halves, nu: Halves, count: jax.Array, *, like: Moments) -> Moments:
    """Moments kept as those of `like`, rounded by random numbers of this update, target and half.

    They are the same for all tenants, in any slot: what a tenant learns depends on nobody, a resumed one goes on as before.
    """
    kept = jax.tree.leaves(like.mu)[0].dtype
    if kept == jnp.float32:
        return Moments(mu=mu, nu=nu, count=count)

    def draw(target: str, half: int) -> jax.Array:
        """uint32, 16 bits for each of the two moments."""
        key = jax.random.key(0)
        for number in (count, ALL_TARGETS.index(target), half):
            key = jax.random.fold_in(key, number)
        return jax.random.bits(key, mu[target][half].shape)

    drawn = {target: (draw(target, 0), draw(target, 1)) for target in mu}
    for_nu = jax.tree.map(lambda bits: bits >> 16, drawn)
    if kept == jnp.uint8:
        mu, nu = lax.optimization_barrier((mu, nu))  # as above, and for each block's scale
        return Moments(mu=jax.tree.map(quantised_mu, mu), nu=jax.tree.map(quantised_nu, nu, for_nu), count=count)
    for_mu = jax.tree.map(lambda bits: bits & 0xFFFF, drawn)
    mu, nu = jax.tree.map(stochastic_bfloat16, (mu, nu), (for_mu, for_nu))
    return Moments(mu=mu, nu=nu, count=count)


def stochastic_bfloat16(x: jax.Array, bits: jax.Array) -> jax.Array:
    """bfloat16: of the two neighbours of a finite float32 x the nearer more often, so that the mean is x.

    `bits`: uint32 below 2^16, uniform.  Rounding to the nearest would lose every change below 0.2 %, and at b2 = 0.999 the
    second moment changes by 0.1 % of what it is behind.
    """
    whole = lax.bitcast_convert_type(x, jnp.uint32) + bits
    return lax.bitcast_convert_type((whole >> 16).astype(jnp.uint16), jnp.bfloat16)
