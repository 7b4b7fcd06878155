"""The one jitted multi-tenant step, in two halves.

`accumulate` runs lanes of many tenants forward and backward and adds each lane's gradient to its own slot's rows;
`apply` updates the slots that are due.  All other slots come back bit for bit, unread and untouched.  `train_step` is
both in one program.  Slots, hyper-parameters and tenants are data: nothing a tenant does compiles anything.

Shape letters: G lanes, J tokens of a lane, U due slots, S slots, T = G * J tokens, N query heads, K kv heads, H head.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jaxlora.config import LANE_BLOCK
from jaxlora.mesh import attention_placement, replicated
from jaxlora.model import Base, TokenBatch, forward, head_weight
from jaxlora.pool import LaneLora, LoraLayout, LoraRows, PoolSpec, Rows, empty_pool
from pallas_kernels import NO_ADAPTER
from pallas_kernels.attention import packed_attention
from pallas_kernels.cross_entropy import target_logprob
from train.losses import cross_entropy
from train.optimizer import Halves, Hyper, Moments, adamw


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """Lanes of one step.  A lane is one packed row of one tenant; lanes without work have slot NO_ADAPTER and no weight."""

    token_GJ: jax.Array  # int32
    target_GJ: jax.Array  # int32 what should follow
    weight_GJ: jax.Array  # float32 of that prediction; 0 is not trained
    position_GJ: jax.Array  # int32 place in its segment
    segment_GJ: jax.Array  # int32 example within the lane, from 1; 0 is padding
    slot_G: jax.Array  # int32 whose lane


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that changes in training, O(slots), float32.  Donated to every step."""

    pool: Rows
    grads: Halves  # target → (a_LSRX, b_LSRY) summed gradients of the open window
    moments: Moments  # the same shapes; count_S int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LaneSums:
    """What each lane's tokens summed to, float32 [G]."""

    loss_G: jax.Array  # weighted loss
    weight_G: jax.Array  # weights
    hit_G: jax.Array  # targets that were the likeliest token
    count_G: jax.Array  # targets


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """How each due slot's update went, [U]."""

    norm_U: jax.Array  # float32 gradient norm before clipping
    finite_U: jax.Array  # bool; False: the update was skipped


def empty_state(base: Base, spec: PoolSpec, mesh: Mesh) -> TrainState:
    """A state whose slots are all zero, placed on the mesh like the pool it trains."""

    def zeros() -> Halves:
        return halves(empty_pool(base.config, spec, mesh))

    count = jnp.zeros((spec.slots,), jnp.int32, device=replicated(mesh))
    pool = empty_pool(base.config, spec, mesh)
    return TrainState(pool=pool, grads=zeros(), moments=Moments(mu=zeros(), nu=zeros(), count=count))


def halves(rows: Rows) -> Halves:
    """The trained part of some rows: (a, b) by target, without scale."""
    return {t: (r.a_LSRX, r.b_LSRY) for t, r in rows.items()}


def with_halves(rows: Rows, new: Halves) -> Rows:
    """The rows with other weights and the same scale."""
    return {t: LoraRows(a_LSRX=new[t][0], b_LSRY=new[t][1], scale_LS=r.scale_LS) for t, r in rows.items()}


def lane_losses(base: Base, rows_LG: Rows, batch: TrainBatch) -> tuple[jax.Array, LaneSums]:
    """(float32 sum of all lanes' weighted losses, the sums by lane) under each lane's adapter."""
    G, J = batch.token_GJ.shape
    lora = LaneLora(rows_LG, LoraLayout(config=base.config, mesh=base.mesh))

    def attend(layer, q_TNH, k_TKH, v_TKH, cache):
        lanes = [x.reshape(G, J, *x.shape[1:]) for x in (q_TNH, k_TKH, v_TKH)]
        options = {"window": base.config.window, "block": LANE_BLOCK, "placement": attention_placement(base.mesh)}
        return packed_attention(*lanes, batch.segment_GJ, **options).reshape(q_TNH.shape), cache

    tokens = TokenBatch(
        token_T=batch.token_GJ.reshape(-1),
        position_T=batch.position_GJ.reshape(-1),
        segment_T=batch.segment_GJ.reshape(-1),
        slot_T=jnp.repeat(batch.slot_G, J),
    )
    x_TD, _ = forward(base, tokens, lora, attend, ())
    wanted_GJ = batch.weight_GJ != 0
    with jax.default_matmul_precision(base.precision):
        logprob_GJK, hit_GJK = target_logprob(
            x_TD.reshape(G, J, -1),
            *head_weight(base),
            batch.target_GJ[..., None],
            wanted_GJ,
            lora.head_rows(),
            placement=lora.head_placement(),
            chunk=min(LANE_BLOCK, J),
            tied=base.config.tied,
        )
    logprob_GJ, hit_GJ = logprob_GJK[..., 0], hit_GJK[..., 0]
    loss_G = cross_entropy(logprob_GJ, batch.weight_GJ).sum(1)
    sums = LaneSums(
        loss_G=loss_G,
        weight_G=batch.weight_GJ.sum(1),
        hit_G=hit_GJ.sum(1).astype(jnp.float32),
        count_G=wanted_GJ.sum(1).astype(jnp.float32),
    )
    return loss_G.sum(), sums


