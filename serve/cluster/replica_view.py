"""What the router is told of a request and by a replica, and what it knows of the replica between two reports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from serve.cluster.rendezvous import stable_hash

type AdapterKey = tuple[str, str]  # tenant and name; all versions of an adapter go the same way


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """What the router must know of a request."""

    tenant: str
    adapter: str | None  # None: the base
    tokens: int  # of the prompt, and those expected to be generated
    beginning: str  # of the prompt's text

    @property
    def key(self) -> AdapterKey | None:
        """The adapter that has to be in a slot."""
        return None if self.adapter is None else (self.tenant, self.adapter)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a replica says of itself."""

    asked_s: float  # when it was asked, on the router's clock: what was sent before is counted
    slots: int
    rows: int
    running_rows: int
    running_tokens: int  # still to be computed
    waiting_tokens: int
    adapters: Mapping[AdapterKey, int]  # in its slots, or waiting for one: the tokens that wait and run for each

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"a replica must have at least 1 row, got {self.rows}")


@dataclass(frozen=True, slots=True)
class Sent:
    """A request that a replica was given."""

    number: int
    replica: str
    ask: Ask
    at_s: float


@dataclass(slots=True, eq=False)
class ReplicaView:
    """What is known of a replica."""

    name: str
    weight: float
    fronts: int  # each is taken to have sent as much since the report as this one
    report: Report
    hash: int = field(init=False)
    draining: bool = False
    place: int | None = None  # in the router's arrays; None: it is sent nothing
    open: dict[int, Sent] = field(default_factory=dict)  # what the report does not count
    adapters: dict[AdapterKey, int] = field(default_factory=dict)  # the report's, and what is open

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"a replica's weight must be positive, got {self.weight}")
        self.hash = stable_hash(self.name)

    @property
    def unseen(self) -> tuple[int, int]:
        """Requests and their tokens that the report does not count, of all fronts."""
        return self.fronts * len(self.open), self.fronts * sum(sent.ask.tokens for sent in self.open.values())

    @property
    def load(self) -> float:
        """Waiting and running tokens a row."""
        return (self.report.waiting_tokens + self.report.running_tokens + self.unseen[1]) / self.report.rows

    @property
    def waiting(self) -> float:
        """Waiting tokens a row; of what the report does not count, as many requests run as rows were free."""
        requests, tokens = self.unseen
        beyond = max(0, requests - max(0, self.report.rows - self.report.running_rows))
        return (self.report.waiting_tokens + (tokens * beyond / requests if beyond else 0)) / self.report.rows

    @property
    def is_full(self) -> bool:
        """Whether another adapter would have to wait for a slot."""
        return sum(tokens > 0 for tokens in self.adapters.values()) >= self.report.slots

    @property
    def has_room(self) -> bool:
        """Whether a request for an adapter that it holds would run at once."""
        return self.report.running_rows + self.unseen[0] < self.report.rows
