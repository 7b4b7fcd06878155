"""Which job gets the next slot: shares of tokens between owners, whatever the number of their jobs.  Pure.

Each owner has a tag: the tokens it was given, each divided by its job's weight.  A free slot goes to the waiting owner with
the lowest tag, and there to the job that came first.  An owner is charged for a whole turn when it begins, so slots that
come free together are shared as well, and the difference when the turn ends.  An owner who comes back from having no jobs
starts at the tag of those being served: time away is not saved up, and a debt is not forgotten.

Source: start-time fair queueing (Goyal, Vin and Cheng 1996).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Job:
    """A job that waits or has a turn."""

    owner: _Owner
    weight: float
    arrival: int
    charged: float  # tokens of its next turn, or of the one that it has
    used: int = 0  # tokens of this turn
    steps: int = 0  # of this turn


@dataclass(slots=True)
class _Owner:
    tag: float
    waiting: dict[str, _Job] = field(default_factory=dict)
    turns: dict[str, _Job] = field(default_factory=dict)

    def first(self, fits: Callable[[str], bool]) -> str | None:
        """The job that has waited longest of those that fit."""
        return next((key for key in self.waiting if fits(key)), None)


class FairQueue:
    """Jobs that wait for a slot, and the turns of those that have one."""

    def __init__(self) -> None:
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
        """A job waits for a turn of so many tokens."""
        record = self._owners.setdefault(owner, _Owner(self._clock))
        if not record.waiting and not record.turns:
            record.tag = max(record.tag, self._clock)
        job = _Job(record, weight, next(self._arrivals), tokens)
        self._waiting[key] = record.waiting[key] = job

    def remove(self, key: str) -> None:
        """A waiting job waits no more."""
        job = self._waiting.pop(key)
        del job.owner.waiting[key]
        self._forget_idle()

    def take(self, fits: Callable[[str], bool]) -> str | None:
        """The job whose turn begins; its owner is charged.  None when nobody waits whom a free slot fits."""
        firsts = [(owner, owner.first(fits)) for owner in self._owners.values()]
        waiting = [(owner, key) for owner, key in firsts if key is not None]
        if not waiting:
            return None
        owner, key = min(waiting, key=lambda w: (w[0].tag, w[0].waiting[w[1]].arrival))
        job = owner.waiting[key]
        del owner.waiting[key], self._waiting[key]
        self._turns[key] = owner.turns[key] = job
        self._clock = max(self._clock, owner.tag)
        owner.tag += job.charged / job.weight
        return key

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
        job.charged, job.used, job.steps = tokens, 0, 0
        job.owner.tag += tokens / job.weight
        return True

    def _settle(self, job: _Job) -> None:
        job.owner.tag += (job.used - job.charged) / job.weight
        job.charged = job.used

    def _forget_idle(self) -> None:
        """Owners without jobs, once their record says no more than the clock does."""
        for name, owner in list(self._owners.items()):
            if not owner.waiting and not owner.turns and owner.tag <= self._clock:
                del self._owners[name]
