"""What a server does at one quantum, as a line of a table, as JSON, and all of them as a picture: tokens a second against waiting."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from serve.bench.report import LoadReport

SERIES_MS = (25.0, 50.0, 100.0, 200.0, 400.0, 800.0, 1600.0)
HEAD = f"{'quantum ms':>10} {'tokens/s':>9} {'swaps/s':>8} {'first token ms: p50':>20} {'p99':>9} {'failed':>7}"


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


def picture(points: Sequence[Point]) -> bytes:
    """Returns an SVG: tokens a second over the time to the first token, each point with its quantum.

    The same points give the same bytes; one without an answer is left out.
    """
    from matplotlib import rc_context  # half a second to import, and only needed here
    from matplotlib.figure import Figure

    told = [(p, p.load.first_token) for p in points if p.load.first_token is not None]
    speeds = [p.load.tokens_s for p, _ in told]
    with rc_context({"svg.hashsalt": "jaxlora", "svg.fonttype": "none"}):  # text stays text: a small file
        figure = Figure(figsize=(7, 4.5), layout="tight")
        axes = figure.add_subplot()
        for name, waits_s in (
            ("median", [first.p50_s for _, first in told]),
            ("99th percentile", [first.p99_s for _, first in told]),
        ):
            axes.plot(waits_s, speeds, marker="o", label=name)
            for (point, _), wait_s, speed in zip(told, waits_s, speeds, strict=True):
                axes.annotate(
                    f"{point.quantum_ms:g} ms",
                    (wait_s, speed),
                    xytext=(5, 5),
                    textcoords="offset points",
                    fontsize="small",
                )
        axes.set(xlabel="seconds to the first token", ylabel="tokens a second", xscale="log")
        axes.legend(fontsize="small")
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
