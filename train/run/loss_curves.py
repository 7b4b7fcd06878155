"""Curves of training and held-out losses, drawn as PNG and SVG.  No jax.

As a program it draws for a server, whose process must not wait for it:

    standard input   JSON: {name: {"train": [steps, losses], "heldout": [steps, losses]}}
    standard output  JSON: {"png": base64, "svg": base64}
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import batched
from pathlib import Path
from statistics import fmean

from jaxlora.core.atomic_files import replace_file

FORMATS = ("png", "svg")
MOST_POINTS = 1000  # of a curve in a picture
LOG_FROM = 20.0  # the largest loss over the smallest from which the axis is logarithmic
NICENESS = 10

Curve = tuple[Sequence[float], Sequence[float]]  # optimizer steps, and the loss of each


@dataclass(frozen=True, kw_only=True, slots=True)
class LossCurves:
    """The losses of one adapter, in nats per target token."""

    train: Curve
    heldout: Curve = ((), ())


def thinned(curve: Curve, most: int = MOST_POINTS) -> Curve:
    """Returns the curve without losses that are not finite, and with at most so many points: means of neighbours."""
    points = [(step, loss) for step, loss in zip(*curve, strict=True) if math.isfinite(loss)]
    if len(points) > most:
        groups = batched(points, math.ceil(len(points) / most))
        points = [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]
    return [x for x, _ in points], [y for _, y in points]


def drawn(curves: Mapping[str, LossCurves]) -> dict[str, bytes]:
    """Returns a picture of these adapters' losses in each of FORMATS; the same losses give the same bytes."""
    from matplotlib import rc_context  # half a second to import, and only needed here
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "jaxlora"}):
        figure = Figure(figsize=(8, 5), layout="tight")
        axes = figure.add_subplot()
        seen: list[float] = []
        for name, both in curves.items():
            train, heldout = thinned(both.train), thinned(both.heldout)
            (line,) = axes.plot(*train, label=name)
            if heldout[0]:
                axes.plot(*heldout, color=line.get_color(), linestyle="--", marker="o", markersize=4)
                line.set_label(f"{name} (dashed: held out)")
            seen += [*train[1], *heldout[1]]
        is_wide = bool(seen) and min(seen) > 0 and max(seen) > LOG_FROM * min(seen)
        axes.set(xlabel="optimizer step", ylabel="loss, nats per token", yscale="log" if is_wide else "linear")
        if curves:
            axes.legend(fontsize="small")
        files = {form: io.BytesIO() for form in FORMATS}
        for form, file in files.items():
            figure.savefig(file, format=form, metadata={"Date": None} if form == "svg" else None)
    return {form: file.getvalue() for form, file in files.items()}


def write_pictures(curves: Mapping[str, LossCurves], folder: Path) -> None:
    """Writes loss.png and loss.svg into the folder, each whole or not at all."""
    for form, content in drawn(curves).items():
        replace_file(folder / f"loss.{form}", content)


def to_json(curves: Mapping[str, LossCurves]) -> str:
    """Returns what the program reads; curves are thinned first."""
    thin = {name: LossCurves(train=thinned(both.train), heldout=thinned(both.heldout)) for name, both in curves.items()}
    return json.dumps({name: asdict(both) for name, both in thin.items()})


def main() -> None:
    """Draws what standard input says."""
    os.nice(NICENESS)
    curves = {name: LossCurves(**both) for name, both in json.load(sys.stdin).items()}
    json.dump({form: base64.b64encode(content).decode() for form, content in drawn(curves).items()}, sys.stdout)


if __name__ == "__main__":
    main()
