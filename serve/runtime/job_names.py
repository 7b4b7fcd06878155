"""The names of what jobs make.  Pure.

A job makes an adapter under a name of its tenant's, such as any other adapter has.  OpenAI's names for it are aliases:
ft:BASE:ORG:SUFFIX:ID, alone, with :ckpt-step-STEP, or with :latest.  While the job runs the plain alias means its newest
checkpoint, afterwards its result; `latest` is the newest version.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field

from jaxlora.core.errors import AlreadyExists

JOB_PREFIX = "ft-"  # of adapters that jobs of the first releases made, whose names nobody chose
FT_NAME = re.compile(r"ft:([^:]+):([^:]+):([^:]*):([0-9a-f]{12})(?::(?:ckpt-step-(\d{1,9})|(latest)))?")


@dataclass(slots=True)
class JobName:
    """The versions that one job's name stands for."""

    tenant: str
    adapter: str  # its name in the store
    suffix: str
    job_id: str
    steps: dict[int, int] = field(default_factory=dict)  # of each checkpoint → version
    final: int | None = None
    ended: bool = False

    @property
    def id(self) -> str:
        """Returns the last part of the name."""
        return short_id(self.job_id)


@dataclass(frozen=True, slots=True)
class Target:
    """The adapter that a name stands for, and its versions of which the first that is there is meant; None: the newest."""

    tenant: str
    adapter: str
    versions: tuple[int, ...] | None


def short_id(job_id: str) -> str:
    """Returns the last part of the model name of a job."""
    return job_id.removeprefix("ftjob-")[:12]


class JobNames:
    """The names of all jobs of one server.  Thread-safe."""

    def __init__(self, base: str):
        self._base = base.replace("/", "--").replace(":", "-")
        self._jobs: dict[str, JobName] = {}
        self._adapters: dict[tuple[str, str], JobName] = {}
        self._lock = threading.Lock()

    def add(self, job_id: str, tenant: str, adapter: str, suffix: str) -> None:
        """Adds a job without versions, the newest that makes this adapter; a job that is known keeps its name."""
        job = JobName(tenant, adapter, suffix, job_id)
        with self._lock:
            if job.id not in self._jobs:
                self._jobs[job.id] = self._adapters[tenant, adapter] = job

    def put(self, job: JobName) -> None:
        """Adds what another process knows of a job, or the versions of it that are new."""
        with self._lock:
            known = self._jobs.setdefault(job.id, JobName(job.tenant, job.adapter, job.suffix, job.job_id))
            known.steps |= {step: max(v, known.steps.get(step, v)) for step, v in job.steps.items()}
            known.final = known.final if job.final is None else job.final
            known.ended |= job.ended

    def claim(self, job_id: str, tenant: str, adapter: str, suffix: str) -> None:
        """Adds a new job.  Raises AlreadyExists, and adds none, while another job makes an adapter of this name."""
        job = JobName(tenant, adapter, suffix, job_id)
        with self._lock:
            other = self._adapters.get((tenant, adapter))
            if other is not None and not other.ended:
                raise AlreadyExists(
                    f"job {other.job_id} makes {adapter}; choose another name, or cancel that job", param="suffix"
                )
            self._jobs[job.id] = self._adapters[tenant, adapter] = job

    def forget(self, job_id: str) -> None:
        """Removes a job that was claimed and not made after all."""
        with self._lock:
            job = self._jobs.pop(short_id(job_id))
            del self._adapters[job.tenant, job.adapter]  # one that made it before has no version any more

    def checkpoint(self, job_id: str, step: int, version: int, *, final: bool) -> None:
        """Adds a version that stays; final: the job's result."""
        with self._lock:
            job = self._jobs.get(short_id(job_id))
            if job is not None:
                job.steps[step] = version
                job.final = version if final else job.final

    def end(self, job_id: str) -> None:
        """Marks the job as ended: its adapter may be deleted."""
        with self._lock:
            job = self._jobs.get(short_id(job_id))
            if job is not None:
                job.ended = True

    def makes(self, tenant: str, adapter: str) -> bool:
        """Whether a job that has not ended makes this adapter."""
        with self._lock:
            job = self._adapters.get((tenant, adapter))
            return job is not None and not job.ended

    def full(self, job_id: str, step: int | None = None) -> str:
        """Returns the model name of a job, or of its checkpoint of a step."""
        with self._lock:
            job = self._jobs[short_id(job_id)]
        return self._written(job) + ("" if step is None else f":ckpt-step-{step}")

    def adapter(self, job_id: str) -> str:
        """Returns the name of the adapter that a job makes."""
        with self._lock:
            return self._jobs[short_id(job_id)].adapter

    def shown(self, tenant: str, adapter: str) -> str | None:
        """Returns the alias of an adapter whose own name nobody chose; None for any other."""
        with self._lock:
            job = self._adapters.get((tenant, adapter))
        return None if job is None or adapter != JOB_PREFIX + job.id else self._written(job)

    def _written(self, job: JobName) -> str:
        return f"ft:{self._base}:{job.tenant}:{job.suffix}:{job.id}"

    def find(self, sees: str | None, model: str) -> Target | None:
        """Returns the target of a name for a caller who sees this tenant's objects (None: everyone's), or None."""
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
            if latest:  # not of another job that made an adapter of this name when this one's was deleted
                makes = self._adapters.get((job.tenant, job.adapter)) is job
                return Target(job.tenant, job.adapter, None) if makes else None
            if step:
                versions = [job.steps[int(step)]] if int(step) in job.steps else []
            else:
                versions = [job.steps[n] for n in sorted(job.steps, reverse=True)]
                versions = versions if job.final is None else [job.final, *versions]
            return Target(job.tenant, job.adapter, tuple(versions)) if versions else None
