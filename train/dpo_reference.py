"""Reference log-probabilities of DPO: those of preference pairs under the base model, each computed once."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import numpy as np

from train.data.examples import Lane, Pair, fill_lane, fitting_length


class DpoReferences:
    """Cache of reference log-probabilities by pair, for as long as the pair lives.

    A pair is evaluated alone in its lane, so that its reference depends on nothing else: a resumed run gets the same.
    """

    def __init__(self, lanes: Mapping[int, int]):
        """lanes: how many of each length the base evaluates at once, in rising order of length."""
        self._lanes = lanes
        self._known: weakref.WeakKeyDictionary[Pair, np.ndarray] = weakref.WeakKeyDictionary()

    def asks(self, lanes: Sequence[Lane]) -> list[list[Lane]]:
        """Returns the lanes, one new pair each, that the base must evaluate before these lanes can be trained.

        Each pair lies in the shortest lane that holds it; those of one group have one length.
        """
        pairs = dict.fromkeys(u for lane in lanes for u in lane.units if isinstance(u, Pair))
        new: dict[int, list[Lane]] = {length: [] for length in self._lanes}
        for pair in pairs:
            if pair not in self._known:
                length = fitting_length([*self._lanes], [pair])
                new[length].append(fill_lane([pair], length))
        return [
            some[start : start + self._lanes[length]]
            for length, some in new.items()
            for start in range(0, len(some), self._lanes[length])
        ]

    def know(self, lanes: Sequence[Lane], logprob_GJ: np.ndarray) -> None:
        """Stores the base's float32 [n, J] log-probabilities of the targets of such lanes."""
        for lane, logprob_J in zip(lanes, logprob_GJ, strict=True):
            for pair in lane.units:
                assert isinstance(pair, Pair)
                self._known[pair] = np.array(logprob_J[: pair.predictions])

    def of(self, lane: Lane) -> np.ndarray:
        """Returns float32 [J]: the log-probabilities the lane's loss compares with; its pairs must be stored."""
        reference_J, start = lane.reference_J.copy(), 0
        for unit in lane.units:
            if isinstance(unit, Pair):
                reference_J[start : start + unit.predictions] = self._known[unit]
            start += unit.predictions
        return reference_J
