"""What a training job is: what was asked for, how far it is, what happened.  Pure: no jax, no clock, no files."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, Protocol, cast

from jaxlora.config.training import CROSS_ENTROPY, Loss, Optimizer, TooLong
from jaxlora.core.errors import InvalidRequest, JaxLoraError, StorageFailed
from jaxlora.core.lora import AdapterRef, AdapterWeights, LoraSpec, check_name
from jaxlora.storage.remote_states import StateCopies
from train.data.examples import Unit
from train.jobs.status import ENDED, JobStatus, check_move

Source = Path | Sequence[Unit]  # a JSONL file, read when it is needed, or examples that stay in memory


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRequest:
    """What a job is asked to do.  Raises InvalidRequest, naming the field, for a value that no base could make right."""

    owner: str  # tenant key: shares of the device are per owner, over all its jobs
    name: str  # of the adapter that comes out
    data: Source
    spec: LoraSpec
    optimizer: Optimizer
    batch_size: int  # examples of a step
    loss: Loss = CROSS_ENTROPY
    seed: int  # of the first weights and of the order of the examples
    weight: float = 1.0  # its share of its owner's tokens, and its rank among its owner's jobs that wait
    # A PEFT folder, the checkpoints of a job, or an adapter to continue from.
    start: Path | AdapterWeights | None = None
    heldout: Source | None = None
    evaluate_every: int | None = None  # steps between held-out losses; None: after the last step only
    checkpoint_every: int | None = None  # steps; None: when it pauses and ends
    patience: int | None = None  # held-out losses in a row without a better one, after which it ends early
    min_delta: float = 0.0  # nats by which a held-out loss must be better to count as better
    keep_best: bool = False  # deliver the weights of the best held-out loss instead of the last ones
    too_long: TooLong = "error"  # of examples in files that a lane does not hold

    def __post_init__(self) -> None:
        check_name(self.owner, "owner")
        check_name(self.name, "name")
        if not 0 <= self.seed < 2**32:
            raise InvalidRequest(f"seed must be in [0, 2^32), got {self.seed}", param="seed")
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise InvalidRequest(f"weight must be positive and finite, got {self.weight}", param="weight")
        for name in ("batch_size", "evaluate_every", "checkpoint_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRequest(f"{name} must be at least 1, got {value}", param=name)
        if not 0 <= self.min_delta < math.inf:
            raise InvalidRequest(f"min_delta must be 0 or more and finite, got {self.min_delta}", param="min_delta")
        for name in ("evaluate_every", "patience", "keep_best"):
            if getattr(self, name) and self.heldout is None:
                raise InvalidRequest(f"{name} needs held-out examples; give `heldout`", param=name)
        if self.patience is not None and self.evaluate_every is None:
            raise InvalidRequest("patience counts held-out losses; give `evaluate_every`", param="patience")

    def without_examples(self) -> JobRequest:
        """What to keep of the request of a job that has ended: paths, but no examples and no weights."""
        return replace(
            self,
            data=self.data if isinstance(self.data, Path) else (),
            heldout=self.heldout if isinstance(self.heldout, Path | None) else (),
            start=None if isinstance(self.start, AdapterWeights) else self.start,
        )


class Shelf(Protocol):
    """Where finished adapters go: an AdapterStore is one."""

    def add(self, tenant: str, name: str, weights: AdapterWeights) -> AdapterRef:
        """Keeps the weights as the next version of this adapter."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class JobsConfig:
    """How jobs share a trainer."""

    states: Path | None  # checkpoints, a folder a job; None: none are written
    keep: int = 2  # newest checkpoints of a job that stay, besides the best
    quantum_steps: int | None = None  # after these a job gives way to owners who had less; None: it keeps its slot
    events: int = 1000  # of a job, kept in memory
    copies: StateCopies | None = None  # object storage behind `states`

    def __post_init__(self) -> None:
        for name in ("keep", "quantum_steps", "events"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRequest(f"{name} must be at least 1, got {value}", param=name)


@dataclass(slots=True)
class Progress:
    """How far a job is: all that must come back with its weights for it to go on as if nothing had happened."""

    step: int = 0  # optimizer steps done
    cursor: int = 0  # examples consumed
    tokens: int = 0  # trained
    skipped: int = 0  # updates that were not finite
    bad_steps: int = 0  # of these, the last ones in a row
    best_step: int | None = None  # with the best held-out loss so far
    best_loss: float | None = None
    stale: int = 0  # held-out losses since then
    heldout_due: bool = False  # the held-out loss of the newest step is not known yet

    def to_json(self) -> dict[str, object]:
        """For a checkpoint's meta."""
        return asdict(self)

    @staticmethod
    def from_json(meta: Mapping[str, object]) -> Progress:
        """What `to_json` gave, out of a meta that holds more; the first releases knew of no loss that is due.

        Raises StorageFailed for anything else.
        """
        values = {f.name: meta.get(f.name) for f in fields(Progress)}
        if values["heldout_due"] is None:
            values["heldout_due"] = False
        kinds = {"best_loss": (int, float), "heldout_due": (bool,)}
        numbers = {name: value for name, value in values.items() if value is not None}
        bad = [n for n, v in numbers.items() if type(v) not in kinds.get(n, (int,))]
        bad += [n for n, v in numbers.items() if n not in kinds and n not in bad and cast(int, v) < 0]
        bad += [n for n in values.keys() - numbers.keys() if n not in ("best_step", "best_loss")]
        if bad:
            raise StorageFailed(f"a checkpoint's progress is damaged: {', '.join(sorted(bad))}")
        return Progress(**values)  # ty: ignore[invalid-argument-type]

    def judge(self, loss: float, min_delta: float = 0.0) -> bool:
        """Takes in the held-out loss of this step; whether it is the best so far by `min_delta` or more (a NaN never is)."""
        if self.best_loss is None:
            better = loss < math.inf
        else:
            better = loss < self.best_loss and loss <= self.best_loss - min_delta
        if better:
            self.best_step, self.best_loss, self.stale = self.step, loss, 0
            return True
        self.stale += 1
        return False


Level = Literal["info", "warn", "error"]
Kind = Literal["state", "step", "best", "skipped", "checkpoint", "problem"]


@dataclass(frozen=True, kw_only=True, slots=True)
class JobEvent:
    """Something that happened to a job."""

    seq: int  # from 1, without gaps within its job
    time_s: float  # since 1970
    level: Level
    kind: Kind
    message: str
    # Finite; of a step: step, loss, accuracy, lr, grad_norm, tokens, tokens_per_s, heldout_loss, heldout_accuracy.
    data: Mapping[str, float]


class EventLog:
    """The events of one job, within `limit`: its steps and all else are bounded apart, so neither crowds out the other."""

    def __init__(self, limit: int, clock: Callable[[], float], added: Callable[[], None] = lambda: None):
        """added: called after each new event."""
        self._added = added
        self._steps: deque[JobEvent] = deque(maxlen=max(limit // 2, 1))
        self._rest: deque[JobEvent] = deque(maxlen=max(limit // 2, 1))
        self._clock = clock
        self._count = 0

    def add(
        self, kind: Kind, message: str, *, level: Level = "info", data: Mapping[str, float] | None = None
    ) -> JobEvent:
        """One more, which it returns; the oldest of its sort is dropped when there are too many.  Numbers that no JSON holds are left out."""
        self._count += 1
        finite = {k: v for k, v in (data or {}).items() if math.isfinite(v)}
        event = JobEvent(seq=self._count, time_s=self._clock(), level=level, kind=kind, message=message, data=finite)
        (self._steps if kind == "step" else self._rest).append(event)
        self._added()
        return event

    def add_step(self, data: Mapping[str, float], *, total: int, finite: bool) -> None:
        """One of `total` steps is done: its numbers, and whether its update was finite."""
        name = "loss" if "loss" in data else "heldout_loss"  # of a step of an earlier process
        self.add(
            "step",
            f"step {data['step']} of {total}: {name.replace('heldout_', 'held-out ')} {data[name]:.4f}",
            data=data,
        )
        if not finite:
            message = f"the update of step {data['step']} was not finite and is skipped"
            self.add("skipped", message, level="warn", data={"step": data["step"]})

    def after(self, seq: int) -> list[JobEvent]:
        """Those kept whose number is above `seq`, oldest first; a gap in the numbers is what was dropped."""
        merged = heapq.merge(self._steps, self._rest, key=lambda e: e.seq)
        return [event for event in merged if event.seq > seq]


@dataclass(frozen=True, kw_only=True, slots=True)
class JobView:
    """A job as it was at one time; it may travel to another process."""

    id: str
    state: JobStatus
    code: str | None
    reason: str | None
    started_s: float | None
    finished_s: float | None
    progress: Progress  # a copy
    numbers: Mapping[str, float]


@dataclass(slots=True, eq=False)
class Job:
    """One job.  Changed by `Jobs` alone."""

    id: str
    request: JobRequest
    created_s: float
    log: EventLog
    state: JobStatus = JobStatus.VALIDATING_FILES
    code: str | None = None  # why it is paused or failed, for programs
    reason: str | None = None  # the same, for people
    started_s: float | None = None  # when it first ran
    finished_s: float | None = None
    progress: Progress = field(default_factory=Progress)
    numbers: dict[str, float] = field(default_factory=dict)  # of its newest step and held-out loss, as in their event
    result: AdapterRef | None = None  # the version that it made

    @property
    def final(self) -> bool:
        """Whether it has ended for good."""
        return self.state in ENDED

    def view(self) -> JobView:
        """Returns what it is now, which changes no more."""
        return JobView(
            id=self.id,
            state=self.state,
            code=self.code,
            reason=self.reason,
            started_s=self.started_s,
            finished_s=self.finished_s,
            progress=replace(self.progress),
            numbers=dict(self.numbers),
        )

    def outcome(self, *, best: bool) -> str:
        """How far it came, for people.  best: its weights are those of its best held-out loss."""
        p, total = self.progress, self.request.optimizer.total_steps
        how = f"{p.step} of {total} steps"
        if p.step < total:
            how += f", stopped early: {p.stale} held-out losses in a row were no better"
        return f"{how}; its weights are those of step {p.best_step}" if best else how

    def check_move(self, to: JobStatus) -> None:
        """Raises StateInvalid, saying what is possible, when the job cannot go there from where it is."""
        check_move(self.id, self.state, to)

    def move(self, to: JobStatus, message: str, *, level: Level = "info", code: str | None = None) -> None:
        """Goes there, with an event; `code` says why it is paused or failed.  Raises StateInvalid."""
        self.check_move(to)
        self.state, self.code, self.reason = to, code, None if code is None else message
        event = self.log.add("state", f"{to}: {message}", level=level)
        if to is JobStatus.RUNNING and self.started_s is None:
            self.started_s = event.time_s


def said(error: Exception) -> str:
    """What a tenant may read of it: no path of ours."""
    if isinstance(error, JaxLoraError):
        return error.message
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return f"an internal error ({type(error).__name__}); the server's log says more"
