"""Names of what jobs make: ft:BASE:ORG:SUFFIX:ID, alone, with :ckpt-step-STEP, or with :latest.  Pure.

While a job runs its plain name means its newest checkpoint, afterwards its result.  `latest` is the newest version there is.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field

JOB_PREFIX = "ft-"  # of adapters that jobs make
FT_NAME = re.compile(r"ft:([^:]+):([^:]+):([^:]*):([0-9a-f]{12})(?::(?:ckpt-step-(\d{1,9})|(latest)))?")


@dataclass(slots=True)
class JobName:
    """What one job's name means."""

    tenant: str
    adapter: str  # its name in the store
    suffix: str
    id: str  # the last part of the name
    steps: dict[int, int] = field(default_factory=dict)  # of each checkpoint → version
    final: int | None = None
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Meant:
    """The adapter that a name means, and which version; None: its newest."""

    tenant: str
    adapter: str
    version: int | None


def short_id(job_id: str) -> str:
    """The last part of the model name of a job."""
    return job_id.removeprefix("ftjob-")[:12]


def adapter_name(job_id: str) -> str:
    """The name in the store of what a job makes."""
    return JOB_PREFIX + short_id(job_id)


def names_version(model: str) -> bool:
    """Whether a model name means one version of an adapter, and not the adapter: NAME@VERSION, or a job's checkpoint."""
    match = FT_NAME.fullmatch(model)
    return "@" in model if match is None else match[5] is not None or match[6] is not None


class JobNames:
    """The names of all jobs of one server.  From any thread."""

    def __init__(self, base: str):
        self._base = base.replace("/", "--").replace(":", "-")
        self._jobs: dict[str, JobName] = {}
        self._adapters: dict[tuple[str, str], JobName] = {}
        self._lock = threading.Lock()

    def add(self, job_id: str, tenant: str, suffix: str) -> None:
        """A job has this name from now on, and no version yet; one that is known keeps its own."""
        job = JobName(tenant, adapter_name(job_id), suffix, short_id(job_id))
        with self._lock:
            if job.id in self._jobs:
                return
            self._jobs[job.id] = self._adapters[tenant, job.adapter] = job

    def checkpoint(self, job_id: str, step: int, version: int, *, final: bool) -> None:
        """A version that stays; final: the job's result."""
        with self._lock:
            job = self._jobs.get(short_id(job_id))
            if job is not None:
                job.steps[step] = version
                job.final = version if final else job.final

    def end(self, job_id: str) -> None:
        """The job has ended: its adapter is anyone's to delete."""
        with self._lock:
            job = self._jobs.get(short_id(job_id))
            if job is not None:
                job.ended = True

    def makes(self, tenant: str, adapter: str) -> bool:
        """Whether a job that has not ended makes this adapter."""
        with self._lock:
            job = self._adapters.get((tenant, adapter))
            return job is not None and not job.ended

    def drop(self, tenant: str, adapter: str, version: int | None = None) -> None:
        """A version of an adapter is deleted, or all of it."""
        with self._lock:
            job = self._adapters.get((tenant, adapter))
            if job is None:
                return
            job.steps = {s: v for s, v in job.steps.items() if version is not None and v != version}
            if version is None or job.final == version:
                job.final = None

    def full(self, job_id: str, step: int | None = None) -> str:
        """The model name of a job, or of its checkpoint of a step."""
        with self._lock:
            job = self._jobs[short_id(job_id)]
        return self._written(job) + ("" if step is None else f":ckpt-step-{step}")

    def shown(self, tenant: str, adapter: str) -> str | None:
        """The model name of an adapter that a job makes; None: of another."""
        with self._lock:
            job = self._adapters.get((tenant, adapter))
        return None if job is None else self._written(job)

    def _written(self, job: JobName) -> str:
        return f"ft:{self._base}:{job.tenant}:{job.suffix}:{job.id}"

    def find(self, sees: str | None, model: str) -> Meant | None:
        """What a name means to who sees a tenant's objects (None: everyone's); None: nothing."""
        match = FT_NAME.fullmatch(model)
        if match is None:
            return None
        base, tenant, suffix, id, step, latest = match.groups()
        with self._lock:
            job = self._jobs.get(id)
            if job is None or (base, tenant, suffix) != (self._base, job.tenant, job.suffix):
                return None
            if sees not in (None, job.tenant):
                return None
            if latest:
                return Meant(job.tenant, job.adapter, None)
            newest = job.steps[max(job.steps)] if job.steps else None
            version = job.steps.get(int(step)) if step else job.final if job.final is not None else newest
            return None if version is None else Meant(job.tenant, job.adapter, version)
