"""metrics.csv: one row for each optimizer step of a tenant.  After a resume it goes on where the checkpoint was."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from jaxlora.durable import replace_file
from train.trainer import StepReport

# The file's header.  `train.tensorboard` shows the numbers among them.
COLUMNS = ("step", "loss", "accuracy", "lr", "grad_norm", "tokens", "finite")


def append(path: Path, report: StepReport) -> None:
    """Adds the report's row, below a header in a new file."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        writer.writerow(row_of(report).values())


def row_of(report: StepReport) -> dict[str, str]:
    """The report's row, column → what the file holds."""
    values = {column: getattr(report, column) for column in COLUMNS}
    return {column: f"{value:.7g}" if isinstance(value, float) else str(value) for column, value in values.items()}


def rows(path: Path) -> list[dict[str, str]]:
    """All rows of a file, column → text; none of one that is not there."""
    return [dict(zip(COLUMNS, row, strict=True)) for row in _rows(path)]


def cut(path: Path, step: int) -> None:
    """Drops the rows after `step`: what was trained past the last checkpoint is trained again."""
    if not path.exists():
        return
    kept = io.StringIO(newline="")
    csv.writer(kept).writerows([COLUMNS, *(row for row in _rows(path) if int(row[0]) <= step)])
    replace_file(path, kept.getvalue().encode())


def losses(path: Path) -> tuple[list[int], list[float]]:
    """(steps, the loss of each) of all rows."""
    found = rows(path)
    return [int(row["step"]) for row in found], [float(row["loss"]) for row in found]


def _rows(path: Path) -> list[list[str]]:
    """The rows below the header, without one that a crash left half written."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.reader(file) if len(row) == len(COLUMNS) and row[0].isdigit()]
