"""Fine-tuning jobs beside serving: the device thread runs them between decode steps and publishes their versions.

    create ─▶ Jobs ─step─▶ every few steps and at each checkpoint ─▶ Publisher ─▶ served from the next request on
    train_once ─▶ a guest's slot for one update ─▶ its caller

Device thread only, but for `poke`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import jax

from jaxlora.core.adapter_size import AdapterSize, adapter_size
from jaxlora.core.errors import AdapterNotFinite, JaxLoraError, QuotaExceeded, Unavailable
from jaxlora.core.lora import AdapterRef, AdapterWeights, LoraSpec
from jaxlora.model.lora_pool import Rows
from serve.runtime.live_training import KEEP_VERSIONS, PUBLISH
from train.data.mixer import Batches
from train.jobs.job import Job, JobEvent, JobRequest, JobView, said
from train.jobs.runner import Jobs
from train.jobs.status import JobStatus
from train.step.optimizer import Optimizer
from train.step.state import SlotState
from train.tenant import is_device_loss
from train.trainer import FIRST_PART, StepReport

LOG = logging.getLogger("serve")


@dataclass(frozen=True, kw_only=True, slots=True)
class JobNews:
    """A job that has changed, as it was then, and its new events, to be stored."""

    job: JobView
    events: tuple[JobEvent, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A version that a job has published."""

    job_id: str
    step: int
    ref: AdapterRef
    time_s: float  # since 1970
    checkpoint: bool  # it stays; others are deleted when there are newer ones
    final: bool  # it is the job's result
    size: AdapterSize
    numbers: Mapping[str, float]


class Shelf(Protocol):
    """Takes the versions of jobs.  Called on the trainer's thread."""

    def add(self, tenant: str, name: str, weights: AdapterWeights) -> AdapterRef:
        """See `Publisher.add`."""
        ...

    def publish(
        self,
        tenant: str,
        name: str,
        spec: LoraSpec,
        rows: Rows,
        *,
        keep: int | None,
        spare: Collection[int],
        learned_s: float,
    ) -> AdapterRef:
        """See `Publisher.publish`."""
        ...


class Listener(Protocol):
    """Stores the changes of jobs.  Called on the device thread, and must not wait."""

    def job_changed(self, news: JobNews) -> None: ...
    def job_published(self, published: Published) -> None: ...


