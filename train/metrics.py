"""metrics.csv: one row for each optimizer step of a tenant.  After a resume it goes on where the checkpoint was."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from jaxlora.durable import replace_file
from train.trainer import StepReport

COLUMNS = ("step", "loss", "accuracy", "lr", "grad_norm", "tokens", "finite")


def append(path: Path, report: StepReport) -> None:
    """Adds the report's row, below a header in a new file."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        values = [getattr(report, column) for column in COLUMNS]
        writer.writerow([f"{value:.7g}" if isinstance(value, float) else value for value in values])


def cut(path: Path, step: int) -> None:
    """Drops the rows after `step`: what was trained past the last checkpoint is trained again."""
    if not path.exists():
        return
    kept = io.StringIO(newline="")
    csv.writer(kept).writerows([COLUMNS, *(row for row in _rows(path) if int(row[0]) <= step)])
    replace_file(path, kept.getvalue().encode())


def losses(path: Path) -> tuple[list[int], list[float]]:
    """(steps, the loss of each) of all rows."""
    rows = _rows(path) if path.exists() else []
    return [int(row[0]) for row in rows], [float(row[1]) for row in rows]


def _rows(path: Path) -> list[list[str]]:
    """The rows below the header, without one that a crash left half written."""
    with path.open(newline="") as file:
        return [row for row in csv.reader(file) if len(row) == len(COLUMNS) and row[0].isdigit()]
