"""The jitted multi-tenant training step: `accumulate` adds gradients, `apply` updates weights.

`accumulate` runs lanes of many tenants forward and backward and adds each lane's gradient to its own slot's rows;
`apply` updates the slots that are due.  All other slots come back bit for bit, unread and untouched.  `train_step` is
both in one program.  Slots, hyper-parameters and tenants are data: nothing a tenant does compiles anything.

Shape letters: G lanes, J tokens of a lane, U due slots, S slots, T = G * J tokens, N query heads, K kv heads, H head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlora.config.training import LANE_BLOCK
from jaxlora.core.errors import ConfigInvalid
from jaxlora.model.decoder import Attend, Base, TokenBatch, forward, head_weight
from jaxlora.model.lora_pool import DropoutLora, LaneLora, LoraLayout, Rows
from jaxlora.model.mesh import RULES, attention_placement, lane_parts, replicated
from pallas_kernels.attention.op import packed_attention
from pallas_kernels.cross_entropy.op import target_logprob
from pallas_kernels.product.op import Packed
from train.step.batch import LaneSums, TrainBatch
from train.step.lane_lora import Gradients, StepLora
from train.step.losses import LossInputs, token_losses
from train.step.optimizer import Halves
from train.step.state import (
    Due,
    States,
    apply,
    seat,
    splits_of,
    unseat,
    with_gradients,
)
from train.step.update import Split, UpdateReport


def lane_losses(
    base: Base, lanes: LaneLora, batch: TrainBatch, *, dropout: bool, remat: str = "products"
) -> tuple[jax.Array, LaneSums]:
    """Returns (float32 sum of all lanes' losses, each its own, and the sums by lane) under each lane's adapter.

    remat: what a gradient keeps of a layer, one of `decoder.REMAT`.
    """
    lora = with_dropout(lanes, jnp.arange(base.config.layers), batch) if dropout else lanes
    # Both implement Lora with their own Layer type; the type variable cannot express their union.
    x_TD, _ = forward(base, lane_tokens(batch), lora, lane_attend(base, batch), (), remat=remat)  # ty: ignore[invalid-argument-type]
    head = head_weight(base)
    return summed(batch, *target_logprobs(base, head, lanes, x_TD, batch.target_GJ, batch.weight_GJ != 0))


def with_dropout(lanes: LaneLora, layer_L: jax.Array, batch: TrainBatch) -> DropoutLora:
    """Returns the lanes' adapters with training dropout, in layers of these numbers."""
    return DropoutLora(lanes, layer_L, batch.dropout_G, batch.draw_GN)


def lane_tokens(batch: TrainBatch) -> TokenBatch:
    """Returns the lanes' tokens in the model's input format."""
    return TokenBatch(
        token_T=batch.token_GJ.reshape(-1),
        position_T=batch.position_GJ.reshape(-1),
        segment_T=batch.segment_GJ.reshape(-1),
        slot_T=jnp.repeat(batch.slot_G, batch.token_GJ.shape[1]),
    )


def lane_attend(base: Base, batch: TrainBatch) -> Attend[tuple[()]]:
    """Returns attention within the segments of each lane."""

    def attend(
        layer: jax.Array, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, cache: tuple[()]
    ) -> tuple[jax.Array, tuple[()]]:
        qkv = [x.reshape(*batch.segment_GJ.shape, *x.shape[1:]) for x in (q_TNH, k_TKH, v_TKH)]
        options = {"window": base.config.window, "block": LANE_BLOCK, "placement": attention_placement(base.mesh)}
        return packed_attention(*qkv, batch.segment_GJ, **options).reshape(q_TNH.shape), cache

    return attend


def target_logprobs(
    base: Base,
    head: tuple[jax.Array | Packed, jax.Array],
    lanes: LaneLora,
    x_TD: jax.Array,
    target_GJ: jax.Array,
    wanted_GJ: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns ([G, J] float32 log-probability of each wanted target, bool: none is likelier) after the final norm.

    head: as `head_weight` returns it.
    """
    G, J = target_GJ.shape
    with jax.default_matmul_precision(base.precision):
        logprob_GJK, hit_GJK = target_logprob(
            x_TD.reshape(G, J, -1),
            *head,
            target_GJ[..., None],
            wanted_GJ,
            lanes.head_rows(),
            placement=lanes.head_placement(),
            chunk=min(LANE_BLOCK, J),
            tied=base.config.tied,
        )
    return logprob_GJK[..., 0], hit_GJK[..., 0]


def summed(batch: TrainBatch, logprob_GJ: jax.Array, hit_GJ: jax.Array) -> tuple[jax.Array, LaneSums]:
    """Returns (float32 sum of all lanes' losses, the sums by lane) of the targets' log-probabilities."""
    loss_G = token_losses(logprob_GJ, batch.loss_G, _loss_inputs(batch)).sum(1)
    sums = LaneSums(
        loss_G=loss_G,
        weight_G=batch.weight_GJ.sum(1),
        hit_G=hit_GJ.sum(1).astype(jnp.float32),
        count_G=(batch.weight_GJ != 0).sum(1).astype(jnp.float32),
        logprob_GJ=logprob_GJ,
    )
    return loss_G.sum(), sums


def _loss_inputs(batch: TrainBatch) -> LossInputs:
    """Returns the loss inputs of all lanes."""
    return LossInputs(
        segment_J=batch.segment_GJ,
        weight_J=batch.weight_GJ,
        reference_J=batch.reference_GJ,
        advantage_J=batch.advantage_GJ,
        ratio_J=batch.ratio_GJ,
        pair_J=batch.pair_GJ,
        low_J=batch.low_GJ,
        high_J=batch.high_GJ,
        beta=batch.beta_G,
    )


def lora_layout(base: Base) -> LoraLayout:
    """Returns how LoRA products are placed on the base's mesh."""
    return LoraLayout(config=base.config, mesh=base.mesh)


def accumulate(
    base: Base, states: States, batch: TrainBatch, *, remat: str = "products", passes: int = 1
) -> tuple[States, LaneSums]:
    """Returns the states, each lane's gradient of its loss added to those of its slot, and the sums by lane.

    passes: the lanes go through the model in so many groups, one after the other, so that a gradient keeps one group's
    activations; it divides the lanes of each group of devices (`check_passes`).
    """
    if passes == 1:
        return _accumulate_pass(base, states, batch, remat)

    def one(grads: tuple[Halves, ...], batch: TrainBatch) -> tuple[tuple[Halves, ...], LaneSums]:
        after, sums = _accumulate_pass(base, with_gradients(states, grads), batch, remat)
        return tuple(state.grads for state in after), sums

    parts = lane_parts(base.mesh)
    first = tuple(state.grads for state in states)
    grads, sums = lax.scan(one, first, jax.tree.map(lambda x: _in_passes(base.mesh, x, parts, passes), batch))
    # Lanes come back in the order in which they were given.
    sums = jax.tree.map(lambda x: _in_passes(base.mesh, x.reshape(-1, *x.shape[2:]), passes, parts), sums)
    return with_gradients(states, grads), jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), sums)


def check_passes(mesh: Mesh, lanes: int, passes: int) -> None:
    """Raises ConfigInvalid when a step's lanes on each group of devices do not divide into these passes."""
    own = lanes // lane_parts(mesh)
    if passes < 1 or own % passes:
        raise ConfigInvalid(
            f"passes must divide the {own} lanes of each group of devices, got {passes}", param="passes"
        )


def _in_passes(mesh: Mesh, x_G: jax.Array, parts: int, passes: int) -> jax.Array:
    """Returns [passes, G / passes, ...]: of each of `parts` runs of lanes its own share, so that none changes device."""
    apart = x_G.reshape(parts, passes, -1, *x_G.shape[1:]).swapaxes(0, 1)
    together = apart.reshape(passes, -1, *x_G.shape[1:])
    if mesh.size == 1:
        return together
    return lax.with_sharding_constraint(together, NamedSharding(mesh, PartitionSpec(None, RULES["lanes"])))


def _accumulate_pass(base: Base, states: States, batch: TrainBatch, remat: str) -> tuple[States, LaneSums]:
    totals = jax.tree.map(jax.new_ref, [state.grads for state in states])
    pools = [state.pool for state in states]

    def loss(by: jax.Array) -> tuple[jax.Array, LaneSums]:
        lanes = StepLora(pools, batch.slot_G, lora_layout(base), Gradients(totals=totals, by=by))
        return lane_losses(base, lanes, batch, dropout=True, remat=remat)

    _, sums = jax.grad(loss, has_aux=True)(jnp.float32(0))
    return with_gradients(states, jax.tree.map(jax.freeze, totals)), sums


def _train_step(
    base: Base,
    states: States,
    batch: TrainBatch,
    due: tuple[Due, ...],
    *,
    remat: str,
    passes: int,
    splits: tuple[Split | None, ...],
) -> tuple[States, LaneSums, tuple[UpdateReport, ...]]:
    states, sums = accumulate(base, states, batch, remat=remat, passes=passes)
    states, reports = apply(states, due, splits=splits)
    return states, sums, reports


def _evaluate(base: Base, pools: tuple[Rows, ...], batch: TrainBatch) -> LaneSums:
    return lane_losses(base, StepLora(pools, batch.slot_G, lora_layout(base)), batch, dropout=False)[1]


@dataclass(frozen=True, slots=True)
class Programs:
    """Compiled programs of one trainer; states are donated and keep their placement.  A bucket is a Python number."""

    accumulate: jax.stages.Wrapped  # (base, states, batch) → states, LaneSums
    apply: jax.stages.Wrapped  # (states, due) → states, reports
    train_step: jax.stages.Wrapped  # (base, states, batch, due) → states, LaneSums, reports
    evaluate: jax.stages.Wrapped  # (base, pools, batch) → LaneSums
    seat: jax.stages.Wrapped  # (states, bucket, slot, SlotState) → states
    unseat: jax.stages.Wrapped  # (states, bucket, slot) → SlotState


@functools.cache
def _keeping(remat: str, passes: int, splits: tuple[Split | None, ...]) -> tuple[Callable, Callable, Callable]:
    """Returns (accumulate, apply, train_step), the same functions each time, so that equal trainers share what is compiled."""
    return (
        functools.partial(accumulate, remat=remat, passes=passes),
        functools.partial(apply, splits=splits),
        functools.partial(_train_step, remat=remat, passes=passes, splits=splits),
    )


def make_programs(states: States, mesh: Mesh, *, remat: str = "products", passes: int = 1) -> Programs:
    """Returns the jitted programs for states placed like these.

    remat: what a gradient keeps (`decoder.REMAT`).  passes: of a step's lanes (see `accumulate`).
    """
    placed = jax.tree.map(lambda x: x.sharding, states)
    small = replicated(mesh)
    adding, updating, train_step = _keeping(remat, passes, splits_of(states, mesh))
    return Programs(
        accumulate=jax.jit(adding, donate_argnums=1, out_shardings=(placed, small)),
        apply=jax.jit(updating, donate_argnums=0, out_shardings=(placed, small)),
        train_step=jax.jit(train_step, donate_argnums=1, out_shardings=(placed, small, small)),
        evaluate=jax.jit(_evaluate, out_shardings=small),
        seat=jax.jit(seat, static_argnums=1, donate_argnums=0, out_shardings=placed),
        unseat=jax.jit(unseat, static_argnums=1, out_shardings=small),  # replicated: any process can read it
    )
