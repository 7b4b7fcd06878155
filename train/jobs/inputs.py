"""What a job needs from the disk, checked when it is created and read again when it gets a slot.  From any thread.

Between the two a waiting job holds nothing but a digest of its examples.

Threads that read and check what jobs bring, and the jobs that wait for them."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from pathlib import Path

from jaxlora.config.training import TooLong
from jaxlora.core.errors import (
    AdapterInvalid,
    BaseMismatch,
    DataInvalid,
    JaxLoraError,
    StateInvalid,
    StorageAway,
    StorageFailed,
)
from jaxlora.core.lora import HEAD_TARGET, AdapterWeights, LoraSpec
from jaxlora.core.tenant_threads import TenantThreads
from jaxlora.peft.folder import import_peft
from jaxlora.storage.checkpoint_writer import Snapshot
from jaxlora.storage.checkpoints import read_meta, restore_state
from jaxlora.storage.remote_states import StateCopies
from jaxlora.storage.step_folders import set_aside, steps_of
from train.data.examples import ExampleStream, PackedExamples, Unit
from train.data.load import Loaded
from train.data.mixer import Batches
from train.jobs.job import Job, JobRequest, Progress, Source
from train.step.state import SlotState
from train.tenant import EvaluationSums
from train.trainer import StepReport, Trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What is known of a job whose files are good."""

    examples: str  # digest
    step_tokens: float  # real tokens of a batch, on average


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """What a job brings to its slot."""

    batches: Batches
    stream: ExampleStream
    heldout: PackedExamples | None
    state: SlotState | None  # NumPy; None: it has been here before, and its state is parked
    progress: Progress
    best: SlotState | None  # of the best held-out loss, if a checkpoint holds it
    damaged: Sequence[str] = ()  # newer checkpoints that could not be read


def numbers_of(report: StepReport, took_s: float) -> dict[str, float]:
    """Returns what an event says of a step."""
    data = {k: getattr(report, k) for k in ("step", "loss", "accuracy", "lr", "grad_norm", "tokens")}
    return data | {"tokens_per_s": report.tokens / took_s}


@dataclass(frozen=True, slots=True)
class Judgement:
    """A step that is done, and its held-out loss, as far as it is evaluated."""

    report: StepReport | None  # None: an earlier process made the step
    took_s: float  # the step
    sums: EvaluationSums | None  # None: no held-out loss is due after it


@dataclass(slots=True)
class LiveJob:
    """A job that has not ended, and what belongs to it."""

    job: Job
    facts: Facts | None = None  # None: still validating
    examining: Future[Facts] | None = None
    opening: Future[Material] | None = None
    heldout: PackedExamples | None = None  # while it runs
    judgement: Judgement | None = (
        None  # of its newest step, while its held-out loss is not known; it stays when it gives way
    )
    saved_step: int = 0  # handed to the writer, or restored

    def evaluates(self, step: int, last: bool) -> bool:
        """Whether its held-out loss is due after this step."""
        every = self.job.request.evaluate_every
        return self.heldout is not None and (last or (every is not None and step % every == 0))

    @property
    def is_held(self) -> bool:
        """Whether it is in a slot and waits for a held-out loss."""
        return self.heldout is not None and self.judgement is not None

    @property
    def is_evaluated(self) -> bool:
        """Whether the held-out loss that is due is known."""
        sums = None if self.judgement is None else self.judgement.sums
        return sums is not None and self.heldout is not None and sums.lanes == len(self.heldout)

    def turn_tokens(self, quantum_steps: int | None) -> float:
        """Tokens of its next turn: of so many steps, or of all that are left."""
        assert self.facts is not None
        left = max(self.job.request.optimizer.total_steps - self.job.progress.step, 0)
        return self.facts.step_tokens * min(left, quantum_steps or left)

    @property
    def state_key(self) -> str:
        """Where it is parked."""
        return f"{self.job.id}.state"

    @property
    def best_key(self) -> str:
        """Where the state of its best held-out loss is parked."""
        return f"{self.job.id}.best"


