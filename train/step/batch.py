"""TrainBatch and LaneSums: the arrays a training step reads and returns, and how lanes are packed into them.

Shape letters: G lanes, J positions of a lane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import jax
import numpy as np

from jaxlora.config.training import LOSSES, Loss
from pallas_kernels import NO_ADAPTER
from train.data.examples import Lane


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """Lanes of one step.  A lane is one packed row of one tenant; an idle lane has slot NO_ADAPTER and no weight."""

    token_GJ: jax.Array  # int32
    target_GJ: jax.Array  # int32 id to predict
    weight_GJ: jax.Array  # float32 of that prediction; 0 is not trained
    position_GJ: jax.Array  # int32 place in its segment
    segment_GJ: jax.Array  # int32 example within the lane, from 1; 0 is padding
    reference_GJ: jax.Array  # float32 log-probability of the target when sampled, or under DPO's reference model
    advantage_GJ: jax.Array  # float32
    ratio_GJ: jax.Array  # bool: counts in the ratio of its sequence (gspo)
    pair_GJ: jax.Array  # int32: 1 in a chosen completion, -1 in the rejected one, which is the next segment; 0: no pair
    low_GJ: jax.Array  # float32 bounds of the ratio (ppo, cispo, gspo)
    high_GJ: jax.Array  # float32
    beta_G: jax.Array  # float32 (dpo, dro)
    loss_G: jax.Array  # int32 which loss: an index into `config.training.LOSSES`
    dropout_G: jax.Array  # float32 dropout rate of the inputs of A
    draw_GN: jax.Array  # int32 [G, 3] seeds of the dropout mask: the tenant's seed, its step, the lane's number
    slot_G: jax.Array  # int32 slot of the lane's tenant


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LaneSums:
    """Sums over each lane's tokens, float32 [G], and each target's log-probability."""

    loss_G: jax.Array  # the lane's own weighted loss
    weight_G: jax.Array  # sum of weights
    hit_G: jax.Array  # number of targets that were the likeliest token
    count_G: jax.Array  # number of targets
    logprob_GJ: jax.Array  # float32 of each target; 0 where its weight is 0


KINDS = {"ratio_GJ": np.bool_} | dict.fromkeys(  # of a batch's arrays that are not float32
    ("token_GJ", "target_GJ", "position_GJ", "segment_GJ", "pair_GJ", "loss_G", "draw_GN", "slot_G"), np.int32
)


def idle_batch(lanes: int, length: int) -> TrainBatch:
    """Returns a NumPy batch of idle lanes, which `put_lane` fills."""
    batch = _zeros(TrainBatch, lanes, length, KINDS)
    batch.slot_G[:] = NO_ADAPTER
    return batch


def idle_sums(lanes: int, length: int) -> LaneSums:
    """Returns the sums of idle lanes, in NumPy, which `put_sums` fills."""
    return _zeros(LaneSums, lanes, length, {})


def _zeros[Arrays: TrainBatch | LaneSums](
    of: type[Arrays], lanes: int, length: int, kinds: Mapping[str, type]
) -> Arrays:
    """Returns zeros in NumPy, each field's shaped by its suffix; float32 where `kinds` names no other."""
    shapes = {"G": (lanes,), "GJ": (lanes, length), "GN": (lanes, 3)}
    zeros = {f.name: np.zeros(shapes[f.name.rpartition("_")[2]], kinds.get(f.name, np.float32)) for f in fields(of)}
    return of(**zeros)  # ty: ignore[invalid-argument-type]


def put_sums(sums: LaneSums, lanes: Sequence[int], some: LaneSums) -> None:
    """Writes the sums of the first of some lanes into those of all, which may be longer, at these numbers (NumPy)."""
    for whole, part in zip(jax.tree.leaves(sums), jax.tree.leaves(some), strict=True):
        whole[(list(lanes), *map(slice, part.shape[1:]))] = part[: len(lanes)]


def put_lane(batch: TrainBatch, g: int, lane: Lane, slot: int, loss: Loss, reference_J: np.ndarray) -> None:
    """Writes lane g of a NumPy batch; `reference_J` holds the log-probabilities that its loss compares with."""
    batch.token_GJ[g], batch.target_GJ[g], batch.weight_GJ[g] = lane.token_J, lane.target_J, lane.weight_J
    batch.position_GJ[g], batch.segment_GJ[g], batch.slot_G[g] = lane.position_J, lane.segment_J, slot
    batch.advantage_GJ[g], batch.ratio_GJ[g], batch.pair_GJ[g] = lane.advantage_J, lane.ratio_J, lane.pair_J
    numbers = loss.row()
    batch.loss_G[g], batch.beta_G[g] = list(LOSSES).index(loss.name), numbers["beta"]
    batch.low_GJ[g], batch.high_GJ[g], batch.reference_GJ[g] = numbers["clip_low"], numbers["clip_high"], reference_J


def put_dropout(batch: TrainBatch, g: int, lane: Lane, rate: float, seed: int, step: int) -> None:
    """Writes lane g's dropout: the mask depends on tenant, step and lane only, whatever slot and batch they are in."""
    batch.dropout_G[g], batch.draw_GN[g] = rate, np.array([seed, step, lane.number], np.uint32).view(np.int32)
