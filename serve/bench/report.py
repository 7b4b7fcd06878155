"""What the answers of a load took: tokens a second, and percentiles of the times that people wait."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from serve.bench.client import Answer

MOST_ERRORS = 5  # that a report tells


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of times in seconds."""

    p50_s: float
    p90_s: float
    p99_s: float

    @classmethod
    def of(cls, times_s: Sequence[float]) -> Percentiles | None:
        """Returns them, or None where there is no time."""
        return cls(*(percentile(times_s, p) for p in (50, 90, 99))) if times_s else None


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """A load, summed up.  Failed requests count in `requests`, `failed` and `errors` only."""

    requests: int
    failed: int
    models: int  # different ones that answered
    wall_s: float  # from the first request to the last answer
    prompt_tokens: int | None  # None: the server does not tell
    tokens: int  # generated
    tokens_s: float  # generated tokens a second
    requests_s: float
    first_token: Percentiles | None
    between_tokens: Percentiles | None  # two pieces of one answer, one after the other
    whole_answer: Percentiles | None
    errors: dict[str, int]  # what the failed were told, and how often; the most frequent

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> LoadReport:
        """Sums up answers, of which there is at least one."""
        good = [a for a in answers if a.error is None]
        wall_s = max(a.ended_s for a in answers) - min(a.began_s for a in answers)
        prompts = [a.prompt_tokens for a in good if a.prompt_tokens is not None]
        tokens = sum(a.tokens for a in good)
        return cls(
            requests=len(answers),
            failed=len(answers) - len(good),
            models=len({a.model for a in good}),
            wall_s=wall_s,
            prompt_tokens=sum(prompts) if prompts else None,
            tokens=tokens,
            tokens_s=tokens / wall_s,
            requests_s=len(good) / wall_s,
            first_token=Percentiles.of([a.pieces_s[0] - a.began_s for a in good if a.pieces_s]),
            between_tokens=Percentiles.of([later - t for a in good for t, later in itertools.pairwise(a.pieces_s)]),
            whole_answer=Percentiles.of([a.ended_s - a.began_s for a in good]),
            errors=dict(Counter(a.error for a in answers if a.error is not None).most_common(MOST_ERRORS)),
        )

    def lines(self) -> list[str]:
        """Returns the report as a table for people."""
        told = "?" if self.prompt_tokens is None else f"{self.prompt_tokens:,}"
        shown = [
            f"requests         {self.requests:,}, {self.failed:,} of them failed; models that answered: {self.models:,}",
            f"wall time        {self.wall_s:.2f} s, {self.requests_s:.2f} requests/s",
            f"tokens           {told} in, {self.tokens:,} out, {self.tokens_s:.1f} out/s",
            f"{'milliseconds':16} {'p50':>9} {'p90':>9} {'p99':>9}",
        ]
        rows = {
            "first token": self.first_token,
            "between tokens": self.between_tokens,
            "whole answer": self.whole_answer,
        }
        for name, times in rows.items():
            if times is not None:
                shown.append(f"{name:16} {times.p50_s * 1e3:9.1f} {times.p90_s * 1e3:9.1f} {times.p99_s * 1e3:9.1f}")
        return [*shown, *(f"failed {count:,} times: {error}" for error, count in self.errors.items())]


def percentile(values: Sequence[float], p: float) -> float:
    """Returns the p-th percentile, between two values in proportion.  values: not empty."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * p / 100
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))
