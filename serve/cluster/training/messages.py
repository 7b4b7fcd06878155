"""What the keeper and its trainers tell each other.  Plain values, all of which may travel between processes.

    trainer ─Contact: what it holds, what has happened─▶ keeper        ─Publication: weights─▶ keeper
            ◀─Orders: what to do, what is not its own any more─                ◀─AdapterRef─

A trainer calls, several times a second; the keeper never does.  Both sides reckon with time on a clock that goes on while a
machine sleeps.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from jaxlora.config.serving import SizedTraining
from jaxlora.core.errors import JaxLoraError, Unavailable
from jaxlora.core.lora import AdapterRef, AdapterWeights
from serve.cluster.training.placement import Slots
from serve.jobs.live_jobs import JobNews, Published
from train.jobs.job import JobRequest
from train.jobs.status import JobStatus

TRAINER = "trainer-"  # of names of trainers; a number follows
LEASE_S = 10.0  # a trainer that has not reached its keeper for so long does nothing more for the jobs it had
MARGIN_S = 5.0  # beyond it, until the keeper gives them to another: for what was on its way to the disk


def clock_s() -> float:
    """Returns the seconds of a clock that only goes forward, also while the machine sleeps, where there is one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Lease:
    """The right to train a job, of one trainer at a time.  A later one is greater."""

    epoch: int  # start of the keeper, which counts them
    number: int  # of those that this keeper gave


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What a trainer must be like for its results to be those of the keeper, bit for bit."""

    base_hash: str
    training: SizedTraining


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaceJob:
    """Train this job."""

    number: int
    lease: Lease
    id: str
    request: JobRequest
    publish: bool
    kept: tuple[int, ...]  # versions of its checkpoints


@dataclass(frozen=True, kw_only=True, slots=True)
class MoveJob:
    """Pause or cancel a job."""

    number: int
    id: str
    owner: str
    to: JobStatus


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseJob:
    """Save what a job has learned, and let it go."""

    number: int
    id: str
    owner: str


type Order = PlaceJob | MoveJob | ReleaseJob  # their numbers grow; each is carried out once


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """An order was carried out, or refused."""

    number: int
    error: JaxLoraError | None


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSaid:
    """What has happened to a job."""

    lease: Lease
    id: str
    what: JobNews | Published


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """One of the things that a trainer tells, each until it is heard."""

    seq: int  # grows
    what: Answer | JobSaid


@dataclass(frozen=True, kw_only=True, slots=True)
class Contact:
    """A trainer as it is now."""

    trainer: str  # name of its process
    epoch: int  # of the keeper that it works for; 0 before it has had contact
    slots: tuple[Slots, ...]
    holds: Mapping[
        str, Lease
    ]  # jobs that it trains, or whose files it may still write; not one of which nothing is left
    said: tuple[Said, ...]  # oldest first
    leaves: bool  # it ends, and takes no more jobs


@dataclass(frozen=True, kw_only=True, slots=True)
class Orders:
    """What the keeper answers.  If its epoch is a new one: release all jobs, without those to drop."""

    epoch: int
    heard: int  # seq of the newest thing it has heard
    orders: tuple[Order, ...]  # not answered yet, oldest first
    drop: frozenset[str]  # jobs of which the trainer has no lease any more: not one byte of them is to be written
    weights: Mapping[str, float]  # of the owners of its jobs
    full: frozenset[tuple[str, str]]  # (owner, name) of adapters without room for another version


@dataclass(frozen=True, kw_only=True, slots=True)
class Publication:
    """Weights that become a version."""

    trainer: str
    job: str
    lease: Lease
    number: int  # of this trainer: a publication that is told twice is made once
    weights: AdapterWeights
    keep: int | None  # newest versions that stay
    spare: tuple[int, ...]  # others that stay
    age_s: float  # since the weights were learned


class KeeperGone(Unavailable):
    """The keeper cannot be reached just now."""


class KeeperPeer(Protocol):
    """The keeper, as a trainer reaches it.  Called on threads; every call waits for its answer, and raises KeeperGone."""

    def terms(self) -> Terms:
        """Returns the terms."""
        ...

    def contact(self, contact: Contact) -> Orders:
        """Tells the keeper what there is, and renews all leases."""
        ...

    def publish(self, publication: Publication) -> AdapterRef:
        """Makes a version.  Raises StateInvalid without a lease, and as `Publisher.publish_weights` does."""
        ...


class Carrier(Protocol):
    """What carries a trainer's calls."""

    def own_name(self) -> str:
        """Returns the name of this process: trainer-0.1, and so on."""
        ...

    def keeper(self) -> KeeperPeer:
        """Returns the keeper that there is now.  Raises KeeperGone."""
        ...