def _accumulate(base: Base, state: TrainState, batch: TrainBatch) -> tuple[TrainState, LaneSums]:
    rows = LaneLora.gather(state.pool, batch.slot_G)
    grad_of = jax.grad(lambda h: lane_losses(base, with_halves(rows, h), batch), has_aux=True)
    grads_LG, sums = grad_of(halves(rows))

    def add_lane(g: jax.Array, total: Halves) -> Halves:
        slot = batch.slot_G[g]
        safe = jnp.maximum(slot, 0)

        def add(total_LSRX: jax.Array, grad_LGRX: jax.Array) -> jax.Array:
            old = lax.dynamic_index_in_dim(total_LSRX, safe, 1)
            new = jnp.where(slot != NO_ADAPTER, old + lax.dynamic_index_in_dim(grad_LGRX, g, 1), old)
            return lax.dynamic_update_slice_in_dim(total_LSRX, new, safe, 1)

        return jax.tree.map(add, total, grads_LG)

    grads = lax.fori_loop(0, batch.slot_G.shape[0], add_lane, state.grads)
    return TrainState(pool=state.pool, grads=grads, moments=state.moments), sums


def _apply(state: TrainState, hyper: Hyper, slot_U: jax.Array) -> tuple[TrainState, UpdateReport]:
    safe_U = jnp.maximum(slot_U, 0)
    weights = halves(state.pool)
    # One tree of everything the update reads and writes, slot axis 1 (counts: 0).
    take = functools.partial(jnp.take, indices=safe_U, axis=1, mode="clip")
    old_arrays = jax.tree.map(take, (weights, state.moments.mu, state.moments.nu))
    grads = jax.tree.map(take, state.grads)
    count_U = state.moments.count[safe_U]

    axes = (1, 1, Moments(mu=1, nu=1, count=0), 0)  # ty: ignore[invalid-argument-type]
    moments = Moments(mu=old_arrays[1], nu=old_arrays[2], count=count_U)
    update = jax.vmap(adamw, in_axes=axes, out_axes=(1, Moments(mu=1, nu=1, count=0), 0, 0))  # ty: ignore[invalid-argument-type]
    new_weights, new_moments, norm_U, finite_U = update(old_arrays[0], grads, moments, hyper)
    new_arrays = (new_weights, new_moments.mu, new_moments.nu, jax.tree.map(jnp.zeros_like, grads))

    def put_slot(u: jax.Array, arrays: tuple) -> tuple:
        slot, safe = slot_U[u], safe_U[u]

        def put(all_LSRX: jax.Array, new_LURX: jax.Array) -> jax.Array:
            old = lax.dynamic_index_in_dim(all_LSRX, safe, 1)
            new = jnp.where(slot != NO_ADAPTER, lax.dynamic_index_in_dim(new_LURX, u, 1), old)
            return lax.dynamic_update_slice_in_dim(all_LSRX, new, safe, 1)

        return jax.tree.map(put, arrays, new_arrays)

    everything = (weights, state.moments.mu, state.moments.nu, state.grads)
    weights, mu, nu, grads = lax.fori_loop(0, slot_U.shape[0], put_slot, everything)
    # A slot is due at most once, so a scatter of the counts needs no order; NO_ADAPTER is sent out of range and dropped.
    target_U = jnp.where(slot_U != NO_ADAPTER, slot_U, state.moments.count.shape[0])
    count = state.moments.count.at[target_U].set(new_moments.count, mode="drop")
    state = TrainState(pool=with_halves(state.pool, weights), grads=grads, moments=Moments(mu=mu, nu=nu, count=count))
    return state, UpdateReport(norm_U=norm_U, finite_U=finite_U)


def _train_step(
    base: Base, state: TrainState, batch: TrainBatch, hyper: Hyper, slot_U: jax.Array
) -> tuple[TrainState, LaneSums, UpdateReport]:
    state, sums = _accumulate(base, state, batch)
    state, report = _apply(state, hyper, slot_U)
    return state, sums, report


