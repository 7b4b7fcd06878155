"""Optimizer update of the due slots: in one pass on accelerators, else slot after slot, half after half, each in place.

In one pass a kernel reads and writes each array once (`pallas_kernels.adamw`), after the norm has read the gradients: 36
bytes a number with moments in float32.  Slot after slot, which is all other cases:

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
from dataclasses import dataclass, fields, replace

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import NO_ADAPTER, tiling_cuda
from pallas_kernels.adamw import op as adamw_op
from pallas_kernels.adamw.op import NUMBERS, SlotArrays
from pallas_kernels.dispatch import by_platform
from pallas_kernels.sharding import Placement
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """How a bucket's arrays are split over a mesh of several devices."""

    mesh: Mesh
    specs: tuple[tuple[str, PartitionSpec, PartitionSpec], ...]  # target, of a_LSRX, of b_LSRY

    @staticmethod
    def of(weights: Halves, mesh: Mesh) -> Split | None:
        """Returns how these arrays (or shapes with shardings) are split; None on one device."""
        if mesh.size == 1:
            return None
        return Split(mesh=mesh, specs=tuple((t, a.sharding.spec, b.sharding.spec) for t, (a, b) in weights.items()))  # ty: ignore[missing-attribute]

    def of_half(self, target: str, half: int) -> PartitionSpec:
        """Returns the spec of one half of a target."""
        return {name: pair for name, *pair in self.specs}[target][half]


Updated = tuple[Halves, Halves, Moments, UpdateReport]


def update_slots(
    weights: Halves, grads: Halves, moments: Moments, hyper: Hyper, slot_U: jax.Array, split: Split | None = None
) -> Updated:
    """Applies AdamW to the due slots; returns (weights, grads, moments), grads zeroed, and a report on each slot.

    slot_U: as in `Due`.  Where loss gradient or update is not finite, weights and moments stay as they were; in one pass a
    number whose update is not finite although the gradient's norm is stays alone.  Moments in fewer bits are used in
    float32 and rounded again when stored; they are never updated in one pass.
    """
    arrays = None if _in_fewer_bits(moments) else _arrays(weights, grads, moments)

    def once(body: adamw_op.Update) -> Callable[[Halves, Halves, Moments, Hyper, jax.Array], Updated]:
        return lambda *args: _in_one_pass(body, split, *args)

    return by_platform(
        "adamw",
        *(weights, grads, moments, hyper, slot_U),
        xla=_slot_by_slot,
        pallas=(lambda interpret: once(adamw_op.on_tpu(interpret)))
        if arrays is not None and adamw_op.fits_tpu(list(arrays.values()))
        else None,
        triton=(lambda: once(adamw_op.on_cuda())) if arrays is not None and tiling_cuda.installed() else None,
    )


def _in_fewer_bits(moments: Moments) -> bool:
    return any(x.dtype != jnp.float32 for x in jax.tree.leaves(moments.mu))


def _arrays(weights: Halves, grads: Halves, moments: Moments) -> dict[tuple[str, int], SlotArrays]:
    """Returns the arrays of each half of each target, moments in float32."""

    def of(target: str, half: int) -> SlotArrays:
        mu, nu = moments.mu[target][half], moments.nu[target][half]
        assert not isinstance(mu, Blocks)
        assert not isinstance(nu, Blocks)
        weight, grad = weights[target][half], grads[target][half]
        return SlotArrays(weight_LSRX=weight, grad_LSRX=grad, mu_LSRX=mu, nu_LSRX=nu)

    return {(target, half): of(target, half) for target in weights for half in (0, 1)}


def _in_one_pass(
    body: adamw_op.Update,
    split: Split | None,
    weights: Halves,
    grads: Halves,
    moments: Moments,
    hyper: Hyper,
    slot_U: jax.Array,
) -> Updated:
    """Returns what `update_slots` returns; each array is read and written once after the norms."""
    safe_U = jnp.maximum(slot_U, 0)

    def add_norm(u: jax.Array, norm_U: jax.Array) -> jax.Array:
        own = [_own(half, slot_U[u]) for pair in grads.values() for half in pair]
        return norm_U.at[u].set(optax.tree.norm(own) / jnp.abs(hyper.divisor[u]))

    due = (slot_U != NO_ADAPTER).sum()
    norm_U = lax.fori_loop(0, due, add_norm, jnp.zeros(slot_U.shape, jnp.float32))
    finite_U = jnp.isfinite(norm_U)
    count_U = moments.count[safe_U]
    next_U = jnp.where(finite_U, optax.safe_increment(count_U), count_U)
    at_U = jnp.where(slot_U == NO_ADAPTER, moments.count.shape[0], slot_U)
    count_S = moments.count.at[at_U].set(next_U, mode="drop")
    shrink_U = jnp.where(norm_U < hyper.clip, 1.0, hyper.clip / norm_U)
    numbers = {f.name: getattr(hyper, f.name) for f in fields(hyper)}
    numbers |= {f"c{n}": 1 - numbers[f"b{n}"] ** optax.safe_increment(count_U) for n in (1, 2)}
    numbers["shrink"] = jnp.where(finite_U, shrink_U, jnp.nan)

    def updated(name: tuple[str, int], arrays: SlotArrays) -> SlotArrays:
        lr_U = hyper.lr * hyper.b_ratio if name[1] else hyper.lr
        turn_UN = jnp.stack([(numbers | {"lr": lr_U})[n] for n in NUMBERS], axis=1)
        run = body
        if split is not None:
            run = adamw_op.on_each(body, Placement(mesh=split.mesh), split.of_half(*name))
        return run(arrays, slot_U, turn_UN)

    found = {name: updated(name, arrays) for name, arrays in _arrays(weights, grads, moments).items()}

    def by_target(of: Callable[[SlotArrays], jax.Array]) -> Halves:
        return {t: (of(found[t, 0]), of(found[t, 1])) for t in weights}

    new = Moments(mu=by_target(lambda x: x.mu_LSRX), nu=by_target(lambda x: x.nu_LSRX), count=count_S)
    report = UpdateReport(norm_U=norm_U, finite_U=finite_U)
    return by_target(lambda x: x.weight_LSRX), by_target(lambda x: x.grad_LSRX), new, report


def _slot_by_slot(weights: Halves, grads: Halves, moments: Moments, hyper: Hyper, slot_U: jax.Array) -> Updated:
    """Returns what `update_slots` returns, one slot after the other."""
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
