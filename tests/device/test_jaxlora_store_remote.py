"""AdapterStore with object storage behind it: another machine finds every version that was said to be stored."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from blobs_world import FAULTS, faulty
from store_world import LARGE, kill_at_work, make, put, same

from jaxlora.core.errors import AdapterNotFound, StorageFailed, Unavailable
from jaxlora.core.lora import AdapterRef
from jaxlora.storage import object_store as blobs_module
from jaxlora.storage import remote_adapters
from jaxlora.storage.adapter_store import AdapterStore
from jaxlora.storage.disk_cache import DiskCopies
from jaxlora.storage.object_store import Blobs
from jaxlora.storage.remote_adapters import RemoteVersions
from jaxlora.storage.version_files import GAP


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(blobs_module, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(remote_adapters, "RETRY_S", 0.05)


@pytest.fixture
def machine(tmp_path, request):
    """A function that opens the store of one machine, by name; all have the same object storage, one at a time."""
    opened: list[AdapterStore] = []
    url = request.node.name.replace("[", "-").replace("]", "")
    blobs = faulty(url)

    def open_(name: str, *, most_bytes: int | None = None, host_bytes: int = LARGE) -> AdapterStore:
        close_last()
        remote = RemoteVersions(blobs, DiskCopies(most_bytes))
        opened.append(AdapterStore(tmp_path / name, host_bytes=host_bytes, remote=remote))
        return opened[-1]

    def close_last() -> None:
        if opened:
            with contextlib.suppress(StorageFailed):  # some tests take object storage away
                opened[-1].close()

    open_.blobs = blobs
    yield open_
    FAULTS.__init__()
    close_last()


def lose(store: AdapterStore) -> None:
    """The machine is gone with its disk; the object is of no use any more."""
    root = store._files._root
    store.close()
    shutil.rmtree(root)


def folder(store: AdapterStore, ref: AdapterRef) -> Path:
    return store._files._folder(ref)


def test_another_machine_finds_every_version_and_reads_what_is_asked(machine):
    store = machine("one")
    adapters = [put(store), put(store), put(store, name="other"), put(store, tenant="zeta")]
    created = {a.ref: store.created(a.ref) for a in adapters}
    for adapter in adapters:
        store.wait_saved(adapter.ref)
    lose(store)
    FAULTS.calls.clear()
    store = machine("two")
    assert FAULTS.calls.count("list") == 2
    assert "read" not in FAULTS.calls
    assert store.list(None) == [adapters[1].ref, adapters[2].ref, adapters[3].ref]
    assert {a.ref: store.created(a.ref) for a in adapters} == created
    assert [store.rank(a.ref) for a in adapters] == [a.spec.max_rank for a in adapters]
    assert [store.nbytes(a.ref) for a in adapters] == [a.nbytes for a in adapters]
    assert "read" not in FAULTS.calls
    for adapter in adapters:
        assert same(store.get(adapter.ref), adapter)
    assert FAULTS.calls.count("read") == len(adapters)
    assert FAULTS.calls.count("list") == 2
    store = machine("two", host_bytes=0)
    FAULTS.calls.clear()
    assert same(store.get(adapters[0].ref), adapters[0])  # its copy
    assert "read" not in FAULTS.calls


def test_a_version_deleted_anywhere_is_deleted_everywhere(machine):
    store = machine("one")
    first, second = put(store), put(store)
    store.flush()
    store.delete("acme", "bot")
    store = machine("two")
    assert store.list(None) == []
    assert store.mint("acme", "bot").version > second.ref.version
    third = put(store)
    store.flush()
    store.delete_version(third.ref)
    fourth = put(store)
    store.flush()
    store = machine("one")  # its disk has versions of its own time
    assert store.versions("acme", "bot") == [fourth.ref]
    with pytest.raises(AdapterNotFound):
        store.get(first.ref)
    store.flush()
    assert len(machine.blobs.list("adapters/")) == 1
    assert sorted(machine.blobs.list("deleted/")) == ["deleted/acme/bot/1004.only", "deleted/acme/bot/2"]


def test_a_deletion_that_object_storage_cannot_hear_changes_nothing(machine):
    store = machine("one")
    adapter = put(store)
    store.flush()
    FAULTS.down = True
    with pytest.raises(Unavailable):
        store.delete("acme", "bot")
    assert same(store.get(adapter.ref), adapter)
    FAULTS.down = False
    store.delete("acme", "bot")
    assert machine("two").list(None) == []


def test_one_version_is_deleted_everywhere_before_its_object_is(machine, monkeypatch):
    """The process ends, and its machine with it, before the sender has removed anything."""
    store = machine("one")
    kept, gone = put(store), put(store)
    store.flush()
    with monkeypatch.context() as killed:
        killed.setattr(RemoteVersions, "forget", lambda self, ref: None)
        store.delete_version(gone.ref)
        lose(store)
    assert len(machine.blobs.list("adapters/")) == 2
    store = machine("two")
    assert store.versions("acme", "bot") == [kept.ref]
    store.flush()
    assert len(machine.blobs.list("adapters/")) == 1
    store.delete("acme", "bot")
    store.flush()
    assert machine.blobs.list("adapters/") == {}
    assert list(machine.blobs.list("deleted/")) == ["deleted/acme/bot/1001"], "one mark says it all"


def test_a_deletion_of_one_version_that_object_storage_cannot_hear_changes_nothing(machine):
    store = machine("one")
    first, second = put(store), put(store)
    store.flush()
    FAULTS.down = True
    with pytest.raises(Unavailable):
        store.delete_version(second.ref)
    assert store.versions("acme", "bot") == [first.ref, second.ref]
    FAULTS.down = False
    store.delete_version(second.ref)
    assert machine("one").versions("acme", "bot") == [first.ref]


def test_a_version_that_comes_while_all_are_deleted_is_marked_too(machine, monkeypatch):
    store = machine("one")
    put(store)
    store.flush()
    retire, came = RemoteVersions.retire, []

    def slow(self, tenant, name, minted):
        retire(self, tenant, name, minted)
        if not came:
            came.append(put(store).ref)

    monkeypatch.setattr(RemoteVersions, "retire", slow)
    store.delete("acme", "bot")
    assert store.list(None) == []
    assert "deleted/acme/bot/2" in machine.blobs.list("deleted/")
    assert machine("two").list(None) == []


def test_a_deletion_that_was_killed_half_way_is_complete_after_the_next_start(machine, monkeypatch):
    store = machine("one")
    put(store), put(store)
    store.flush()
    monkeypatch.setattr(RemoteVersions, "forget", lambda *a: None)  # the process dies before
    store.delete("acme", "bot")
    assert len(machine.blobs.list("adapters/")) == 2
    store = machine("two")
    assert store.list(None) == []
    store.flush()
    assert machine.blobs.list("adapters/") == {}


def test_numbers_go_on_above_those_that_may_have_been_lost(machine):
    store = machine("one")
    sent = put(store)
    store.flush()
    FAULTS.down = True
    lost = put(store)
    with pytest.raises(Unavailable):
        store.wait_saved(lost.ref)
    shutil.rmtree(store._files._root)
    FAULTS.down = False
    store._files._remote._sending.clear()
    store = machine("two")
    assert store.versions("acme", "bot") == [sent.ref]
    assert store.mint("acme", "bot").version == sent.ref.version + GAP + 1
    assert store.mint("acme", "new").version == 1


def test_while_object_storage_is_away_all_goes_on_and_is_sent_later(machine, tmp_path):
    store = machine("one", host_bytes=0)
    FAULTS.down = True
    adapters = [put(store) for _ in range(3)]
    for adapter in adapters:
        with pytest.raises(Unavailable):
            store.wait_saved(adapter.ref)
        assert same(store.get(adapter.ref), adapter)
    assert store.host_memory().held == 0  # the disk has them
    with pytest.raises(StorageFailed, match="3 versions are not stored"):
        store.flush()
    FAULTS.down = False
    for adapter in adapters:
        deadline = time.monotonic() + 10
        while store._files._remote.about(adapter.ref) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        store.wait_saved(adapter.ref)
    assert machine("two").versions("acme", "bot") == [a.ref for a in adapters]


def test_an_object_storage_that_hangs_does_not_keep_a_server_from_ending(machine, monkeypatch):
    monkeypatch.setattr(remote_adapters, "FLUSH_S", 0.3)
    store = machine("one")
    FAULTS.hang = gate = threading.Event()
    adapters = [put(store) for _ in range(3)]
    began = time.monotonic()
    with pytest.raises(StorageFailed, match=r"3 versions are not stored .*too slow"):
        store.close()
    assert time.monotonic() - began < 5
    FAULTS.hang = None
    gate.set()
    store = machine("one")
    assert all(same(store.get(a.ref), a) for a in adapters)
    store.flush()
    assert machine("two").versions("acme", "bot") == [a.ref for a in adapters]


def test_what_an_ended_process_had_not_sent_is_sent_after_the_next_start(machine):
    store = machine("one")
    FAULTS.down = True
    adapter = put(store)
    with pytest.raises(StorageFailed):
        store.close()
    FAULTS.down = False
    store = machine("one")
    store.wait_saved(adapter.ref)
    assert same(machine("two").get(adapter.ref), adapter)


def test_an_adapter_is_here_unless_it_must_be_fetched(machine):
    store = machine("one", host_bytes=0)
    ref = put(store).ref
    assert store.is_here(ref)
    store.flush()
    assert store.is_here(ref)
    store = machine("two", host_bytes=0)
    assert not store.is_here(ref)
    store.get(ref)
    assert store.is_here(ref)


def test_a_missing_object_storage_fails_only_who_needs_it(machine):
    store = machine("one")
    cold, warm = put(store), put(store, name="warm")
    lose(store)
    store = machine("two")
    assert same(store.get(warm.ref), warm)
    FAULTS.down = True
    with pytest.raises(Unavailable):
        store.get(cold.ref)
    assert same(store.get(warm.ref), warm)
    FAULTS.down = False
    assert same(store.get(cold.ref), cold)


def test_a_damaged_copy_is_brought_anew_and_a_damaged_object_gives_way(machine):
    store = machine("one")
    first, second = put(store), put(store)
    store.flush()
    store = machine("one", host_bytes=0)
    victim = next(p for p in folder(store, second.ref).rglob("0.0.0"))
    data = bytearray(victim.read_bytes())
    data[5] ^= 1
    victim.write_bytes(data)
    assert same(store.get(second.ref), second)
    lose(store)
    store = machine("two", host_bytes=0)
    (key,) = [k for k in machine.blobs.list("adapters/") if "/2_" in k]
    machine.blobs.put_bytes(key, b"nothing like it")
    with pytest.raises(StorageFailed):
        store.get(second.ref)
    assert store.latest("acme", "bot") == first.ref
    assert same(store.get(first.ref), first)


def test_a_copy_of_a_version_that_another_machine_made_since_is_not_used(machine):
    """Machine one had made a version and not sent it; two, knowing nothing of it, gave its number again."""
    store = machine("one")
    FAULTS.down = True
    stale = put(store)
    with pytest.raises(StorageFailed):
        store.close()
    FAULTS.down = False
    store = machine("two")
    ref = store.mint("acme", "bot")
    assert ref == stale.ref
    fresh = make(ref, 7.0)
    store.put(fresh)
    store.flush()
    store = machine("one", host_bytes=0)
    assert same(store.get(ref), fresh)
    assert not np.array_equal(*(a.weights["q_proj"][0] for a in (stale, fresh)))


def test_copies_stay_within_their_bytes_and_nothing_is_lost(machine):
    store = machine("one", most_bytes=1, host_bytes=0)
    adapters = [put(store) for _ in range(4)]
    store.flush()
    store = machine("one", most_bytes=1, host_bytes=0)
    for adapter in [*adapters, *adapters]:
        assert same(store.get(adapter.ref), adapter)
    store.close()
    assert not [a for a in adapters if folder(store, a.ref).exists()]


CHILD = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from store_world import put
from jaxlora.storage.object_store import Blobs
from jaxlora.storage.disk_cache import DiskCopies
from jaxlora.storage.remote_adapters import RemoteVersions
from jaxlora.storage.adapter_store import AdapterStore
remote = RemoteVersions(Blobs("file://" + sys.argv[2], timeout_s=20), DiskCopies(1))
store = AdapterStore(Path(sys.argv[1]), host_bytes=0, remote=remote)
while True:
    ref = put(store).ref
    if ref.version % 3 == 0:
        store.wait_saved(ref)
        print(*(r.version for r in store.versions("acme", "bot")), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 4])
def test_killed_while_sending_and_its_disk_lost_nothing_confirmed_is(kills, tmp_path):
    confirmed: set[int] = set()
    for kill in range(kills):
        confirmed |= kill_at_work(CHILD, tmp_path / f"disk{kill}", tmp_path / "objects", kill=kill)
        remote = RemoteVersions(Blobs(f"file://{tmp_path}/objects", timeout_s=20), DiskCopies(None))
        store = AdapterStore(tmp_path / f"reader{kill}", host_bytes=0, remote=remote)
        listed = store.versions("acme", "bot")
        assert confirmed
        assert {r.version for r in listed} >= confirmed
        for ref in listed:
            assert same(store.get(ref), make(ref))
        store.close()
