"""What the device thread says of jobs, stored by a thread of its own: a database that is slow or away delays no step.

LiveJobs ─JobNews, Published─▶ queue ─▶ one transaction a job: where it stands, its new events and checkpoints

A version is told when it is saved.  One whose save fails is late: it is told when it is saved after all, and until then its
job has not succeeded; other jobs do not wait for it.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import cast

from jaxlora.core.errors import JaxLoraError, StorageFailed, StorageFull, Unavailable
from jaxlora.core.lora import AdapterRef
from serve.db.jobs import StoredJobs
from serve.db.models import CheckpointRecord, JobRecord, JsonObject, NewEvent, new_id
from serve.jobs.live_jobs import JobNews, Published
from serve.runtime.job_names import JobNames
from train.jobs.job import JobEvent
from train.jobs.status import ENDED, JobStatus

LOG = logging.getLogger("serve")
RETRY_S = 1.0  # before a write that failed is tried again, or a late version is looked for
SAVE_WAIT_S = 2.0  # for a version on its way to the disk, before it is late
DEATHS = "deaths"  # in a job's progress: of servers while it ran, since its newest checkpoint
NAMES = {  # of a step's numbers, as they are called in OpenAI's events and checkpoints
    "loss": "train_loss",
    "accuracy": "train_mean_token_accuracy",
    "lr": "learning_rate",
    "grad_norm": "grad_norm",
    "tokens": "tokens",
    "tokens_per_s": "tokens_per_second",
    "heldout_loss": "valid_loss",
    "heldout_accuracy": "valid_mean_token_accuracy",
}

type Change = JobNews | Published | Callable[[], None]


class JobRecorder:
    """Keeps the record of every job that has not ended, and stores what changes.  Told from any thread, waits for none."""

    def __init__(self, stored: StoredJobs, names: JobNames, saved: Callable[[AdapterRef, float], None]):
        """saved: waits so many seconds until a version is saved, and raises when it is not."""
        self._stored, self._names, self._saved = stored, names, saved
        self._records: dict[str, JobRecord] = {}
        self._late: dict[str, list[Published | JobNews]] = {}  # by job: versions, and the success that follows them
        self._late_at = 0.0  # when they are looked at again, monotonic
        self._changes: queue.SimpleQueue[tuple[str, Change] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="job-recorder", daemon=True)

    def start(self, *, published: Callable[[JobRecord, Published], None], ended: Callable[[JobRecord], None]) -> None:
        """Begins to store what it is told.  published, ended: called on the recorder's thread when that is stored."""
        self._published, self._ended = published, ended
        self._thread.start()

    def register(self, record: JobRecord) -> None:
        """A job that is stored, and of which there will be news."""
        self._records[record.id] = record

    def job_changed(self, news: JobNews) -> None:
        """Where it stands now."""
        self._changes.put((news.job.id, news))

    def job_published(self, published: Published) -> None:
        """A version that it has made."""
        self._changes.put((published.job_id, published))

    def add_steps(self, news: JobNews) -> None:
        """Stores the steps that somebody made of a job; where it stands is for another to say."""

        def work() -> None:
            record = self._records.get(news.job.id)
            if record is not None and (steps := [event for event in news.events if event.kind == "step"]):
                self._store(record, _told(record, steps), [])

        self._changes.put((news.job.id, work))

    def change(self, id: str, change: Callable[[JobRecord], JobRecord], *events: NewEvent) -> None:
        """Stores another record of a job, and events, after all that was told before.  Returns when it is tried."""
        self.post(id, change, *events)
        self.flush()

    def post(self, id: str, change: Callable[[JobRecord], JobRecord], *events: NewEvent) -> None:
        """Stores another record of a job, and events, after all that was told before.  Returns at once."""

        def work() -> None:
            known = self._records.get(id)
            if known is not None:
                self._store(change(known), list(events), [])
            else:
                self._stored.save(change(self._stored.get(id, None)), events=events)

        self._changes.put((id, work))

    def flush(self) -> None:
        """Returns when all that was told before is stored, or was tried."""
        done = threading.Event()
        self._changes.put(("", done.set))
        done.wait()

    def close(self) -> None:
        """Stores what is left, each once more if need be, and that running jobs wait for the next start; ends."""
        self._closing.set()
        self._changes.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._next()) is not None:
            self._do(*item)
        self._do("", self._tell_late)
        for record in [r for r in self._records.values() if r.status is JobStatus.RUNNING]:
            queued = replace(record, status=JobStatus.QUEUED)
            self._do(record.id, lambda queued=queued: self._store(queued, [], []))

    def _next(self) -> tuple[str, Change] | None:
        """Returns what happened next, waiting for it; None at the end."""
        while True:
            wait_s = max(self._late_at - time.monotonic(), 0.0) if self._late else None
            if wait_s == 0.0:
                self._late_at = time.monotonic() + RETRY_S
                return "", self._tell_late
            try:
                return self._changes.get(timeout=wait_s)
            except queue.Empty:
                pass

    def _do(self, id: str, change: Change) -> None:
        try:
            if isinstance(change, JobNews):
                if change.job.state is JobStatus.SUCCEEDED and id in self._late:
                    self._late[id].append(change)
                else:
                    self._hear(change)
            elif isinstance(change, Published):
                if self._is_saved(change, SAVE_WAIT_S):
                    self._hear_version(change)
            else:
                change()
        except Exception:
            LOG.exception("job %s: what happened is not stored", id)

    def _is_saved(self, version: Published, wait_s: float) -> bool:
        """Whether a version may be told; a late one is kept, with an event of its job."""
        if not version.checkpoint:
            return True
        id, late = version.job_id, self._late.get(version.job_id, [])
        try:
            self._saved(version.ref, wait_s)
        except Exception as error:
            record = self._records.get(id)
            if record is not None and version not in late:
                self._late.setdefault(id, []).append(version)
                why = error.message if isinstance(error, JaxLoraError) else type(error).__name__
                message = f"version {version.ref.version} is not saved yet: {why}; it is tried again"
                LOG.error("job %s: %s", id, message)
                event = NewEvent(time_s=time.time(), level="warn", kind="message", message=message)
                stopped: JsonObject = {"code": StorageFailed.code, "message": message, "param": None}
                self._store(replace(record, error=stopped) if version.final else record, [event], [])
            return False
        return True

    def _tell_late(self) -> None:
        """Tells the late versions that are saved by now."""
        for id, late in list(self._late.items()):
            for change in list(late) if id in self._records else ():
                if isinstance(change, Published) and not self._is_saved(change, 0.0):
                    break
                late.remove(change)
                self._hear_version(change) if isinstance(change, Published) else self._hear(change)
            if not late or id not in self._records:
                del self._late[id]

    def _hear(self, news: JobNews) -> None:
        job = news.job
        record = self._records.get(job.id)
        if record is None:
            return
        progress: JsonObject = {**record.progress, **renamed(job.numbers), **asdict(job.progress)}
        if any(event.kind == "checkpoint" for event in news.events):
            progress[DEATHS] = 0
        stopped = job.state in (JobStatus.FAILED, JobStatus.PAUSED) and job.code is not None
        self._store(
            replace(
                record,
                status=job.state,
                started_s=job.started_s if record.started_s is None else record.started_s,
                finished_s=job.finished_s,
                progress=progress,
                error={"code": job.code, "message": job.reason, "param": None} if stopped else None,
            ),
            _told(record, news.events),
            [],
        )

    def _hear_version(self, said: Published) -> None:
        record = self._records.get(said.job_id)
        if record is None:
            return
        newest = max(said.ref.version, cast(int, record.progress.get("version", 0)))  # a late one is not the newest
        progress: JsonObject = {**record.progress, "version": newest}
        if said.final:
            progress["final_version"] = said.ref.version
        events, checkpoints = [], []
        if said.checkpoint:
            progress["checkpoint_step"] = said.step
            checkpoints.append(
                CheckpointRecord(
                    id=new_id("ftckpt-"),
                    job=record.id,
                    step=said.step,
                    version=said.ref.version,
                    metrics={"step": said.step, **renamed(said.numbers)},
                    created_s=said.time_s,
                )
            )
            alias = self._names.full(record.id) if said.final else self._names.full(record.id, said.step)
            what = "Fine-tuned model created" if said.final else f"Checkpoint created at step {said.step}"
            message = f"{what}: {said.ref.name}@{said.ref.version}"
            data: JsonObject = {"step": said.step, "adapter_version": said.ref.version, "model": alias}
            if said.final:
                message, data["size"] = f"{message}; {said.size}", said.size.to_json()
            events.append(NewEvent(time_s=said.time_s, level="info", kind="message", message=message, data=data))
        if said.checkpoint:  # first: who is told of a name may use it at once
            self._names.checkpoint(record.id, said.step, said.ref.version, final=said.final)
        self._store(replace(record, progress=progress), events, checkpoints)
        self._published(self._records.get(record.id, record), said)

    def _store(self, record: JobRecord, events: list[NewEvent], checkpoints: list[CheckpointRecord]) -> None:
        """Tries until it is stored; while the recorder closes, once."""
        self._records[record.id] = record
        if record.status in ENDED:  # first: who is told of the end may delete what was made at once
            self._names.end(record.id)
        while True:
            try:
                self._stored.save(record, events=events, checkpoints=checkpoints)
                break
            except (Unavailable, StorageFull) as error:
                LOG.error("job %s is not stored yet: %s", record.id, error)
                if self._closing.wait(RETRY_S):
                    return  # the next process takes it from where the database says it is
            except JaxLoraError as error:  # it was deleted meanwhile
                LOG.warning("job %s is not stored: %s", record.id, error)
                break
        if record.status in ENDED:
            self._records.pop(record.id, None)
            self._ended(record)


def renamed(numbers: object) -> JsonObject:
    """A step's numbers under OpenAI's names."""
    assert isinstance(numbers, dict)
    return {NAMES[k]: v for k, v in numbers.items() if k in NAMES}


def _told(record: JobRecord, events: Iterable[JobEvent]) -> list[NewEvent]:
    plan = record.resolved.plan
    return [told(event, None if plan is None else plan.total_steps) for event in events]


def told(event: JobEvent, total_steps: int | None) -> NewEvent:
    """An event of a job as it is stored."""
    numbers: JsonObject = dict(event.data)
    if event.kind != "step":
        return NewEvent(time_s=event.time_s, level=event.level, kind="message", message=event.message, data=numbers)
    data: JsonObject = {"step": numbers["step"], "total_steps": total_steps, **renamed(numbers)}
    return NewEvent(time_s=event.time_s, level=event.level, kind="metrics", message=event.message, data=data)
