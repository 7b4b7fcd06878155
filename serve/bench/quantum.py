"""What a server does at each quantum, as lines of a table and as a picture: tokens a second against waiting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serve.bench.report import LoadReport, Percentiles

SERIES_MS = (25.0, 50.0, 100.0, 200.0, 400.0, 800.0, 1600.0)
HEAD = f"{'quantum ms':>10} {'tokens/s':>9} {'swaps/s':>8} {'first token ms: p50':>20} {'p99':>9} {'failed':>7}"
LEFT, RIGHT, TOP, BOTTOM = 64, 700, 30, 340  # where the axes of the picture are, in pixels
STYLE = """
text { font: 12px ui-sans-serif, system-ui, Helvetica, Arial, sans-serif; fill: #1f2328; text-anchor: middle }
path, polyline { fill: none; stroke: #818b98 }
.y { text-anchor: end }
.median polyline { stroke: #3a7bd5 } .median circle { fill: #3a7bd5 }
.tail polyline { stroke: #c36a14 } .tail circle { fill: #c36a14 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } }
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A load at one quantum."""

    quantum_ms: float
    swaps_s: float  # exchanges a second of an adapter in a slot for one that waited
    load: LoadReport

    def line(self) -> str:
        """Returns it as a line under HEAD."""
        first = self.load.first_token
        waits = f"{'':>20} {'':>9}" if first is None else f"{first.p50_s * 1e3:20.1f} {first.p99_s * 1e3:9.1f}"
        return f"{self.quantum_ms:10g} {self.load.tokens_s:9.1f} {self.swaps_s:8.2f} {waits} {self.load.failed:7,}"


def picture(points: Sequence[Point]) -> str:
    """Returns an SVG that fetches nothing: tokens a second over seconds to the first token.

    Each point has its quantum beside it; one without an answer is left out.
    """
    told = [(point, point.load.first_token) for point in points if point.load.first_token is not None]
    waits_s = [wait for _, first in told for wait in (first.p50_s, first.p99_s)] or [1.0]
    steps = [digit * 10.0**power for power in range(-6, 7) for digit in (1, 2, 5)]
    low = max((s for s in steps if s <= min(waits_s)), default=steps[0])
    high = min((s for s in steps if s > max(waits_s)), default=steps[-1])
    fastest = max((point.load.tokens_s for point, _ in told), default=1.0)
    step = next(s for s in steps if s >= fastest / 5)
    ticks = math.ceil(fastest / step)

    def x(wait_s: float) -> float:
        return LEFT + (RIGHT - LEFT) * math.log(wait_s / low) / math.log(high / low)

    def y(speed: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * speed / (ticks * step)

    def curve(kind: str, title: str, wait: Callable[[Percentiles], float], below: Sequence[int]) -> list[str]:
        """below: where labels are, in turn, as neighbours may lie close."""
        places = [(x(wait(first)), y(point.load.tokens_s), point.quantum_ms) for point, first in told]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py, _ in places)
        dots = [
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4"/><text x="{px:.1f}" y="{py + below[n % 2]:.1f}">{ms:g} ms</text>'
            for n, (px, py, ms) in enumerate(places)
        ]
        return [f'<g class="{kind}"><title>{title}</title><polyline points="{line}"/>', *dots, "</g>"]

    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {RIGHT + 40} {BOTTOM + 60}" role="img">',
            f"<title>Tokens a second over seconds to the first token, by quantum</title><style>{STYLE}</style>",
            f'<path d="M{LEFT} {TOP} V{BOTTOM} H{RIGHT}"/>',
            *(f'<text x="{x(s):.1f}" y="{BOTTOM + 18}">{s:g}</text>' for s in steps if low <= s <= high),
            *(
                f'<text class="y" x="{LEFT - 8}" y="{y(n * step) + 4:.1f}">{n * step:g}</text>'
                for n in range(ticks + 1)
            ),
            f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 42}">seconds to the first token: median (left), '
            "99th percentile (right)</text>",
            f'<text x="{LEFT}" y="{TOP - 12}">tokens a second</text>',
            *curve("median", "median", lambda first: first.p50_s, (-10, -23)),
            *curve("tail", "99th percentile", lambda first: first.p99_s, (20, 33)),
            "</svg>\n",
        ]
    )
