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
from train.data.examples import CheckedExamples, Lane, PackedExamples, Unit, fitting_length, pair_margins
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
        lengths: Sequence[int],
    ):
        """evaluate: the jitted program.  holder: has the adapters.  microsteps: None where a step is one program.

        lanes: of the shortest of these lengths; of longer ones as many as come to its tokens, and a lane a device group.
        """
        self.base, self.lanes, self.lengths = base, lanes, lengths
        self._evaluate, self._holder, self._microsteps = evaluate, holder, microsteps
        groups = base.mesh.shape["data"] * base.mesh.shape["fsdp"]
        self._lanes = {n: max(lanes * lengths[0] // n // groups, 1) * groups for n in lengths}
        self.references = DpoReferences(self._lanes)

    def warm_up(self, begins: Callable[[], None]) -> None:
        """Compiles and runs the program of each length, once, on idle lanes; `begins` is called before each."""
        for length, lanes in self._lanes.items():
            begins()
            self._sums(idle_batch(lanes, length))

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
        return PackedExamples(CheckedExamples(examples, loss.name, fitting_length(self.lengths, examples)))

    def evaluate(self, rows: Sequence[EvaluatedLane]) -> Generator[str]:
        """Adds what at most as many lanes as a step has sum to; yields the name of each part before it runs."""
        yield from self.learn([row.lane for row in rows])
        for length, lanes in self._lanes.items():
            same = [row for row in rows if len(row.lane.token_J) == length]
            for start in range(0, len(same), lanes):
                yield EVALUATE
                some = same[start : start + lanes]
                sums = self._sums(self.batch([(row.lane, row.slot, row.loss) for row in some], lanes, length))
                for g, row in enumerate(some):
                    hits = self.hits(row.lane, row.loss, sums, g)
                    row.sums.add(row.lane, row.loss, (float(sums.loss_G[g]), float(sums.count_G[g]), *hits))

    def hits(self, lane: Lane, loss: Loss, sums: LaneSums, g: int) -> tuple[float, float]:
        """(targets of lane g that were the likeliest, targets); of pairs: (those whose margin is positive, pairs)."""
        if loss.name != "dpo":
            return float(sums.hit_G[g]), float(sums.count_G[g])
        logprob_J = np.asarray(sums.logprob_GJ[g])[: len(lane.token_J)]  # other lanes may be longer
        margins = pair_margins(lane, logprob_J, self.references.of(lane))
        return float((margins > 0).sum()), float(len(margins))

    def learn(self, lanes: Sequence[Lane]) -> Generator[str]:
        """Computes the base's log-probabilities of these lanes' pairs where they are not known, in parts as a step is."""
        for asked in self.references.asks(lanes):
            yield from self.learn_pairs(asked)

    def learn_pairs(self, asked: Sequence[Lane]) -> Generator[str]:
        """Computes those of one pair in each lane of a group (`DpoReferences.asks`)."""
        length = len(asked[0].token_J)
        size = self._lanes[length] if self._microsteps is None else self._microsteps.sizes.lanes
        for start in range(0, len(asked), size):
            some, batch = asked[start : start + size], idle_batch(size, length)
            for g, lane in enumerate(some):
                put_lane(batch, g, lane, NO_ADAPTER, CROSS_ENTROPY, lane.reference_J)
            if self._microsteps is None:
                logprob_GJ = np.asarray(self._sums(batch).logprob_GJ)
            else:
                logprob_GJ = yield from self._microsteps.logprobs(batch, self._holder)
            self.references.know(some, logprob_GJ[: len(some)])

    def batch(self, rows: Sequence[tuple[Lane, int, Loss]], lanes: int, length: int) -> TrainBatch:
        """So many lanes of one length with their slots and losses, in NumPy; the references of their pairs must be known."""
        batch = idle_batch(lanes, length)
        for g, (lane, slot, loss) in enumerate(rows):
            put_lane(batch, g, lane, slot, loss, self.references.of(lane))
        return batch

    def _sums(self, batch: TrainBatch) -> LaneSums:
        pools = tuple(state.pool for state in self._holder.states)
        return jax.device_get(self._evaluate(self.base, pools, place_rows(self.base.mesh, batch)))
