"""The losses of examples under adapters in training, or under the base alone.

DPO compares with the base's log-probabilities of each pair; they are computed once, before a step or an evaluation
that needs them.

Shape letters: G lanes, J positions of a lane.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jaxlora.config.training import CROSS_ENTROPY, Loss
from jaxlora.model.decoder import Base
from jaxlora.model.lora_pool import Rows
from jaxlora.model.mesh import place_rows
from pallas_kernels import NO_ADAPTER
from train.data.examples import CheckedExamples, Lane, PackedExamples, Unit, pair_margins
from train.dpo_reference import DpoReferences
from train.step.batch import LaneSums, TrainBatch, idle_batch, put_lane
from train.step.microsteps import Holder, Microsteps
from train.tenant import Evaluation, EvaluationSums

EVALUATE = "evaluate"  # the name of a part of an evaluation

type Evaluate = Callable[[Base, tuple[Rows, ...], TrainBatch], LaneSums]


@dataclass(frozen=True, slots=True)
class EvaluatedLane:
    """A lane to be evaluated, and where the result goes."""

    lane: Lane
    slot: int
    loss: Loss
    sums: EvaluationSums


@dataclass(frozen=True, slots=True)
class HeldLanes:
    """Examples of a tenant who is held, and how far they are evaluated."""

    name: str
    packed: PackedExamples
    sums: EvaluationSums


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
        packs = [self.packed(examples, loss) for examples, _, loss in work]
        found = [EvaluationSums() for _ in work]
        rows: list[EvaluatedLane] = []
        for sums, packed, (_, slot, loss) in zip(found, packs, work, strict=True):
            if loss.name == "dpo" and not tuned:  # the base is its own reference: every margin is exactly 0
                segments = [segment for unit in packed.examples.units for segment in unit.segments]
                targets, pairs = sum(np.count_nonzero(e.weights) for e in segments), len(packed.examples)
                sums.sums += pairs * math.log(2), targets, 0, pairs
                sums.weights.append(float(pairs))
                continue
            for number in range(len(packed)):
                rows.append(EvaluatedLane(packed.lane(number), slot if tuned else NO_ADAPTER, loss, sums))
                if len(rows) == self.lanes:
                    yield from self.evaluate(rows)
                    rows = []
        if rows:
            yield from self.evaluate(rows)
        return [sums.result() for sums in found]

    def packed(self, examples: Sequence[Unit], loss: Loss) -> PackedExamples:
        """Returns the examples in lanes.  Raises DataInvalid.  From any thread."""
        return PackedExamples(CheckedExamples(examples, loss.name, self.lane_tokens))

    def evaluate(self, rows: Sequence[EvaluatedLane]) -> Generator[str]:
        """Adds what at most as many lanes as a step has sum to; yields the name of each part before it runs."""
        yield from self.learn([row.lane for row in rows])
        yield EVALUATE
        sums = self._sums(self.batch([(row.lane, row.slot, row.loss) for row in rows]))
        for g, row in enumerate(rows):
            hits = self.hits(row.lane, row.loss, sums, g)
            row.sums.add(row.lane, row.loss, (float(sums.loss_G[g]), float(sums.count_G[g]), *hits))

    def hits(self, lane: Lane, loss: Loss, sums: LaneSums, g: int) -> tuple[float, float]:
        """(targets of lane g that were the likeliest, targets); of pairs: (those whose margin is positive, pairs)."""
        if loss.name != "dpo":
            return float(sums.hit_G[g]), float(sums.count_G[g])
        margins = pair_margins(lane, np.asarray(sums.logprob_GJ[g]), self.references.of(lane))
        return float((margins > 0).sum()), float(len(margins))

    def learn(self, lanes: Sequence[Lane]) -> Generator[str]:
        """Computes the base's log-probabilities of these lanes' pairs where they are not known, in parts as a step is."""
        for asked in self.references.asks(lanes):
            yield from self.learn_pairs(asked)

    def learn_pairs(self, asked: Sequence[Lane]) -> Generator[str]:
        """Computes those of one pair in each of at most as many lanes as a step has (`DpoReferences.asks`)."""
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
