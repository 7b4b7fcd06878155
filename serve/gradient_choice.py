"""Which of the given answers is the one, by what each scored.  Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence


def choose(scores: Sequence[float], *, temperature: float, top_k: int, top_p: float, drawn: float) -> int:
    """The index of the chosen score, each a log-probability up to a constant.

    temperature: 0 takes the best, the first of equals.  top_k: the best so many (0 or less: all), then top_p: the fewest
    best whose share comes to it.  drawn: a number in [0, 1) that decides.
    """
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if temperature == 0:
        return order[0]
    order = order[:top_k] if top_k > 0 else order
    best = scores[order[0]]
    shares = [math.exp((scores[i] - best) / temperature) for i in order]
    total, kept, reached = sum(shares), 0, 0.0
    while kept < len(order) and (kept == 0 or reached < top_p * total):
        reached += shares[kept]
        kept += 1
    at = drawn * reached
    for i, share in zip(order[:kept], shares, strict=False):
        at -= share
        if at < 0:
            return i
    return order[kept - 1]  # rounding
