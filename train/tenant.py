"""One tenant in training, what its batches sum to, and what it learns of each step."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import jax
import numpy as np

from jaxlora.config.training import Loss
from jaxlora.core.lora import LoraSpec
from train.data.examples import ExampleStream, Lane
from train.step.batch import LaneSums
from train.step.optimizer import Optimizer

MAX_BAD_STEPS = 5  # skipped updates in a row after which a tenant stops


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """One tenant's part in one step."""

    tenant: str
    step: int  # optimizer steps it has done
    loss: float  # its loss's sum, divided by the sum of its weights' sizes (dpo: by its pairs); nats for cross_entropy
    accuracy: float  # share of target tokens that were the likeliest (dpo: of pairs whose margin is positive)
    lr: float
    grad_norm: float  # before clipping
    tokens: int  # real tokens computed for it
    finite: bool  # False: the update was skipped
    nll: float  # nats of all its target tokens together, unweighted, before the update
    targets: int  # that many tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """How well a model does on some examples, by the loss of the tenant whose they are."""

    nll: float  # the loss, divided as in a StepReport; of cross_entropy nats per target token
    accuracy: float  # as in a StepReport
    tokens: int  # target tokens


@dataclass(slots=True)
class Window:
    """What a tenant's batch has summed to so far: one that has no room in a step takes several."""

    weight: float = 0.0  # what loss and gradient will be divided by
    loss: float = 0.0
    hits: float = 0.0
    count: float = 0.0  # what hits are counted among
    tokens: int = 0
    nll: float = 0.0  # of the target tokens, unweighted
    targets: int = 0

    def add(self, sums: LaneSums, gs: Sequence[int], hits: np.ndarray, tokens: int) -> None:
        """What these lanes summed to (NumPy); hits: what was hit and what it is counted among."""
        self.loss += float(sums.loss_G[gs].sum())
        self.hits, self.count = self.hits + float(hits[0]), self.count + float(hits[1])
        self.nll -= float(sums.logprob_GJ[gs].sum())
        self.targets += int(sums.count_G[gs].sum())
        self.tokens += tokens


class TenantStatus(StrEnum):
    """Whether a tenant takes part in the next step."""

    RUNNING = "running"
    DONE = "done"  # its last step is
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class Tenant:
    """One tenant in training."""

    name: str
    slot: int
    spec: LoraSpec
    optimizer: Optimizer
    stream: ExampleStream
    loss: Loss
    step: int = 0
    per_target: bool = False  # its loss is divided by the number of its target tokens, not by their weights
    window: Window = field(default_factory=Window)  # its open batch
    bad_steps: int = 0  # in a row
    status: TenantStatus = TenantStatus.RUNNING
    failure: str = ""  # why it failed
    fault: Exception | None = None  # what was raised for it alone, if that is why
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class MixedStep:
    """A step as it was mixed: whose lanes, and whose updates with what numbers."""

    lanes: list[Lane]
    owners: list[Tenant]  # of each lane
    draws: list[tuple[int, int]]  # (seed, step) of each lane's dropout
    due: list[tuple[Tenant, dict[str, float]]]


def is_device_loss(error: BaseException) -> bool:
    """Whether an error is nobody's: a device program failed, and with it what it was given.

    Every other exception that the host raises for one tenant or job is that one's end, and the others go on.
    """
    return isinstance(error, jax.errors.JaxRuntimeError) or not isinstance(error, Exception)


@dataclass(slots=True)
class EvaluationSums:
    """What the lanes of one set of examples have summed to so far."""

    sums: np.ndarray = field(default_factory=lambda: np.zeros(4))  # loss, targets, hits and what they are counted among
    weights: list[float] = field(default_factory=list)  # of each lane; what the loss is divided by is their sum

    @property
    def lanes(self) -> int:
        """Returns the number of lanes that are in."""
        return len(self.weights)

    def add(self, lane: Lane, loss: Loss, sums: tuple[float, float, float, float]) -> None:
        """Adds a lane."""
        self.sums += sums
        self.weights.append(batch_weight([lane], loss))

    def result(self) -> Evaluation:
        """Returns what they say, once all lanes are in."""
        total, targets, hits, count = self.sums
        nll = total / divisor(sum(self.weights))
        return Evaluation(nll=float(nll), accuracy=float(hits / max(count, 1.0)), tokens=int(targets))


def batch_weight(lanes: Sequence[Lane], loss: Loss) -> float:
    """What losses and gradients of these lanes are divided by: the sum of the weights' sizes; dpo: pairs.

    Weights may be negative (to unlearn a token); their plain sum could be zero, or turn the gradient around.
    """
    if loss.name == "dpo":
        return float(sum(len(lane.units) for lane in lanes))
    return sum(float(np.abs(lane.weight_J).sum(dtype=np.float64)) for lane in lanes)


def target_count(lanes: Sequence[Lane]) -> float:
    """Target tokens of these lanes."""
    return float(sum(np.count_nonzero(lane.weight_J) for lane in lanes))


def divisor(weight: float) -> float:
    """The weight within float32."""
    limits = np.finfo(np.float32)
    return min(max(weight, float(limits.tiny)), float(limits.max))


def whole[T](parts: Generator[str, None, T]) -> T:
    """What the parts return, all run."""
    while True:
        try:
            next(parts)
        except StopIteration as end:
            return end.value
