"""Metrics of a training run, one set for each tenant: metrics.csv, a TensorBoard event file and plots of the loss.

metrics.csv has one row for each optimizer step of a tenant.  A resumed run continues all three from its checkpoint.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jaxlora.core.atomic_files import replace_file
from train.trainer import StepReport

# The file's header.
COLUMNS = ("step", "loss", "accuracy", "lr", "grad_norm", "tokens", "finite")
SCALARS = ("loss", "accuracy", "lr", "grad_norm", "tokens")  # columns that TensorBoard shows
FLUSH_S = 5  # seconds until a row is on disk for TensorBoard

Curve = tuple[Sequence[int], Sequence[float]]  # optimizer steps, and the loss of each


def append(path: Path, report: StepReport) -> None:
    """Appends the report's row; a new file gets a header first."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        writer.writerow(row_of(report).values())


def row_of(report: StepReport) -> dict[str, str]:
    """Returns the report's row: column → text in the file."""
    values = {column: getattr(report, column) for column in COLUMNS}
    return {column: f"{value:.7g}" if isinstance(value, float) else str(value) for column, value in values.items()}


def rows(path: Path) -> list[dict[str, str]]:
    """Returns all rows of a file, column → text; none when the file does not exist."""
    return [dict(zip(COLUMNS, row, strict=True)) for row in _rows(path)]


def cut(path: Path, step: int) -> None:
    """Removes the rows after `step`: steps past the last checkpoint are trained again."""
    if not path.exists():
        return
    kept = io.StringIO(newline="")
    csv.writer(kept).writerows([COLUMNS, *(row for row in _rows(path) if int(row[0]) <= step)])
    replace_file(path, kept.getvalue().encode())


def losses(path: Path) -> tuple[list[int], list[float]]:
    """Returns (steps, the loss of each) of all rows."""
    found = rows(path)
    return [int(row["step"]) for row in found], [float(row["loss"]) for row in found]


def _rows(path: Path) -> list[list[str]]:
    """Returns the rows below the header, without one that a crash left incomplete."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.reader(file) if len(row) == len(COLUMNS) and row[0].isdigit()]


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


def plot_losses(losses: Mapping[str, Sequence[float]], path: Path) -> None:
    """Plots losses from step 1 on, as `plot_curves` does."""
    plot_curves({name: (range(1, len(values) + 1), values) for name, values in losses.items()}, path)


def plot_curves(curves: Mapping[str, Curve], path: Path) -> None:
    """Writes one curve per tenant (mean loss per target token, nats, by optimizer step) as PNG or SVG, by the suffix."""
    import matplotlib  # a second to import, and only needed here

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, (steps, losses) in curves.items():
        axes.plot(steps, losses, label=name)
    axes.set(xlabel="optimizer step", ylabel="training loss, nats per token", yscale="log")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
