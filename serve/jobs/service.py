"""Fine-tuning jobs without HTTP: what a client asks is checked, stored, handed to the device thread, and goes on after a restart.

    create ─▶ stored ─▶ intake thread: files read, "auto" filled in ─▶ LiveJobs ─▶ JobRecorder ─▶ stored

Every call may wait for a file, the database or the device thread: not for an event loop's thread.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from jaxlora.config.serving import LimitsSection
from jaxlora.config.training import TooLong
from jaxlora.core.adapter_size import AdapterSize, adapter_size
from jaxlora.core.errors import (
    AdapterNotFound,
    InvalidRequest,
    JaxLoraError,
    NotFound,
    StateInvalid,
    StorageAway,
    Unavailable,
)
from jaxlora.core.lora import Adapter, AdapterRef, LoraSpec
from jaxlora.core.tenant_threads import TenantThreads
from serve.access.adapter_quota import AdapterQuota
from serve.access.caller import Caller
from serve.db.job_spec import JobSpec, Plan, Resolved
from serve.db.jobs import StoredJobs
from serve.db.models import EventRecord, FileRecord, JobRecord, Json, NewEvent, new_id
from serve.jobs import resolve, results
from serve.jobs.live_jobs import LiveJobs
from serve.jobs.places import JobPlaces, OwnPlace
from serve.jobs.recorder import DEATHS, JobRecorder
from serve.jobs.results import Draw
from serve.runtime.device_thread import DeviceThread
from serve.runtime.job_names import short_id
from train.data.load import Loaded
from train.jobs.job import said
from train.jobs.status import ENDED, JobStatus, check_move
from train.run.loss_curves import LossCurves

LOG = logging.getLogger("serve")
INTAKE_THREADS = 2
RETRY_S = 5.0  # when the database or object storage does not answer
MAX_DEATHS = 3  # of the server, while a job ran and wrote no checkpoint; then the job is paused
EVENTS_AT_ONCE = 1000  # read when a result file is written
MAX_STEM, NAME_DIGITS = 32, 6  # of a name that nobody chose
RESULTS = "fine-tune-results"  # purpose of result files


class Files(Protocol):
    """The uploaded files."""

    def find(self, id: str, sees: str | None) -> tuple[FileRecord, Path]:
        """A file and where its bytes are.  Raises NotFound."""
        ...

    def load(self, path: Path, too_long: TooLong) -> Loaded:
        """The examples of a file.  Raises DataInvalid, NotFound, Unavailable, StorageFailed."""
        ...

    def keep(self, tenant: str, filename: str, purpose: str, content: bytes) -> FileRecord:
        """A new file of the server's own making."""
        ...


