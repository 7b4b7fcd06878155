"""Where the state of tenants without a slot waits: host RAM within a byte budget, past it files.

States come back bit for bit.  What was parked or read longest ago is spilled first.  The files are of
this process only (what must outlive it is a checkpoint): a new Parking removes those it finds.  Owned by one thread.

What a job has learned: on the device, parked on the host, or handed to the writer of checkpoints."""

from __future__ import annotations

import contextlib
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from jaxlora.core.atomic_files import replace_file
from jaxlora.core.errors import JaxLoraError, NotFound, StorageFailed
from jaxlora.storage.checkpoint_writer import CheckpointWriter
from train.jobs.inputs import JobFiles, LiveJob
from train.jobs.status import JobStatus
from train.step.state import SlotState
from train.trainer import Trainer

SUFFIX = ".parked"


@dataclass(slots=True)
class _Parked:
    state: SlotState  # of arrays, or once spilled of _Spilled
    nbytes: int
    checksum: int | None = None  # crc32 of the file; None: in RAM


@dataclass(frozen=True, slots=True)
class _Spilled:
    """A leaf that lies in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Parking:
    """States by key, most of them small enough for RAM.  Keys are file names."""

    def __init__(self, folder: Path, *, host_bytes: int):
        """At most `host_bytes` stay in RAM; `folder` takes the rest and belongs to this Parking alone."""
        self.folder, self.host_bytes = folder, host_bytes
        self.ram_bytes = 0
        self._parked: dict[str, _Parked] = {}  # least recently used first
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"*{SUFFIX}*"):
            left.unlink()

    def __contains__(self, key: str) -> bool:
        return key in self._parked

    def __len__(self) -> int:
        return len(self._parked)

    def put(self, key: str, state: SlotState) -> None:
        """Parks a state in RAM, over the budget if need be; replaces what was parked under this key."""
        self.discard(key)
        arrays = jax.tree.map(np.asarray, state)
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        self._parked[key] = _Parked(arrays, nbytes)
        self.ram_bytes += nbytes

    def spill(self) -> None:
        """Moves states to files until the rest fits the budget.

        Raises StorageFailed when a file cannot be written; then that state and all others are where they were.
        """
        for key, parked in list(self._parked.items()):
            if self.ram_bytes <= self.host_bytes:
                return
            if parked.checksum is None:
                self._spill(key, parked)

    def get(self, key: str) -> SlotState:
        """A parked state, which stays parked.  Raises NotFound, StorageFailed for a file that is gone or damaged."""
        if key not in self._parked:
            raise NotFound(f"nothing is parked as {key}")
        parked = self._parked[key] = self._parked.pop(key)
        return parked.state if parked.checksum is None else self._read(key, parked)

    def discard(self, key: str) -> None:
        """Forgets a state, if there is one."""
        parked = self._parked.pop(key, None)
        if parked is None:
            return
        if parked.checksum is None:
            self.ram_bytes -= parked.nbytes
        else:
            with contextlib.suppress(OSError):  # what stays is removed by the next process
                os.unlink(self._path(key))

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _spill(self, key: str, parked: _Parked) -> None:
        data = b"".join(leaf.tobytes() for leaf in jax.tree.leaves(parked.state))
        try:
            replace_file(self._path(key), data)
        except OSError as e:
            raise StorageFailed(
                f"{self.ram_bytes} bytes are parked in RAM, over the limit of {self.host_bytes}, and {key} could not be "
                f"moved to a file: {e.strerror}; make room on that disk"
            ) from e
        parked.state = jax.tree.map(lambda leaf: _Spilled(leaf.shape, leaf.dtype), parked.state)
        parked.checksum = zlib.crc32(data)
        self.ram_bytes -= parked.nbytes

    def _read(self, key: str, parked: _Parked) -> SlotState:
        try:
            data = self._path(key).read_bytes()
        except OSError as e:
            raise StorageFailed(f"the parked state {key} cannot be read: {e.strerror}") from e
        if zlib.crc32(data) != parked.checksum:
            raise StorageFailed(f"the parked state {key} is damaged: its checksum differs")
        start = 0

        def leaf(spilled: _Spilled) -> np.ndarray:
            nonlocal start
            count = math.prod(spilled.shape)
            array = np.frombuffer(data, spilled.dtype, count, start).reshape(spilled.shape)
            start += array.nbytes
            return array

        return jax.tree.map(leaf, parked.state)


class JobStates:
    """The states of one trainer's jobs.  Owned by the trainer's thread."""

    def __init__(self, trainer: Trainer, files: JobFiles, parking: Parking, writer: CheckpointWriter, *, keep: int):
        """keep: newest checkpoints of a job that stay, besides the best."""
        self._trainer, self._files, self._parking, self._writer, self._keep = trainer, files, parking, writer, keep

    def of(self, live: LiveJob) -> SlotState | None:
        """On the host; None before its start."""
        if live.job.state is JobStatus.RUNNING:
            return jax.device_get(self._trainer.unseat(live.job.id))
        if live.state_key in self._parking:
            return self._parking.get(live.state_key)
        return None

    def park(self, live: LiveJob, key: str, state: SlotState) -> None:
        """Keeps a state of the job under one of its keys; what has no room in memory goes to the disk."""
        self._parking.put(key, state)
        try:
            self._parking.spill()
        except JaxLoraError as error:
            live.job.log.add("problem", str(error), level="warn")

    def save(self, live: LiveJob) -> None:
        """Hands its state to the writer, unless that step was."""
        step = live.job.progress.step
        if self._files.states is None or step == live.saved_step or live.facts is None:
            return
        state = self.of(live)
        if state is None:
            return
        live.saved_step = step
        self._writer.submit(live.job.id, self._files.snapshot(live.job, live.facts, state, keep=self._keep))

    def has_any(self, job_id: str) -> bool:
        """Whether a job has checkpoints.  Reads the disk, of any thread.  Raises StorageFailed, Unavailable."""
        return bool(self._files.steps(job_id))

    def is_writing(self, job_id: str) -> bool:
        """Whether a checkpoint of a job is on its way to the disk.  Of any thread."""
        return self._writer.is_busy(job_id)

    def stored(self) -> set[str]:
        """Ids of all jobs that have checkpoints.  Of any thread."""
        if self._files.states is None:
            return set()
        there = [] if self._files.copies is None else self._files.copies.folders()
        return {p.name for p in [*self._files.states.glob("[!.]*"), *there]}

    def discard(self, job_id: str) -> None:
        """Removes the checkpoints of a job that has ended, soon.  Of any thread."""
        if self._files.states is not None:
            self._writer.discard(job_id, self._files.folder(job_id))

    def take_best(self, live: LiveJob, best: SlotState | None) -> None:
        """Parks the state of the best held-out loss that a checkpoint holds; a best that is nowhere is sought anew."""
        progress = live.job.progress
        if best is not None:
            self.park(live, live.best_key, best)
        elif live.job.request.keep_best and progress.best_step is not None and live.best_key not in self._parking:
            message = f"the weights of its best step {progress.best_step} are on no disk; the best is sought anew"
            progress.best_step = progress.best_loss = None
            live.job.log.add("problem", message, level="warn")
