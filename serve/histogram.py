"""How often something took how long.  Pure: it counts, and somebody else writes it on a wire.  Read from any thread."""

from __future__ import annotations

from bisect import bisect_left
from collections import abc


class Histogram:
    """Counts of observations by upper bounds, with their sum: what Prometheus calls a histogram."""

    def __init__(self, bounds: abc.Sequence[float]):
        """bounds: in order; what is above the last is counted by itself."""
        assert list(bounds) == sorted(set(bounds))
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)  # not cumulative; the last is of those above all bounds
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """One more.  A value on a bound is below it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def total(self) -> int:
        """Observations."""
        return sum(self.counts)

    def quantile(self, share: float) -> float:
        """The bound that this share of the observations is below; infinity above the last, 0 without any."""
        total, seen = self.total, 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            seen += count
            if total and seen >= share * total:
                return bound
        return 0.0

    def lines(self, unit: str = "s") -> list[str]:
        """A line for each bound that has been met: the bound, the count and a bar."""
        most = max(self.counts)
        names = [f"<= {bound:g} {unit}" for bound in self.bounds] + [f"> {self.bounds[-1]:g} {unit}"]
        return [
            f"{name:>12}  {count:>6}  {'#' * -(-40 * count // most)}"
            for name, count in zip(names, self.counts, strict=True)
            if count
        ]
