"""A tuner without a model: what it was asked is on record, its losses fall, and a backend knows its adapters; a wire over it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import dataclass, field

import numpy as np

from jaxlora.core.errors import AdapterInvalid, AdapterNotFinite, AdapterNotFound, QuotaExceeded
from jaxlora.core.lora import AdapterRef
from serve.api.gradient.complete import GradientConfig
from serve.api.gradient.routes import GradientRoutes
from serve.db.database import Database
from serve.db.gradient import StoredGradient
from serve.db.models import GradientRecord
from serve.http.idempotency import Once

MAX_RANK = 64


@dataclass(frozen=True)
class Tuned:
    """What one call has done."""

    tokens: int
    sum_loss: float
    ref: AdapterRef


@dataclass
class FakeTuner:
    """Behaviour is set by assigning fields."""

    backend: object
    failure: Exception | None = None
    hold: threading.Event | None = None  # a call waits for it
    most: dict[str, int] = field(default_factory=dict)  # adapters that a tenant may create
    created: list = field(default_factory=list)
    calls: list = field(default_factory=list)

    def is_made_by_job(self, tenant, name):
        return False

    async def create(self, tenant, name, spec, seed):
        if spec.rank > MAX_RANK:
            raise AdapterInvalid(f"rank {spec.rank}, at most {MAX_RANK}")
        if self.failure is not None:
            raise self.failure
        if sum(made[0] == tenant and made[1] in self.backend.adapters for made in self.created) >= self.most.get(
            tenant, 1000
        ):
            raise QuotaExceeded(f"you may have {self.most[tenant]} adapters; delete one")
        self.created.append((tenant, name, spec, seed))
        self.backend.adapters[name] = 1
        return AdapterRef(tenant, name, 1)

    async def fine_tune(self, tenant, name, examples, optimizer):
        if name not in self.backend.adapters:
            raise AdapterNotFound("no adapter of that name")
        if self.hold is not None:
            assert await asyncio.to_thread(self.hold.wait, 20)
        if self.failure is not None:
            raise self.failure
        if any(np.abs(e.weights).max() > 1e20 for e in examples):
            raise AdapterNotFinite("the loss or its gradient is not finite; nothing was changed")
        self.calls.append((tenant, name, list(examples), optimizer))
        self.backend.adapters[name] += 1
        version = self.backend.adapters[name]
        tokens = sum(int(np.count_nonzero(e.weights)) for e in examples)
        return Tuned(tokens, 6.0 * tokens / version, AdapterRef(tenant, name, version))

    async def delete(self, tenant, name):
        if self.backend.adapters.pop(name, None) is None:
            raise AdapterNotFound("no adapter of that name")


@contextlib.contextmanager
def gradient_over(backend, folder, *, longest=50, **how):
    """The Gradient wire over a backend, a tuner and an empty database."""
    database = Database(f"sqlite:///{folder / 'gradient.sqlite'}")
    how = {"tuner": FakeTuner(backend)} | how
    config = GradientConfig(default_lr=3e-4, longest=longest)
    try:
        yield GradientRoutes(backend, config, records=StoredGradient(database), once=Once(database), **how)
    finally:
        database.close()


def known_adapter(wire, tenant, workspace):
    """The id of an adapter that the backend has from the start."""
    record = GradientRecord(
        id="a" * 36 + "_model_adapter",
        tenant=tenant,
        workspace=workspace,
        adapter="support",
        base=wire.base_id,
        settings={"name": "support", "lr": 0.1, "weight_decay": 0.0, "clip": 1.0},
        created_s=1.0,
        updated_s=1.0,
    )
    wire._records.insert(record)
    return record.id
