"""Where jobs run: beside this server's engine, or wherever a cluster puts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from serve.jobs.live_jobs import LiveJobs
from serve.runtime.device_thread import DeviceThread
from train.jobs.job import JobRequest


class JobPlaces(Protocol):
    """Runs jobs whose files were read.  From any thread; every call may wait."""

    def create(self, id: str, request: JobRequest, *, publish: bool, kept: Sequence[int]) -> None:
        """Takes a job; see `LiveJobs.create`."""
        ...

    def pause(self, owner: str, id: str) -> None:
        """Pauses a job.  Raises NotFound for one that is not there (any more), StateInvalid."""
        ...

    def resume(self, owner: str, id: str) -> None:
        """Puts a paused job in line again.  Raises as `pause` does."""
        ...

    def cancel(self, owner: str, id: str) -> None:
        """Ends a job.  Raises as `pause` does."""
        ...


@dataclass(frozen=True, slots=True)
class OwnPlace:
    """This server's trainer."""

    runner: DeviceThread
    live: LiveJobs

    def create(self, id: str, request: JobRequest, *, publish: bool, kept: Sequence[int]) -> None:
        """Takes a job; see `LiveJobs.create`."""
        self.runner.call(lambda: self.live.create(id, request, publish=publish, kept=kept))

    def pause(self, owner: str, id: str) -> None:
        """Pauses a job; see `LiveJobs.pause`."""
        self.runner.call(lambda: self.live.pause(owner, id))

    def resume(self, owner: str, id: str) -> None:
        """Puts a paused job in line again; see `LiveJobs.resume`."""
        self.runner.call(lambda: self.live.resume(owner, id))

    def cancel(self, owner: str, id: str) -> None:
        """Ends a job; see `LiveJobs.cancel`."""
        self.runner.call(lambda: self.live.cancel(owner, id))
