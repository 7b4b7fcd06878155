"""Which trainer gets which job.  Pure: jobs, places and the clock in, decisions out.

A job in line goes to a place with a free slot for its rank: owners with the fewest running jobs by their weight first.  Jobs
leave a place that drains, and one where they wait for a slot while another has one.  The keeper is a place too, the last
choice of all; without trainers it takes every job and shares its slots in time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

PATIENCE_S = 600.0  # a job that has waited so long comes before all who came later, whatever their owners have


@dataclass(frozen=True, kw_only=True, slots=True)
class Slots:
    """Slots of a trainer for adapters of up to a rank."""

    count: int
    rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A trainer, or the keeper."""

    name: str
    slots: tuple[Slots, ...]  # by growing rank, each rank once: an adapter gets one of the first that it fits
    is_keeper: bool = False
    drains: bool = False

    def bucket(self, rank: int) -> Slots | None:
        """Returns the slots for a rank; None where it fits none."""
        return next((slots for slots in self.slots if rank <= slots.rank), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedJob:
    """A job that is neither paused nor at its end."""

    id: str
    owner: str
    rank: int
    since_s: float  # it waits since then, unless it runs
    place: str | None = None  # None: in line
    runs: bool = False  # it has a slot
    arrives: bool = False  # it is on its way there
    leaves: bool = False  # it is on its way into the line


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What to do now."""

    placed: Mapping[str, str]  # job → place, of jobs in line
    released: Collection[str]  # jobs to get in line again


def decide(
    places: Collection[Place], jobs: Collection[PlacedJob], weight_of: Callable[[str], float], now_s: float
) -> Decision:
    """Returns which jobs in line get a place, and which leave theirs.  weight_of: of an owner."""
    board = _Board(places, jobs)
    placed: dict[str, str] = {}
    line = [job for job in jobs if job.place is None]

    def rank(job: PlacedJob) -> tuple[bool, float, float, str]:
        impatient = now_s - job.since_s >= PATIENCE_S
        share = 0.0 if impatient else board.running[job.owner] / weight_of(job.owner)
        return not impatient, share, job.since_s, job.id

    while (found := next(board.fitting(sorted(line, key=rank)), None)) is not None:
        job, place = found
        line.remove(job)
        board.take(job, place)
        placed[job.id] = place.name
    return Decision(placed=placed, released=[*board.drained(), *board.better_elsewhere()])


class _Board:
    """The slots that are left while one decides."""

    def __init__(self, places: Collection[Place], jobs: Collection[PlacedJob]):
        self._places = {place.name: place for place in places}
        self._group = [place for place in places if not place.drains and not place.is_keeper]
        self._keeper = [place for place in places if place.is_keeper]
        self._jobs = jobs
        self.running: Counter[str] = Counter()  # jobs of an owner
        self._taken: Counter[tuple[str, int]] = Counter()  # of a place's slots of a rank
        self._of_owner: Counter[tuple[str, str]] = Counter()
        for job in jobs:
            if (place := self._place_of(job)) is not None:
                self.take(job, place)

    def take(self, job: PlacedJob, place: Place) -> None:
        """Counts a job in at a place."""
        if (bucket := place.bucket(job.rank)) is not None:
            self._taken[place.name, bucket.rank] += 1
        self.running[job.owner] += job.runs or job.place is None or not place.is_keeper
        self._of_owner[place.name, job.owner] += 1

    def free(self, place: Place, rank: int) -> int:
        """Returns how many slots for a rank are left; below 0 where jobs wait."""
        bucket = place.bucket(rank)
        return 0 if bucket is None else bucket.count - self._taken[place.name, bucket.rank]

    def fitting(self, line: Collection[PlacedJob]) -> Iterator[tuple[PlacedJob, Place]]:
        """Yields the jobs that get a place, and the best one."""
        for job in line:
            if (place := self._best([*self._group, *self._keeper], job)) is not None:
                yield job, place
            elif not self._group and self._keeper:
                yield job, self._keeper[0]

    def _best(self, places: Collection[Place], job: PlacedJob) -> Place | None:
        able = [place for place in places if self.free(place, job.rank) > 0]

        def rank(place: Place) -> tuple[bool, int, int, str]:
            return place.is_keeper, self._of_owner[place.name, job.owner], -self.free(place, job.rank), place.name

        return min(able, key=rank, default=None)

    def _place_of(self, job: PlacedJob) -> Place | None:
        return None if job.place is None else self._places.get(job.place)

    def drained(self) -> Iterator[str]:
        """Yields the jobs of places that drain."""
        for job in self._jobs:
            place = self._place_of(job)
            if place is not None and place.drains and not (job.arrives or job.leaves):
                yield job.id

    def better_elsewhere(self) -> Iterator[str]:
        """Yields jobs that wait for a slot where they are while another trainer has one; those that wait longest first."""
        for job in self._jobs:
            if job.leaves:
                self._move(job)
        for job in sorted(self._jobs, key=lambda job: (job.since_s, job.id)):
            place = self._place_of(job)
            if place is None or job.runs or job.arrives or job.leaves or self.free(place, job.rank) >= 0:
                continue
            if not place.drains and self._move(job):
                yield job.id

    def _move(self, job: PlacedJob) -> bool:
        """Counts a job in at another trainer in place of where it is; returns whether one has a slot."""
        other, place = self._best(self._group, job), self._place_of(job)
        if place is not None and (job.leaves or other is not None) and (bucket := place.bucket(job.rank)) is not None:
            self._taken[place.name, bucket.rank] -= 1
        if other is not None:
            self.take(job, other)
        return other is not None
