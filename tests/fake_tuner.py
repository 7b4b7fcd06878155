"""A tuner without a model: what it was asked is on record, its losses fall, and a house knows its adapters."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import numpy as np

from jaxlora.errors import AdapterInvalid, AdapterNotFinite, AdapterNotFound
from jaxlora.lora import AdapterRef

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

    house: object
    failure: Exception | None = None
    hold: asyncio.Event | None = None  # a call waits for it
    created: list = field(default_factory=list)
    calls: list = field(default_factory=list)

    async def create(self, tenant, name, spec, seed):
        if spec.rank > MAX_RANK:
            raise AdapterInvalid(f"rank {spec.rank}, at most {MAX_RANK}")
        if self.failure is not None:
            raise self.failure
        self.created.append((tenant, name, spec, seed))
        self.house.adapters[name] = 1
        return AdapterRef(tenant, name, 1)

    async def fine_tune(self, tenant, name, examples, optimizer):
        if name not in self.house.adapters:
            raise AdapterNotFound("no adapter of that name")
        if self.hold is not None:
            await self.hold.wait()
        if self.failure is not None:
            raise self.failure
        if any(np.abs(e.weights).max() > 1e20 for e in examples):
            raise AdapterNotFinite("the loss or its gradient is not finite; nothing was changed")
        self.calls.append((tenant, name, list(examples), optimizer))
        self.house.adapters[name] += 1
        version = self.house.adapters[name]
        tokens = sum(int(np.count_nonzero(e.weights)) for e in examples)
        return Tuned(tokens, 6.0 * tokens / version, AdapterRef(tenant, name, version))

    async def delete(self, tenant, name):
        if self.house.adapters.pop(name, None) is None:
            raise AdapterNotFound("no adapter of that name")
