"""TensorBoard's event file of one tenant: the numbers of its metrics.csv, digit for digit, as scalars by step."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter

# protobuf makes these classes when the modules are imported
from tensorboardX.proto.event_pb2 import Event  # ty: ignore[missing-module-member]
from tensorboardX.proto.summary_pb2 import Summary  # ty: ignore[missing-module-member]

SCALARS = ("loss", "accuracy", "lr", "grad_norm", "tokens")
FLUSH_S = 5.0  # what is older than this when a row comes is on disk, for who looks on


class EventFile:
    """An event file that takes the place of all that the folder held, so that no step is there twice after a resume."""

    def __init__(self, folder: Path, rows: Iterable[Mapping[str, str]]):
        """It starts with these rows of the metrics file, which get the time of now."""
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = EventsWriter(str((folder / "events").absolute()))
        self._flushed_s = time.monotonic()
        for row in rows:
            self.add(row)
        self.flush()

    def add(self, row: Mapping[str, str]) -> None:
        """One more row of the metrics file."""
        scalars = [Summary.Value(tag=name, simple_value=float(row[name])) for name in SCALARS]
        self._writer.write_event(Event(wall_time=time.time(), step=int(row["step"]), summary=Summary(value=scalars)))
        if time.monotonic() - self._flushed_s >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """All rows are on disk."""
        self._writer.flush()
        self._flushed_s = time.monotonic()

    def close(self) -> None:
        """All rows are on disk, and no more come."""
        self._writer.close()
