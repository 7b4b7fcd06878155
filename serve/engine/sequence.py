"""The progress of each request, and the plan of a step.  Pure: no jax here."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum

from jaxlora.core.lora import AdapterRef
from pallas_kernels import NO_ADAPTER
from serve.engine.request import Request


class Status(Enum):
    """The state of a sequence between its arrival and its end."""

    WAITING = "waiting"  # it has had no row yet
    RUNNING = "running"  # it has a row
    PREEMPTED = "preempted"  # it lost its row; its KV is in pages, or dropped
    OFFLOADED = "offloaded"  # it lost its row; its KV is on the host, and in no page
    FINISHED = "finished"  # it holds nothing any more


@dataclass(slots=True, eq=False)
class Sequence:
    """A request in progress.  `tokens` is the prompt and what was generated; the KV of the first `done` is computed.

    A sequence that loses its row goes on at the same token later.  Where its KV was dropped, it is computed again.
    KV counts as computed from the launch of its program on: all that reads it is launched later.
    """

    request: Request
    tokens: list[int]
    adapter: AdapterRef | None  # the version that its next token is of; the request's, or a newer one if it follows
    number: int  # order of arrival
    arrived: float
    since: float  # when it got its row, or began to wait for one
    done: int = 0
    slot: int = NO_ADAPTER
    pages: list[int] = field(default_factory=list)
    lost: int = 0  # tokens whose KV was computed when it was last dropped
    cached_tokens: int = 0  # of the prompt, whose KV was cached when it first ran
    queued_s: float = 0.0  # from its arrival until it first ran
    last_token: float = 0.0  # when its newest token was made
    status: Status = Status.WAITING
    place: int = -1  # of its row, while it runs
    listed: int = 0  # of its pages, how many the row table has; 0: nothing of the sequence
    pending: int = 0  # tokens that were launched and not read: they follow `tokens`
    waits: bool = False  # whether how a token is chosen depends on the one before

    @property
    def salt(self) -> Hashable | None:
        """The key under which the KV is shared: tenant, adapter version and cache_salt.  None: it is not shared.

        The KV of one that follows its adapter may be of several versions.
        """
        follows = self.request.follow and self.adapter is not None
        return None if follows else (self.request.tenant, self.adapter, self.request.cache_salt)

    @property
    def group(self) -> Hashable:
        """The unit of scheduling: all requests of an adapter version, or a tenant's requests of the base model."""
        return self.adapter or self.request.tenant

    @property
    def prompt_left(self) -> int:
        """Tokens to compute before the next one can be sampled: of the prompt, or of everything that was dropped."""
        known = len(self.request.prompt) if self.generated == 0 else len(self.tokens) - 1
        return max(known - self.done, 0)

    @property
    def decodes(self) -> bool:
        """Whether its next token can be launched, alone: its KV is there, it is not at its end, and no token must be read first."""
        length, pending = len(self.tokens), self.pending
        generated = length - len(self.request.prompt)
        return (
            self.done >= length - (generated > 0)
            and generated + pending < self.request.params.max_tokens
            and not (pending and self.waits)
        )

    @property
    def scoring(self) -> bool:
        """Whether the log-probabilities of its prompt are still to be reported: cached pages would leave some out."""
        return self.request.params.prompt_logprobs is not None and self.generated == 0

    @property
    def recovering(self) -> bool:
        """Whether dropped KV is not computed again yet: a sequence preempted now might never get further."""
        return 0 < self.lost >= self.done

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.request.prompt)


@dataclass(frozen=True, slots=True)
class AdapterQueue:
    """The unfinished requests of one adapter version."""

    since: float  # when its wait for a slot began, if it is not active
    rows: int  # requests that run
    others: int  # requests that do not


@dataclass(frozen=True, slots=True)
class Chunk:
    """Known tokens of one sequence whose KV a step computes: `count` of them from position `start`."""

    sequence: Sequence
    start: int
    count: int

    @property
    def chooses(self) -> bool:
        """Whether a token is chosen after it.  Not after one that was computed again: what comes next is known."""
        return self.start + self.count == len(self.sequence.tokens)


@dataclass(slots=True)
class Plan:
    """The work of the next step, in this order."""

    save: list[tuple[Sequence, list[int]]] = field(default_factory=list)  # KV to copy from these pages to the host
    load: list[tuple[AdapterRef, int]] = field(default_factory=list)  # adapters to copy into slots
    restore: list[tuple[Sequence, list[int]]] = field(default_factory=list)  # saved KV to copy back into these pages
    prefill: list[Chunk] = field(default_factory=list)  # one lane each
    decode: list[Sequence] = field(default_factory=list)  # one row each

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.load or self.restore or self.prefill or self.decode)