def _evaluate(base: Base, pool: Rows, batch: TrainBatch) -> LaneSums:
    return lane_losses(base, LaneLora.gather(pool, batch.slot_G), batch)[1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SlotState:
    """All that training keeps of one tenant between steps: what a checkpoint holds.  No slot axis."""

    rows: Rows
    moments: Moments


def _seat(state: TrainState, slot: jax.Array, seat: SlotState) -> TrainState:
    """The state with one slot replaced whole, its open gradients cleared."""

    def put(whole: jax.Array, part: jax.Array) -> jax.Array:
        return lax.dynamic_update_index_in_dim(whole, part.astype(whole.dtype), slot, 1)

    moments = Moments(
        mu=jax.tree.map(put, state.moments.mu, seat.moments.mu),
        nu=jax.tree.map(put, state.moments.nu, seat.moments.nu),
        count=state.moments.count.at[slot].set(seat.moments.count),
    )
    grads = jax.tree.map(lambda g: put(g, jnp.zeros((*g.shape[:1], *g.shape[2:]), g.dtype)), state.grads)
    return TrainState(pool=jax.tree.map(put, state.pool, seat.rows), grads=grads, moments=moments)


def _unseat(state: TrainState, slot: jax.Array) -> SlotState:
    """A copy of one slot."""

    def take(whole: jax.Array) -> jax.Array:
        return lax.dynamic_index_in_dim(whole, slot, 1, keepdims=False)

    moments = Moments(
        mu=jax.tree.map(take, state.moments.mu),
        nu=jax.tree.map(take, state.moments.nu),
        count=state.moments.count[slot],
    )
    return SlotState(rows=jax.tree.map(take, state.pool), moments=moments)


def fresh_seat(rows: Rows) -> SlotState:
    """A tenant that has not trained yet: these rows (NumPy), zero moments."""

    def zeros() -> Halves:
        return {t: (np.zeros_like(a), np.zeros_like(b)) for t, (a, b) in halves(rows).items()}  # ty: ignore[invalid-explicit-return]

    return SlotState(rows=rows, moments=Moments(mu=zeros(), nu=zeros(), count=np.int32(0)))  # ty: ignore[invalid-argument-type]


@dataclass(frozen=True, slots=True)
class Programs:
    """The compiled programs of one trainer; state is donated and keeps its placement."""

    accumulate: jax.stages.Wrapped  # (base, state, batch) → state, LaneSums
    apply: jax.stages.Wrapped  # (state, hyper, slot_U) → state, UpdateReport
    train_step: jax.stages.Wrapped  # (base, state, batch, hyper, slot_U) → state, LaneSums, UpdateReport
    evaluate: jax.stages.Wrapped  # (base, pool, batch) → LaneSums
    seat: jax.stages.Wrapped  # (state, slot, SlotState) → state
    unseat: jax.stages.Wrapped  # (state, slot) → SlotState


def make_programs(state: TrainState, mesh: Mesh) -> Programs:
    """The jitted step for states placed like this one."""
    placed = jax.tree.map(lambda x: x.sharding, state)
    small = replicated(mesh)
    return Programs(
        accumulate=jax.jit(_accumulate, donate_argnums=1, out_shardings=(placed, small)),
        apply=jax.jit(_apply, donate_argnums=0, out_shardings=(placed, small)),
        train_step=jax.jit(_train_step, donate_argnums=1, out_shardings=(placed, small, small)),
        evaluate=jax.jit(_evaluate, out_shardings=small),
        seat=jax.jit(_seat, donate_argnums=0, out_shardings=placed),
        unseat=jax.jit(_unseat),
    )


def idle_batch(lanes: int, length: int) -> TrainBatch:
    """A NumPy batch of empty lanes, for the host to fill."""
    shape = (lanes, length)
    return TrainBatch(
        token_GJ=np.zeros(shape, np.int32),  # ty: ignore[invalid-argument-type]
        target_GJ=np.zeros(shape, np.int32),  # ty: ignore[invalid-argument-type]
        weight_GJ=np.zeros(shape, np.float32),  # ty: ignore[invalid-argument-type]
        position_GJ=np.zeros(shape, np.int32),  # ty: ignore[invalid-argument-type]
        segment_GJ=np.zeros(shape, np.int32),  # ty: ignore[invalid-argument-type]
        slot_G=np.full(lanes, NO_ADAPTER, np.int32),  # ty: ignore[invalid-argument-type]
    )
