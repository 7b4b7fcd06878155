"""The models of a server and their names: the base, adapters and their versions, and results of jobs.

A job makes an adapter under a name of its tenant's, such as any other adapter has.  OpenAI's names for it are aliases:
ft:BASE:ORG:SUFFIX:ID, alone, with :ckpt-step-STEP, or with :latest.  While the job runs the plain alias means its newest
checkpoint, afterwards its result; `latest` is the newest version.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter
from dataclasses import dataclass, field

from jaxlora.core.errors import AdapterNotFound, AlreadyExists, InvalidRequest, StorageFailed
from jaxlora.core.lora import AdapterRef
from jaxlora.storage.adapter_store import AdapterStore
from serve.engine.slots import SlotTable
from serve.runtime.backend import ModelCard

LOG = logging.getLogger("serve")
RESERVED_NAMES = frozenset({"versions", "download", "pin", "unpin"})
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
    """The adapter that a name stands for, and its version; None: the newest."""

    tenant: str
    adapter: str
    version: int | None


def short_id(job_id: str) -> str:
    """Returns the last part of the model name of a job."""
    return job_id.removeprefix("ftjob-")[:12]


def names_version(model: str) -> bool:
    """Whether a model name means one version of an adapter: NAME@VERSION, or a job's checkpoint."""
    match = FT_NAME.fullmatch(model)
    return "@" in model if match is None else match[5] is not None or match[6] is not None


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

    def drop(self, tenant: str, adapter: str, version: int | None = None) -> None:
        """Removes a deleted version of an adapter, or all of them."""
        with self._lock:
            job = self._adapters.get((tenant, adapter))
            if job is None:
                return
            job.steps = {s: v for s, v in job.steps.items() if version is not None and v != version}
            if version is None or job.final == version:
                job.final = None

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
            newest = job.steps[max(job.steps)] if job.steps else None
            version = job.steps.get(int(step)) if step else job.final if job.final is not None else newest
            return None if version is None else Target(job.tenant, job.adapter, version)


class Catalog:
    """The models of one server.  Thread-safe."""

    def __init__(self, store: AdapterStore, slots: SlotTable, base_name: str, started: float):
        """started: when the server did, seconds since 1970."""
        self._store, self._slots, self._base_name, self._started = store, slots, base_name, started
        self.jobs = JobNames(base_name)

    def check_free(self, tenant: str, name: str, *, param: str) -> None:
        """Raises AlreadyExists when the tenant has an adapter of this name, and as `check_name` does."""
        self.check_name(tenant, name, param=param)
        if self._store.latest(tenant, name) is not None:
            raise AlreadyExists(f"you have an adapter {name}; choose another name, or delete it first", param=param)

    def check_name(self, tenant: str, name: str, *, param: str = "name") -> None:
        """Raises InvalidRequest for a name that cannot be requested: it means the base model, or an action of the API."""
        if self._base_name in (name, f"{tenant}/{name}"):
            raise InvalidRequest(f"{self._base_name} is the base model; give the adapter another name", param=param)
        if name in RESERVED_NAMES:  # /v1/adapters/TENANT/NAME would be read as that
            raise InvalidRequest(f"{name} is a word of the API; give the adapter another name", param=param)

    def resolve(self, tenant: str | None, model: str) -> AdapterRef | None:
        """Returns the version that a model name means now; None is the base model.

        Names: NAME, NAME@VERSION, TENANT/NAME, each also as BASE:NAME, and the names of jobs.
        Raises AdapterNotFound for an unknown name, and for one that several tenants have.
        """
        if model == self._base_name:
            return None
        store = self._store
        model = model.removeprefix(f"{self._base_name}:")
        if model.startswith("ft:"):
            return self._made_by_job(tenant, model)
        path, at, number = model.partition("@")
        owner, slash, name = path.rpartition("/")
        asked = owner if slash else tenant
        found = store.named(name, asked) if tenant in (None, asked) else []
        if len(found) > 1:
            raise AdapterNotFound(f"several tenants have a model `{name}`; write TENANT/{name}", param="model")
        if found and at:
            versions = store.versions(found[0].tenant, found[0].name)
            found = [ref for ref in versions if str(ref.version) == number]
        if not found and asked is not None and tenant in (None, asked) and self.jobs.makes(asked, name):
            raise AdapterNotFound(f"The model `{model}` has no version yet: its job has made none.", param="model")
        if not found:
            raise AdapterNotFound(f"The model `{model}` does not exist.", param="model")
        return found[0]

    def _made_by_job(self, tenant: str | None, model: str) -> AdapterRef:
        """Returns the version that a job's model name means now.  Raises AdapterNotFound."""
        target = self.jobs.find(tenant, model)
        versions = [] if target is None else self._store.versions(target.tenant, target.adapter)
        if target is not None and target.version is not None:
            versions = [ref for ref in versions if ref.version == target.version]
        if not versions:
            raise AdapterNotFound(f"The model `{model}` does not exist.", param="model")
        return versions[-1]

    def models(self, tenant: str | None) -> list[ModelCard]:
        """Returns the base and every adapter of the tenant, but for those that cannot be read.  Reads the disk."""
        refs = self._store.list(tenant)
        owners = Counter(ref.name for ref in refs)
        cards = [self._base_card()]
        for ref in refs:
            try:
                made = self.jobs.shown(ref.tenant, ref.name)
                name = ref.name if owners[ref.name] == 1 else f"{ref.tenant}/{ref.name}"
                cards.append(self._card(ref, made or name))
            except AdapterNotFound:
                pass  # deleted meanwhile
            except StorageFailed as error:
                LOG.error("not listed: %s", error)
        return cards

    def model(self, tenant: str | None, model: str) -> ModelCard:
        """Returns the card of one model name.  Reads the disk.  Raises AdapterNotFound, StorageFailed for a damaged version."""
        ref = self.resolve(tenant, model)
        return self._base_card() if ref is None else self._card(ref, model)

    def _base_card(self) -> ModelCard:
        return ModelCard(
            id=self._base_name,
            created=int(self._started),
            owned_by="jaxlora",
            parent=None,
            root=self._base_name,
            version=None,
            rank=None,
            state="base",
        )

    def _card(self, ref: AdapterRef, name: str) -> ModelCard:
        store = self._store
        on_device = self._slots.find(ref) is not None
        return ModelCard(
            id=name,
            created=int(store.created(ref)),
            owned_by=ref.tenant,
            parent=self._base_name,
            root=ref.name,
            version=ref.version,
            rank=store.rank(ref),
            state="device" if on_device else "host" if store.in_memory(ref) else "disk",
        )
