"""The result files of a job that has ended: its steps as a table, and its losses as pictures, drawn by a process of its own."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from jaxlora.core.errors import StorageFailed
from serve.db.models import EventRecord, JsonObject
from serve.jobs.recorder import NAMES
from train.run import loss_curves
from train.run.loss_curves import Curve, LossCurves, to_json

DRAW_S = 60.0  # for both pictures of a job
HEADER = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
COLUMNS = ("step", "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")

type Draw = Callable[[Mapping[str, LossCurves]], Mapping[str, bytes]]


def step_rows(events: Sequence[EventRecord]) -> list[JsonObject]:
    """The numbers of each step, oldest first, from a job's events."""
    return [e.data for e in events if e.kind == "metrics" and e.data.keys() & {NAMES["loss"], NAMES["heldout_loss"]}]


def results_csv(rows: Sequence[JsonObject]) -> str:
    """The table of a job: a line for each step."""
    lines = [",".join("" if row.get(c) is None else str(row[c]) for c in COLUMNS) for row in rows]
    return "\n".join([HEADER, *lines]) + "\n"


def curves(rows: Sequence[JsonObject]) -> LossCurves:
    """The losses of a job."""
    return LossCurves(train=_curve(rows, NAMES["loss"]), heldout=_curve(rows, NAMES["heldout_loss"]))


def _curve(rows: Sequence[JsonObject], name: str) -> Curve:
    points = [
        (step, loss)
        for step, loss in ((row.get("step"), row.get(name)) for row in rows)
        if isinstance(step, int) and isinstance(loss, int | float)
    ]
    return [step for step, _ in points], [loss for _, loss in points]


def draw_apart(curves: Mapping[str, LossCurves]) -> dict[str, bytes]:
    """Pictures of these losses by format, drawn by another process: drawing takes a second of a processor.

    Raises StorageFailed.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", loss_curves.__name__],
            input=to_json(curves).encode(),
            capture_output=True,
            check=True,
            timeout=DRAW_S,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is the server's
        )
        return {form: base64.b64decode(content) for form, content in json.loads(done.stdout).items()}
    except subprocess.CalledProcessError as error:
        last = error.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise StorageFailed(f"the losses cannot be drawn: {last or f'exit code {error.returncode}'}") from error
    except (subprocess.TimeoutExpired, OSError, ValueError) as error:
        raise StorageFailed(f"the losses cannot be drawn: {error}") from error
