"""Optimizer update of the due slots: slot after slot, half after half, each written in place.

XLA would copy the arrays of all slots, for each slot, where it may write before the last read: so the barriers make
the order a data dependence.  XLA also spreads a slot's scalar over a whole array where it is computed and used in one
fusion: so it is computed before (barriers again).

    norm       reads the gradients
    updates    of the size of one slot's weights; read weights, gradients and moments
    finite?    of both; nothing is written before
    written    weights, then the second moment, the first, the gradient: each needs only those after it

Shape letters: U due slots, L layers, S slots, R LoRA rank, X features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import optax
from jax import lax

from pallas_kernels import NO_ADAPTER
from train.step.moments_8bit import Blocks, mu_of, nu_of
from train.step.optimizer import Halves, Hyper, Moments, adamw, in_float32, kept_mu, kept_nu, rounding_bits


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """Report on each due slot's update, [U]."""

    norm_U: jax.Array  # float32 gradient norm before clipping
    finite_U: jax.Array  # bool; False: the update was skipped


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _Half:
    """All arrays of one half of a target, with slots as axis 1: all slots or one."""

    weight: jax.Array
    grad: jax.Array
    mu: jax.Array | Blocks
    nu: jax.Array | Blocks


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """What the update of one slot depends on, each a scalar."""

    slot: jax.Array
    count: jax.Array
    hyper: Hyper
    norm: jax.Array

    def next(self, whole: _Half, half: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns (what is added to the weights, the new moments in float32) of the slot.  half: 0 is A."""
        own = _own(whole, self.slot)
        mu, nu = in_float32(own.mu, mu_of), in_float32(own.nu, nu_of)
        update, mu, nu = adamw(own.weight, own.grad, mu, nu, self.count, self.hyper, self.norm)
        return update * self.hyper.b_ratio if half else update, mu, nu


def _own[T](whole: T, slot: jax.Array) -> T:
    """Returns a slot's part of arrays of all slots; the slot axis stays, with length one."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, slot, 1, 1), whole)


def _put[T](whole: T, part: T, slot: jax.Array) -> T:
    """Returns the arrays of all slots with this part written at one."""
    return jax.tree.map(lambda x, new: lax.dynamic_update_slice_in_dim(x, new, slot, 1), whole, part)


def update_slots(
    weights: Halves, grads: Halves, moments: Moments, hyper: Hyper, slot_U: jax.Array
) -> tuple[Halves, Halves, Moments, UpdateReport]:
    """Applies AdamW to the due slots; returns (weights, grads, moments), grads zeroed, and a report on each slot.

    slot_U: as in `Due`.  Where loss gradient or update is not finite, weights and moments stay as they were.  Moments
    in fewer bits are used in float32 and rounded again when stored.
    """
    names = [(target, half) for target in weights for half in (0, 1)]
    start = [_Half(weight=weights[t][i], grad=grads[t][i], mu=moments.mu[t][i], nu=moments.nu[t][i]) for t, i in names]

    def one_slot(u: jax.Array, carry: tuple) -> tuple:
        halves, count_S, norm_U, finite_U = carry
        row = jax.tree.map(lambda x: x[u], hyper)
        slot, count, row = lax.optimization_barrier((slot_U[u], count_S[slot_U[u]], row))
        norm = optax.tree.norm([_own(half.grad, slot) for half in halves]) / jnp.abs(row.divisor)
        norm = lax.optimization_barrier(norm)
        turn = _Turn(slot=slot, count=count, hyper=row, norm=norm)
        updates = [lax.optimization_barrier(turn.next(half, i)[0]) for (_, i), half in zip(names, halves, strict=True)]
        finite = lax.optimization_barrier(jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates)))
        halves = [
            _written(turn, name, half, update, finite)
            for name, half, update in zip(names, halves, updates, strict=True)
        ]
        count_S = count_S.at[slot].set(jnp.where(finite, optax.safe_increment(count), count))
        return halves, count_S, norm_U.at[u].set(norm), finite_U.at[u].set(finite)

    due = (slot_U != NO_ADAPTER).sum()
    carry = (start, moments.count, jnp.zeros(slot_U.shape, jnp.float32), jnp.ones(slot_U.shape, bool))
    halves, count_S, norm_U, finite_U = lax.fori_loop(0, due, one_slot, carry)

    def by_target[Array](of: Callable[[_Half], Array]) -> dict[str, tuple[Array, Array]]:
        found = dict(zip(names, map(of, halves), strict=True))
        return {target: (found[target, 0], found[target, 1]) for target in weights}

    new = Moments(mu=by_target(lambda h: h.mu), nu=by_target(lambda h: h.nu), count=count_S)
    report = UpdateReport(norm_U=norm_U, finite_U=finite_U)
    return by_target(lambda h: h.weight), by_target(lambda h: h.grad), new, report


def _written(turn: _Turn, name: tuple[str, int], half: _Half, update: jax.Array, finite: jax.Array) -> _Half:
    """Returns the half with this slot's update; its gradient is zero."""
    (target, i), slot = name, turn.slot
    bits = lax.optimization_barrier(rounding_bits(turn.count + 1, target, i, update.shape))

    def put[T](whole: T, new: T) -> T:
        return _put(whole, jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, _own(whole, slot)), slot)

    half = replace(half, weight=put(half.weight, optax.apply_updates(_own(half.weight, slot), update)))
    half = lax.optimization_barrier(half)
    nu = kept_nu(turn.next(half, i)[2], _own(half.nu, slot), bits)
    half = lax.optimization_barrier(replace(half, nu=put(half.nu, nu)))
    mu = kept_mu(turn.next(half, i)[1], _own(half.mu, slot), bits)
    half = lax.optimization_barrier(replace(half, mu=put(half.mu, mu)))
    return replace(half, grad=_put(half.grad, jnp.zeros_like(update), slot))
