"""The adapters' wire over a real store and no engine: what a device thread would do is done at once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import peft_world

from jaxlora.lora import ALL_TARGETS
from jaxlora.pool import PoolSpec
from jaxlora.serve_config import Tuning
from jaxlora.slots import SlotTable
from jaxlora.store import AdapterStore
from serve.adapters import AdapterService
from serve.adapters_api import AdaptersWire
from serve.catalog import Catalog


class FakeRunner:
    """What AdapterService asks of a runner."""

    def __init__(self, store: AdapterStore, base_name: str):
        spec = PoolSpec(slots=2, rank=8, dtype="float32", targets=ALL_TARGETS)
        nothing = {"announce": lambda ref: None, "release": lambda ref: True}
        self.engine = SimpleNamespace(store=store, pool_spec=spec, base_hash="sha256:base", **nothing)
        self.catalog = Catalog(store, SlotTable(2), base_name, 0.0)
        self.resolve, self.model = self.catalog.resolve, self.catalog.model
        self.base_name, self.tuning = base_name, Tuning(quantum_ms=1.0)

    def call(self, work):
        return work()

    def tune(self, tuning):
        tuning.check_fits(2, 1)
        self.tuning = tuning


def fake_adapters(base_name: str, folder: Path) -> AdaptersWire:
    """The wire over an empty store in `folder`, for adapters of the llama base of the PEFT fixtures."""
    service = AdapterService(
        FakeRunner(AdapterStore(folder / "store", host_bytes=10**7), base_name),
        config=peft_world.base_config("llama"),
        read_head=lambda: peft_world.base_head("llama"),
        staging=folder / "staging",
        roots=[folder],
        check_quota=lambda tenant: None,
    )
    return AdaptersWire(service)
