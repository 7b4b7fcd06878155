"""What the Gradient wire needs of the server beside `House`: adapters that are trained by calls.  Pure: a protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxlora.config.base import need
from jaxlora.config.training import Optimizer
from jaxlora.core.lora import AdapterRef, LoraSpec
from train.data.examples import Example


class FineTuned(Protocol):
    """What one call has done."""

    @property
    def tokens(self) -> int:
        """Target tokens of all examples."""
        ...

    @property
    def sum_loss(self) -> float:
        """Nats of all of them under the weights before the update, whatever their weights in it; finite."""
        ...

    @property
    def ref(self) -> AdapterRef:
        """The version after, which is published."""
        ...


class Tuner(Protocol):
    """Creates, trains and deletes adapters.  Called on the event loop."""

    async def create(self, tenant: str, name: str, spec: LoraSpec, seed: int) -> AdapterRef:
        """A new adapter that changes nothing yet.

        Raises AdapterInvalid for a rank or targets that no slot holds, QuotaExceeded.
        """
        ...

    async def fine_tune(self, tenant: str, name: str, examples: Sequence[Example], optimizer: Optimizer) -> FineTuned:
        """One update by all examples, divided by the number of their target tokens; calls of one adapter wait in line.

        Raises AdapterNotFound, DataInvalid; AdapterNotFinite, and nothing has changed then.
        """
        ...

    async def delete(self, tenant: str, name: str) -> None:
        """The adapter is gone at once; what runs ends on it.  Raises AdapterNotFound."""
        ...


DEFAULT_RANK = 8  # of an adapter whose client names none


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientConfig:
    """What the Gradient wire takes where a client says nothing, and the longest sample it takes."""

    default_lr: float
    longest: int  # tokens of a sample in training
    rank: int = DEFAULT_RANK
    alpha: float = 32.0
    max_tokens: int = 128  # of an answer

    def __post_init__(self) -> None:
        need(0 < self.default_lr < 1, "default_lr", "between 0 and 1", self.default_lr)
        need(self.longest >= 2, "longest", "at least 2", self.longest)