class JobService:
    """All jobs of one server."""

    def __init__(
        self,
        runner: DeviceThread,
        live: LiveJobs,
        recorder: JobRecorder,
        stored: StoredJobs,
        files: Files,
        *,
        base_lr: float,
        limits: LimitsSection,
        quota: AdapterQuota,
    ):
        """base_lr: of a job that names none.  recorder: stores what happens, and tells `ended` of it once it is started."""
        self.live, self.recorder, self.stored, self.files = live, recorder, stored, files
        self._runner, self._store, self.names = runner, runner.engine.store, runner.catalog.jobs
        self.places: JobPlaces = OwnPlace(runner, live)  # a cluster has others, before `restart`
        self._trainer, self._states = live.jobs.trainer, live.jobs.states
        self._base_lr, self._limits, self._quota = base_lr, limits, quota
        self._slot_bytes = runner.engine.slot_bytes
        self.draw: Draw = results.draw_apart  # may wait
        self._pictures = TenantThreads(1, "job-pictures")
        self._intake = TenantThreads(INTAKE_THREADS, "job-intake")
        self._stopping = threading.Event()
        self._deciding = threading.Lock()  # held from a look at a stored job to what follows from it

    # ---- what clients ask for -------------------------------------------------------------------------------------

    def create(self, caller: Caller, asked: JobSpec) -> JobRecord:
        """A new job, stored and in line to be read.  Its adapter has the name that is asked for, or one of `free_name`.

        Raises InvalidRequest, AdapterInvalid, NotFound for a file or model that is not there, AlreadyExists for a name that
        is taken, QuotaExceeded.
        """
        resolve.check(asked)
        start = self._runner.resolve(caller.sees, asked.model)
        if start is not None and asked.lora is not None:
            raise InvalidRequest(
                "a job that goes on from an adapter has its rank and targets; leave out lora", param="lora"
            )
        spec = self._lora_spec(asked, start)
        self._trainer.seats.check(spec)
        self._quota.check(caller.owner, adapter_size(self._trainer.base.config, spec).nbytes, another=True)
        read = {field: self._usable(id, caller, field) for field, id in asked.files.items()}
        id = new_id("ftjob-")
        seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed
        adapter = free_name(read["training_file"].filename, id) if asked.suffix is None else asked.suffix
        self._runner.catalog.check_free(caller.owner, adapter, param="suffix")
        record = JobRecord(
            id=id,
            tenant=caller.owner,
            adapter=adapter,
            request=asked,
            resolved=Resolved(seed=seed, start=start),
            labels=asked.metadata or {},
            created_s=time.time(),
        )
        first = NewEvent(time_s=time.time(), level="info", kind="message", message=f"Created fine-tuning job: {id}")
        self.names.claim(id, record.tenant, adapter, asked.suffix or "")
        try:
            self.stored.insert(
                record, files=list(asked.files.values()), most=self._limits.of(caller.owner).jobs, events=[first]
            )
        except BaseException:
            self.names.forget(id)
            raise
        self._begin(record)
        return record

    def _usable(self, id: str, caller: Caller, field: str) -> FileRecord:
        """A file that a field of the request names.  Raises NotFound, InvalidRequest."""
        try:
            file, _ = self.files.find(id, caller.sees)
        except NotFound as error:
            raise NotFound(str(error), param=field) from error
        if file.status == "error":
            raise InvalidRequest(f"file {id} is not usable: {file.status_details}", param=field)
        return file

    def move(self, caller: Caller, id: str, to: JobStatus) -> JobRecord:
        """The job, which is paused, queued again or cancelled from the next step boundary on; as it is when it was already.

        Raises NotFound; StateInvalid where it cannot go there.
        """
        owner = self.stored.get(id, caller.sees).tenant
        moves = {
            JobStatus.PAUSED: self.places.pause,
            JobStatus.QUEUED: self.places.resume,
            JobStatus.CANCELLED: self.places.cancel,
        }
        with self._deciding:
            try:
                moves[to](owner, id)
            except NotFound:  # not there yet, not there any more, or paused by an earlier process
                self._move_stored(id, to)
        self.recorder.flush()
        return self.stored.get(id, caller.sees)

    def size(self, record: JobRecord) -> AdapterSize | None:
        """How large the adapter is that a job makes; None until its files are read."""
        plan = record.resolved.plan
        return None if plan is None else adapter_size(self._trainer.base.config, plan.spec)

    def slot_bytes(self, record: JobRecord) -> int:
        """Returns the bytes of the smallest slot that holds the adapter which a job makes, of the largest if none does."""
        plan, slots = record.resolved.plan, self._slot_bytes
        fits = [n for rank, n in slots.items() if plan is not None and rank >= plan.spec.max_rank]
        return min(fits, default=max(slots.values()))

    def restart(self) -> None:
        """Goes on with every job that had not ended when the server last did; paused ones wait to be resumed."""
        unfinished = self.stored.unfinished()
        self._sweep()
        for record in unfinished:
            if record.status is JobStatus.RUNNING:
                record, events = self._blamed(record)
                self.stored.save(record, events=events)
            if record.status is JobStatus.PAUSED:
                self.recorder.register(record)
            else:
                self._begin(record)

    def died(self, id: str) -> bool:
        """Stores that the process where a job ran has died; returns whether the job goes on."""
        self.recorder.flush()
        blamed, events = self._blamed(self.stored.get(id, None))
        goes_on = blamed.status is not JobStatus.PAUSED
        status = JobStatus.QUEUED if goes_on else blamed.status
        self.recorder.change(
            id, lambda now: replace(now, status=status, error=blamed.error, progress=blamed.progress), *events
        )
        return goes_on

    def _blamed(self, record: JobRecord) -> tuple[JobRecord, list[NewEvent]]:
        """The record of a job that ran when its process died; after a few times it is paused, as it may be the cause."""
        before = record.progress.get(DEATHS)
        deaths = before + 1 if isinstance(before, int) else 1
        if deaths < MAX_DEATHS:
            return replace(record, progress={**record.progress, DEATHS: deaths}), []
        reason = f"the server died {deaths} times while this job ran; resume it to try again"
        blamed = replace(
            record,
            status=JobStatus.PAUSED,
            error={"code": "server_died", "message": reason, "param": None},
            progress={**record.progress, DEATHS: 0},
        )
        LOG.error("job %s is paused: %s", record.id, reason)
        return blamed, [NewEvent(time_s=time.time(), level="warn", kind="message", message=f"paused: {reason}")]

    def close(self) -> None:
        """Stores what is left.  After the device thread has ended."""
        self._stopping.set()
        self._intake.shutdown()
        self.live.close()
        self._pictures.shutdown()  # each tells the recorder
        self.recorder.close()

    # ---- from a request to the device thread ----------------------------------------------------------------------

    def _lora_spec(self, asked: JobSpec, start: AdapterRef | None) -> LoraSpec:
        if start is not None:
            return self._store.get(start).spec
        return resolve.spec_of(asked, max(bucket.rank for bucket in self._trainer.seats.buckets))

    def _begin(self, record: JobRecord) -> None:
        self.names.add(record.id, record.tenant, record.adapter, record.request.suffix or "")
        self.recorder.register(record)
        self._intake.submit(record.tenant, self._take_in, record)

    def _take_in(self, record: JobRecord) -> None:
        """Reads what the job brings and hands it to the device thread; what is wrong with it is the job's end."""
        while not self._stopping.is_set():
            try:
                self._hand_over(record)
            except StorageAway as error:
                LOG.warning("job %s is not taken in yet: %s", record.id, error)
                self._stopping.wait(RETRY_S)
            except Unavailable:
                return  # the server ends; the job goes on when it is up again
            except Exception as error:
                if not isinstance(error, JaxLoraError | OSError):
                    LOG.exception("job %s was not taken in", record.id)
                self.fail(record.id, error)
                return
            else:
                return

    def _hand_over(self, record: JobRecord) -> None:
        if self.stored.get(record.id, None).status in ENDED:
            return
        asked, resolved = record.request, record.resolved
        plan = resolved.plan or self._plan(record)  # an earlier process may have made it
        request = resolve.job_request(
            plan,
            owner=record.tenant,
            name=record.adapter,
            data=self._path(asked.training_file),
            heldout=None if asked.validation_file is None else self._path(asked.validation_file),
            start=self._start(record),
            seed=resolved.seed,
            too_long=resolve.too_long(asked),
        )
        kept = [c.version for c in self.stored.checkpoints(record.id, None, after=None, limit=1000).records]
        self.recorder.change(record.id, lambda now: replace(now, resolved=replace(resolved, plan=plan)))
        with self._deciding:
            if self.stored.get(record.id, None).status not in ENDED:  # it may be cancelled meanwhile
                self.places.create(record.id, request, publish=plan.publish, kept=kept)

    def _plan(self, record: JobRecord) -> Plan:
        """All that decides the job.  Its events say which examples of its files are too long, and what becomes of them."""
        asked, policy = record.request, resolve.too_long(record.request)
        examples = self.files.load(self._path(asked.training_file), policy)
        notes = {asked.training_file: examples.note}
        if asked.validation_file is not None:
            notes[asked.validation_file] = self.files.load(self._path(asked.validation_file), policy).note
        for id, note in notes.items():
            if note is not None:
                event = NewEvent(time_s=time.time(), level="warn", kind="message", message=f"{id}: {note}")
                self.recorder.change(record.id, lambda now: now, event)
        spec = self._lora_spec(asked, record.resolved.start)
        return resolve.plan(asked, examples=len(examples.units), base_lr=self._base_lr, spec=spec)

    def _path(self, file: str) -> Path:
        return self.files.find(file, None)[1]

    def _start(self, record: JobRecord) -> Adapter | None:
        """The adapter that the job begins with; one that is deleted is missed only by a job without a checkpoint of its own."""
        ref = record.resolved.start
        if ref is None:
            return None
        try:
            return self._store.get(ref)
        except AdapterNotFound:
            if not self._states.has_any(record.id):
                raise
            return None

    def fail(self, id: str, error: Exception) -> None:
        """Stores that a job has failed before anybody trained it."""
        reason = said(error)
        code = error.code if isinstance(error, JaxLoraError) else JaxLoraError.code
        event = NewEvent(time_s=time.time(), level="error", kind="message", message=f"failed: {reason}")
        self.recorder.change(
            id,
            lambda now: replace(
                now,
                status=JobStatus.FAILED,
                finished_s=time.time(),
                error={
                    "code": code,
                    "message": reason,
                    "param": error.param if isinstance(error, JaxLoraError) else None,
                },
            ),
            event,
        )

    def _move_stored(self, id: str, to: JobStatus) -> None:
        """Moves a job that the device thread does not know.  Raises StateInvalid."""
        self.recorder.flush()
        record = self.stored.get(id, None)
        being_read = (JobStatus.VALIDATING_FILES, JobStatus.QUEUED, JobStatus.RUNNING)
        if record.status == to or (to is JobStatus.QUEUED and record.status in being_read):
            return
        check_move(id, record.status, to)
        if to is JobStatus.PAUSED:
            raise StateInvalid(
                f"the files of job {id} are being read, so it cannot be paused yet; ask again, or cancel it"
            )
        if to is JobStatus.QUEUED:
            self._begin(record)
            event = NewEvent(time_s=time.time(), level="info", kind="message", message="queued: resumed")
            self.recorder.change(record.id, lambda now: replace(now, status=JobStatus.QUEUED, error=None), event)
            return
        event = NewEvent(time_s=time.time(), level="info", kind="message", message="cancelled: its owner asked for it")
        self.recorder.change(
            record.id, lambda now: replace(now, status=JobStatus.CANCELLED, finished_s=time.time()), event
        )

    # ---- ends -----------------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Removes the checkpoints of jobs that have ended; those of failed and of unknown ones after `keep_days`."""
        for id in self.stored.need_no_states(self._states.stored(), now_s=time.time(), keep_s=self._limits.keep_s):
            self._states.discard(id)

    def ended(self, record: JobRecord) -> None:
        """Writes the result files of a job that has ended; one that failed keeps its checkpoints for a while.

        Called on the recorder's thread.
        """
        if record.status is not JobStatus.FAILED:
            self._states.discard(record.id)
        try:
            self._sweep()
            events: list[EventRecord] = []
            while page := self.stored.events_since(
                record.id, None, events[-1].seq if events else 0, limit=EVENTS_AT_ONCE
            ):
                events += page
            if rows := results.step_rows(events):
                name = f"step_metrics-{short_id(record.id)}.csv"
                made = self.files.keep(record.tenant, name, RESULTS, results.results_csv(rows).encode())
                self.stored.save(replace(record, progress={**record.progress, "results": [made.id]}))
                with contextlib.suppress(RuntimeError):  # the server ends: this job has no pictures
                    self._pictures.submit(record.tenant, self._add_pictures, record, results.curves(rows))
        except (JaxLoraError, OSError) as error:
            LOG.error("job %s has no result file: %s", record.id, error)

    def _add_pictures(self, record: JobRecord, curves: LossCurves) -> None:
        """Draws the losses of a job that has ended, as further result files."""
        made: list[Json] = []
        try:
            for form, content in self.draw({record.adapter: curves}).items():
                name = f"loss-{short_id(record.id)}.{form}"
                made.append(self.files.keep(record.tenant, name, RESULTS, content).id)
        except Exception as error:
            known = isinstance(error, JaxLoraError | OSError)
            LOG.error("job %s has no pictures: %s", record.id, error, exc_info=not known)
        if made:
            self.recorder.post(record.id, lambda now: with_results(now, made))


def with_results(record: JobRecord, files: list[Json]) -> JobRecord:
    """Returns the record with more result files."""
    known = record.progress.get("results")
    return replace(
        record, progress={**record.progress, "results": [*(known if isinstance(known, list) else []), *files]}
    )


def free_name(filename: str, job_id: str) -> str:
    """Returns a name for the adapter of a job without one: what its training file is called, and digits of the job's id."""
    stem = re.sub(r"[^A-Za-z0-9]+", "-", filename.partition(".")[0]).strip("-")[:MAX_STEM].rstrip("-")
    return f"{stem.lower() or 'job'}-{short_id(job_id)[:NAME_DIGITS]}"
