"""What a job has learned: on the device, parked on the host, or handed to the writer of checkpoints."""

from __future__ import annotations

import jax

from jaxlora.core.errors import JaxLoraError
from jaxlora.storage.checkpoint_writer import CheckpointWriter
from train.job_files import JobFiles, LiveJob
from train.parking import Parking
from train.state import SlotState
from train.trainer import Trainer


class JobStates:
    """The states of one trainer's jobs.  Owned by the trainer's thread."""

    def __init__(self, trainer: Trainer, files: JobFiles, parking: Parking, writer: CheckpointWriter, *, keep: int):
        """keep: newest checkpoints of a job that stay, besides the best."""
        self._trainer, self._files, self._parking, self._writer, self._keep = trainer, files, parking, writer, keep

    def of(self, live: LiveJob) -> SlotState | None:
        """On the host; None before its start."""
        if live.job.state == "running":
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

    def newest(self, job_id: str) -> dict | None:
        """Meta of a job's newest checkpoint.  Reads the disk, of any thread.  Raises StorageFailed, Unavailable."""
        return self._files.newest(job_id)

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
