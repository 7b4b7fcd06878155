"""The losses of examples under adapters in training, or under the base alone.

DPO compares with the base's log-probabilities of each pair; they are computed once, before a step or an evaluation
that needs them.

Shape letters: G lanes, J positions of a lane.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence

import jax
import numpy as np

from jaxlora.config.training import CROSS_ENTROPY, Loss
from jaxlora.model.decoder import Base
from jaxlora.model.lora_pool import Rows
from jaxlora.model.mesh import place_rows
from pallas_kernels import NO_ADAPTER
from train.data.examples import Lane, Unit, check_kind, pack, pair_margins
from train.dpo_reference import DpoReferences
from train.step.batch import LaneSums, TrainBatch, idle_batch, put_lane
from train.step.microsteps import Holder, Microsteps
from train.tenant import Evaluation, batch_weight, divisor

EVALUATE = "evaluate"  # the name of a part of an evaluation

type Evaluate = Callable[[Base, tuple[Rows, ...], TrainBatch], LaneSums]


class Evaluator:
    """Evaluates examples in lanes that all who ask share.  Owned by the trainer's thread."""

    def __init__(
        self,
        base: Base,
        evaluate: Evaluate,
        holder: Holder,
        microsteps: Microsteps | None,
        *,
        lanes: int,
        lane_tokens: int,
    ):
        """evaluate: the jitted program.  holder: has the adapters.  microsteps: None where a step is one program."""
        self.base, self.lanes, self.lane_tokens = base, lanes, lane_tokens
        self._evaluate, self._holder, self._microsteps = evaluate, holder, microsteps
        self.references = DpoReferences(lanes, lane_tokens)

    def evaluation(
        self, work: Sequence[tuple[Sequence[Unit], int, Loss]], *, tuned: bool = True
    ) -> Generator[str, None, list[Evaluation]]:
        """Yields the name of each part before it runs, and returns one Evaluation per (examples, slot, loss).

        Not tuned: the base in place of the adapters.  Raises DataInvalid, before anything runs, for an example that is
        too long for a lane or of another kind than the loss takes.
        """
        asked: list[tuple[int, Lane, int, Loss]] = []  # whose work, lane, slot, loss
        totals = np.zeros((len(work), 4))  # loss, targets, hits and what they are counted among
        divisors: list[float] = []
        for owner, (examples, slot, loss) in enumerate(work):
            for unit in examples:
                check_kind(unit, loss.name)
            lanes = pack(examples, self.lane_tokens)
            divisors.append(divisor(batch_weight(lanes, loss)))
            if loss.name == "dpo" and not tuned:  # the base is its own reference: every margin is exactly 0
                targets = sum(np.count_nonzero(lane.weight_J) for lane in lanes)
                totals[owner] = len(examples) * math.log(2), targets, 0, len(examples)
            else:
                asked += [(owner, lane, slot if tuned else NO_ADAPTER, loss) for lane in lanes]
        for start in range(0, len(asked), self.lanes):
            part = asked[start : start + self.lanes]
            yield from self.learn([lane for _, lane, _, _ in part])
            yield EVALUATE
            sums = self._sums(self.batch([(lane, slot, loss) for _, lane, slot, loss in part]))
            for g, (owner, lane, _, loss) in enumerate(part):
                totals[owner] += sums.loss_G[g], sums.count_G[g], *self.hits(lane, loss, sums, g)
        return [
            Evaluation(nll=float(total / divisor), accuracy=float(hits / max(count, 1.0)), tokens=int(targets))
            for divisor, (total, targets, hits, count) in zip(divisors, totals, strict=True)
        ]

    def hits(self, lane: Lane, loss: Loss, sums: LaneSums, g: int) -> tuple[float, float]:
        """(targets of lane g that were the likeliest, targets); of pairs: (those whose margin is positive, pairs)."""
        if loss.name != "dpo":
            return float(sums.hit_G[g]), float(sums.count_G[g])
        margins = pair_margins(lane, np.asarray(sums.logprob_GJ[g]), self.references.of(lane))
        return float((margins > 0).sum()), float(len(margins))

    def learn(self, lanes: Sequence[Lane]) -> Generator[str]:
        """Computes the base's log-probabilities of these lanes' pairs where they are not known, in parts as a step is."""
        for asked in self.references.asks(lanes):
            batch = idle_batch(self.lanes, self.lane_tokens)
            for g, lane in enumerate(asked):
                put_lane(batch, g, lane, NO_ADAPTER, CROSS_ENTROPY, lane.reference_J)
            if self._microsteps is None:
                found = [self._sums(batch).logprob_GJ]
            else:
                found = []
                for start in range(0, len(asked), self._microsteps.sizes.lanes):
                    found.append((yield from self._microsteps.logprobs(batch, start, self._holder)))
            self.references.know(asked, np.concatenate(found)[: len(asked)])

    def batch(self, rows: Sequence[tuple[Lane, int, Loss]]) -> TrainBatch:
        """Lanes with their slots and losses, in NumPy; the references of their pairs must be known."""
        batch = idle_batch(self.lanes, self.lane_tokens)
        for g, (lane, slot, loss) in enumerate(rows):
            put_lane(batch, g, lane, slot, loss, self.references.of(lane))
        return batch

    def _sums(self, batch: TrainBatch) -> LaneSums:
        pools = tuple(state.pool for state in self._holder.states)
        return jax.device_get(self._evaluate(self.base, pools, place_rows(self.base.mesh, batch)))
