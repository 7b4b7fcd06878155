"""The adapters of a running server: publishing, pruning, names and the list of models."""

from __future__ import annotations

import json
import threading
import time

import jax
import numpy as np
import pytest
from serve_world import BASE, World, ask

from jaxlora.core.errors import AdapterNotFinite, AdapterNotFound, InvalidRequest, StorageFailed
from jaxlora.core.lora import AdapterRef
from jaxlora.storage import version_files
from jaxlora.storage.adapter_files import load_version
from jaxlora.storage.adapter_store import AdapterStore
from serve.runtime.device_thread import DeviceThread

pytest_plugins = ["serve_fixtures"]

# --- publish


def test_a_published_version_is_on_disk_later(world, runner, tmp_path):
    adapter = world.add("source", seed=80)
    ref = runner.call(lambda: runner.publisher.publish("acme", "kept", adapter.spec, world.device_rows(adapter)))
    assert ref == AdapterRef("acme", "kept", 1)
    world.store.flush()
    stored, _ = load_version(world.store._files._root / "adapters/acme/kept", ref)
    assert stored.base_hash == world.base_hash
    for target, pair in adapter.weights.items():
        for x, y in zip(stored.weights[target], pair, strict=True):
            np.testing.assert_array_equal(x, y)


def test_publishing_waits_for_no_storage(world, runner, monkeypatch):
    blocked, save = threading.Event(), version_files.save_version
    monkeypatch.setattr(version_files, "save_version", lambda *a: blocked.wait(20) and save(*a))
    adapter = world.adapters[0]
    rows = world.device_rows(adapter)
    ref = runner.call(lambda: runner.publisher.publish("acme", "unsaved", adapter.spec, rows))
    request = ask("r", ref, 5, 8)
    assert runner.complete([request])[0].tokens == world.plain.greedy(request.prompt, 8, adapter)
    assert not (world.store._files._root / "adapters/acme/unsaved/1").exists()
    blocked.set()
    world.store.flush()
    assert (world.store._files._root / "adapters/acme/unsaved/1").exists()


@pytest.mark.fault("A2")
def test_weights_that_are_not_finite_are_never_published(world, runner):
    good = world.add("careful", seed=90)
    rows = world.device_rows(good)
    spoilt = dict(rows) | {"q_proj": jax.tree.map(lambda x: x.at[..., 0].set(np.inf), rows["q_proj"])}
    with pytest.raises(AdapterNotFinite):
        runner.call(lambda: runner.publisher.publish("acme", "careful", good.spec, spoilt))
    assert runner.resolve(None, "careful") == good.ref
    assert world.store.versions("acme", "careful") == [good.ref]


# --- names


@pytest.fixture(scope="module")
def named(world, tmp_path_factory):
    """A server of three adapters of two tenants over a store of its own; never started."""
    store = AdapterStore(tmp_path_factory.mktemp("named"), host_bytes=10**8)
    mine = World(**(vars(world) | {"store": store}))
    for tenant, name, count in (("acme", "bot", 3), ("acme", "twin", 1), ("zoo", "twin", 2)):
        for i in range(count):
            store.add(tenant, name, world.adapters[i])
    yield DeviceThread(mine.engine(), base_name=BASE)
    store.close()


@pytest.mark.parametrize(
    ("tenant", "model", "found"),
    [
        (None, BASE, None),
        ("acme", BASE, None),
        (None, "bot", AdapterRef("acme", "bot", 3)),
        (None, "bot@2", AdapterRef("acme", "bot", 2)),
        (None, "bot@3", AdapterRef("acme", "bot", 3)),
        (None, "acme/bot", AdapterRef("acme", "bot", 3)),
        (None, "acme/bot@1", AdapterRef("acme", "bot", 1)),
        (None, "zoo/twin", AdapterRef("zoo", "twin", 2)),
        ("acme", "twin", AdapterRef("acme", "twin", 1)),
        ("zoo", "twin", AdapterRef("zoo", "twin", 2)),
        ("zoo", "zoo/twin@1", AdapterRef("zoo", "twin", 1)),
    ],
)
def test_a_name_means_a_version(named, tenant, model, found):
    assert named.resolve(tenant, model) == found


@pytest.mark.parametrize(
    ("tenant", "model"),
    [
        (None, "nobody"),
        (None, "bot@4"),
        (None, "bot@0"),
        (None, "bot@02"),
        (None, "bot@"),
        (None, "bot@x"),
        (None, "bot@1@1"),
        (None, "/bot"),
        (None, "zoo/bot"),
        (None, "x/acme/bot"),
        (None, "../bot"),
        (None, "BOT"),
        (None, ""),
        (None, "\0"),
        (None, BASE + "@1"),
        ("zoo", "bot"),
        ("zoo", "acme/bot"),
        ("zoo", "acme/twin"),
        ("stranger", "bot"),
    ],
)
def test_an_unknown_name_and_anothers_are_the_same_error(named, tenant, model):
    with pytest.raises(AdapterNotFound) as caught:
        named.resolve(tenant, model)
    assert str(caught.value) == f"The model `{model}` does not exist."
    with pytest.raises(AdapterNotFound):
        named.model(tenant, model)


