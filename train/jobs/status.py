"""Where a job stands, and where it may go from there.  Pure.

    validating_files ─▶ queued ⇄ running ─▶ succeeded        paused ─▶ queued
                          └──────┴──▶ paused | failed | cancelled

A running job goes back to queued when its time slice is over; what it learned so far is parked.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from jaxlora.core.errors import StateInvalid


class JobStatus(StrEnum):
    """Where a job stands, in OpenAI's words."""

    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


NEXT: Mapping[JobStatus, tuple[JobStatus, ...]] = {
    JobStatus.VALIDATING_FILES: (JobStatus.QUEUED, JobStatus.FAILED, JobStatus.CANCELLED),
    JobStatus.QUEUED: (JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.FAILED, JobStatus.CANCELLED),
    JobStatus.RUNNING: (JobStatus.QUEUED, JobStatus.PAUSED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED),
    JobStatus.PAUSED: (JobStatus.QUEUED, JobStatus.CANCELLED),
    JobStatus.SUCCEEDED: (),
    JobStatus.FAILED: (),
    JobStatus.CANCELLED: (),
}
ENDED = tuple(status for status, after in NEXT.items() if not after)


def check_move(job_id: str, now: JobStatus, to: JobStatus) -> None:
    """Raises StateInvalid, which says what is possible, when a job cannot go from `now` to `to`."""
    if to not in NEXT[now]:
        possible = f"it may become {' or '.join(NEXT[now])}" if NEXT[now] else "that is final"
        raise StateInvalid(f"job {job_id} is {now} and cannot become {to}; {possible}")
