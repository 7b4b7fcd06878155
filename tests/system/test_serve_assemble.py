"""The server as `jaxlora serve` builds it: PEFT folders under names, addresses, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from base_shapes import sized
from serve_world import World, random_weights

from jaxlora.checkpoints.load import Opened
from jaxlora.config.base import ModelSection
from jaxlora.config.serving import AdapterSection, ServeConfig, SlotSize, Tuning
from jaxlora.core.errors import AdapterInvalid, InvalidRequest
from jaxlora.core.lora import AdapterWeights, LoraSpec
from jaxlora.peft.folder import export_peft
from jaxlora.storage.adapter_store import AdapterStore
from serve.server import uvicorn
from serve.server.app import make_http
from serve.server.build import load_all, load_peft, make_runner, stop, with_store_classes
from serve.server.gate import AppConfig
from serve.server.uvicorn import HttpServer

pytest_plugins = ["serve_fixtures"]


@pytest.fixture
def opened(world) -> Opened:
    return world.opened()


@pytest.fixture
def runner(opened, tmp_path):
    """A server that is not started, over a store of its own."""
    store = AdapterStore(tmp_path / "store", host_bytes=10**8)
    yield make_runner(opened, sized(ServeConfig(model=ModelSection(path="tiny"), kv_pages=8)), store)
    store.close()


def export(world: World, adapter, folder: Path) -> Path:
    export_peft(adapter, folder, world.base.config, base_name="org/base")
    return folder


def test_a_request_is_as_long_as_the_fewest_pages_hold(opened, tmp_path):
    config = sized(ServeConfig(model=ModelSection(path="tiny"), slots=2, max_rank=2, kv_pages=64, page_tokens=4))
    sizes = (SlotSize(slots=2, pages=64), SlotSize(slots=4, pages=10))
    store = AdapterStore(tmp_path / "sizes", host_bytes=10**8)
    engine = make_runner(opened, dataclasses.replace(config, slot_sizes=(2, 4), sizes=sizes), store).engine
    assert (engine.sizes, engine.size) == (sizes, sizes[0])
    assert engine.config.max_tokens == 40 < opened.base.config.context
    store.close()


# --- classes of slots from the store


def test_slots_that_the_plan_chose_are_divided_by_the_ranks_in_the_store(opened, tmp_path, caplog):
    """In the memory of the plan; a restart chooses anew; pins that no class could hold keep one class."""
    config = sized(ServeConfig(model=ModelSection(path="tiny"), max_rank=16, kv_pages=8))
    by_store = dataclasses.replace(config, classes_from_store=True)
    c, pinning = opened.base.config, dataclasses.replace(by_store, tuning=Tuning(pin=("a", "b"), active_slots=4))
    with contextlib.closing(AdapterStore(tmp_path / "store", host_bytes=10**8)) as store:
        assert with_store_classes(by_store, opened, store).rank_classes == config.rank_classes  # it is empty
        for i in range(30):
            spec = LoraSpec(rank=3 if i else 16, alpha=1.0, targets=("q_proj",))
            weights = random_weights(c, spec.rank, spec.targets, seed=i)
            store.add("acme", f"a{i}", AdapterWeights(spec=spec, base_hash=opened.base_hash, weights=weights))
        with caplog.at_level("INFO", logger="serve"):
            chosen = with_store_classes(by_store, opened, store)
        assert [rank for _, rank in chosen.rank_classes] == [16, 4]
        told = " and ".join(f"{slots} of rank {rank}" for slots, rank in chosen.rank_classes)
        assert f"slots: {told}, by the ranks of the 30 adapters in the store" in caplog.text
        assert with_store_classes(config, opened, store) == config
        assert with_store_classes(pinning, opened, store) == pinning
        engines = [make_runner(opened, it, store).engine for it in (config, chosen)]
        one, several = (sum(x.nbytes for x in jax.tree.leaves(engine._pool)) for engine in engines)
        assert 0.9 * one < several <= one
        assert engines[1].slots.count > 2 * engines[0].slots.count
        assert {engines[1].scheduler.active.home(ref) for ref in store.list(None)} == {16, 4}


# --- [[load]]


def test_a_folder_becomes_a_version_and_a_changed_one_the_next(world, opened, runner, tmp_path):
    first = AdapterSection(name="bot", path=export(world, world.adapters[0], tmp_path / "one"))
    second = AdapterSection(name="bot", path=export(world, world.adapters[2], tmp_path / "two"))
    assert [load_peft(runner, opened, s).version for s in (first, first, second, second, first)] == [1, 1, 2, 2, 3]
    assert runner.resolve(None, "bot").version == 3


def test_what_an_import_notes_is_told(world, opened, runner, tmp_path, caplog):
    folder = export(world, world.adapters[0], tmp_path / "out")
    load_peft(runner, opened, AdapterSection(name="known", path=folder))
    assert "base" not in caplog.text
    (folder / "jaxlora.json").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"eva_config": {"rho": 2.0}}))
    load_peft(runner, opened, AdapterSection(name="strange", path=folder))
    assert "adapter strange: the file does not record its base" in caplog.text
    told = next(r.getMessage() for r in caplog.records if "no effect" in r.getMessage() and "strange" in r.getMessage())
    assert "eva_config" in told


def test_the_name_of_the_base_is_refused_before_anything_is_read(opened, runner, tmp_path):
    with pytest.raises(InvalidRequest, match="tiny is the base model; give the adapter another name"):
        load_peft(runner, opened, AdapterSection(name="tiny", path=tmp_path / "nowhere"))


def test_every_folder_that_does_not_fit_is_told_at_once(world, opened, runner, tmp_path, capsys):
    sections = [
        AdapterSection(name=n, path=export(world, world.adapters[0], tmp_path / n)) for n in ("dora", "good", "rank")
    ]
    for section, change in zip(sections, ({"use_dora": True, "bias": "all"}, {}, {"r": 5}), strict=True):
        config = json.loads((section.path / "adapter_config.json").read_text())
        (section.path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(AdapterInvalid) as caught:
        load_all(runner, opened, sections, at=[].append)
    dora, _, rank = (f"[[load]] {s.name} ({s.path})" for s in sections)
    assert caught.value.message == (
        f"{dora}: adapter refused: DoRA adapters are not supported (use_dora); trained biases are not supported "
        "(bias=all); so are 1 more of [[load]]"
    )
    assert caught.value.details[0] == f"{dora}: DoRA adapters are not supported (use_dora)"
    assert {d.partition(": ")[0] for d in caught.value.details} == {dora, rank}
    assert all("tensors have rank 3, config says 5" in d for d in caught.value.details[2:])
    assert capsys.readouterr().out == "loaded good as version 1\n"


# --- addresses


def test_small_writes_are_sent_at_once():
    """asyncio switches Nagle's algorithm off on connections that it knows to be TCP."""

    async def accepted() -> int:
        found = asyncio.get_running_loop().create_future()

        def connected(reader, writer):
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listening = uvicorn.bound("127.0.0.1", 0)
        async with await asyncio.start_server(connected, sock=listening):
            _, writer = await asyncio.open_connection(*listening.getsockname())
            writer.close()
            return await found

    assert asyncio.run(accepted()) != 0