def test_a_name_that_two_tenants_have_asks_for_the_tenant(named):
    for model in ("twin", "twin@1"):
        with pytest.raises(AdapterNotFound, match=r"several tenants .* TENANT/twin"):
            named.resolve(None, model)


def test_models_are_the_base_and_what_the_tenant_may_see(named):
    base, *cards = named.models(None)
    assert (base.id, base.state, base.rank, base.version, base.parent) == (BASE, "base", None, None, None)
    assert [c.id for c in cards] == ["bot", "acme/twin", "zoo/twin"]
    assert [(c.root, c.owned_by, c.version, c.rank, c.parent) for c in cards] == [
        ("bot", "acme", 3, 6, BASE),
        ("twin", "acme", 1, 3, BASE),
        ("twin", "zoo", 2, 1, BASE),
    ]
    assert [c.id for c in named.models("zoo")] == [BASE, "twin"]
    assert [c.id for c in named.models("stranger")] == [BASE]
    for card in cards:
        assert named.resolve(None, card.id) == AdapterRef(card.owned_by, card.root, card.version)
        assert abs(card.created - time.time()) < 100
    assert named.model("acme", "bot@2").id == "bot@2"
    assert named.model("acme", "bot@2").rank == 1
    assert named.model(None, BASE) == base


def test_a_card_says_where_the_weights_are(named):
    store, ref = named.engine.store, named.resolve(None, "bot")
    assert named.model(None, "bot").state == "host"
    store.flush()
    with store._state:
        store._ram.forget(ref)
    assert named.model(None, "bot").state == "disk"
    named.engine.slots.place(0, ref)
    assert named.model(None, "bot").state == "device"
    assert named.model(None, "bot@2").state == "host"


# --- pruning


def test_old_versions_leave_and_those_in_use_stay(world, runner):
    """Six publications of one name with keep = 2, under a request that uses the first version."""
    rows = [world.device_rows(world.adapters[i % 2]) for i in range(6)]
    spec = world.adapters[0].spec

    def publish(i):
        return runner.call(lambda: runner.publisher.publish("acme", "kept-short", spec, rows[i], keep=2))

    refs = [publish(0)]
    request = ask("long", refs[0], 4, 60)
    gate, step = threading.Event(), runner.engine.step
    runner.engine.step = lambda deliver: step(deliver) if gate.is_set() else []  # it is under way until we say so
    runner.call(lambda: runner.admit(request, lambda _delta: None))
    refs += [publish(i) for i in range(1, 5)]
    assert world.store.versions("acme", "kept-short") == [refs[0], *refs[3:]]
    gate.set()
    runner.complete([ask("end", None, 4, 60), ask("end2", None, 4, 60)])
    while runner.call(lambda: runner.engine.has_work):
        time.sleep(0.001)
    refs.append(publish(5))
    assert world.store.versions("acme", "kept-short") == refs[-2:]
    assert runner.call(lambda: [runner.engine.slots.find(r) is not None for r in refs]) == [False] * 4 + [True] * 2
    world.store.flush()
    assert sorted(p.name for p in (world.store._files._root / "adapters/acme/kept-short").iterdir()) == ["5", "6"]


# --- what cannot be read


@pytest.mark.parametrize("kind", ["damaged", "undated"])
def test_a_version_that_cannot_be_read_is_not_listed_and_hides_nobody(world, tmp_path, caplog, kind):
    store = AdapterStore(tmp_path, host_bytes=10**8)
    mine = World(**(vars(world) | {"store": store}))
    for name in ("good", "bad", "better"):
        mine.add(name, seed=1)
    store.close()
    path = tmp_path / "adapters/acme/bad/1/meta/metadata"
    meta = json.loads(path.read_text())
    del meta["created"]
    path.write_text("{" if kind == "damaged" else json.dumps(meta))
    mine.store = store = AdapterStore(tmp_path, host_bytes=10**8)
    runner = DeviceThread(mine.engine(), base_name=BASE)
    assert [card.id for card in runner.models(None)] == [BASE, "better", "good"]
    assert "not listed: acme/bad@1" in caplog.text
    with pytest.raises(StorageFailed, match="acme/bad@1"):
        runner.model(None, "bad")
    store.close()


def test_an_adapter_deleted_during_the_listing_is_left_out(world, tmp_path, monkeypatch):
    store = AdapterStore(tmp_path, host_bytes=10**8)
    mine = World(**(vars(world) | {"store": store}))
    for name in ("goes", "stays"):
        mine.add(name, seed=1)
    runner = DeviceThread(mine.engine(), base_name=BASE)
    created = store.created

    def slow(ref):
        if ref.name == "goes":
            store.delete("acme", "goes")
        return created(ref)

    monkeypatch.setattr(store, "created", slow)
    assert [card.id for card in runner.models(None)] == [BASE, "stays"]
    store.close()


# --- the base's name


@pytest.mark.parametrize(("base", "tenant", "name"), [("tiny", "acme", "tiny"), ("acme/tiny", "acme", "tiny")])
def test_an_adapter_that_nobody_could_ask_for_is_not_published(world, base, tenant, name):
    runner = DeviceThread(world.engine(), base_name=base)
    adapter = world.adapters[0]
    with pytest.raises(InvalidRequest, match=f"{base} is the base model"):
        runner.publisher.publish(tenant, name, adapter.spec, world.device_rows(adapter))
    assert world.store.latest(tenant, name) is None
