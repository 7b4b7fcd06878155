"""AdapterStore: immutable versions, available at once, on disk later, visible only when complete."""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from store_world import LARGE, SPEC, make, put, same

from jaxlora.core.errors import (
    AdapterNotFinite,
    AdapterNotFound,
    AlreadyExists,
    InvalidRequest,
    StateInvalid,
    StorageFailed,
)
from jaxlora.core.lora import AdapterRef
from jaxlora.storage import version_files
from jaxlora.storage.adapter_store import AdapterStore

pytest_plugins = ["store_fixtures"]


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


def test_bytes_need_no_weights(open_store, tmp_path, monkeypatch):
    store = open_store()
    ref = put(store).ref
    assert store.nbytes(ref) == store.get(ref).nbytes == 4 * (2 * 4 * (16 + 24) + 4 * (16 + 40))
    store.close()
    for path in (tmp_path / "adapters/acme/bot/1/weights").rglob("*"):
        if path.is_file():
            path.unlink()
    again = open_store()
    assert again.nbytes(ref) == store.nbytes(ref)
    monkeypatch.setattr(version_files, "describe", None)  # read once, then kept
    assert again.nbytes(ref) == store.nbytes(ref)


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
    monkeypatch.setattr(version_files, "describe", None)  # read once, then kept
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
    assert [str(r) for r in store.named("a", None)] == ["acme/a@2", "zoo/a@1"]
    assert [str(r) for r in store.named("a", "zoo")] == ["zoo/a@1"]
    assert store.named("b", "zoo") == store.named("c", None) == []
    store.delete("zoo", "a")
    assert [str(r) for r in store.named("a", None)] == ["acme/a@2"]
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
    real = version_files.save_version

    def slow(*args):
        gate.wait(10)
        real(*args)

    monkeypatch.setattr(version_files, "save_version", slow)
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


def test_least_recently_used_leaves_first(open_store):
    size = make(AdapterRef("t", "n", 1)).nbytes
    store = open_store(host_bytes=2 * size)
    a, b = put(store, name="a"), put(store, name="b")
    store.flush()
    held_a = store.get(a.ref)
    c = put(store, name="c")
    store.flush()
    assert store._ram.refs() == [a.ref, c.ref]
    assert store.get(a.ref) is held_a
    assert same(store.get(b.ref), b)
    assert store._ram.refs() == [a.ref, b.ref]
    assert store.host_memory().held == 2 * size


def test_memory_holds_what_is_served_in_half_of_the_bytes(open_store):
    """Whoever needs the exact weights gets them: before they are saved, beside what is served, and from the disk."""
    size = make(AdapterRef("t", "n", 1)).nbytes
    store = open_store(host_bytes=4 * size)
    adapters = [put(store, name=name) for name in "abcdef"]
    assert same(store.get(adapters[0].ref, "bfloat16"), adapters[0].rounded())
    assert same(store.get(adapters[0].ref), adapters[0])
    store.flush()
    for adapter in adapters:
        assert same(store.get(adapter.ref, "bfloat16"), adapter.rounded())
    assert store._ram.refs() == [a.ref for a in adapters]  # four of them in float32
    memory = store.host_memory()
    assert (memory.held, memory.loading, memory.aside) == (3 * size, 0, 0)
    assert same(store.get(adapters[-1].ref), adapters[-1])  # of the disk: what is served stays in memory
    assert store.host_memory().held == 3 * size
    served = store.get(adapters[0].ref, "bfloat16")
    assert served is store.get(adapters[0].ref, "bfloat16")
    assert not any(x.flags.writeable for pair in served.weights.values() for x in pair)
    assert store.nbytes(adapters[0].ref) == size


def test_a_borrower_keeps_what_is_served_of_a_deleted_version(open_store):
    store = open_store()
    adapter = put(store)
    store.flush()
    served = store.get(adapter.ref, "bfloat16")
    store.borrow(adapter.ref)
    store.delete("acme", "bot")
    assert store.get(adapter.ref, "bfloat16") is served
    with pytest.raises(AdapterNotFound):
        store.get(adapter.ref)
    store.give_back(adapter.ref)
    with pytest.raises(AdapterNotFound):
        store.get(adapter.ref, "bfloat16")
    assert store.host_memory().aside == 0


