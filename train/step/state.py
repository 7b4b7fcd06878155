"""Training state on the device, by slot: weights, open gradients and moments; and how slots are written and read.

Slots come in buckets of one largest rank each, so that a tenant of rank 8 does not hold moments of rank 64.  A lane's
slot number counts over all buckets, running on from one to the next; what changes one bucket alone counts its own.
A slot that is not written comes back bit for bit, unread.

Shape letters: G lanes, U due slots of a bucket, L layers, S slots of a bucket, R LoRA rank, X features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlora.core.lora import ALL_TARGETS, AdapterWeights, LoraSpec
from jaxlora.core.model_config import ModelConfig, layer_count, target_features
from jaxlora.model.decoder import Base
from jaxlora.model.lora_pool import LoraRows, PoolSpec, Rows, empty_pool
from jaxlora.model.mesh import replicated
from train.step.moments_8bit import Blocks, block_count, scale_shape
from train.step.optimizer import BlockHalves, Halves, Hyper, Moments
from train.step.update import Split, UpdateReport, update_slots


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that training changes in one bucket, O(slots); moments in their dtype, the rest float32.  Donated."""

    pool: Rows
    grads: Halves  # target → (a_LSRX, b_LSRY) summed gradients of the open window
    moments: Moments  # the same shapes; count_S int32


States = tuple[TrainState, ...]  # by bucket


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Due:
    """The slots of one bucket that are updated in this step."""

    hyper: Hyper  # one row for each
    slot_U: jax.Array  # int32, each once; the unused ones, NO_ADAPTER, come last


def empty_state(base: Base, spec: PoolSpec, mesh: Mesh, moments: str = "float32") -> TrainState:
    """Returns a state whose slots are all zero, placed on the mesh like the pool it trains.  moments: their dtype."""

    def zeros(dtype: str) -> Halves:
        return halves(empty_pool(base.config, replace(spec, dtype=dtype), mesh))

    def no_moment() -> Halves | BlockHalves:
        return jax.tree.map(_empty_blocks, zeros(moments)) if moments == "uint8" else zeros(moments)

    count = jnp.zeros((spec.slots,), jnp.int32, device=replicated(mesh))
    pool = empty_pool(base.config, spec, mesh)
    return TrainState(pool=pool, grads=zeros(spec.dtype), moments=Moments(mu=no_moment(), nu=no_moment(), count=count))


def _empty_blocks(code_LSRX: jax.Array) -> Blocks:
    """Returns zero blocks.  Scales are sharded as codes are, or replicated where their number does not divide."""
    codes = code_LSRX.sharding
    assert isinstance(codes, NamedSharding)
    axis = codes.spec[-1]
    if axis is not None and block_count(code_LSRX.shape[-1]) % codes.mesh.shape[axis]:
        axis = None
    where = NamedSharding(codes.mesh, PartitionSpec(None, None, axis))
    return Blocks(code_LSRX, jnp.zeros(scale_shape(code_LSRX.shape), jnp.float32, device=where))


def halves(rows: Rows) -> Halves:
    """Returns the trained part of some rows: (a, b) by target, without scale."""
    return {t: (r.a_LSRX, r.b_LSRY) for t, r in rows.items()}


def with_gradients(states: States, grads: Sequence[Halves]) -> States:
    """Returns the states with other summed gradients."""
    return tuple(replace(state, grads=own) for state, own in zip(states, grads, strict=True))


def with_halves(rows: Rows, new: Halves) -> Rows:
    """Returns the rows with other weights and the same scale."""
    return {t: LoraRows(a_LSRX=new[t][0], b_LSRY=new[t][1], scale_LS=r.scale_LS) for t, r in rows.items()}


def splits_of(states: States, mesh: Mesh) -> tuple[Split | None, ...]:
    """Returns how each bucket's arrays are split over the mesh."""
    return tuple(Split.of(halves(state.pool), mesh) for state in states)