class GuestCaller(Protocol):
    """The caller of one update.  Called on the device thread, and must not wait."""

    def updated(self, report: StepReport, rows: Rows, state: SlotState) -> None:
        """Takes the result of the update; rows on the device, the state on the host.  Not called for a skipped one."""

    def failed(self, error: Exception) -> None:
        """Takes the error of an update that was not made; nothing has changed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuestCall:
    """One update of an adapter that no job trains."""

    name: str  # its own in the trainer
    owner: str  # whose share of the device pays for it
    spec: LoraSpec
    optimizer: Optimizer
    examples: Batches  # all of them are the batch
    state: SlotState  # before, in NumPy
    step: int  # updates before
    caller: GuestCaller


@dataclass(slots=True)
class _Live:
    """The publications of a job that has not ended."""

    job: Job
    publish: bool
    kept: set[int]  # versions that stay
    seen: int = 0  # events reported
    step: int = 0  # of the newest version
    newest: AdapterRef | None = None  # that version, if this process made it
    learned_s: float = field(default_factory=time.monotonic)  # when its newest update was done


def is_checkpoint(job: Job) -> bool:
    """Whether the newest step of a job is one of its checkpoints."""
    every = job.request.checkpoint_every
    return every is not None and job.progress.step % every == 0


class LiveJobs:
    """A trainer for `DeviceThread`: the jobs of one trainer, and its guests."""

    def __init__(
        self,
        publisher: Shelf,
        make_jobs: Callable[[Callable[[], None]], Jobs],
        *,
        wake: Callable[[], None],
        publish_every: int,
        listener: Listener,
        had_room: Callable[[str, str], bool],
    ):
        """make_jobs: gets `poke` for Jobs.  wake: has the device thread look for work.

        publish_every: steps between two versions of a job.
        had_room: whether one more version of a tenant's adapter may stay; it must not wait.
        """
        self._publisher, self._wake, self._listener, self.had_room = publisher, wake, listener, had_room
        self.publish_every = publish_every
        self.jobs = make_jobs(self.poke)
        self._live: dict[str, _Live] = {}
        self._due: list[str] = []  # jobs that are published next
        self._waiting: dict[str, deque[GuestCall]] = {}  # by owner; whose turn it is comes first
        self._seated: dict[str, GuestCall] = {}
        self._poked = False

    # ---- what the device thread runs ------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether `advance` would do anything."""
        under_way = self.jobs.under_way or self.jobs.part != FIRST_PART
        return under_way or self._poked or bool(self._due)

    @property
    def part(self) -> str:
        """The name of the part that `advance` runs next."""
        return PUBLISH if self._due else self.jobs.part

    def poke(self) -> None:
        """Reports that there may be work.  From any thread."""
        self._poked = True
        self._wake()

    def advance(self) -> None:
        """Runs the next part of a training step, or publishes a version that is due."""
        if self._due:
            self._publish(self._due.pop(0))
        else:
            if self.jobs.part == FIRST_PART:
                self._poked = False
                self._seat_guests()
            for report in self.jobs.advance():
                if report.tenant in self._seated:
                    self._guest_is_done(report)
                else:
                    self._note(report)
            self._end_failed_guests()
        self._report_changes()

    def close(self) -> None:
        """Saves the states of unfinished jobs and waits for the disk.  Call it after the device thread has ended."""
        for call in [*(call for calls in self._waiting.values() for call in calls), *self._seated.values()]:
            call.caller.failed(Unavailable("the server is stopping; nothing was changed"))
        self.jobs.close()
        self._report_changes()

    # ---- jobs -----------------------------------------------------------------------------------------------------

    def create(self, id: str, request: JobRequest, *, publish: bool, kept: Sequence[int] = ()) -> None:
        """Adds a new job, or one of an earlier process that goes on from its newest checkpoint.

        publish: its versions can be used while it runs.  kept: versions of its checkpoints in an earlier process.
        Raises as `Jobs.create` does.
        """
        job = self.jobs.create(request, id=id)
        self._live[id] = _Live(job=job, publish=publish, kept=set(kept))
        self.poke()

    def pause(self, owner: str, id: str) -> None:
        """Pauses a job, which gives up its slot, and publishes its weights.  Raises NotFound, StateInvalid."""
        self._leave(self.jobs.get(owner, id), JobStatus.PAUSED)
        self.jobs.pause(owner, id)
        self._report_changes()
        self.poke()

    def resume(self, owner: str, id: str) -> None:
        """Puts a paused job in the queue again.  Raises NotFound, StateInvalid."""
        self.jobs.resume(owner, id)
        self._report_changes()
        self.poke()

    def cancel(self, owner: str, id: str) -> None:
        """Ends a job and publishes its weights.  Raises NotFound, StateInvalid."""
        self._leave(self.jobs.get(owner, id), JobStatus.CANCELLED)
        self.jobs.cancel(owner, id)
        self._report_changes()
        self.poke()

    def release(self, owner: str, id: str, *, save: bool = True) -> None:
        """Lets go of a job without a word of it, for another process to go on.  save: see `Jobs.release`, and what it raises."""
        self._report_changes()
        self.jobs.release(owner, id, save=save)
        del self._live[id]
        self._due = [due for due in self._due if due != id]
        self.poke()

    def _leave(self, job: Job, to: JobStatus) -> None:
        """Publishes the weights of a job before it leaves the trainer."""
        live = self._live.get(job.id)
        if live is None or job.state == to or job.final:
            return
        job.check_move(to)
        if not live.publish or job.progress.step < live.step or job.progress.step == 0:
            return
        stays = to is JobStatus.CANCELLED or self._may_stay(job)  # the weights of a cancelled job are its result
        if live.newest is not None and job.progress.step == live.step:
            if live.newest.version not in live.kept and stays:  # made for `latest`; now it stays
                self._record_version(job, live.newest, checkpoint=True)
            return
        if job.id in self.jobs.trainer.tenants:
            self._publish(job.id, checkpoint=stays)
            return
        request = job.request
        try:
            ref = self._publisher.add(request.owner, request.name, self.jobs.adapter(request.owner, job.id))
        except (JaxLoraError, OSError) as error:
            job.log.add("problem", f"step {job.progress.step} is not published: {said(error)}", level="warn")
        else:
            self._record_version(job, ref, checkpoint=stays)

    def _may_stay(self, job: Job) -> bool:
        """Whether the newest version may be a checkpoint.  Else the next one takes its place, and the job goes on."""
        room = self.had_room(job.request.owner, job.request.name)
        if not room:
            step, code = job.progress.step, QuotaExceeded.code
            job.log.add(
                "problem",
                f"step {step} is no checkpoint ({code}): your adapters have as many bytes as they may; delete some",
                level="warn",
            )
        return room

    def _note(self, report: StepReport) -> None:
        """Notes a step of a job, after which a version may be due."""
        live = self._live.get(report.tenant)
        if live is None or report.tenant not in self.jobs.trainer.tenants:
            return  # it has left, and its version is published
        live.learned_s = time.monotonic()
        due = report.step % self.publish_every == 0 or is_checkpoint(live.job)
        if live.publish and report.finite and due:
            self._due.append(report.tenant)

    def _publish(self, id: str, *, checkpoint: bool | None = None) -> None:
        """Publishes the present weights of a job that has a slot.  A failure is an event of this job alone."""
        trainer, live = self.jobs.trainer, self._live.get(id)
        if live is None or id not in trainer.tenants:
            return
        job = live.job
        kept = is_checkpoint(job) and self._may_stay(job) if checkpoint is None else checkpoint
        try:
            ref = self._publisher.publish(
                job.request.owner,
                job.request.name,
                job.request.spec,
                trainer.rows(id),
                keep=KEEP_VERSIONS,
                spare=live.kept,
                learned_s=live.learned_s,
            )
        except AdapterNotFinite:
            return  # its steps report it
        except (JaxLoraError, OSError) as error:
            job.log.add("problem", f"step {job.progress.step} is not published: {said(error)}", level="warn")
        except Exception as error:
            self.jobs.fail(id, error)
        else:
            self._record_version(job, ref, checkpoint=kept)

    def _record_version(self, job: Job, ref: AdapterRef, *, checkpoint: bool) -> None:
        live = self._live[job.id]
        live.step, live.newest = job.progress.step, ref
        if checkpoint:
            live.kept.add(ref.version)
        self._report_version(job, ref, checkpoint=checkpoint, final=False)

    def _report_version(self, job: Job, ref: AdapterRef, *, checkpoint: bool, final: bool) -> None:
        best = job.progress.best_step if final and job.request.keep_best else None
        self._listener.job_published(
            Published(
                job_id=job.id,
                step=job.progress.step if best is None else best,
                ref=ref,
                time_s=time.time(),
                checkpoint=checkpoint,
                final=final,
                size=adapter_size(self.jobs.trainer.base.config, job.request.spec),
                numbers=dict(job.numbers),
            )
        )

    def _report_changes(self) -> None:
        """Reports changes to the listener, and forgets jobs that have ended."""
        for job in self.jobs.changed():
            live = self._live[job.id]
            events = job.log.after(live.seen)
            live.seen = events[-1].seq if events else live.seen
            now = job.view()
            if job.result is not None:  # its last step, then its result, then that it has succeeded
                before = replace(now, state=JobStatus.RUNNING, finished_s=None)
                self._listener.job_changed(JobNews(job=before, events=tuple(events[:-1])))
                self._report_version(job, job.result, checkpoint=True, final=True)
                events = events[-1:]
            self._listener.job_changed(JobNews(job=now, events=tuple(events)))
            if job.final:
                del self._live[job.id]
                self.jobs.forget(job.request.owner, job.id)

    # ---- guests ---------------------------------------------------------------------------------------------------

    def train_once(self, call: GuestCall) -> None:
        """Queues one update of an adapter, for the next step with a slot for it: a job gives way if need be."""
        self._waiting.setdefault(call.owner, deque()).append(call)
        self.poke()

    def _seat_guests(self) -> None:
        """Seats the calls whose turn it is: one of each owner at a time, owners in turn.

        A call of more lanes than a step has stays for several steps: such calls leave every second slot to the others.
        """
        if not self._waiting:
            return
        trainer = self.jobs.trainer
        self.jobs.fill()
        for owner in list(self._waiting):
            call = self._waiting[owner][0]
            if any(seated.owner == owner for seated in self._seated.values()):
                continue
            if self._is_long(call):
                slots = trainer.seats.buckets[trainer.seats.bucket_for(call.spec)].slots
                if sum(map(self._is_long, self._seated.values())) >= max(1, slots // 2):
                    continue
            try:
                if not self.jobs.make_room(call.spec):
                    continue
                trainer.add(
                    call.name,
                    call.spec,
                    call.optimizer,
                    call.examples,
                    batch_size=call.examples.batch_size,
                    seed=0,
                    per_target=True,
                    resume=(call.state, call.step, 0),
                )
            except Exception as error:
                self._refuse(call, error)
            else:
                self._seated[call.name] = call
                self.jobs.add_guest(call.name, owner)
            calls = self._waiting.pop(owner)
            calls.popleft()
            if calls:
                self._waiting[owner] = calls  # behind the others

    def _is_long(self, call: GuestCall) -> bool:
        """Whether a call takes several steps."""
        return len(call.examples.worst) > self.jobs.trainer.lanes

    def _refuse(self, call: GuestCall, error: Exception) -> None:
        """Tells a caller of the error of its call alone.  Raises one that is nobody's."""
        if is_device_loss(error):
            raise error
        if not isinstance(error, JaxLoraError):
            LOG.error("a call of %s fails", call.owner, exc_info=error)
            error = JaxLoraError(
                "an internal error ended this call; nothing was changed, and the server's log says more"
            )
        call.caller.failed(error)

    def _end_failed_guests(self) -> None:
        for name in list(self._seated):
            fault = self.jobs.trainer.tenants[name].fault
            if fault is not None:
                self._refuse(self._seated.pop(name), fault)
                self._leave_slot(name, 0)

    def _guest_is_done(self, report: StepReport) -> None:
        call, trainer = self._seated.pop(report.tenant), self.jobs.trainer
        try:
            if report.finite:
                state = trainer.unseat(call.name)
                call.caller.updated(report, state.rows, jax.device_get(state))
            else:
                call.caller.failed(AdapterNotFinite("the loss or its gradient is not finite; nothing was changed"))
        except Exception as error:
            self._refuse(call, error)
        finally:
            self._leave_slot(call.name, report.tokens)

    def _leave_slot(self, name: str, tokens: int) -> None:
        self.jobs.remove_guest(name, tokens)
        self.poke()  # its slot is free
