"""Metrics of a training run, one set for each tenant: metrics.csv, heldout.csv and a TensorBoard event file.

metrics.csv has one row for each optimizer step of a tenant, heldout.csv one for each held-out loss.  A resumed run continues
all three from its checkpoint.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jaxlora.core.atomic_files import replace_file
from train.run.loss_curves import Curve
from train.trainer import Evaluation, StepReport

# The files' headers.
COLUMNS = ("step", "loss", "accuracy", "lr", "grad_norm", "tokens", "finite")
HELDOUT_COLUMNS = ("step", "loss", "accuracy")
SCALARS = ("loss", "accuracy", "lr", "grad_norm", "tokens")  # columns that TensorBoard shows
FLUSH_S = 5  # seconds until a row is on disk for TensorBoard


def append(path: Path, report: StepReport) -> None:
    """Appends the report's row to a metrics.csv; a new file gets a header first."""
    _append(path, row_of(report))


def append_heldout(path: Path, step: int, evaluation: Evaluation) -> None:
    """Appends a held-out loss to a heldout.csv; a new file gets a header first."""
    values = step, evaluation.nll, evaluation.accuracy
    _append(path, {column: _text(value) for column, value in zip(HELDOUT_COLUMNS, values, strict=True)})


def row_of(report: StepReport) -> dict[str, str]:
    """Returns the report's row: column → text in the file."""
    return {column: _text(getattr(report, column)) for column in COLUMNS}


def rows(path: Path, columns: Sequence[str] = COLUMNS) -> list[dict[str, str]]:
    """Returns all rows of a file of these columns, column → text; none when the file does not exist."""
    return [dict(zip(columns, row, strict=True)) for row in _rows(path, columns)]


def cut(path: Path, step: int, columns: Sequence[str] = COLUMNS) -> None:
    """Removes the rows after `step`: steps past the last checkpoint are trained again."""
    if not path.exists():
        return
    kept = io.StringIO(newline="")
    csv.writer(kept).writerows([columns, *(row for row in _rows(path, columns) if int(row[0]) <= step)])
    replace_file(path, kept.getvalue().encode())


def losses(path: Path, columns: Sequence[str] = COLUMNS) -> Curve:
    """Returns (steps, the loss of each) of all rows."""
    found = rows(path, columns)
    return [int(row["step"]) for row in found], [float(row["loss"]) for row in found]


def _append(path: Path, row: Mapping[str, str]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(row)
        writer.writerow(row.values())


def _text(value: float | bool) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _rows(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """Returns the rows below the header, without one that a crash left incomplete."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.reader(file) if len(row) == len(columns) and row[0].isdigit()]


class EventFile:
    """TensorBoard event file of one tenant: the numbers of its metrics.csv, digit for digit, as scalars by step."""

    def __init__(self, folder: Path, rows: Iterable[Mapping[str, str]]):
        """Starts with these rows of the metrics file, which get the present time and hide all that earlier files hold.

        They are written again because a killed process may have lost rows that it had not flushed.
        """
        from tensorboardX import SummaryWriter  # half a second to import, and only needed here

        self._writer = SummaryWriter(str(folder), purge_step=0, max_queue=1000, flush_secs=FLUSH_S)
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, str]) -> None:
        """Adds a row of the metrics file; it is on disk FLUSH_S later."""
        for name in SCALARS:
            self._writer.add_scalar(name, float(row[name]), int(row["step"]))

    def close(self) -> None:
        """Returns when all rows are on disk.  No row may be added afterwards."""
        self._writer.close()
