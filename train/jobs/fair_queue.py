"""Which job gets the next slot: shares of tokens between owners, whatever the number of their jobs.  Pure.

Each owner has a tag: the tokens it was given, divided by the owner's weight, which is the server's.  A free slot goes to the
waiting owner with the lowest tag, and there to the job of the largest weight, its owner's wish, that came first.  An owner is charged for a whole turn when it begins, so slots that
come free together are shared as well, and the difference when the turn ends.  An owner who comes back from having no jobs
starts at the tag of those being served: time away is not saved up, and a debt is not forgotten.

Source: start-time fair queueing (Goyal, Vin and Cheng 1996).
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class _Job:
    """A job that waits or has a turn."""

    key: str
    owner: _Owner
    weight: float  # among the jobs of its owner
    arrival: int
    charged: float  # tokens of its next turn, or of the one that it has
    rate: float = 1.0  # the owner's weight when it was charged
    used: int = 0  # tokens of this turn
    steps: int = 0  # of this turn


@dataclass(slots=True, eq=False)
class _Owner:
    name: str
    tag: float
    waiting: list[_Job] = field(default_factory=list)  # in the order of their turns
    turns: dict[str, _Job] = field(default_factory=dict)

    def first(self, fits: Callable[[str], bool]) -> _Job | None:
        """The job whose turn is next of those that fit."""
        return next((job for job in self.waiting if fits(job.key)), None)


class FairQueue:
    """Jobs that wait for a slot, and the turns of those that have one."""

    def __init__(self, weight_of: Callable[[str], float] = lambda owner: 1.0) -> None:
        """weight_of: an owner's share relative to the others'; it may change."""
        self._weight_of = weight_of
        self._owners: dict[str, _Owner] = {}
        self._waiting: dict[str, _Job] = {}
        self._turns: dict[str, _Job] = {}
        self._arrivals = itertools.count()
        self._clock = 0.0  # highest tag at which a turn began

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, key: str) -> bool:
        return key in self._waiting

    def add(self, key: str, owner: str, *, weight: float, tokens: float) -> None:
        """A job waits for a turn of so many tokens.  weight: its rank among the jobs of its owner."""
        record = self._owner(owner)
        job = self._waiting[key] = _Job(key, record, weight, next(self._arrivals), tokens)
        bisect.insort(record.waiting, job, key=lambda job: (-job.weight, job.arrival))

    def _owner(self, name: str) -> _Owner:
        record = self._owners.setdefault(name, _Owner(name, self._clock))
        if not record.waiting and not record.turns:
            record.tag = max(record.tag, self._clock)
        return record

    def charge(self, owner: str, tokens: int) -> None:
        """An owner was given tokens beside its jobs' turns.  It pays for them if somebody waits."""
        if self._waiting:
            self._owner(owner).tag += tokens / self._weight_of(owner)

    def remove(self, key: str) -> None:
        """A waiting job waits no more."""
        job = self._waiting.pop(key)
        job.owner.waiting.remove(job)
        self._forget_idle()

    def take(self, fits: Callable[[str], bool]) -> str | None:
        """The job whose turn begins; its owner is charged.  None when nobody waits whom a free slot fits."""
        firsts = [job for owner in self._owners.values() if (job := owner.first(fits)) is not None]
        if not firsts:
            return None
        job = min(firsts, key=lambda job: (job.owner.tag, job.arrival))
        job.owner.waiting.remove(job)
        del self._waiting[job.key]
        self._turns[job.key] = job.owner.turns[job.key] = job
        self._clock = max(self._clock, job.owner.tag)
        self._begin(job, job.charged)
        return job.key

    def has_turn(self, key: str) -> bool:
        """Whether the job's turn has begun and not ended."""
        return key in self._turns

    def serve(self, key: str, tokens: int) -> None:
        """A job used one step, of so many tokens, of its turn."""
        self._turns[key].used += tokens
        self._turns[key].steps += 1

    def end_turn(self, key: str) -> None:
        """A job gives its slot up; its owner is charged for what it used."""
        job = self._turns.pop(key)
        self._settle(job)
        del job.owner.turns[key]
        self._forget_idle()

    def over(self, steps: int) -> Iterator[str]:
        """Jobs that had so many steps of their turn, those with the most first."""
        over = [key for key, job in self._turns.items() if job.steps >= steps]
        yield from sorted(over, key=lambda key: -self._turns[key].steps)

    def renew(self, key: str, tokens: float, fits: Callable[[str], bool]) -> bool:
        """Begins another turn of a job in its slot, unless an owner with a job that fits there was given less: then False."""
        job = self._turns[key]
        self._settle(job)
        if any(o.tag < job.owner.tag and o.first(fits) is not None for o in self._owners.values()):
            return False
        self._begin(job, tokens)
        return True

    def _begin(self, job: _Job, tokens: float) -> None:
        """Charges a turn of so many tokens ahead."""
        job.charged, job.used, job.steps, job.rate = tokens, 0, 0, self._weight_of(job.owner.name)
        job.owner.tag += tokens / job.rate

    def _settle(self, job: _Job) -> None:
        job.owner.tag += (job.used - job.charged) / job.rate
        job.charged = job.used

    def _forget_idle(self) -> None:
        """Owners without jobs, once their record says no more than the clock does."""
        for name, owner in list(self._owners.items()):
            if not owner.waiting and not owner.turns and owner.tag <= self._clock:
                del self._owners[name]
