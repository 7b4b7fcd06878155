"""Brings the servers that are there to those that are wanted: starts, repairs with a growing wait, drains and removes.

Of one thread, which looks again and again; no look waits for a server.  This module knows nothing of what runs the
processes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from serve.cluster.autoscaler import Wanted

LOG = logging.getLogger("serve")
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0  # before another start, where the last one failed
LIVED_S = 10.0  # after so long, and ready meanwhile, a process was not a bad start


class Life(Enum):
    """What becomes of a process."""

    STARTING = "starting"
    READY = "ready"
    ENDED = "ended"


class Process(Protocol):
    """A server's process, from its start on.  No method waits for it."""

    def life(self) -> tuple[Life, str]:
        """Returns how far it is, and of one that has ended why."""
        ...

    def stop(self) -> None:
        """Has it complete its open requests, save what it has, and end."""
        ...

    def kill(self) -> None:
        """Ends it at once, and frees what it has of the cluster."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind[P: Process]:
    """How servers of one kind are started and removed."""

    name_of: Callable[[int], str]  # of the first, which has the number 0, and so on
    start: Callable[[str], P]
    stop_s: float  # that one may take to stop
    drained: Callable[[str], bool] = lambda _: (
        True
    )  # takes its work away; whether that is done.  Asked at each look until it is


@dataclass(slots=True)
class Place[P: Process]:
    """Where one server is to be."""

    number: int
    name: str
    process: P | None = None
    started_s: float = 0.0  # the process
    is_ready: bool = False  # it was
    failures: int = 0  # bad starts in a row
    next_s: float = 0.0  # no start before
    leaving: bool = False
    is_drained: bool = False
    stop_ends_s: float | None = None  # it was told to stop


@dataclass(slots=True)
class Group[P: Process]:
    """The servers of one kind."""

    kind: Kind[P]
    places: list[Place[P]] = field(default_factory=list)
    failure: str | None = None  # why the last start failed, unless one was ready since

    @property
    def ready(self) -> Mapping[str, P]:
        """Returns the processes that can be called, by server name."""
        found = {}
        for place in self.places:
            if place.process is not None and place.is_ready:
                found[place.name] = place.process
        return found

    def look(self, wanted: int, now_s: float, work: Mapping[str, int] | None = None) -> None:
        """Does what can be done now for so many to be there.  Those that are not ready go first, then those with the least `work`."""
        for place in self.places:
            self._follow(place, now_s)
        staying = [place for place in self.places if not place.leaving]
        leave_first = sorted(staying, key=lambda p: (p.is_ready, (work or {}).get(p.name, 0), -p.number))
        for place in leave_first[: max(0, len(staying) - wanted)]:
            LOG.info("%s is not needed any more", place.name)
            place.leaving = True
        for place in self.places:
            if place.leaving:
                self._remove(place, now_s)
        self.places = [place for place in self.places if not (place.leaving and place.process is None)]
        for _ in range(wanted - len(staying)):
            taken = {place.number for place in self.places}
            number = next(n for n in range(len(taken) + 1) if n not in taken)
            self.places.append(Place[P](number, self.kind.name_of(number)))
        for place in self.places:
            if place.process is None and now_s >= place.next_s:
                LOG.info("%s is started", place.name)
                place.process, place.started_s = self.kind.start(place.name), now_s

    def _follow(self, place: Place[P], now_s: float) -> None:
        """Takes note of what became of the process."""
        if place.process is None:
            return
        life, why = place.process.life()
        if life is Life.READY and not place.is_ready:
            place.is_ready, self.failure = True, None
            LOG.info("%s is ready", place.name)
        if life is not Life.ENDED:
            return
        place.process.kill()
        was_ready, lived_s = place.is_ready, now_s - place.started_s
        place.process, place.is_ready = None, False
        if place.leaving:
            LOG.info("%s has stopped", place.name)
            return
        if was_ready and lived_s >= LIVED_S:
            place.failures, place.next_s = 0, now_s
            LOG.error("%s has ended; it is started again: %s", place.name, why)
            return
        wait_s = min(FIRST_WAIT_S * 2**place.failures, LONGEST_WAIT_S)
        place.failures += wait_s < LONGEST_WAIT_S
        place.next_s = now_s + wait_s
        what = f"has ended after {lived_s:.0f} s" if was_ready else "did not start"
        LOG.error("%s %s; it is started again in %g s: %s", place.name, what, wait_s, why)
        if not was_ready:
            self.failure = f"{place.name}: {why}"

    def _remove(self, place: Place[P], now_s: float) -> None:
        """Goes on with the end of a server that is not wanted any more."""
        if place.process is None:
            return
        if not place.is_ready:  # it has no work yet
            place.process.kill()
            place.process = None
        elif place.stop_ends_s is not None:
            if now_s >= place.stop_ends_s:
                LOG.error("%s did not stop within %g s; it is ended", place.name, self.kind.stop_s)
                place.process.kill()
                place.process = None
        elif place.is_drained:  # a look later: calls that were on their way have come
            place.process.stop()
            place.stop_ends_s = now_s + self.kind.stop_s
        else:
            place.is_drained = self.kind.drained(place.name)


@dataclass(kw_only=True, slots=True)
class Reconciler[P: Process]:
    """All servers of a cluster.  What the keeper has made the others read, so it is the first."""

    keeper: Group[P]
    front: Group[P]
    replicas: Group[P]
    trainers: Group[P]
    wanted: Callable[[float], Wanted]  # at this time; asks front and keeper, where they are
    _begun: bool = False  # the keeper was ready once

    def look(self, now_s: float) -> None:
        """Does what can be done now."""
        self.keeper.look(1, now_s)
        self._begun = self._begun or bool(self.keeper.ready)
        if not self._begun:
            return
        wanted = self.wanted(now_s)
        self.replicas.look(wanted.replicas, now_s)
        self.trainers.look(wanted.trainers, now_s, wanted.jobs)
        self.front.look(1, now_s)

    @property
    def groups(self) -> tuple[Group[P], ...]:
        """Returns the groups in the order of their start."""
        return self.keeper, self.replicas, self.trainers, self.front

    @property
    def failure(self) -> str | None:
        """Returns why a server could not start, unless one of its kind is ready."""
        return next((group.failure for group in self.groups if group.failure is not None), None)