class FakeSocket:
    """Remembers where it was bound; not every machine has IPv6."""

    def __init__(self, family, *_):
        self.family, self.address = family, None

    def setsockopt(self, *_):
        pass

    def bind(self, address):
        self.address = address

    def getsockname(self):
        return (*self.address, 0, 0) if self.family == socket.AF_INET6 else self.address


@pytest.mark.parametrize(
    ("host", "family", "bound", "url"),
    [
        ("127.0.0.1", socket.AF_INET, "127.0.0.1", "http://127.0.0.1:8123"),
        ("::1", socket.AF_INET6, "::1", "http://[::1]:8123"),
        ("[::1]", socket.AF_INET6, "::1", "http://[::1]:8123"),
    ],
)
def test_an_address_with_colons_stands_in_brackets(runner, monkeypatch, host, family, bound, url):
    names = ("AF_INET", "AF_INET6", "SOCK_STREAM", "IPPROTO_TCP", "SOL_SOCKET", "SO_REUSEADDR")
    fakes = {k: getattr(socket, k) for k in names}
    monkeypatch.setattr(uvicorn, "socket", SimpleNamespace(socket=FakeSocket, **fakes))
    config = AppConfig(default_max_tokens=4, max_request_s=9.0)
    http = make_http(runner, config, listening=uvicorn.bound(host, 8123), grace_s=1.0)
    assert isinstance(http, HttpServer)
    assert (http.listening.family, http.listening.address) == (family, (bound, 8123))
    assert http.url == url


# --- the end


def test_the_store_is_closed_though_the_runner_fails(runner, monkeypatch):
    store, closed = runner.engine.store, []
    monkeypatch.setattr(store, "close", lambda: closed.append(True))
    monkeypatch.setattr(runner, "stop", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stop(runner, store)
    assert closed == [True]
