"""What serving has come to: numbers that only grow.  Pure.  The device thread writes them, any thread reads them, a moment late."""

from __future__ import annotations

from collections import Counter

from serve.histogram import Histogram
from serve.request import Delta
from serve.sequence import Sequence

# Upper bounds, in seconds.
FIRST_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
NEXT_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)
WHOLE_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class Telemetry:
    """Counts and durations of requests, since the start."""

    def __init__(self) -> None:
        self.prompt_tokens = 0  # of requests that have their first token; what was found in a cache included
        self.ended: Counter[str] = Counter()  # requests by how they ended: "stop", "length", "error" or "abort"
        self.first_token_s = Histogram(FIRST_TOKEN_S)  # from arrival
        self.next_token_s = Histogram(NEXT_TOKEN_S)  # between two tokens of a request
        self.whole_s = Histogram(WHOLE_S)  # from arrival to the end, of those that were not broken off
        self.queued_s = Histogram(FIRST_TOKEN_S)  # from arrival to the first step
        self.loads = 0  # adapters copied from the host into a slot

    def took(self, sequence: Sequence, delta: Delta, now: float) -> None:
        """News of a sequence, before they are added to it; now: seconds, of the clock that its arrival is told by."""
        if sequence.generated == 0:
            self.prompt_tokens += len(sequence.request.prompt)
            self.queued_s.observe(sequence.queued_s)
            if delta.tokens:
                self.first_token_s.observe(now - sequence.arrived)
        elif delta.tokens:
            self.next_token_s.observe(now - sequence.told)
        sequence.told = now
        if delta.finish is not None:
            self.ended[delta.finish.value] += 1
            self.whole_s.observe(now - sequence.arrived)
        elif delta.error is not None:
            self.ended["error"] += 1
