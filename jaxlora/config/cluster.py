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
class ClusterSection:
    """The servers that `jaxlora up` runs behind one address, beside the one that trains and keeps everything."""

    replicas: int = 2  # servers that answer requests, and read the adapters and keys of that one
    trainers: int = 0  # servers that only train, what that one gives them
    cpus: float = 1.0  # of Ray's, that each of all these servers takes
    gpus: float = 0.0
    router: RouterSection = RouterSection()

    def __post_init__(self) -> None:
        with Checks() as check:
            check.counts(self, "replicas")
            check.need(self.trainers >= 0, "trainers", "0 or more", self.trainers)
            check.positive(self, "cpus")
            check.need(0 <= self.gpus < math.inf, "gpus", "0 or more", self.gpus)
