"""`Jobs`: many jobs over the few slots of one trainer.

    create ─▶ files read and checked ─▶ queue ─▶ slot ─▶ steps, held-out losses, checkpoints ─▶ shelf
                                          ▲        │
                                          └ parked ┘ paused, or its time slice is over

Everything happens between two steps, on the thread that owns the trainer; only files are read and written elsewhere.
States and events are in memory: who must find them after a crash stores requests and ids, and creates the jobs again with
those ids; each goes on from its newest checkpoint.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Generator
from pathlib import Path

import jax

from jaxlora.config.training import TooLong
from jaxlora.core.errors import AdapterNotFinite, AlreadyExists, JaxLoraError, NotFound, StateInvalid, StorageFailed
from jaxlora.core.lora import AdapterWeights, LoraSpec, check_name
from jaxlora.model.lora_pool import adapter_of_rows
from jaxlora.storage.checkpoint_writer import CheckpointWriter
from train.data.load import Loaded
from train.evaluate import HeldLanes
from train.jobs.fair_queue import FairQueue
from train.jobs.inputs import Facts, JobFiles, JobReaders, Judgement, LiveJob, Material, numbers_of
from train.jobs.job import EventLog, Job, JobEvent, JobRequest, JobsConfig, Level, Shelf, said
from train.jobs.states import JobStates, Parking
from train.jobs.status import JobStatus
from train.step.state import SlotState
from train.tenant import EvaluationSums, TenantStatus, is_device_loss
from train.trainer import FIRST_PART, MAX_BAD_STEPS, Evaluation, StepReport, Trainer

LOG = logging.getLogger("train")


class Jobs:
    """The jobs of one trainer, in which others sit as guests only (`make_room`).  Owned by the trainer's thread."""

    def __init__(
        self,
        trainer: Trainer,
        config: JobsConfig,
        *,
        shelf: Shelf,
        parking: Parking,
        load: Callable[[Path, TooLong], Loaded],
        clock: Callable[[], float] = time.time,
        wake: Callable[[], None] = lambda: None,
        owner_weight: Callable[[str], float] = lambda owner: 1.0,
        may_save: Callable[[str], bool] = lambda job_id: True,
    ):
        """`load` reads a file of examples, on another thread; `clock` gives the seconds since 1970; `wake` is called on another
        thread when something is read or written, so that `advance` has something to do; `owner_weight` is an owner's share
        relative to the others', which no job changes; `may_save` is asked on another thread before a checkpoint is written."""
        self.trainer, self.config = trainer, config
        self.part = FIRST_PART  # what `advance` runs next
        self._shelf, self._parking, self._clock = shelf, parking, clock
        self._files = JobFiles(trainer=trainer, load=load, states=config.states, copies=config.copies)
        self._readers = JobReaders(self._files, wake)
        self._writer = CheckpointWriter(wake, config.copies, may_save)
        self.states = JobStates(trainer, self._files, parking, self._writer, keep=config.keep)
        self._owner_weight = owner_weight
        self._queue = FairQueue(owner_weight)
        self._vacated = False  # a slot has become free, and nobody has looked who waits for it
        self._guests: dict[str, str] = {}  # name in the trainer → owner
        self._jobs: dict[str, Job] = {}  # in order of creation
        self._live: dict[str, LiveJob] = {}
        self._labels: dict[tuple[str, str], str] = {}  # (owner, name) → id, of those
        self._changed: dict[str, None] = {}  # of which there are new events
        self._step: Generator[str, None, builtins.list[StepReport]] | None = None  # under way

    # ---- what callers ask for -------------------------------------------------------------------------------------

    def create(self, request: JobRequest, *, id: str | None = None) -> Job:
        """A new job.  Examples in memory are checked at once, files in the background: bad ones make the job fail.

        `id` is that of a job of an earlier process: it goes on from its checkpoints.
        Raises AdapterInvalid for a rank or targets that no slot holds, AlreadyExists for an id that is known or a name
        of which the owner has an unfinished job, and for examples in memory what JobFiles.examine raises.
        """
        job_id = f"ftjob-{uuid.uuid4().hex}" if id is None else check_name(id, "job id")
        if job_id in self._jobs:
            raise AlreadyExists(f"job {job_id} exists", param="id")
        self.trainer.seats.check(request.spec)
        label = (request.owner, request.name)
        if label in self._labels:
            other = self._jobs[self._labels[label]]
            raise AlreadyExists(
                f"job {other.id} trains {other.request.name} and is {other.state}; cancel it, or choose another name",
                param="name",
            )
        facts = None if self._files.needs_disk(job_id, request) else self._files.examine(job_id, request)
        log = EventLog(self.config.events, self._clock, lambda: self._changed.setdefault(job_id))
        job = Job(id=job_id, request=request, created_s=self._clock(), log=log)
        live = LiveJob(job=job, facts=facts)
        self._live[job_id], self._jobs[job_id], self._labels[label] = live, job, job_id
        log.add("state", "validating_files: created")
        if facts is None:
            self._readers.examine(live)
        else:
            self._line_up(live, "its examples are good")
        return job

    def get(self, owner: str, id: str) -> Job:
        """A job of this owner.  Raises NotFound, for another's job as well."""
        job = self._jobs.get(id)
        if job is None or job.request.owner != owner:
            raise NotFound(f"no job {id[:80]!r}", param="id")
        return job

    def list(self, owner: str | None) -> builtins.list[Job]:
        """The jobs of an owner, or of all, newest first."""
        return [j for j in reversed(self._jobs.values()) if owner in (None, j.request.owner)]

    def events(self, owner: str, id: str, *, after: int = 0) -> builtins.list[JobEvent]:
        """What happened to a job since event `after`, oldest first.  Raises NotFound."""
        return self.get(owner, id).log.after(after)

    def pause(self, owner: str, id: str) -> Job:
        """The job gives its slot up and waits for `resume`.  Raises NotFound, StateInvalid."""
        job = self.get(owner, id)
        if job.state is not JobStatus.PAUSED:
            job.check_move(JobStatus.PAUSED)
            self._pause(self._live[id], "paused_by_owner", "its owner asked for it")
        return job

    def resume(self, owner: str, id: str) -> Job:
        """A paused job gets in line again.  Raises NotFound, StateInvalid."""
        job = self.get(owner, id)
        if job.state not in (JobStatus.QUEUED, JobStatus.RUNNING):
            job.check_move(JobStatus.QUEUED)
            job.progress.bad_steps = 0
            self._line_up(self._live[id], "resumed")
        return job

    def cancel(self, owner: str, id: str) -> Job:
        """The job ends; its last state becomes a checkpoint.  Raises NotFound, StateInvalid."""
        job = self.get(owner, id)
        if job.state is not JobStatus.CANCELLED:
            job.check_move(JobStatus.CANCELLED)
            live = self._live[id]
            self.states.save(live)
            self._end(live, JobStatus.CANCELLED, "its owner asked for it")
        return job

    def forget(self, owner: str, id: str) -> None:
        """Removes a job that has ended and its events.  Raises NotFound, StateInvalid while it has not ended."""
        job = self.get(owner, id)
        if not job.final:
            raise StateInvalid(f"job {id} is {job.state}; cancel it first")
        del self._jobs[id]

    def release(self, owner: str, id: str, *, save: bool = True) -> None:
        """Lets go of a job; created in another process with this id it goes on from its newest checkpoint.

        save: that is its newest update; it is on its way while `states.is_writing`.  Raises NotFound, StateInvalid.
        """
        if (job := self.get(owner, id)).final:
            raise StateInvalid(f"job {id} is {job.state}; nothing of it is left to do")
        if save:
            self.states.save(self._live[id])
        self._let_go(self._live[id])
        del self._jobs[id]

    def adapter(self, owner: str, id: str) -> AdapterWeights:
        """What an unfinished job has learned so far.  Raises NotFound, StateInvalid before its start and after its end."""
        job = self.get(owner, id)
        state = None if job.final else self.states.of(self._live[id])
        if state is None:
            raise StateInvalid(f"job {id} is {job.state} and has no weights; its result is {job.result}")
        return adapter_of_rows(state.rows, job.request.spec, self.trainer.base_hash)

    def changed(self) -> builtins.list[Job]:
        """The jobs with new events since the last call."""
        jobs, self._changed = [self._jobs[id] for id in self._changed if id in self._jobs], {}
        return jobs

    @property
    def has_work(self) -> bool:
        """Whether a job is neither paused nor at its end."""
        return any(x.job.state is not JobStatus.PAUSED for x in self._live.values())

    def run(self) -> None:
        """Steps until every job is paused or has ended, and what they saved is on disk."""
        while self.has_work:
            if not self.step() and not self.under_way:
                self._readers.wait()
        self._writer.flush()
        self._hear_writer()

    def close(self) -> None:
        """Saves what every unfinished job has learned, waits for the disk and stops.  The jobs stay as they are."""
        for live in self._live.values():
            self.states.save(live)
        self._readers.close()
        self._writer.close()
        self._hear_writer()

    # ---- a step and what stands around it -------------------------------------------------------------------------

    def step(self) -> builtins.list[StepReport]:
        """Who waits for a free slot gets it; then one training step, if a job runs, and what follows from it.

        Waits for no disk but for states that were spilled when they were parked.
        """
        reports = self.advance()
        while self._step is not None:
            reports = self.advance()
        return reports

    def advance(self) -> builtins.list[StepReport]:
        """The next part of the same, `part`: the reports of the steps that it completes, those of guests among them.

        A step is complete when its held-out loss is known, if one is due after it.
        """
        if self._step is None:
            self._vacated = False
            self._hear_writer()
            self._hear_readers()
            self._slice()
            self.fill()
            if not self.under_way:
                return []
            self._reweigh()
            self._step = self._run_step()
        try:
            self.part = next(self._step)
        except BaseException as end:
            self._step, self.part = None, FIRST_PART
            if not isinstance(end, StopIteration):
                raise
            return end.value
        return []

    @property
    def under_way(self) -> bool:
        """Whether somebody trains, has a held-out loss under way, or may have a slot that has become free."""
        held = any(live.is_held for live in self._live.values())
        return self.trainer.has_work or held or (self._vacated and len(self._queue) > 0)

    def _run_step(self) -> Generator[str, None, builtins.list[StepReport]]:
        """A training step of all who are not held, then a few lanes of held-out examples; yields each part's name before it."""
        reports: builtins.list[StepReport] = []
        if self.trainer.has_work:
            began = time.perf_counter()
            reports += self.trainer.advance()
            while self.trainer.part != FIRST_PART:
                yield self.trainer.part
                reports += self.trainer.advance()
            took_s = time.perf_counter() - began
            for report in reports:
                if self._runs(report.tenant):
                    with self._answers(live := self._live[report.tenant]):
                        self._took_step(live, report, took_s)
        complete = [report for report in reports if report.tenant not in self._live] + self._complete()
        yield from self._evaluate()
        return complete + self._complete()

    def _complete(self) -> builtins.list[StepReport]:
        """Does what follows from the newest steps of jobs whose held-out loss is known, or not due: their reports."""
        reports: builtins.list[StepReport] = []
        for live in [live for live in self._live.values() if live.job.state is JobStatus.RUNNING]:
            with self._answers(live):
                fault = self.trainer.tenants[live.job.id].fault
                if fault is not None:
                    raise fault
                report = self._judge(live)
                if report is not None:
                    reports.append(report)
        return reports

    @contextlib.contextmanager
    def _answers(self, live: LiveJob) -> Generator[None]:
        """Inside, the host works for one job, which answers for what is raised: it fails, and the others go on."""
        try:
            yield
        except Exception as error:
            self.fail(live.job.id, error)

    def fail(self, id: str, error: Exception) -> None:
        """Ends a job by an error of the work for it.  Raises the error if no job is to blame (`is_device_loss`)."""
        if is_device_loss(error):
            raise error
        if not isinstance(error, JaxLoraError | OSError):
            LOG.error("job %s fails", id, exc_info=error)
        if id in self._live:
            self._fail(self._live[id], error)

    def _runs(self, name: str) -> bool:
        """Whether the tenant of a report is a job that still has its slot: guests are none, and one may have left meanwhile."""
        return name in self._live and name in self.trainer.tenants

    def make_room(self, spec: LoraSpec) -> bool:
        """Whether a slot for such an adapter is free; if need be the job gives way that has had its own longest.

        For a guest, a tenant that someone else adds to the trainer between two steps, for a few steps.  Call `fill`
        before: a job that waits gets a slot, and at least one step, before a guest may have that.
        """
        bucket_for = self.trainer.seats.bucket_for
        kept = sum(bucket_for(live.job.request.spec) == bucket_for(spec) for live in self._readers.opening())
        for name in builtins.list(self._queue.over(1)):
            live = self._live[name]
            if self.trainer.free_slots(spec) > kept:
                break
            if name in self.trainer.tenants and bucket_for(live.job.request.spec) == bucket_for(spec):
                with self._answers(live):
                    self._vacate(live, park=True)
                    self._line_up(live, "gives way to a call that waits")
        return self.trainer.free_slots(spec) > kept

    def add_guest(self, name: str, owner: str) -> None:
        """Has an owner's share pay for a tenant of the trainer that is no job."""
        self._guests[name] = owner

    def remove_guest(self, name: str, tokens: int) -> None:
        """Takes a guest out of the trainer.  tokens: it was given."""
        self.trainer.remove(name)
        self._queue.charge(self._guests.pop(name), tokens)

    def _reweigh(self) -> None:
        """An owner's share of the coming step is the server's; its jobs and guests divide it by their weights."""
        weights: defaultdict[str, dict[str, float]] = defaultdict(dict)
        for name in self.trainer.tenants:
            if name in self._live:
                request = self._live[name].job.request
                weights[request.owner][name] = request.weight
            elif name in self._guests:
                weights[self._guests[name]][name] = 1.0
        for owner, own in weights.items():
            for name, weight in own.items():
                self.trainer.set_weight(name, self._owner_weight(owner) * weight / sum(own.values()))

    def _hear_writer(self) -> None:
        for outcome in self._writer.outcomes():
            if outcome.key not in self._jobs:
                continue
            job, live, data = self._jobs[outcome.key], self._live.get(outcome.key), {"step": outcome.step}
            if outcome.error is None:
                job.log.add("checkpoint", f"step {outcome.step} is saved", data=data)
                continue
            reason = f"its checkpoint was not written: {said(outcome.error)}"
            job.log.add("problem", reason, level="error", data=data)
            if live is not None and live.saved_step == outcome.step:
                live.saved_step = 0
                if job.state in (JobStatus.QUEUED, JobStatus.RUNNING):
                    with self._answers(live):
                        self._pause(live, "storage_failed", f"{reason}; make room and resume it", save=False)

    def _hear_readers(self) -> None:
        for live, found, error in self._readers.hear():
            if isinstance(error, StorageFailed) and live.facts is not None:  # its files stay as they are
                self._pause(live, "storage_failed", f"{said(error)}; resume it to try again", save=False)
            elif error is not None:
                self.fail(live.job.id, error)
            elif isinstance(found, Facts):
                live.facts = found
                self._line_up(live, "its files are good")
            elif found is not None and self.trainer.free_slots(live.job.request.spec):
                with self._answers(live):
                    self._seat(live, found)
            else:  # a guest has the slot that was kept for it
                self._queue.end_turn(live.job.id)
                self._await_turn(live)

    def _slice(self) -> None:
        """Jobs whose time slice is over begin another, or give way to an owner who had less; longest in their slot first."""
        if self.config.quantum_steps is None:
            return
        for job_id in builtins.list(self._queue.over(self.config.quantum_steps)):
            live = self._live[job_id]
            with self._answers(live):
                if not self._queue.renew(
                    job_id, live.turn_tokens(self.config.quantum_steps), functools.partial(self._alike, job_id)
                ):
                    self._vacate(live, park=True)
                    self._line_up(live, "its time slice is over; others wait")
                    self.fill()

    def fill(self) -> None:
        """Free slots go to those whose turn it is; one whose files must be read keeps its slot free meanwhile."""
        while (job_id := self._queue.take(self._has_room)) is not None:
            live = self._live[job_id]
            assert live.facts is not None
            request, parked = live.job.request, live.state_key in self._parking
            if self._files.needs_disk(job_id, request, parked=parked):
                self._readers.open(live, parked=parked)
            else:
                with self._answers(live):
                    progress = live.job.progress
                    self._seat(live, self._files.open(job_id, request, live.facts, parked=parked, progress=progress))

    def _alike(self, one: str, other: str) -> bool:
        """Whether two jobs want slots of the same bucket."""
        buckets = [self.trainer.seats.bucket_for(self._live[x].job.request.spec) for x in (one, other)]
        return buckets[0] == buckets[1]

    def _has_room(self, job_id: str) -> bool:
        """Whether a slot is free for the job that no other job's files are being read for."""
        kept = sum(self._alike(job_id, x.job.id) for x in self._readers.opening())
        return self.trainer.free_slots(self._live[job_id].job.request.spec) > kept

    def _took_step(self, live: LiveJob, report: StepReport, took_s: float) -> None:
        """Counts a step of a job, which is held until its held-out loss is known, if one is due."""
        job, p, tenant = live.job, live.job.progress, self.trainer.tenants[live.job.id]
        self._queue.serve(job.id, report.tokens)
        p.step, p.cursor, p.tokens = report.step, tenant.stream.cursor, p.tokens + report.tokens
        p.skipped += not report.finite
        p.bad_steps = 0 if report.finite else p.bad_steps + 1
        job.numbers |= numbers_of(report, took_s)
        p.heldout_due = live.evaluates(report.step, tenant.status is TenantStatus.DONE)
        live.judgement = Judgement(report, took_s, EvaluationSums() if p.heldout_due else None)
        if p.heldout_due:
            self.trainer.hold(job.id)

    def _evaluate(self) -> Generator[str]:
        """Evaluates the next lanes of held-out examples, if it is their turn; yields the name of each part before it runs."""
        turn: builtins.list[HeldLanes] = []
        for name in self.trainer.held_turn():
            live = self._live[name]
            if live.judgement is not None and live.judgement.sums is not None and live.heldout is not None:
                turn.append(HeldLanes(name, live.heldout, live.judgement.sums))
        if not turn:
            return
        spent = yield from self.trainer.evaluate_held(turn)
        for name, tokens in spent.items():
            if self._queue.has_turn(name):
                self._queue.serve(name, tokens)

    def _judge(self, live: LiveJob) -> StepReport | None:
        """What its newest step means for a job whose held-out loss is known, or not due; the report of the step."""
        judgement = live.judgement
        if judgement is None or (judgement.sums is not None and not live.is_evaluated):
            return None
        live.judgement, live.job.progress.heldout_due = None, False
        self.trainer.release(live.job.id)
        heldout = None if judgement.sums is None else judgement.sums.result()
        self._record(live, judgement.report, heldout, judgement.took_s)
        return judgement.report

    def _record(self, live: LiveJob, report: StepReport | None, heldout: Evaluation | None, took_s: float) -> None:
        """Notes a step, which no report tells of if an earlier process made it, and does what follows from it."""
        job, p, request = live.job, live.job.progress, live.job.request
        data: dict[str, float] = {"step": p.step} if report is None else numbers_of(report, took_s)
        if heldout is not None:
            data |= {"heldout_loss": heldout.nll, "heldout_accuracy": heldout.accuracy}
        job.numbers |= data
        job.log.add_step(data, total=request.optimizer.total_steps, finite=report is None or report.finite)
        better = heldout is not None and p.judge(heldout.nll, request.min_delta)
        if better:
            assert heldout is not None
            if request.keep_best:
                self.states.park(live, live.best_key, jax.device_get(self.trainer.unseat(job.id)))
            message = f"best held-out loss so far: {heldout.nll:.4f}"
            job.log.add("best", message, data={"step": p.step, "heldout_loss": heldout.nll})
        every = request.checkpoint_every
        if p.bad_steps >= MAX_BAD_STEPS:
            reason = f"{MAX_BAD_STEPS} updates in a row were not finite and were skipped; lower lr or look at the data"
            self._pause(live, "not_finite", reason)
        elif self._is_over(live):
            self._finish(live)
        elif (every is not None and p.step % every == 0) or (better and request.keep_best):
            self.states.save(live)

    # ---- moves ----------------------------------------------------------------------------------------------------

    def _line_up(self, live: LiveJob, message: str) -> None:
        self._await_turn(live)
        live.job.move(JobStatus.QUEUED, message)

    def _await_turn(self, live: LiveJob) -> None:
        request = live.job.request
        self._queue.add(
            live.job.id, request.owner, weight=request.weight, tokens=live.turn_tokens(self.config.quantum_steps)
        )

    def _seat(self, live: LiveJob, material: Material) -> None:
        job, request = live.job, live.job.request
        state = material.state
        if state is not None:
            job.progress, live.saved_step, live.judgement = material.progress, material.progress.step, None
        elif (state := self._unparked(live)) is None:
            return
        self.trainer.add(
            job.id,
            request.spec,
            request.optimizer,
            material.batches,
            batch_size=request.batch_size,
            seed=request.seed,
            loss=request.loss,
            resume=(state, job.progress.step, job.progress.cursor),
            stream=material.stream,
        )
        self._parking.discard(live.state_key)
        for message in material.damaged:
            job.log.add("problem", message, level="warn")
        live.heldout = material.heldout
        job.move(JobStatus.RUNNING, "started" if job.progress.step == 0 else f"goes on from step {job.progress.step}")
        self.states.take_best(live, material.best)
        if job.progress.heldout_due and live.heldout is not None:  # it gave way meanwhile, or the process ended
            live.judgement = live.judgement or Judgement(None, 0.0, EvaluationSums())
            self.trainer.hold(job.id)
        elif self._is_over(live):  # it could not be delivered before, or the process died just then
            self._finish(live)

    def _unparked(self, live: LiveJob) -> SlotState | None:
        """What it has learned so far; None when that is damaged: then it takes another turn, from its newest checkpoint."""
        try:
            return self._parking.get(live.state_key)
        except StorageFailed as error:
            message = f"{said(error)}; the job goes on from its newest checkpoint"
            live.job.log.add("problem", message, level="warn")
            self._parking.discard(live.state_key)
            self._queue.end_turn(live.job.id)
            self._await_turn(live)
            return None

    def _is_over(self, live: LiveJob) -> bool:
        """Whether its last step is done, or no better held-out loss is to be expected."""
        patience = live.job.request.patience
        early = patience is not None and live.job.progress.stale >= patience
        return early or self.trainer.tenants[live.job.id].status is TenantStatus.DONE

    def _vacate(self, live: LiveJob, *, park: bool) -> None:
        """The job leaves its slot, the line, or the reader that it waits for."""
        if live.job.state is JobStatus.RUNNING:
            if park:
                self.states.park(live, live.state_key, jax.device_get(self.trainer.unseat(live.job.id)))
            self.trainer.remove(live.job.id)
            self._vacated = True
        if self._queue.has_turn(live.job.id):
            self._queue.end_turn(live.job.id)
        elif live.job.id in self._queue:
            self._queue.remove(live.job.id)
        self._readers.forget(live)
        live.heldout = None

    def _pause(self, live: LiveJob, code: str, reason: str, *, save: bool = True) -> None:
        if save:
            self.states.save(live)
        self._vacate(live, park=True)
        live.job.move(JobStatus.PAUSED, reason, level="info" if code == "paused_by_owner" else "warn", code=code)

    def _finish(self, live: LiveJob) -> None:
        """Its adapter goes to the shelf."""
        job, request = live.job, live.job.request
        self.states.save(live)
        best = live.best_key in self._parking
        try:
            kept = self._parking.get(live.best_key) if best else None
        except StorageFailed as error:
            self._pause(live, "storage_failed", f"{said(error)}; resume it to go on from its newest checkpoint")
            for key in (live.state_key, live.best_key):
                self._parking.discard(key)
            return
        try:
            rows = jax.device_get(self.trainer.rows(job.id)) if kept is None else kept.rows
            weights = adapter_of_rows(rows, request.spec, self.trainer.base_hash)
            ref = self._shelf.add(request.owner, request.name, weights)
        except AdapterNotFinite as error:
            self._fail(live, error)
        except (JaxLoraError, OSError) as error:
            self._pause(live, "storage_failed", f"its adapter was not stored: {said(error)}; resume it to try again")
        else:
            job.result = ref
            self._end(live, JobStatus.SUCCEEDED, job.outcome(best=best))

    def _fail(self, live: LiveJob, error: Exception) -> None:
        code = error.code if isinstance(error, JaxLoraError) else JaxLoraError.code
        self._end(live, JobStatus.FAILED, said(error), level="error", code=code)

    def _end(
        self, live: LiveJob, state: JobStatus, message: str, *, level: Level = "info", code: str | None = None
    ) -> None:
        """The job ends and lets go of all it held."""
        job = live.job
        self._let_go(live)
        job.finished_s = self._clock()
        job.move(state, message, level=level, code=code)
        job.request = job.request.without_examples()

    def _let_go(self, live: LiveJob) -> None:
        request = live.job.request
        self._vacate(live, park=False)
        for key in (live.state_key, live.best_key):
            self._parking.discard(key)
        del self._live[live.job.id], self._labels[request.owner, request.name]
