"""AdapterStore: immutable versions, available at once, on disk later, visible only when complete."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxlora import store as store_module
from jaxlora.errors import AdapterNotFinite, AdapterNotFound, AlreadyExists, InvalidRequest, StateInvalid, StorageFailed
from jaxlora.lora import Adapter, AdapterRef, LoraSpec, ModuleException
from jaxlora.store import AdapterStore

SPEC = LoraSpec(
    rank=4,
    alpha=8.5,
    targets=("q_proj", "lm_head"),
    rslora=True,
    exceptions=(ModuleException(target="q_proj", layer=1, rank=2, alpha=3.0),),
)
LARGE = 10**9


def make(ref: AdapterRef, value: float | None = None) -> Adapter:
    random = np.random.default_rng(ref.version)
    shapes = {"q_proj": ((2, 4, 16), (2, 4, 24)), "lm_head": ((1, 4, 16), (1, 4, 40))}
    weights = {
        target: tuple(
            random.normal(size=s).astype(np.float32) if value is None else np.full(s, value, np.float32) for s in pair
        )
        for target, pair in shapes.items()
    }
    return Adapter(ref=ref, spec=SPEC, base_hash="sha256:base", weights=weights)


def same(x: Adapter, y: Adapter) -> bool:
    return (x.ref, x.spec, x.base_hash, sorted(x.weights)) == (y.ref, y.spec, y.base_hash, sorted(y.weights)) and all(
        p.tobytes() == q.tobytes() and p.shape == q.shape and p.dtype == q.dtype
        for target in x.weights
        for p, q in zip(x.weights[target], y.weights[target], strict=True)
    )


@pytest.fixture
def open_store(tmp_path):
    """A function that opens the store of this test; all are closed at the end."""
    opened = []

    def open_(host_bytes: int = LARGE) -> AdapterStore:
        opened.append(AdapterStore(tmp_path, host_bytes=host_bytes))
        return opened[-1]

    yield open_
    for store in opened:
        try:
            store.close()
        except StorageFailed:
            assert store.last_error is not None


def put(store: AdapterStore, tenant="acme", name="bot", value: float | None = None) -> Adapter:
    adapter = make(store.mint(tenant, name), value)
    store.put(adapter)
    return adapter


def test_put_then_get_before_and_after_restart(open_store):
    store = open_store()
    before = time.time()
    adapters = [put(store) for _ in range(3)]
    assert all(store.get(a.ref) is not None and same(store.get(a.ref), a) for a in adapters)
    store.close()
    again = open_store()
    assert again.versions("acme", "bot") == [a.ref for a in adapters]
    assert again.latest("acme", "bot") == adapters[-1].ref
    for adapter in adapters:
        assert same(again.get(adapter.ref), adapter)
        assert before <= again.created(adapter.ref) == store.created(adapter.ref) <= time.time()


def test_created_needs_no_weights(open_store, tmp_path):
    store = open_store()
    ref = put(store).ref
    store.close()
    for path in (tmp_path / "adapters/acme/bot/1/weights").rglob("*"):
        if path.is_file():
            path.unlink()
    assert open_store().created(ref) == store.created(ref)


def test_rank_needs_no_weights(open_store, tmp_path, monkeypatch):
    store = open_store()
    ref = put(store).ref
    assert store.rank(ref) == SPEC.max_rank == 4
    store.close()
    for path in (tmp_path / "adapters/acme/bot/1/weights").rglob("*"):
        if path.is_file():
            path.unlink()
    again = open_store()
    assert again.rank(ref) == 4
    monkeypatch.setattr(store_module, "read_meta", None)  # read once, then kept
    assert again.rank(ref) == 4


def test_rank_of_what_is_not_there(open_store, tmp_path):
    store = open_store()
    ref = put(store).ref
    with pytest.raises(AdapterNotFound):
        store.rank(replace(ref, version=2))
    store.delete("acme", "bot")
    with pytest.raises(AdapterNotFound):
        store.rank(ref)
    ref = put(store).ref
    store.close()
    path = tmp_path / f"adapters/acme/bot/{ref.version}/meta/metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"spec": {"rank": 4}}))
    with pytest.raises(StorageFailed, match="specification"):
        open_store().rank(ref)


def test_in_memory_is_whether_get_needs_no_disk(open_store):
    store = open_store(host_bytes=1)
    ref = put(store).ref
    store.flush()
    assert not store.in_memory(ref)  # saved, and over the bound
    assert not store.in_memory(replace(ref, version=9))
    store.close()
    again = open_store()
    assert not again.in_memory(ref)
    again.get(ref)
    assert again.in_memory(ref)


def test_list_and_versions_by_tenant(open_store):
    store = open_store()
    for tenant, name in (("acme", "b"), ("acme", "a"), ("zoo", "a"), ("acme", "a")):
        put(store, tenant, name)
    assert [str(r) for r in store.list("acme")] == ["acme/a@2", "acme/b@1"]
    assert [str(r) for r in store.list(None)] == ["acme/a@2", "acme/b@1", "zoo/a@1"]
    assert store.list("nobody") == []
    assert store.latest("acme", "c") is None
    assert store.versions("acme", "c") == []


def test_numbers_are_never_reused(open_store):
    store = open_store()
    first = put(store)
    lost = store.mint("acme", "bot")
    store.flush()
    store.delete("acme", "bot")
    assert store.mint("acme", "bot").version == lost.version + 1 == 3
    store.close()
    again = open_store()
    assert again.mint("acme", "bot").version == 4
    assert again.latest("acme", "bot") is None
    for late in (first, make(lost)):
        with pytest.raises(StateInvalid, match="was deleted"):
            again.put(late)


def test_deleted_is_gone_at_once_and_the_name_is_free(open_store, tmp_path):
    store = open_store()
    old = put(store, value=1.0)
    other = put(store, name="other")
    store.flush()
    store.delete("acme", "bot")
    for call in (store.get, store.created):
        with pytest.raises(AdapterNotFound):
            call(old.ref)
    with pytest.raises(AdapterNotFound):
        store.delete("acme", "bot")
    new = put(store, value=2.0)
    assert same(store.get(new.ref), new)
    store.close()
    assert list((tmp_path / "trash").iterdir()) == []
    again = open_store()
    assert again.list(None) == [new.ref, other.ref]
    assert same(again.get(new.ref), new)
    assert sorted(p.name for p in (tmp_path / "adapters/acme/bot").iterdir()) == ["2"]


def test_delete_before_the_save_leaves_nothing(open_store, tmp_path, monkeypatch):
    gate = threading.Event()
    real = store_module.save_version

    def slow(*args):
        gate.wait(10)
        real(*args)

    monkeypatch.setattr(store_module, "save_version", slow)
    store = open_store()
    first = put(store, name="first")  # keeps the thread busy, and the disk lock
    put(store, name="second")
    deleter = threading.Thread(target=store.delete, args=("acme", "second"))
    deleter.start()
    gate.set()
    deleter.join(10)
    store.flush()
    assert store.list(None) == [first.ref]
    assert not (tmp_path / "adapters/acme/second").exists()


def test_put_serves_while_storage_is_blocked(open_store, monkeypatch):
    gate = threading.Event()
    real = store_module.save_version
    monkeypatch.setattr(store_module, "save_version", lambda *a: (gate.wait(10), real(*a)))
    store = open_store(host_bytes=0)
    ref = store.mint("acme", "bot")
    adapter = make(ref)
    started = time.monotonic()
    store.put(adapter)
    assert same(store.get(ref), adapter)
    assert store.latest("acme", "bot") == ref
    assert time.monotonic() - started < 1
    gate.set()
    store.flush()
    assert store._held_bytes == 0
    assert same(store.get(ref), adapter)


def test_failed_saves_stay_in_memory_and_are_reported(open_store, monkeypatch):
    broken = True
    real = store_module.save_version

    def save(*args):
        if broken:
            raise OSError("disk full")
        real(*args)

    monkeypatch.setattr(store_module, "save_version", save)
    store = open_store(host_bytes=0)
    adapter = put(store)
    with pytest.raises(StorageFailed, match=r"acme/bot@1.*disk full"):
        store.flush()
    assert str(store.last_error) == "disk full"
    assert same(store.get(adapter.ref), adapter)
    broken = False
    store.flush()
    assert store.last_error is None
    store.close()
    assert same(open_store().get(adapter.ref), adapter)


def test_close_reports_what_is_lost_and_may_come_twice(open_store, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(store_module, "save_version", fail)
    store = open_store()
    put(store)
    for _ in range(2):
        with pytest.raises(StorageFailed, match="disk full"):
            store.close()


def test_least_recently_used_leaves_first(open_store):
    size = make(AdapterRef("t", "n", 1)).nbytes
    store = open_store(host_bytes=2 * size)
    a, b = put(store, name="a"), put(store, name="b")
    store.flush()
    held_a = store.get(a.ref)
    c = put(store, name="c")
    store.flush()
    assert list(store._held) == [a.ref, c.ref]
    assert store.get(a.ref) is held_a
    assert same(store.get(b.ref), b)
    assert list(store._held) == [a.ref, b.ref]
    assert store._held_bytes == 2 * size


def test_many_askers_cause_one_load(open_store, monkeypatch):
    store = open_store(host_bytes=LARGE)
    adapter = put(store)
    store.close()
    again = open_store()
    loads = []
    real = store_module.load_version

    def load(*args):
        loads.append(args)
        time.sleep(0.2)
        return real(*args)

    monkeypatch.setattr(store_module, "load_version", load)
    got = []
    threads = [threading.Thread(target=lambda: got.append(again.get(adapter.ref))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1
    assert len(got) == 20
    assert all(g is got[0] for g in got)


def test_versions_never_change(open_store):
    store = open_store()
    adapter = put(store)
    with pytest.raises(AlreadyExists):
        store.put(make(adapter.ref, 1.0))
    with pytest.raises(ValueError, match="read-only"):
        adapter.weights["q_proj"][0][0, 0, 0] = 1.0
    store.close()
    loaded = open_store().get(adapter.ref)
    with pytest.raises(ValueError, match="read-only"):
        loaded.weights["q_proj"][1][0, 0, 0] = 1.0


def test_refused_puts_change_nothing(open_store):
    store = open_store()
    with pytest.raises(StateInvalid, match="never minted"):
        store.put(make(AdapterRef("acme", "bot", 1)))
    with pytest.raises(AdapterNotFinite):
        store.put(make(store.mint("acme", "bot"), float("nan")))
    with pytest.raises(InvalidRequest):
        store.mint("../x", "bot")
    assert store.list(None) == []
    store.close()
    with pytest.raises(StateInvalid, match="closed"):
        store.put(make(AdapterRef("acme", "bot", 1)))


def test_unknown_version(open_store):
    store = open_store()
    put(store)
    for ref in (AdapterRef("acme", "bot", 2), AdapterRef("zoo", "bot", 1)):
        with pytest.raises(AdapterNotFound):
            store.get(ref)


def saved_folder(open_store, tmp_path) -> tuple[AdapterRef, Path]:
    store = open_store()
    ref = put(store).ref
    store.close()
    return ref, tmp_path / "adapters/acme/bot/1"


def test_unknown_format_is_refused_by_name(open_store, tmp_path):
    ref, folder = saved_folder(open_store, tmp_path)
    path = folder / "meta" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 7}))
    with pytest.raises(StorageFailed, match=r"acme/bot@1 is stored in format 7; this build reads format 1"):
        open_store().get(ref)


def test_changed_description_is_found(open_store, tmp_path):
    ref, folder = saved_folder(open_store, tmp_path)
    path = folder / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["spec"]["alpha"] = 9.5
    path.write_text(json.dumps(meta))
    with pytest.raises(StorageFailed, match="do not match their checksum"):
        open_store().get(ref)
    path.write_text("{")
    with pytest.raises(StorageFailed, match="cannot be read"):
        open_store().get(ref)


# A read that fails leaves sibling reads of tensorstore without an event loop to report to; they say so on stderr.
@pytest.mark.filterwarnings("ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning")
def test_flipped_bytes_are_found_and_others_unharmed(open_store, tmp_path):
    store = open_store()
    refs = [put(store).ref, put(store).ref]
    store.close()
    for path in (tmp_path / "adapters/acme/bot/2/weights").rglob("*"):
        if path.is_file() and path.stat().st_size > 500:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 0x10
            path.write_bytes(data)
    again = open_store()
    with pytest.raises(StorageFailed):
        again.get(refs[1])
    assert same(again.get(refs[0]), make(refs[0]))
    time.sleep(0.3)  # so that the sibling reads end inside this test


def test_damaged_counter_is_refused_and_a_lost_one_is_safe(open_store, tmp_path):
    store = open_store()
    put(store), put(store)
    store.close()
    path = tmp_path / "counters/acme/bot.json"
    path.write_text("{")
    with pytest.raises(StorageFailed, match="version counter of acme/bot is damaged"):
        open_store().mint("acme", "bot")
    path.write_text(json.dumps({"format": 2, "minted": 2, "deleted": 0}))
    with pytest.raises(StorageFailed, match="format 2"):
        open_store().mint("acme", "bot")
    path.unlink()
    assert open_store().mint("acme", "bot").version == 3


def test_ten_thousand_adapters_list_from_folders_alone(tmp_path):
    for i in range(10_000):
        os.makedirs(tmp_path / "adapters" / f"t{i % 100}" / f"a{i}" / "1")
    os.makedirs(tmp_path / "adapters" / "t0" / "a0" / "2.orbax-checkpoint-tmp")
    os.makedirs(tmp_path / "adapters" / "t0" / ".strange" / "1")
    started = time.monotonic()
    store = AdapterStore(tmp_path, host_bytes=0)
    assert len(store.list(None)) == 10_000
    assert len(store.list("t7")) == 100
    assert store.versions("t0", "a0") == [AdapterRef("t0", "a0", 1)]
    assert time.monotonic() - started < 5
    store.close()


def test_many_threads(open_store):
    store = open_store(host_bytes=5_000)
    errors = []

    def work(name: str) -> None:
        try:
            for _ in range(3):
                adapter = put(store, name=name)
                assert same(store.get(adapter.ref), adapter)
                for ref in store.list(None):
                    store.get(ref)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(f"a{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    store.flush()
    assert store._held_bytes == sum(a.nbytes for a in store._held.values()) <= 5_000
    assert [r.version for r in store.list(None)] == [3] * 4


CHILD = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from test_jaxlora_store import put
from jaxlora.store import AdapterStore
store = AdapterStore(Path(sys.argv[1]), host_bytes=0)
while True:
    ref = put(store).ref
    if ref.version % 3 == 0:
        store.flush()
        print(*(r.version for r in store.versions("acme", "bot")), flush=True)
"""


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_while_saving_leaves_only_complete_versions(kills, tmp_path):
    """A process that saves without pause is killed; all that is listed loads, and nothing confirmed is lost."""
    code = CHILD.format(paths=[str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    confirmed = set()
    for kill in range(kills):
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=os.environ
        )
        try:
            for _ in range(2 + kill):
                confirmed |= {int(v) for v in child.stdout.readline().split()}
            time.sleep(0.013 * (kill + 1))
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
            child.stdout.close()
        store = AdapterStore(tmp_path, host_bytes=0)
        listed = store.versions("acme", "bot")
        assert confirmed
        assert {r.version for r in listed} >= confirmed
        for ref in listed:
            assert same(store.get(ref), make(ref))
        assert store.mint("acme", "bot").version > listed[-1].version
        store.close()


def test_leftovers_of_a_killed_save_are_invisible_and_cleared(open_store, tmp_path):
    ref, folder = saved_folder(open_store, tmp_path)
    leftover = folder.with_name("2.orbax-checkpoint-tmp")
    folder.rename(leftover)
    store = open_store()
    assert store.list(None) == []
    new = put(store)
    assert new.ref.version == ref.version + 1
    store.flush()
    assert not leftover.exists()
    assert same(store.get(replace(new).ref), new)
