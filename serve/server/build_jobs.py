"""From settings to fine-tuning jobs beside a runner: trainer, jobs, calls, scores and what is stored of them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from jaxlora.checkpoints.load import Opened
from jaxlora.config.serving import ServeConfig, TrainingSection
from jaxlora.config.training import default_lr
from jaxlora.core.lora import ALL_TARGETS
from jaxlora.model.lora_pool import PoolSpec
from jaxlora.storage.disk_cache import Remote
from jaxlora.storage.remote_states import StateCopies
from serve.access.adapter_quota import AdapterQuota
from serve.db.database import Database
from serve.db.jobs import StoredJobs
from serve.db.models import JobRecord
from serve.jobs.live_jobs import JobNews, JobShelf, LiveJobs, Published
from serve.jobs.on_demand import Tuner
from serve.jobs.scoring import Scorer
from serve.jobs.service import Files, JobService
from serve.runtime.catalog import JobNames
from serve.runtime.device_thread import DeviceThread
from serve.runtime.live_training import warm_up
from serve.runtime.snapshot import training_view
from train.jobs.job import JobsConfig
from train.jobs.runner import Jobs
from train.jobs.states import Parking
from train.jobs.status import ENDED
from train.step.microsteps import small_parts
from train.trainer import Trainer

PARKED_BYTES = 2 * 2**30  # of jobs without a slot in RAM; the rest waits in files


class _Mailbox:
    """Passes on what LiveJobs says: it is made before those who listen."""

    def __init__(self) -> None:
        self.service: JobService | None = None

    def job_changed(self, news: JobNews) -> None:
        assert self.service is not None, "no job is made before"
        self.service.recorder.job_changed(news)

    def job_published(self, published: Published) -> None:
        assert self.service is not None, "no job is made before"
        self.service.recorder.job_published(published)


@dataclass(frozen=True, slots=True)
class JobHost:
    """All that trains beside a runner."""

    runner: DeviceThread
    live: LiveJobs
    service: JobService
    tuner: Tuner
    scorer: Scorer

    def start(self) -> None:
        """Compiles what training runs, and goes on with the jobs of an earlier process.  The runner has started."""
        self.runner.call(lambda: warm_up(self.live.jobs.trainer, self.runner))
        self.runner.watch.training = functools.partial(training_view, self.live.jobs)
        self.runner.trainer = self.live
        self.service.restart()

    def close(self) -> None:
        """Saves what jobs have learned and stores what is left.  After the device thread has ended."""
        self.scorer.close()
        self.service.close()
        self.tuner.close()


def make_job_host(
    opened: Opened,
    config: ServeConfig,
    training: TrainingSection,
    runner: DeviceThread,
    database: Database,
    files: Files,
    quota: AdapterQuota,
    remote: Remote | None,
) -> JobHost:
    """Jobs over this base that are not started yet.

    Raises ConfigInvalid for sizes that do not fit the base; Unavailable, StorageFailed as object storage does.
    """
    rank = config.max_rank if training.max_rank is None else training.max_rank
    trainer = Trainer(
        opened.base,
        opened.mesh,
        [PoolSpec(slots=training.slots, rank=rank, dtype="float32", targets=ALL_TARGETS)],
        lanes=training.lanes,
        lane_tokens=training.lane_tokens,
        base_hash=opened.base_hash,
        parts=small_parts(opened.mesh),
    )
    folder, tuned = config.data / "jobs", config.data / "tuned"
    copies = None if remote is None else StateCopies(remote.blobs, folder / "states", "jobs")
    mailbox = _Mailbox()
    live = LiveJobs(
        runner,
        lambda wake: Jobs(
            trainer,
            JobsConfig(states=folder / "states", quantum_steps=training.quantum_steps, copies=copies),
            shelf=JobShelf(runner),
            parking=Parking(folder / "parked", host_bytes=PARKED_BYTES),
            load=files.load,
            wake=wake,
        ),
        publish_every=training.publish_every,
        listener=mailbox,
        had_room=quota.had_room,
    )
    stored = StoredJobs(database)
    know_names(runner.catalog.jobs, stored)
    scorer: Scorer | None = None

    def published(record: JobRecord, version: Published) -> None:
        quota.has_room(version.ref)  # for the next one
        assert scorer is not None
        scorer.score(record, version)

    service = JobService(
        live,
        stored,
        files,
        runner.catalog.jobs,
        base_lr=default_lr(opened.base.config),
        limits=config.limits,
        quota=quota,
        published=published,
    )
    mailbox.service = service

    @contextlib.contextmanager
    def opened_file(id: str) -> Generator[Path]:
        _, path = files.find(id, None)
        with files.here(path):
            yield path

    scorer = Scorer(runner, opened_file, service.recorder.change)
    tuner = Tuner(live, tuned, quota, None if remote is None else StateCopies(remote.blobs, tuned, "tuned"))
    return JobHost(runner, live, service, tuner, scorer)


def know_names(names: JobNames, stored: StoredJobs) -> None:
    """Has the names of all jobs that there ever were mean what they have made."""
    for record, checkpoints in stored.history():
        names.add(record.id, record.tenant, record.request.suffix or "")
        for checkpoint in checkpoints:
            final = checkpoint.version == record.progress.get("final_version")
            names.checkpoint(record.id, checkpoint.step, checkpoint.version, final=final)
        if record.status in ENDED:
            names.end(record.id)
