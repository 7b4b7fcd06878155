"""Counters and histograms of serving, which only grow.  Pure.  The device thread writes them, any thread reads them."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, abc

from serve.engine.request import Delta
from serve.engine.sequence import Sequence

# Upper bounds, in seconds.
FIRST_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
NEXT_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)
WHOLE_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class Histogram:
    """Counts observations by upper bounds and sums them, as a Prometheus histogram does."""

    def __init__(self, bounds: abc.Sequence[float]):
        """bounds: in order; what is above the last is counted by itself."""
        assert list(bounds) == sorted(set(bounds))
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)  # not cumulative; the last is of those above all bounds
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Adds an observation.  A value on a bound counts as below it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def total(self) -> int:
        """The number of observations."""
        return sum(self.counts)

    def lines(self, unit: str = "s") -> list[str]:
        """Returns a line of text for each bound with observations: the bound, the count and a bar."""
        most = max(self.counts)
        names = [f"<= {bound:g} {unit}" for bound in self.bounds] + [f"> {self.bounds[-1]:g} {unit}"]
        return [
            f"{name:>12}  {count:>6}  {'#' * -(-40 * count // most)}"
            for name, count in zip(names, self.counts, strict=True)
            if count
        ]


class Telemetry:
    """Counts requests and measures their durations, since the start."""

    def __init__(self) -> None:
        self.prompt_tokens = 0  # of requests that have their first token; cached ones included
        self.ended: Counter[str] = Counter()  # requests by how they ended: "stop", "length", "error" or "abort"
        self.first_token_s = Histogram(FIRST_TOKEN_S)  # from arrival
        self.next_token_s = Histogram(NEXT_TOKEN_S)  # between two tokens of a request
        self.whole_s = Histogram(WHOLE_S)  # from arrival to the end, of those that were not broken off
        self.queued_s = Histogram(FIRST_TOKEN_S)  # from arrival to the first step
        self.loads = 0  # adapters copied from the host into a slot

    def took(self, sequence: Sequence, delta: Delta, now: float) -> None:
        """Records a delta before it is added to its sequence; now: seconds, of the clock of its arrival."""
        if sequence.generated == 0:
            self.prompt_tokens += len(sequence.request.prompt)
            self.queued_s.observe(sequence.queued_s)
            if delta.tokens:
                self.first_token_s.observe(now - sequence.arrived)
        elif delta.tokens:
            self.next_token_s.observe(now - sequence.last_token)
        sequence.last_token = now
        if delta.finish is not None:
            self.ended[delta.finish.value] += 1
            self.whole_s.observe(now - sequence.arrived)
        elif delta.error is not None:
            self.ended["error"] += 1