def digest(units: Sequence[Unit]) -> str:
    """Hex sha256 of all that the examples or pairs hold, in their order."""
    total = hashlib.sha256()
    for e in (e for unit in units for e in unit.segments):
        total.update(len(e).to_bytes(8, "little"))
        total.update(e.tokens.astype("<i4").tobytes() + e.weights.astype("<f4").tobytes())
        if e.rollout is not None:
            total.update(e.rollout.logprobs.astype("<f4").tobytes() + e.rollout.advantages.astype("<f4").tobytes())
            total.update(e.rollout.ratio_mask.tobytes())
    return total.hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class JobFiles:
    """The readers of one trainer's jobs."""

    trainer: Trainer  # asked only what any thread may ask
    load: Callable[[Path, TooLong], Loaded]  # a file of examples; raises DataInvalid
    states: Path | None  # a folder of checkpoints for each job id
    copies: StateCopies | None = None  # object storage behind it

    def needs_disk(self, job_id: str, request: JobRequest, *, parked: bool = False) -> bool:
        """Whether to read what it needs takes a while; `parked`: its state is at hand."""
        if isinstance(request.data, Path) or isinstance(request.heldout, Path):
            return True
        found = self.copies is not None or (self.states is not None and (self.states / job_id).is_dir())
        return not parked and (found or isinstance(request.start, Path))

    def examine(self, job_id: str, request: JobRequest) -> Facts:
        """Reads and checks all of it.

        Raises DataInvalid, InvalidRequest, AdapterInvalid, BaseMismatch, StateInvalid (a checkpoint of another job),
        StorageFailed.
        """
        examples = self._read(request, request.data)
        batches = self.trainer.check(request.spec, examples, request.batch_size, request.loss)
        self._read_heldout(request)
        tokens = int(batches.examples.size_N.sum()) / len(examples) * request.batch_size
        facts = Facts(examples=digest(examples), step_tokens=tokens)
        if not self._has_own(job_id, request, facts) and request.start is not None:
            self._started(request, request.start)
        return facts

    def open(self, job_id: str, request: JobRequest, facts: Facts, *, parked: bool, progress: Progress) -> Material:
        """Everything the job needs in its slot; with `parked` no state, and its progress is this one.

        Raises DataInvalid when the examples are not those that were examined; StorageFailed when no checkpoint of the job
        can be read; else as `examine`.
        """
        examples = self._read(request, request.data)
        if isinstance(request.data, Path) and digest(examples) != facts.examples:
            raise DataInvalid(f"the examples of {request.name} changed while it waited; create the job anew")
        batches = self.trainer.check(request.spec, examples, request.batch_size, request.loss)
        heldout = self._read_heldout(request)
        state, best, damaged = None, None, []
        if not parked:
            progress = Progress()
            found, damaged = self._newest_good(job_id, request, facts)
            if found is not None:
                progress, state = found
                if request.keep_best and progress.best_step is not None:
                    with contextlib.suppress(StorageFailed):
                        best = self._restored(self.folder(job_id), request.spec, progress.best_step)
            elif request.start is not None:
                state = self._started(request, request.start)
            else:
                state = self.trainer.fresh(request.spec, request.seed)
        stream = ExampleStream(batches.examples.units, request.seed, progress.cursor).shuffled()
        return Material(
            batches=batches,
            stream=stream,
            heldout=heldout,
            state=state,
            progress=progress,
            best=best,
            damaged=damaged,
        )

    def steps(self, job_id: str) -> list[int]:
        """The job's checkpoints, oldest first, which are brought here if need be.  Raises StorageFailed, Unavailable."""
        if self.copies is not None:
            self.copies.bring(self.folder(job_id))
        return [] if self.states is None else steps_of(self.folder(job_id))

    def snapshot(self, job: Job, facts: Facts, state: SlotState, *, keep: int) -> Snapshot:
        """A checkpoint of the job, to be written."""
        return Snapshot(
            folder=self.folder(job.id),
            step=job.progress.step,
            arrays=state,
            meta=self._identity(job.request, facts) | job.progress.to_json(),
            keep=keep,
            best=job.progress.best_step if job.request.keep_best else None,
        )

    def _identity(self, request: JobRequest, facts: Facts) -> dict[str, object]:
        """What a checkpoint must agree with for this job to go on from it."""
        return {
            "base": self.trainer.base_hash,
            "spec": request.spec.to_json(),
            "seed": request.seed,
            "moments": self.trainer.moments,
            "loss": {"name": request.loss.name} | request.loss.row(),
            "examples": facts.examples,
        }

    def folder(self, job_id: str) -> Path:
        """Where its checkpoints are; `states` is not None."""
        assert self.states is not None
        return (self.states / job_id).absolute()

    def _read(self, request: JobRequest, source: Source) -> Sequence[Unit]:
        return self.load(source, request.too_long).units if isinstance(source, Path) else source

    def _read_heldout(self, request: JobRequest) -> PackedExamples | None:
        if request.heldout is None:
            return None
        heldout = self._read(request, request.heldout)
        if not heldout:
            raise DataInvalid("no held-out examples; give at least one, or leave them out", param="heldout")
        return self.trainer.evaluator.packed(heldout, request.loss)

    def _has_own(self, job_id: str, request: JobRequest, facts: Facts) -> bool:
        """Whether it has checkpoints.  Raises StateInvalid when those that can be read are of another job."""
        steps, error = self.steps(job_id), None
        for step in reversed(steps):
            try:
                self._check_own(job_id, request, facts, read_meta(self.folder(job_id), step=step) or {})
                return True
            except StorageFailed:
                pass
            except StateInvalid as other:
                error = error or other
        if error is not None:
            raise error
        return bool(steps)

    def _newest_good(
        self, job_id: str, request: JobRequest, facts: Facts
    ) -> tuple[tuple[Progress, SlotState] | None, list[str]]:
        """The job's own newest checkpoint that can be read, None without any; and what is wrong with newer ones.

        A damaged one is replaced by its copy in object storage, else put aside when an older one is good.
        """
        folder, bad = self.folder(job_id) if self.states is not None else Path(), dict[int, JaxLoraError]()
        for step in reversed(self.steps(job_id)):
            try:
                found = self._read_checkpoint(job_id, request, facts, step)
            except (StorageFailed, StateInvalid) as error:
                bad[step] = error
                continue
            for damaged in bad:
                set_aside(folder, damaged)
            return found, [f"{error.message}; the job goes on from step {step}" for error in bad.values()]
        if bad:
            raise next(iter(bad.values()))
        return None, []

    def _read_checkpoint(self, job_id: str, request: JobRequest, facts: Facts, step: int) -> tuple[Progress, SlotState]:
        folder = self.folder(job_id)

        def read() -> tuple[Progress, SlotState]:
            meta = read_meta(folder, step=step) or {}
            self._check_own(job_id, request, facts, meta)
            state = self._restored(folder, request.spec, step)
            if state is None:
                raise StorageFailed(f"step {step} of {job_id} is gone")
            return Progress.from_json(meta), state

        try:
            return read()
        except StorageFailed:
            if self.copies is None or not self.copies.bring_again(folder, step):
                raise
            return read()

    def _check_own(self, job_id: str, request: JobRequest, facts: Facts, meta: Mapping[str, object]) -> None:
        """Raises StateInvalid for a checkpoint of another job."""
        differs = [k for k, v in self._identity(request, facts).items() if meta.get(k) != v]
        if differs:
            raise StateInvalid(
                f"the checkpoints of job {job_id} were made with another {', another '.join(differs)}; "
                "create a new job instead"
            )

    def _restored(self, folder: Path, spec: LoraSpec, step: int | None) -> SlotState | None:
        found = restore_state(folder, self.trainer.fresh(spec, 0), step=step)
        if found is None:
            return None
        assert isinstance(found.arrays, SlotState)
        return found.arrays

    def _started(self, request: JobRequest, start: Path | AdapterWeights) -> SlotState | None:
        """The state that a new job goes on from: of a checkpoint also its moments; the schedule starts anew."""
        if isinstance(start, AdapterWeights):
            _check_start(request, start.spec, start.base_hash, self.trainer.base_hash)
            return self.trainer.seat_of(start)
        meta = read_meta(start.absolute())
        if meta is not None:
            _check_start(request, LoraSpec.from_json(meta["spec"]), meta["base"], self.trainer.base_hash)
            return self._restored(start.absolute(), request.spec, None)
        pool = self.trainer.seats.widest
        adapter, _ = import_peft(
            start,
            self.trainer.base.config,
            base_hash=self.trainer.base_hash,
            max_rank=pool.rank,
            head_supported=HEAD_TARGET in pool.targets,
        )
        return self._started(request, adapter)


