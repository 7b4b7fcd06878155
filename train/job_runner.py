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
import functools
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path

import jax

from jaxlora.checkpoint_writer import CheckpointWriter
from jaxlora.errors import AdapterNotFinite, AlreadyExists, JaxLoraError, NotFound, StateInvalid
from jaxlora.lora import Adapter, AdapterRef, check_name
from jaxlora.pool import adapter_of_rows
from train.data import Unit
from train.job_files import JobFiles, LiveJob, Material
from train.job_queue import FairQueue
from train.jobs import EventLog, Job, JobEvent, JobRequest, JobsConfig, Level, Shelf, State, said
from train.parking import Parking
from train.state import SlotState
from train.trainer import MAX_BAD_STEPS, Evaluation, StepReport, Trainer

FILE_THREADS = 2  # that read and check training files


class Jobs:
    """The jobs of one trainer, in which nobody else sits.  Owned by the trainer's thread."""

    def __init__(
        self,
        trainer: Trainer,
        config: JobsConfig,
        *,
        shelf: Shelf,
        parking: Parking,
        load: Callable[[Path], Sequence[Unit]],
        clock: Callable[[], float] = time.time,
    ):
        """`load` reads a JSONL file, on another thread; `clock` gives the seconds since 1970."""
        self.trainer, self.config = trainer, config
        self._shelf, self._parking, self._clock = shelf, parking, clock
        self._files = JobFiles(trainer=trainer, load=load, states=config.states)
        self._readers = ThreadPoolExecutor(FILE_THREADS, "job-files")
        self._writer = CheckpointWriter()
        self._queue = FairQueue()
        self._jobs: dict[str, Job] = {}  # in order of creation
        self._live: dict[str, LiveJob] = {}
        self._labels: dict[tuple[str, str], str] = {}  # (owner, name) → id, of those
        self._reading: dict[str, LiveJob] = {}  # of those, whose files are being read

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
        log = EventLog(self.config.events, self._clock)
        job = Job(id=job_id, request=request, created_s=self._clock(), log=log)
        live = LiveJob(job=job, facts=facts)
        self._live[job_id], self._jobs[job_id], self._labels[label] = live, job, job_id
        log.add("state", "validating_files: created")
        if facts is None:
            live.examining = self._readers.submit(self._files.examine, job_id, request)
            self._reading[job_id] = live
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
        if job.state != "paused":
            job.check_move("paused")
            self._pause(self._live[id], "paused_by_owner", "its owner asked for it")
        return job

    def resume(self, owner: str, id: str) -> Job:
        """A paused job gets in line again.  Raises NotFound, StateInvalid."""
        job = self.get(owner, id)
        if job.state not in ("queued", "running"):
            job.check_move("queued")
            job.progress.bad_steps = 0
            self._line_up(self._live[id], "resumed")
        return job

    def cancel(self, owner: str, id: str) -> Job:
        """The job ends; its last state becomes a checkpoint.  Raises NotFound, StateInvalid."""
        job = self.get(owner, id)
        if job.state != "cancelled":
            job.check_move("cancelled")
            live = self._live[id]
            self._save(live)
            self._end(live, "cancelled", "its owner asked for it")
        return job

    def forget(self, owner: str, id: str) -> None:
        """Removes a job that has ended and its events.  Raises NotFound, StateInvalid while it has not ended."""
        job = self.get(owner, id)
        if not job.final:
            raise StateInvalid(f"job {id} is {job.state}; cancel it first")
        del self._jobs[id]

    def adapter(self, owner: str, id: str, ref: AdapterRef) -> Adapter:
        """What an unfinished job has learned so far.  Raises NotFound, StateInvalid before its start and after its end."""
        job = self.get(owner, id)
        state = None if job.final else self._state(self._live[id])
        if state is None:
            raise StateInvalid(f"job {id} is {job.state} and has no weights; its result is {job.result}")
        return adapter_of_rows(state.rows, ref, job.request.spec, self.trainer.base_hash)

    @property
    def has_work(self) -> bool:
        """Whether a job is neither paused nor at its end."""
        return any(x.job.state != "paused" for x in self._live.values())

    def run(self) -> None:
        """Steps until every job is paused or has ended, and what they saved is on disk."""
        while self.has_work:
            if not self.step():
                futures = [f for x in self._reading.values() for f in (x.examining, x.opening) if f is not None]
                wait(futures, return_when="FIRST_COMPLETED")
        self._writer.flush()
        self._hear_writer()

    def close(self) -> None:
        """Saves what every unfinished job has learned, waits for the disk and stops.  The jobs stay as they are."""
        for live in self._live.values():
            self._save(live)
        self._readers.shutdown(cancel_futures=True)
        self._writer.close()
        self._hear_writer()

    # ---- a step and what stands around it -------------------------------------------------------------------------

    def step(self) -> builtins.list[StepReport]:
        """Who waits for a free slot gets it; then one training step, if a job runs, and what follows from it.

        Waits for no disk but for states that were spilled when they were parked.
        """
        self._hear_writer()
        self._hear_readers()
        self._slice()
        self._fill()
        if not self.trainer.has_work:
            return []
        self._reweigh()
        began = time.perf_counter()
        reports = self.trainer.step()
        took_s = time.perf_counter() - began
        heldout = self._evaluate(reports)
        for report in reports:
            self._record(self._live[report.tenant], report, heldout.get(report.tenant), took_s)
        return reports

    def _reweigh(self) -> None:
        """An owner's share of the coming step does not grow with the number of its jobs in it."""
        requests = {name: self._live[name].job.request for name in self.trainer.tenants}
        jobs_of = Counter(request.owner for request in requests.values())
        for name, request in requests.items():
            self.trainer.set_weight(name, request.weight / jobs_of[request.owner])

    def _hear_writer(self) -> None:
        for outcome in self._writer.outcomes():
            job, live = self._jobs.get(outcome.key), self._live.get(outcome.key)
            if job is None:
                continue
            if outcome.error is None:
                job.log.add("checkpoint", f"step {outcome.step} is saved", data={"step": outcome.step})
                continue
            reason = f"its checkpoint was not written: {said(outcome.error)}"
            job.log.add("problem", reason, level="error", data={"step": outcome.step})
            if live is not None and live.saved_step == outcome.step:
                live.saved_step = 0
                if job.state in ("queued", "running"):
                    self._pause(live, "storage_failed", f"{reason}; make room and resume it", save=False)

    def _hear_readers(self) -> None:
        for live in builtins.list(self._reading.values()):
            examining, opening = live.examining, live.opening
            try:
                if examining is not None and examining.done():
                    self._stop_reading(live)
                    live.facts = examining.result()
                    self._line_up(live, "its files are good")
                elif opening is not None and opening.done():
                    self._stop_reading(live)
                    self._seat(live, opening.result())
            except (JaxLoraError, OSError) as error:
                self._fail(live, error)

    def _stop_reading(self, live: LiveJob) -> None:
        """What a reader does for it is done, or of no use any more."""
        live.examining = live.opening = None
        self._reading.pop(live.job.id, None)

    def _slice(self) -> None:
        """Jobs whose time slice is over begin another, or give way to an owner who had less; longest in their slot first."""
        if self.config.quantum_steps is None:
            return
        for job_id in builtins.list(self._queue.over(self.config.quantum_steps)):
            live = self._live[job_id]
            if not self._queue.renew(job_id, self._turn_tokens(live), functools.partial(self._alike, job_id)):
                self._vacate(live, park=True)
                self._line_up(live, "its time slice is over; others wait")
                self._fill()

    def _fill(self) -> None:
        """Free slots go to those whose turn it is; one whose files must be read keeps its slot free meanwhile."""
        while (job_id := self._queue.take(self._has_room)) is not None:
            live = self._live[job_id]
            assert live.facts is not None
            request, parked = live.job.request, live.state_key in self._parking
            if self._files.needs_disk(job_id, request, parked=parked):
                live.opening = self._readers.submit(self._files.open, job_id, request, live.facts, parked=parked)
                self._reading[job_id] = live
            else:
                self._seat(live, self._files.open(job_id, request, live.facts, parked=parked))

    def _alike(self, one: str, other: str) -> bool:
        """Whether two jobs want slots of the same bucket."""
        return len({self.trainer.seats.bucket_for(self._live[x].job.request.spec) for x in (one, other)}) == 1

    def _has_room(self, job_id: str) -> bool:
        """Whether a slot is free for the job that no other job's files are being read for."""
        kept = sum(x.opening is not None and self._alike(job_id, x.job.id) for x in self._reading.values())
        return self.trainer.free_slots(self._live[job_id].job.request.spec) > kept

    def _evaluate(self, reports: Sequence[StepReport]) -> dict[str, Evaluation]:
        """Held-out losses that are due after this step, by job; they share lanes."""
        due = []
        for report in reports:
            live = self._live[report.tenant]
            every = live.job.request.evaluate_every
            last = self.trainer.tenants[report.tenant].status == "done"
            if live.heldout and (last or (every is not None and report.step % every == 0)):
                due.append((live.heldout, report.tenant))
        return dict(zip([name for _, name in due], self.trainer.evaluate_all(due), strict=True))

    def _record(self, live: LiveJob, report: StepReport, heldout: Evaluation | None, took_s: float) -> None:
        """What one step means for one job."""
        job, p, request = live.job, live.job.progress, live.job.request
        tenant = self.trainer.tenants[job.id]
        self._queue.serve(job.id, report.tokens)
        p.step, p.cursor, p.tokens = report.step, tenant.stream.cursor, p.tokens + report.tokens
        p.skipped += not report.finite
        p.bad_steps = 0 if report.finite else p.bad_steps + 1
        data = {k: v for k, v in asdict(report).items() if k not in ("tenant", "finite")}
        data["tokens_per_s"] = report.tokens / took_s
        if heldout is not None:
            data["heldout_loss"] = heldout.nll
        job.log.add_step(data, total=request.optimizer.total_steps, finite=report.finite)
        better = heldout is not None and p.judge(heldout.nll)
        if better:
            assert heldout is not None
            if request.keep_best:
                self._park(live, live.best_key, jax.device_get(self.trainer.unseat(job.id)))
            message = f"best held-out loss so far: {heldout.nll:.4f}"
            job.log.add("best", message, data={"step": p.step, "heldout_loss": heldout.nll})
        every = request.checkpoint_every
        if p.bad_steps >= MAX_BAD_STEPS:
            reason = f"{MAX_BAD_STEPS} updates in a row were not finite and were skipped; lower lr or look at the data"
            self._pause(live, "not_finite", reason)
        elif self._is_over(live):
            self._finish(live)
        elif (every is not None and p.step % every == 0) or (better and request.keep_best):
            self._save(live)

    # ---- moves ----------------------------------------------------------------------------------------------------

    def _line_up(self, live: LiveJob, message: str) -> None:
        request = live.job.request
        tokens = self._turn_tokens(live)
        self._queue.add(live.job.id, request.owner, weight=request.weight, tokens=tokens)
        live.job.move("queued", message)

    def _turn_tokens(self, live: LiveJob) -> float:
        """Tokens of its next turn: a time slice, or all steps that are left."""
        assert live.facts is not None
        left = max(live.job.request.optimizer.total_steps - live.job.progress.step, 0)
        return live.facts.step_tokens * min(left, self.config.quantum_steps or left)

    def _seat(self, live: LiveJob, material: Material) -> None:
        job, request = live.job, live.job.request
        try:
            state = material.state
            if state is None:
                state = self._parking.get(live.state_key)
            else:
                job.progress, live.saved_step = material.progress, material.progress.step
            self.trainer.add(
                job.id,
                request.spec,
                request.optimizer,
                material.examples,
                batch_size=request.batch_size,
                seed=request.seed,
                loss=request.loss,
                resume=(state, job.progress.step, job.progress.cursor),
            )
        except JaxLoraError as error:
            self._fail(live, error)
            return
        self._parking.discard(live.state_key)
        live.heldout = material.heldout
        job.move("running", "started" if job.progress.step == 0 else f"goes on from step {job.progress.step}")
        if material.best is not None:
            self._park(live, live.best_key, material.best)
        elif request.keep_best and job.progress.best_step is not None and live.best_key not in self._parking:
            message = f"the weights of its best step {job.progress.best_step} are on no disk; the best is sought anew"
            job.progress.best_step = job.progress.best_loss = None
            job.log.add("problem", message, level="warn")
        if self._is_over(live):  # it could not be delivered before, or the process died just then
            self._finish(live)

    def _is_over(self, live: LiveJob) -> bool:
        """Whether its last step is done, or no better held-out loss is to be expected."""
        patience = live.job.request.patience
        early = patience is not None and live.job.progress.stale >= patience
        return early or self.trainer.tenants[live.job.id].status == "done"

    def _vacate(self, live: LiveJob, *, park: bool) -> None:
        """The job leaves its slot, the line, or the reader that it waits for."""
        if live.job.state == "running":
            if park:
                self._park(live, live.state_key, jax.device_get(self.trainer.unseat(live.job.id)))
            self.trainer.remove(live.job.id)
        if self._queue.has_turn(live.job.id):
            self._queue.end_turn(live.job.id)
        elif live.job.id in self._queue:
            self._queue.remove(live.job.id)
        self._stop_reading(live)
        live.heldout = ()

    def _park(self, live: LiveJob, key: str, state: SlotState) -> None:
        self._parking.put(key, state)
        try:
            self._parking.spill()
        except JaxLoraError as error:
            live.job.log.add("problem", str(error), level="warn")

    def _pause(self, live: LiveJob, code: str, reason: str, *, save: bool = True) -> None:
        if save:
            self._save(live)
        self._vacate(live, park=True)
        live.job.move("paused", reason, level="info" if code == "paused_by_owner" else "warn", code=code)

    def _finish(self, live: LiveJob) -> None:
        """Its adapter goes to the shelf."""
        job, request = live.job, live.job.request
        self._save(live)
        best = live.best_key in self._parking
        try:
            rows = self._parking.get(live.best_key).rows if best else jax.device_get(self.trainer.rows(job.id))
            ref = self._shelf.mint(request.owner, request.name)
            self._shelf.put(adapter_of_rows(rows, ref, request.spec, self.trainer.base_hash))
        except AdapterNotFinite as error:
            self._fail(live, error)
        except (JaxLoraError, OSError) as error:
            self._pause(live, "storage_failed", f"its adapter was not stored: {said(error)}; resume it to try again")
        else:
            job.result = ref
            p = job.progress
            how = f"{p.step} of {request.optimizer.total_steps} steps"
            if p.step < request.optimizer.total_steps:
                how += f", stopped early: {p.stale} held-out losses in a row were no better"
            self._end(live, "succeeded", f"{how}; its weights are those of step {p.best_step}" if best else how)

    def _fail(self, live: LiveJob, error: JaxLoraError | OSError) -> None:
        code = error.code if isinstance(error, JaxLoraError) else JaxLoraError.code
        self._end(live, "failed", said(error), level="error", code=code)

    def _end(
        self, live: LiveJob, state: State, message: str, *, level: Level = "info", code: str | None = None
    ) -> None:
        """The job ends and lets go of all it held."""
        job = live.job
        self._vacate(live, park=False)
        for key in (live.state_key, live.best_key):
            self._parking.discard(key)
        job.finished_s = self._clock()
        job.move(state, message, level=level, code=code)
        del self._live[job.id], self._labels[job.request.owner, job.request.name]
        job.request = job.request.without_examples()

    # ---- state, files, events -------------------------------------------------------------------------------------

    def _state(self, live: LiveJob) -> SlotState | None:
        """On the host; None before its start."""
        if live.job.state == "running":
            return jax.device_get(self.trainer.unseat(live.job.id))
        if live.state_key in self._parking:
            return self._parking.get(live.state_key)
        return None

    def _save(self, live: LiveJob) -> None:
        """Hands its state to the writer, unless that step was."""
        p = live.job.progress
        if self.config.states is None or p.step == live.saved_step or live.facts is None:
            return
        state = self._state(live)
        if state is None:
            return
        live.saved_step = p.step
        snapshot = self._files.snapshot(live.job, live.facts, state, keep=self.config.keep)
        self._writer.submit(live.job.id, snapshot)
