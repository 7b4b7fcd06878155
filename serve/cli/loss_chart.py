"""Losses drawn in a terminal: the training loss as a line of braille dots, held-out losses as marks.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

HEIGHT = 8  # lines of the chart
LABEL = 10  # characters of a number at its side
LINE, HELDOUT, CORNER = 0, 1, 2
UNICODE, ASCII = "⣀◆└│─", ".o+|-"  # line in the legend, held-out mark, corner, side, foot
# Bits of a braille character by row and column of its dots.
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))

type Points = Sequence[tuple[int, float]]  # (step, loss), by step


def chart(train: Points, heldout: Points, *, width: int, ascii_only: bool) -> list[str]:
    """Returns the lines of a chart at most so wide; none without points."""
    points = [*train, *heldout]
    if not points:
        return []
    mark, side = (ASCII[HELDOUT], ASCII[3]) if ascii_only else (UNICODE[HELDOUT], UNICODE[3])
    columns = max(width - LABEL - 2, 8)
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    across, down = (1, 1) if ascii_only else (2, 4)  # dots of a character

    def column(step: int, wide: int) -> int:
        return round((step - first) / max(last - first, 1) * (wide - 1))

    def row(loss: float, tall: int) -> int:
        return round((high - loss) / (high - low) * (tall - 1)) if high > low else tall - 1

    cells = [[0] * columns for _ in range(HEIGHT)]
    for x, loss in enumerate(line([(column(s, columns * across), y) for s, y in train], columns * across)):
        if loss is not None:
            y = row(loss, HEIGHT * down)
            cells[y // down][x // across] |= DOTS[y % down][x % across]
    drawn = [[letter(bits, ascii_only) for bits in cells_of_row] for cells_of_row in cells]
    for step, loss in heldout:
        drawn[row(loss, HEIGHT)][column(step, columns)] = mark
    labels = [""] * HEIGHT
    labels[0], labels[-1] = f"{high:.4g}", f"{low:.4g}"
    lines = [f"{label:>{LABEL}} {side}{''.join(cells)}".rstrip() for label, cells in zip(labels, drawn, strict=True)]
    return [*lines, *foot(first, last, columns, heldout=bool(heldout), ascii_only=ascii_only)]


def foot(first: int, last: int, columns: int, *, heldout: bool, ascii_only: bool) -> list[str]:
    """Returns the axis, its ends and what the marks mean."""
    line_mark, mark, corner, _, dash = ASCII if ascii_only else UNICODE
    space = " " * (LABEL + 1)
    ends = f"{first}{last:>{max(columns - len(str(first)), 1)}}" if last > first else str(first)
    legend = f"loss by step:  {line_mark} training" + (f"  {mark} held out" if heldout else "")
    return [f"{space}{corner}{dash * columns}", f"{space} {ends}", f"{space} {legend}"]


def line(points: Sequence[tuple[int, float]], wide: int) -> list[float | None]:
    """Returns the mean loss of each column, straight between columns with points; None before the first and after the last."""
    groups: dict[int, list[float]] = {}
    for x, loss in points:
        groups.setdefault(x, []).append(loss)
    known = sorted((x, fmean(losses)) for x, losses in groups.items())
    found: list[float | None] = [None] * wide
    for x, loss in known:
        found[x] = loss
    for (x0, y0), (x1, y1) in pairwise(known):
        for x in range(x0 + 1, x1):
            found[x] = y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return found


def letter(bits: int, ascii_only: bool) -> str:
    """Returns the character of a cell with these dots."""
    if not bits:
        return " "
    return ASCII[LINE] if ascii_only else chr(0x2800 + bits)
