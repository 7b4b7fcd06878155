"""The models of a server and their names: the base, adapters and their versions, and results of jobs (`job_names`)."""

from __future__ import annotations

import logging
from collections import Counter

from jaxlora.core.errors import AdapterNotFound, AlreadyExists, InvalidRequest, StorageFailed
from jaxlora.core.lora import AdapterRef
from jaxlora.storage.adapter_store import AdapterStore
from serve.engine.slots import SlotTable
from serve.runtime.backend import ModelCard
from serve.runtime.job_names import FT_NAME, JobNames

LOG = logging.getLogger("serve")
RESERVED_NAMES = frozenset({"versions", "download", "pin", "unpin"})


def names_version(model: str) -> bool:
    """Whether a model name means one version of an adapter: NAME@VERSION, or a job's checkpoint."""
    match = FT_NAME.fullmatch(model)
    return "@" in model if match is None else match[5] is not None or match[6] is not None


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
        there = [] if target is None else self._store.versions(target.tenant, target.adapter)
        if target is not None and target.versions is not None:
            known = {ref.version: ref for ref in there}
            there = [known[version] for version in target.versions if version in known][:1]
        if not there:
            raise AdapterNotFound(f"The model `{model}` does not exist.", param="model")
        return there[-1]

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
