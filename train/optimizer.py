"""AdamW over the slots that are due: Optax, vmapped, every number of it a value per slot.

Changing a learning rate, a beta or a clip never retraces, and nothing is shared between tenants: each has its own norm,
its own moments, its own step count.

Shape letters: U slots due in this update, L layers, R LoRA rank, X features.
Source: AdamW (arXiv 1711.05101), LoRA+ (arXiv 2402.12354).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlora.config import NO_CLIP, Optimizer

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


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Moments:
    """AdamW's state of one slot (or of all, with a slot axis): float32 moments and the int32 number of updates."""

    mu: Halves
    nu: Halves
    count: jax.Array


def adamw(
    weights: Halves, grads: Halves, moments: Moments, hyper: Hyper
) -> tuple[Halves, Moments, jax.Array, jax.Array]:
    """(new weights, new moments, float32 gradient norm before clipping, bool finite) of ONE tenant.

    Where loss gradient or update is not finite, weights and moments come back as they were.
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
    state = (empty, optax.ScaleByAdamState(count=moments.count, mu=moments.mu, nu=moments.nu), empty, empty)
    updates, (_, adam, _, _) = chain.update(grads, state, weights)  # ty: ignore[not-iterable]
    updates = {t: (a, b * hyper.b_ratio) for t, (a, b) in cast("Halves", updates).items()}
    finite = jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates))
    new_moments = Moments(mu=adam.mu, nu=adam.nu, count=adam.count)  # ty: ignore[missing-union-attribute]
    new = optax.apply_updates(weights, updates), new_moments
    kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, (weights, moments))
    return *kept, norm, finite