def _check_start(request: JobRequest, spec: LoraSpec, base: str, wanted_base: str) -> None:
    if base != wanted_base:
        raise BaseMismatch("what the job is to start from was made for another base model", param="start")
    alike = [replace(s, targets=tuple(sorted(s.targets)), dropout=0.0) for s in (spec, request.spec)]
    if alike[0] != alike[1]:
        raise AdapterInvalid(
            f"what the job is to start from has the LoRA settings {spec.to_json()}, the job asks for "
            f"{request.spec.to_json()}; ask for the same",
            param="start",
        )


LOG = logging.getLogger("train")
FILE_THREADS = 2  # that read and check training files
RETRY_S = 5.0  # when object storage does not answer


class JobReaders:
    """Whose files are being read.  Of one thread; `done` alone is called on others."""

    def __init__(self, files: JobFiles, done: Callable[[], None]):
        self._files, self._done = files, done
        self._pool = TenantThreads(FILE_THREADS, "job-files")
        self._reading: dict[str, LiveJob] = {}
        self._ended = threading.Event()

    def examine(self, live: LiveJob) -> None:
        """Has the files of a new job read and checked."""
        job = live.job

        def examine() -> Facts:
            return self._patiently(lambda: self._files.examine(job.id, job.request))

        live.examining = self._pool.submit(job.request.owner, examine)
        self._await(live, live.examining)

    def open(self, live: LiveJob, *, parked: bool) -> None:
        """Has read what a job needs in its slot, which is kept free meanwhile."""
        assert live.facts is not None
        job, facts = live.job, live.facts

        def open_() -> Material:
            return self._patiently(
                lambda: self._files.open(job.id, job.request, facts, parked=parked, progress=job.progress)
            )

        live.opening = self._pool.submit(job.request.owner, open_)
        self._await(live, live.opening)

    def _patiently[T](self, read: Callable[[], T]) -> T:
        """What it reads, when the storage of it answers."""
        while True:
            try:
                return read()
            except StorageAway as error:
                LOG.warning("a job waits: %s", error)
                if self._ended.wait(RETRY_S):
                    raise

    def _await(self, live: LiveJob, future: Future[Facts] | Future[Material]) -> None:
        self._reading[live.job.id] = live
        future.add_done_callback(lambda _: self._done())

    def opening(self) -> Iterator[LiveJob]:
        """The jobs that a slot is kept free for."""
        return (live for live in self._reading.values() if live.opening is not None)

    def hear(self) -> Iterator[tuple[LiveJob, Facts | Material | None, Exception | None]]:
        """What was read since the last call: (job, what it is, None) or (job, None, what is wrong with it)."""
        for live in list(self._reading.values()):
            for future in (live.examining, live.opening):
                if future is None or not future.done():
                    continue
                self.forget(live)
                try:
                    yield live, future.result(), None
                except Exception as error:
                    yield live, None, error

    def forget(self, live: LiveJob) -> None:
        """What is read for it is of no use any more."""
        live.examining = live.opening = None
        self._reading.pop(live.job.id, None)

    def wait(self) -> None:
        """Returns when something is read, at once when nothing is being read."""
        futures = [f for x in self._reading.values() for f in (x.examining, x.opening) if f is not None]
        wait(futures, return_when="FIRST_COMPLETED")

    def close(self) -> None:
        """Waits for what is being read, and reads no more."""
        self._ended.set()
        self._pool.shutdown()
