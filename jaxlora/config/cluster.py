"""Settings of several servers behind one address."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from jaxlora.config.base import Checks


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterSection:
    """How much load outweighs where an adapter lies.  Tokens are those of a replica, over its rows."""

    copy_tokens: float = 128.0  # that wait and run for one adapter: worth a copy
    margin_tokens: float = 64.0  # loads that differ by less are alike
    spill_tokens: float = 128.0  # where more wait, a replica is overloaded
    rise_s: float = 1.0  # time constant of an adapter's smoothed load while it rises
    fall_s: float = 30.0  # and while it falls
    prefix_chars: int = 256  # of a prompt that decide where it goes
    fronts: int = 1  # that send to the same replicas

    def __post_init__(self) -> None:
        with Checks() as check:
            check.positive(self, *(one.name for one in fields(self)))


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingSection:
    """When `jaxlora up` starts more replicas and trainers, and when fewer are enough."""

    waiting_tokens: float = 64.0  # over a replica's rows: where more wait, it is short of rows
    busy: float = 0.7  # share of rows and slots that may be taken where one replica fewer is to be enough
    rise_s: float = 2.0  # for so long most replicas are short of rows or slots before there are more
    waiting_jobs: int = 4  # that wait for a slot: one more trainer
    job_wait_s: float = 10.0  # of the job that waits longest: one more trainer, however few wait
    idle_s: float = 120.0  # for so long fewer are enough before one goes
    start_s: float = 60.0  # that a request waits for a replica where there is none
    held: int = 256  # requests that wait so at once

    def __post_init__(self) -> None:
        with Checks() as check:
            check.positive(self, "waiting_tokens", "job_wait_s", "idle_s")
            check.need(0 < self.busy <= 1, "busy", "in (0, 1]", self.busy)
            check.counts(self, "waiting_jobs")
            for name in ("rise_s", "start_s", "held"):
                value = getattr(self, name)
                check.need(0 <= value < math.inf, name, "0 or more", value)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterSection:
    """The servers that `jaxlora up` runs behind one address, beside the one that trains and keeps everything."""

    replicas: int = 2  # servers that answer requests, and read the adapters and keys of that one; at least so many
    most_replicas: int | None = None  # as the load asks for; None: as many as `replicas`
    trainers: int = 0  # servers that only train the jobs which that one gives them; at least so many
    most_trainers: int | None = None  # as the jobs ask for; None: as many as `trainers`
    cpus: float = 1.0  # of Ray's, that each of all these servers takes
    gpus: float = 0.0
    router: RouterSection = RouterSection()
    scaling: ScalingSection = ScalingSection()

    def __post_init__(self) -> None:
        with Checks() as check:
            check.counts(self, "most_replicas")
            scales = self.most_replicas is not None
            wanted = "at least 1, or 0 where most_replicas lets requests start one"
            check.need(self.replicas >= (0 if scales else 1), "replicas", wanted, self.replicas)
            check.need(self.trainers >= 0, "trainers", "0 or more", self.trainers)
            for least, most in (("replicas", "most_replicas"), ("trainers", "most_trainers")):
                count, limit = getattr(self, least), getattr(self, most)
                if limit is not None and limit < count:
                    check.refuse(most, f"{most} must be at least {least} = {count}, got {limit}", least)
            check.positive(self, "cpus")
            check.need(0 <= self.gpus < math.inf, "gpus", "0 or more", self.gpus)

    @property
    def replica_limit(self) -> int:
        """Returns how many replicas there may be at once."""
        return self.replicas if self.most_replicas is None else self.most_replicas

    @property
    def trainer_limit(self) -> int:
        """Returns how many trainers there may be at once."""
        return self.trainers if self.most_trainers is None else self.most_trainers

    @property
    def server_limit(self) -> int:
        """Returns how many servers with a model there may be at once."""
        return 1 + self.replica_limit + self.trainer_limit
