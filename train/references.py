"""What DPO compares with: the log-probabilities of preference pairs under the base, each asked for once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import numpy as np

from train.data import Lane, Pair, fill_lane


class References:
    """By pair, for as long as the pair lives.

    A pair is asked for alone in its lane, so that its reference depends on nothing else: a resumed run finds the same.
    """

    def __init__(self, ask: Callable[[Sequence[Lane]], np.ndarray], lanes: int, lane_tokens: int):
        """`ask`: float32 [n, J], the base's log-probabilities of the targets of at most `lanes` lanes."""
        self._ask, self._lanes, self._lane_tokens = ask, lanes, lane_tokens
        self._known: weakref.WeakKeyDictionary[Pair, np.ndarray] = weakref.WeakKeyDictionary()

    def learn(self, lanes: Sequence[Lane]) -> None:
        """Asks for the pairs of these lanes that are new."""
        pairs = dict.fromkeys(u for lane in lanes for u in lane.units if isinstance(u, Pair))
        new = [pair for pair in pairs if pair not in self._known]
        for start in range(0, len(new), self._lanes):
            part = new[start : start + self._lanes]
            logprob_GJ = self._ask([fill_lane([pair], self._lane_tokens) for pair in part])
            for g, pair in enumerate(part):
                self._known[pair] = np.array(logprob_GJ[g, : pair.predictions])

    def of(self, lane: Lane) -> np.ndarray:
        """float32 [J]: the log-probabilities that the lane's loss compares with; its pairs must be learned."""
        reference_J, start = lane.reference_J.copy(), 0
        for unit in lane.units:
            if isinstance(unit, Pair):
                reference_J[start : start + unit.predictions] = self._known[unit]
            start += unit.predictions
        return reference_J