def apply(
    states: States, due: tuple[Due, ...], *, splits: tuple[Split | None, ...]
) -> tuple[States, tuple[UpdateReport, ...]]:
    """Applies AdamW to the due slots of each bucket."""
    done = [_apply_own(*of_bucket) for of_bucket in zip(states, due, splits, strict=True)]
    return tuple(state for state, _ in done), tuple(report for _, report in done)


def _apply_own(state: TrainState, due: Due, split: Split | None) -> tuple[TrainState, UpdateReport]:
    updated = update_slots(halves(state.pool), state.grads, state.moments, due.hyper, due.slot_U, split)
    weights, grads, moments, report = updated
    return TrainState(pool=with_halves(state.pool, weights), grads=grads, moments=moments), report


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SlotState:
    """Training state of one tenant between steps, which is what a checkpoint holds.  No slot axis."""

    rows: Rows
    moments: Moments


def seat(states: States, bucket: int, slot: jax.Array, new: SlotState) -> States:
    """Returns the states with one slot of a bucket replaced whole and its open gradients cleared."""
    return (*states[:bucket], _seat_own(states[bucket], slot, new), *states[bucket + 1 :])


def _seat_own(state: TrainState, slot: jax.Array, new: SlotState) -> TrainState:

    def put(whole: jax.Array, part: jax.Array) -> jax.Array:
        return lax.dynamic_update_index_in_dim(whole, part.astype(whole.dtype), slot, 1)

    moments = Moments(
        mu=jax.tree.map(put, state.moments.mu, new.moments.mu),
        nu=jax.tree.map(put, state.moments.nu, new.moments.nu),
        count=state.moments.count.at[slot].set(new.moments.count),
    )
    grads = jax.tree.map(lambda g: put(g, jnp.zeros((*g.shape[:1], *g.shape[2:]), g.dtype)), state.grads)
    return TrainState(pool=jax.tree.map(put, state.pool, new.rows), grads=grads, moments=moments)


def unseat(states: States, bucket: int, slot: jax.Array) -> SlotState:
    """Returns a copy of one slot of a bucket."""
    state = states[bucket]

    def take(whole: jax.Array) -> jax.Array:
        return lax.dynamic_index_in_dim(whole, slot, 1, keepdims=False)

    moments = Moments(
        mu=jax.tree.map(take, state.moments.mu),
        nu=jax.tree.map(take, state.moments.nu),
        count=state.moments.count[slot],
    )
    return SlotState(rows=jax.tree.map(take, state.pool), moments=moments)


def fresh_seat(rows: Rows, moments: str = "float32") -> SlotState:
    """Returns the state of a tenant that has not trained yet: these rows (NumPy), zero moments of this dtype."""

    def zero(weight: np.ndarray) -> np.ndarray | Blocks:
        x = np.zeros(weight.shape, jnp.dtype(moments))
        return Blocks(x, np.zeros(scale_shape(x.shape), np.float32)) if moments == "uint8" else x  # ty: ignore[invalid-argument-type]

    mu, nu = (jax.tree.map(zero, halves(rows)) for _ in range(2))
    return SlotState(rows=rows, moments=Moments(mu=mu, nu=nu, count=np.int32(0)))  # ty: ignore[invalid-argument-type]


def fresh_adapter(config: ModelConfig, spec: LoraSpec, seed: int, base_hash: str) -> AdapterWeights:
    """Returns an untrained adapter: A uniform in ±1/sqrt(features in), B zero.  Rows depend on seed, target and layer.

    Source: the default initialisation of PEFT.
    """
    weights = {}
    for target in spec.targets:
        x, y = target_features(config, target)
        a = np.zeros((layer_count(config, target), spec.max_rank, x), np.float32)
        for layer in range(a.shape[0]):
            rank, _ = spec.module(target, layer)
            draw = np.random.default_rng([seed, ALL_TARGETS.index(target), layer])
            a[layer, :rank] = draw.uniform(-1, 1, (rank, x)).astype(np.float32) / math.sqrt(x)
        weights[target] = (a, np.zeros((a.shape[0], spec.max_rank, y), np.float32))
    return AdapterWeights(spec=spec, base_hash=base_hash, weights=weights)