def test_a_borrower_is_served_a_deleted_version_that_was_held_as_it_was_put(open_store):
    store = open_store()
    adapter = put(store)
    store.flush()
    store.borrow(adapter.ref)
    store.delete("acme", "bot")
    assert same(store.get(adapter.ref, "bfloat16"), adapter.rounded())
    assert same(store.get(adapter.ref), adapter)
    store.give_back(adapter.ref)
    with pytest.raises(AdapterNotFound):
        store.get(adapter.ref, "bfloat16")
    assert store.host_memory().aside == 0


def test_many_askers_cause_one_load(open_store, monkeypatch):
    store = open_store(host_bytes=LARGE)
    adapter = put(store)
    store.close()
    again = open_store()
    loads = []
    real = version_files.load_version

    def load(*args):
        loads.append(args)
        time.sleep(0.2)
        return real(*args)

    monkeypatch.setattr(version_files, "load_version", load)
    got = []
    threads = [threading.Thread(target=lambda: got.append(again.get(adapter.ref))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1
    assert len(got) == 20
    assert all(g is got[0] for g in got)


def test_loads_keep_within_the_budget_what_is_aside_included(open_store, monkeypatch):
    """Room is made before a byte is read, and loads that have no room beside others wait for them."""
    store = open_store()
    adapters = [put(store, name=f"a{i}") for i in range(8)]
    store.close()
    size = adapters[0].nbytes
    again = open_store(host_bytes=4 * size)
    again.get(adapters[0].ref)
    again.set_aside(size)
    together, most, real = [], [], version_files.load_version

    def load(folder, ref, make_room):
        def counted(nbytes: int) -> None:
            assert nbytes == size
            make_room(nbytes)
            together.append(ref)
            most.append(len(together))
            memory = again.host_memory()
            assert memory.held + memory.loading + memory.aside <= memory.limit
            time.sleep(0.02)

        try:
            return real(folder, ref, counted)
        finally:
            together.remove(ref)

    monkeypatch.setattr(version_files, "load_version", load)
    threads = [threading.Thread(target=again.get, args=(a.ref,)) for a in adapters[1:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 7
    assert 2 <= max(most) <= 3
    memory = again.host_memory()
    assert (memory.loading, memory.aside, memory.held) == (0, size, 3 * size)
    assert memory.peak == memory.limit
    again.set_aside(-size)
    assert again.host_memory().aside == 0


def test_one_load_goes_through_whatever_the_budget(open_store):
    store = open_store()
    adapter = put(store)
    store.close()
    again = open_store(host_bytes=1)
    assert same(again.get(adapter.ref), adapter)
    assert again.host_memory().held == 0
    assert again.host_memory().peak == adapter.nbytes


def test_a_failing_load_gives_its_room_back(open_store, tmp_path):
    store = open_store()
    ref = put(store).ref
    store.close()
    chunk = tmp_path / "adapters/acme/bot/1/weights/q_proj.a/0.0.0"
    chunk.write_bytes(bytes(chunk.stat().st_size))
    again = open_store()
    with pytest.raises(StorageFailed):
        again.get(ref)
    assert again.host_memory().loading == 0


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


def test_weights_become_the_next_version_or_use_up_no_number(open_store):
    store = open_store()
    bad, good = (make(AdapterRef("any", "name", 9), value) for value in (float("nan"), 2.0))
    with pytest.raises(AdapterNotFinite):
        store.add("acme", "bot", bad)
    with pytest.raises(InvalidRequest):
        store.add("acme", "../x", good)
    with ThreadPoolExecutor(4) as pool:
        refs = list(pool.map(lambda _: store.add("acme", "bot", good), range(8)))
    assert sorted(refs) == [AdapterRef("acme", "bot", version) for version in range(1, 9)]
    assert store.versions("acme", "bot") == sorted(refs)
    store.close()
    with pytest.raises(StateInvalid, match="closed"):
        store.add("acme", "bot", good)
    assert all(same(open_store().get(ref), good.named(ref)) for ref in refs[:1])


def test_unknown_version(open_store):
    store = open_store()
    put(store)
    for ref in (AdapterRef("acme", "bot", 2), AdapterRef("zoo", "bot", 1)):
        with pytest.raises(AdapterNotFound):
            store.get(ref)


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
    memory = store.host_memory()
    assert memory.held == sum(store.get(ref).nbytes for ref in store._ram.refs()) <= 5_000
    assert memory.loading == 0
    assert [r.version for r in store.list(None)] == [3] * 4
