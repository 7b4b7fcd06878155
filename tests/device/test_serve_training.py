"""Training beside serving: what one tenant's publication meets is that tenant's alone."""

from __future__ import annotations

import time

import jax
import numpy as np
import pytest
from serve_world import RANK, ask

from jaxlora.config.training import Optimizer
from jaxlora.core.errors import StorageFailed
from jaxlora.core.lora import LoraSpec
from jaxlora.model.lora_pool import PoolSpec
from serve.runtime.device_thread import DeviceThread
from serve.runtime.live_training import KEEP_VERSIONS, LiveTraining
from train.data.examples import Example
from train.trainer import Trainer

pytest_plugins = ["serve_fixtures"]
TENANTS = ("ant", "bee", "cat")
STEPS, PUBLISH_EVERY = 8, 2


class Record:
    """A server that is not started, a trainer of three tenants, and what the callbacks heard."""

    def __init__(self, world, tmp_name: str):
        self.names = [f"{tmp_name}-{t}" for t in TENANTS]
        self.runner = DeviceThread(world.engine(), base_name="owner/tiny")
        spec = PoolSpec(slots=3, rank=RANK, dtype="float32", targets=("q_proj",))
        self.trainer = Trainer(world.base, world.mesh, [spec], lanes=3, lane_tokens=16, base_hash=world.base_hash)
        self.published: list[tuple[str, int]] = []
        self.on_step = lambda _reports: None
        self.live = LiveTraining(
            self.trainer,
            self.runner.publisher,
            publish_every=PUBLISH_EVERY,
            on_step=lambda reports: self.on_step(reports),
            on_publish=lambda ref, step: self.published.append((ref.name, step)),
        )
        for i, name in enumerate(self.names):
            tokens = np.random.default_rng(i).integers(4, 300, 8).astype(np.int32)
            self.trainer.add(
                name,
                LoraSpec(rank=2, alpha=4.0, targets=("q_proj",)),
                Optimizer(lr=0.01, total_steps=STEPS, warmup_steps=0),
                [Example(tokens, np.float32([0] + [1] * 7))],
                batch_size=1,
                seed=i,
            )

    def steps_of(self, name: str) -> list[int]:
        return [step for n, step in self.published if n == name]


@pytest.fixture
def record(world, request):
    return Record(world, request.node.originalname.removeprefix("test_").replace("_", "-")[:50].strip("-"))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), StorageFailed("the counter is damaged")])
def test_a_publication_that_storage_refuses_is_tried_again_and_stops_nobody(record, monkeypatch, caplog, error):
    victim, *others = record.names
    store = record.runner.engine.store
    mint, broken = store.mint, True

    def refuse(tenant, name):
        if name == victim and broken:
            raise error
        return mint(tenant, name)

    monkeypatch.setattr(store, "mint", refuse)
    for _ in range(PUBLISH_EVERY):
        record.live.step()
    assert record.steps_of(victim) == []
    assert [record.steps_of(n) for n in others] == [[2], [2]]
    assert f"tenant {victim} is not published at step 2" in caplog.text
    assert record.trainer.tenants[victim].status == "running"
    broken = False
    while record.live.has_work:
        record.live.step()
    assert record.steps_of(victim) == [4, 6, 8]
    assert [record.steps_of(n) for n in others] == [[2, 4, 6, 8]] * 2
    assert [len(store.versions(n, n)) for n in others] == [KEEP_VERSIONS] * 2


def test_a_last_version_that_storage_refused_comes_with_the_next_publication(record, monkeypatch):
    victim, other, _ = record.names
    record.trainer.tenants[victim].optimizer = Optimizer(lr=0.01, total_steps=1, warmup_steps=0)
    mint = record.runner.engine.store.mint
    refused = iter([True])

    def refuse_once(tenant, name):
        if name == victim and next(refused, False):
            raise OSError("disk full")
        return mint(tenant, name)

    monkeypatch.setattr(record.runner.engine.store, "mint", refuse_once)
    record.live.step()
    assert record.trainer.tenants[victim].status == "done"
    assert record.published == []
    record.live.step()
    assert record.steps_of(victim) == [1]
    assert record.steps_of(other) == [2]


def test_the_device_thread_outlives_a_full_disk(world, record, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(record.runner.engine.store, "mint", full)
    record.runner.start()
    record.runner.call(lambda: setattr(record.runner, "trainer", record.live))
    while record.runner.call(lambda: record.live.has_work):
        time.sleep(0.001)
    request = ask("after", world.adapters[0], 4, 4)
    assert record.runner.complete([request])[0].tokens == world.greedy(request)
    assert record.runner.health() == "ok"
    record.runner.stop()


def test_a_tenant_that_failed_is_not_published(record):
    victim, *others = record.names
    reports = []

    def fail_now(news):
        reports.extend(r.tenant for r in news)
        if len(reports) <= len(TENANTS):
            record.trainer.fail(victim, "its updates were not finite")

    record.on_step = fail_now
    while record.live.has_work:
        record.live.step()
    assert reports.count(victim) == 1
    assert record.steps_of(victim) == []
    assert [record.steps_of(n) for n in others] == [[2, 4, 6, 8]] * 2
    assert record.trainer.tenants[victim].failure == "its updates were not finite"


def test_a_tenant_with_a_nan_leaves_the_training_at_once(record, monkeypatch):
    victim, *others = record.names
    rows = record.trainer.rows

    def spoilt(name):
        good = rows(name)
        return jax.tree.map(lambda x: x * np.nan, good) if name == victim else good

    monkeypatch.setattr(record.trainer, "rows", spoilt)
    reports = []
    record.on_step = lambda news: reports.extend(r.tenant for r in news)
    for _ in range(PUBLISH_EVERY):
        record.live.step()
    tenant = record.trainer.tenants[victim]
    assert (tenant.status, "non-finite" in tenant.failure) == ("failed", True)
    record.trainer.remove(victim)  # its seat is free, and no step looks for it
    while record.live.has_work:
        record.live.step()
    assert reports.count(victim) == PUBLISH_EVERY
    assert record.steps_of(victim) == []
    assert [record.steps_of(n) for n in others] == [[2, 4, 6, 8]] * 2
