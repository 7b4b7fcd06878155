"""What the harness knows of a peer: how it is prepared, started with so many adapters and rows, and given work."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.peers.cases import Case, Work
from benchmarks.peers.processes import Tree
from benchmarks.peers.world import World


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """For what a peer is started."""

    adapters: int  # the first so many of the world
    rows: int  # requests at once
    threads: int  # of one process


class Running(Protocol):
    """A peer that is ready."""

    @property
    def tree(self) -> Tree:
        """All of its processes."""
        ...

    def work(self, case: Case, world: World, round: int) -> Work:
        """Does a case."""
        ...


class Peer(Protocol):
    """One of those that are compared."""

    @property
    def name(self) -> str:
        """What it is called in the tables."""
        ...

    def takes(self, case: Case) -> bool:
        """Says whether it can do a case."""
        ...

    def prepare(self, cache: Path, world: World) -> str:
        """Installs it where that is needed, and returns its version.  Raises Unavailable."""
        ...

    def start(self, size: Size, world: World, logs: Path) -> contextlib.AbstractContextManager[Running]:
        """Has it run.  Raises Unavailable."""
        ...
