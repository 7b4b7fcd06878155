"""The demo model loaded and compiled once for a session: `pytest_plugins = ["smollm2_fixtures"]`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from smollm2_world import CONFIG, RANK, SHAPES, SLOTS, Smol, random_adapter

from jaxlora.checkpoints.load import open_base
from jaxlora.config.base import MeshSection, ModelSection
from jaxlora.core.lora import ALL_TARGETS
from jaxlora.model.lora_pool import PoolSpec
from jaxlora.storage.adapter_store import AdapterStore
from serve.engine.engine import Engine


@pytest.fixture(scope="session")
def smol(tmp_path_factory) -> Iterator[Smol]:
    """The base, and an adapter of each shape in a store."""
    opened = open_base(ModelSection(path="smollm2", dtype="float32"), MeshSection(data=1, fsdp=1, tensor=1))
    store = AdapterStore(tmp_path_factory.mktemp("smollm2"), host_bytes=10**9)
    adapters = []
    for i, (rank, targets) in enumerate(SHAPES):
        adapter = random_adapter(opened, f"tenant{i}", rank, targets, seed=i)
        assert store.add("local", f"tenant{i}", adapter) == adapter.ref
        adapters.append(adapter)
    yield Smol(opened, store, adapters)
    store.close()


@pytest.fixture(scope="session")
def smol_engine(smol) -> Iterator[Engine]:
    """An engine over them, warm, for one user at a time."""
    spec = PoolSpec(slots=SLOTS, rank=RANK, dtype="float32", targets=ALL_TARGETS)
    o = smol.opened
    engine = Engine(o.base, o.mesh, CONFIG, spec, smol.store, o.tokenizer, o.base_hash)
    engine.warm_up()
    yield engine
    assert not engine.has_work
    engine.scheduler.check()
