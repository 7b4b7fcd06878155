"""Reference log-probabilities of DPO: those of preference pairs under the base model, each computed once."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np

from train.data.examples import Lane, Pair, fill_lane


class DpoReferences:
    """Cache of reference log-probabilities by pair, for as long as the pair lives.

    A pair is evaluated alone in its lane, so that its reference depends on nothing else: a resumed run gets the same.
    """

    def __init__(self, lanes: int, lane_tokens: int):
        """lanes: how many the base evaluates at once."""
        self._lanes, self._lane_tokens = lanes, lane_tokens
        self._known: weakref.WeakKeyDictionary[Pair, np.ndarray] = weakref.WeakKeyDictionary()

    def asks(self, lanes: Sequence[Lane]) -> list[list[Lane]]:
        """Returns the lanes, one new pair each, that the base must evaluate before these lanes can be trained."""
        pairs = dict.fromkeys(u for lane in lanes for u in lane.units if isinstance(u, Pair))
        new = [fill_lane([pair], self._lane_tokens) for pair in pairs if pair not in self._known]
        return [new[start : start + self._lanes] for start in range(0, len(new), self._lanes)]

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
