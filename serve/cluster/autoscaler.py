"""Decides how many replicas and trainers there should be.  Pure host code: reports and clock in, counts out.

A replica is short where more tokens wait than `waiting_tokens` a row, or an adapter waits for a slot.  Where most replicas
have been short for `rise_s` there are half as many more.  The router sends requests past those that are short, so a few of
them ask for nobody.  A count comes down to the most that was needed at any time within `idle_s`: after it went up it
stays for as long, and up, down and up again takes longer than that.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from jaxlora.config.cluster import ClusterSection, ScalingSection
from serve.cluster.replica_view import Report
from serve.cluster.training.report import TrainingReport


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What a front knows of the requests there are."""

    replicas: Mapping[str, Report]  # of those that get requests
    held: int  # requests that wait for a first replica
    asked: int  # requests to generate, since the front started


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """How many servers there should be."""

    replicas: int
    trainers: int
    jobs: Mapping[str, int] = field(default_factory=dict)  # that trainers hold, by name


class Settled:
    """A count that goes up at once, and comes down to the most that was needed within a time."""

    def __init__(self, least: int, most: int, idle_s: float):
        self._least, self._most, self._idle_s = least, most, idle_s
        self._needed: deque[tuple[float, int]] = deque()  # when so many were needed last; fewer and fewer

    def settle(self, needed: int, now_s: float) -> int:
        """Returns the count, when so many are needed now."""
        needed = min(max(needed, self._least), self._most)
        while self._needed and self._needed[-1][1] <= needed:
            self._needed.pop()
        self._needed.append((now_s, needed))
        while now_s - self._needed[0][0] >= self._idle_s and len(self._needed) > 1:
            self._needed.popleft()
        return self._needed[0][1]


class ReplicaScaler:
    """How many replicas there should be."""

    def __init__(self, least: int, most: int, config: ScalingSection):
        self._config, self._settled = config, Settled(least, most, config.idle_s)
        self._asked = 0
        self._ready = 0  # replicas at the last look
        self._short_since_s: float | None = None  # most of these

    def wanted(self, load: Load, now_s: float) -> int:
        """Returns the count."""
        reports = load.replicas.values()
        came, self._asked = load.asked != self._asked, load.asked
        if len(reports) != self._ready:  # what waits goes elsewhere only by and by
            self._ready, self._short_since_s = len(reports), None
        short = sum(self._is_short(report) for report in reports)
        if 2 * short <= len(reports):
            self._short_since_s = None
            needed = min(self._carrying(reports), len(reports))
        else:
            self._short_since_s = now_s if self._short_since_s is None else self._short_since_s
            lasts = now_s - self._short_since_s >= self._config.rise_s
            needed = len(reports) + (math.ceil(short / 2) if lasts else 0)
        return self._settled.settle(max(needed, int(came or load.held > 0)), now_s)

    def _is_short(self, report: Report) -> bool:
        """Whether tokens wait for rows, or adapters for slots."""
        over = report.waiting_tokens > self._config.waiting_tokens * report.rows
        return over or sum(tokens > 0 for tokens in report.adapters.values()) > report.slots

    def _carrying(self, reports: Collection[Report]) -> int:
        """Returns how many replicas would carry this load with room to spare."""
        if not reports:
            return 0
        running = sum(report.running_rows for report in reports)
        waiting = sum(report.waiting_tokens for report in reports) / self._config.waiting_tokens
        adapters = {key for report in reports for key, tokens in report.adapters.items() if tokens}
        rows = self._config.busy * sum(report.rows for report in reports) / len(reports)
        slots = self._config.busy * sum(report.slots for report in reports) / len(reports)
        return math.ceil(max(running / rows, waiting / rows, len(adapters) / slots))


class TrainerScaler:
    """How many trainers there should be."""

    def __init__(self, least: int, most: int, config: ScalingSection):
        self._config, self._settled = config, Settled(least, most, config.idle_s)

    def wanted(self, load: TrainingReport, now_s: float) -> int:
        """Returns the count."""
        more = load.waiting // self._config.waiting_jobs
        if load.waiting and load.longest_wait_s >= self._config.job_wait_s:
            more = max(more, 1)
        return self._settled.settle(sum(jobs > 0 for jobs in load.trainers.values()) + more, now_s)


class Autoscaler:
    """Both counts, of what was said last."""

    def __init__(self, config: ClusterSection):
        self._replicas = ReplicaScaler(config.replicas, config.replica_limit, config.scaling)
        self._trainers = TrainerScaler(config.trainers, config.trainer_limit, config.scaling)
        self._wanted = Wanted(replicas=config.replicas, trainers=config.trainers)

    def wanted(self, load: Load | None, training: TrainingReport | None, now_s: float) -> Wanted:
        """Returns the counts, the last ones for what nobody says now."""
        last = self._wanted
        self._wanted = Wanted(
            replicas=last.replicas if load is None else self._replicas.wanted(load, now_s),
            trainers=last.trainers if training is None else self._trainers.wanted(training, now_s),
            jobs=last.jobs if training is None else training.trainers,
        )
        return self._wanted
