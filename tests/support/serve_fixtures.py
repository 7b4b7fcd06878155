"""The world and a fresh engine for each test: `pytest_plugins = ["serve_fixtures"]`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serve_world import BASE, MODEL, RANK, SLOTS, PlainModel, World, check_idle, settle
from small_world import tiny_path

from jaxlora.checkpoints.load import base_hash, open_model
from jaxlora.core.lora import ALL_TARGETS, ATTENTION_TARGETS
from jaxlora.model.decoder import load_base
from jaxlora.model.lora_pool import PoolSpec
from jaxlora.model.mesh import make_mesh
from jaxlora.storage.adapter_store import AdapterStore
from serve.engine.engine import Engine
from serve.runtime.device_thread import DeviceThread


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Iterator[World]:
    """The tiny model in float32, five adapters of ranks 1 to 6 (the pool's limit), and a store."""
    source, tokenizer = open_model(tiny_path(MODEL))
    mesh = make_mesh()
    base = load_base(source, mesh, dtype="float32")
    store = AdapterStore(tmp_path_factory.mktemp("store"), host_bytes=10**8)
    spec = PoolSpec(slots=SLOTS, rank=RANK, dtype="float32", targets=ALL_TARGETS)
    it = World(source, base, mesh, tokenizer, base_hash(tiny_path(MODEL)), store, PlainModel(source), [], spec)
    shapes = [(3, ALL_TARGETS), (1, ATTENTION_TARGETS), (6, ALL_TARGETS), (2, ("q_proj",)), (4, ("lm_head", "up_proj"))]
    it.adapters += [it.add(f"bot{i}", i, rank, targets) for i, (rank, targets) in enumerate(shapes)]
    yield it
    store.close()


@pytest.fixture
def engine(world) -> Iterator[Engine]:
    """A fresh engine, checked to hold nothing at the end."""
    it = world.engine()
    yield it
    check_idle(it)


@pytest.fixture
def runner(world) -> Iterator[DeviceThread]:
    """A running server; at the end nothing may be held for anybody."""
    it = DeviceThread(world.engine(), base_name=BASE)
    it.start()
    yield it
    settle(it)
    it.stop()
    check_idle(it.engine)
