"""Builds the fine-tuning jobs of a server: trainer, recorder, jobs, scorer and on-demand updates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jaxlora.checkpoints.load import Opened
from jaxlora.config.serving import SizedConfig, SizedTraining
from jaxlora.config.training import TooLong, default_lr
from jaxlora.core.lora import ALL_TARGETS
from jaxlora.core.progress import Progress
from jaxlora.model.lora_pool import PoolSpec
from jaxlora.storage.disk_cache import Remote
from jaxlora.storage.remote_states import StateCopies
from serve.access.adapter_quota import AdapterQuota
from serve.db.database import Database
from serve.db.jobs import StoredJobs
from serve.db.models import JobRecord
from serve.jobs.live_jobs import Listener, LiveJobs, Published, Shelf
from serve.jobs.names import know_names
from serve.jobs.on_demand import Tuner
from serve.jobs.recorder import JobRecorder
from serve.jobs.scoring import Scorer
from serve.jobs.service import Files, JobService
from serve.runtime.device_thread import DeviceThread
from serve.runtime.live_training import small_trainer, warm_up
from serve.runtime.snapshot import training_view
from train.data.load import Loaded
from train.jobs.job import JobsConfig
from train.jobs.runner import Jobs
from train.jobs.states import Parking
from train.trainer import Trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Hooks:
    """What LiveJobs and its Jobs ask of the trainer around them."""

    shelf: Shelf
    listener: Listener
    wake: Callable[[], None]
    had_room: Callable[[str, str], bool]
    owner_weight: Callable[[str], float]
    may_save: Callable[[str], bool] = lambda job_id: True  # asked just before a checkpoint is written


def make_live(
    trainer: Trainer,
    training: SizedTraining,
    hooks: Hooks,
    states: Path,
    parking: Parking,
    load: Callable[[Path, TooLong], Loaded],
    copies: StateCopies | None = None,
) -> LiveJobs:
    """Makes the jobs of a trainer.  states: the folder of their checkpoints.  load: reads a file of examples."""
    return LiveJobs(
        hooks.shelf,
        lambda wake: Jobs(
            trainer,
            JobsConfig(states=states, quantum_steps=training.quantum_steps, copies=copies),
            shelf=hooks.shelf,
            parking=parking,
            load=load,
            wake=wake,
            owner_weight=hooks.owner_weight,
            may_save=hooks.may_save,
        ),
        wake=hooks.wake,
        publish_every=training.publish_every,
        listener=hooks.listener,
        had_room=hooks.had_room,
    )


@dataclass(frozen=True, slots=True)
class JobHost:
    """The parts of a server that train."""

    runner: DeviceThread
    live: LiveJobs
    service: JobService
    tuner: Tuner
    scorer: Scorer

    def start(self, progress: Progress) -> None:
        """Compiles the training programs and resumes the jobs of an earlier process.  Call it after the runner has started."""
        with progress.stage("compiling", unit="training programs") as stage:
            self.runner.call(lambda: warm_up(self.live.jobs.trainer, self.runner.publisher, stage.at))
        with progress.stage("resuming jobs"):
            self.runner.watch.training = functools.partial(training_view, self.live.jobs)
            self.runner.trainer = self.live
            self.service.restart()

    def close(self) -> None:
        """Saves the jobs' states and stores what is left.  Call it after the device thread has ended."""
        self.scorer.close()
        self.service.close()
        self.tuner.close()


def make_job_host(
    opened: Opened,
    config: SizedConfig,
    training: SizedTraining,
    runner: DeviceThread,
    database: Database,
    files: Files,
    quota: AdapterQuota,
    remote: Remote | None,
) -> JobHost:
    """Builds the jobs over this base, not started yet.

    Raises ConfigInvalid for sizes that do not fit the base; Unavailable, StorageFailed as object storage does.
    """
    pool = PoolSpec(slots=training.slots, rank=training.max_rank, dtype="float32", targets=ALL_TARGETS)
    trainer = small_trainer(opened, pool, lanes=training.lanes, lane_tokens=training.lengths)
    folder, tuned = config.data / "jobs", config.data / "tuned"
    copies = None if remote is None else StateCopies(remote.blobs, folder / "states", "jobs")
    stored, names = StoredJobs(database), runner.catalog.jobs
    know_names(names, stored)
    recorder = JobRecorder(stored, names, runner.engine.store.wait_saved)
    hooks = Hooks(
        shelf=runner.publisher,
        listener=recorder,
        wake=runner.wake,
        had_room=quota.had_room,
        owner_weight=lambda owner: runner.tuning.weights.get(owner, 1.0),
    )
    parking = Parking(folder / "parked", host_bytes=int(config.host_states_gb * 1e9))
    live = make_live(trainer, training, hooks, folder / "states", parking, files.load, copies)

    def load(id: str, too_long: TooLong) -> Loaded:
        return files.load(files.find(id, None)[1], too_long)

    scorer = Scorer(runner, load, recorder.change)

    def published(record: JobRecord, version: Published) -> None:
        quota.has_room(version.ref)  # for the next one
        scorer.score(record, version)

    base_lr = default_lr(opened.base.config)
    service = JobService(runner, live, recorder, stored, files, base_lr=base_lr, limits=config.limits, quota=quota)
    recorder.start(published=published, ended=service.ended)
    tuned_copies = None if remote is None else StateCopies(remote.blobs, tuned, "tuned")
    tuner = Tuner(runner, live, trainer, tuned, quota, tuned_copies, call_tokens=training.call_tokens)
    return JobHost(runner, live, service, tuner, scorer)
