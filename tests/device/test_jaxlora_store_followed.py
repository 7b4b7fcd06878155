"""A store that reads object storage to which another one writes: what is said there is seen at the next look, and no listing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import pytest
from blobs_world import FAULTS, faulty, s3
from store_world import LARGE, put, same

from jaxlora.core.errors import AdapterNotFound, StateInvalid, StorageAway
from jaxlora.core.lora import AdapterRef
from jaxlora.storage import change_log, remote_adapters
from jaxlora.storage import object_store as blobs_module
from jaxlora.storage.adapter_store import AdapterStore
from jaxlora.storage.disk_cache import DiskCopies
from jaxlora.storage.followed_adapters import FollowedVersions
from jaxlora.storage.object_store import Blobs
from jaxlora.storage.remote_adapters import RemoteVersions


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(blobs_module, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(remote_adapters, "RETRY_S", 0.05)


class World:
    """One that writes and those that read, each with a folder of its own."""

    def __init__(self, folder, blobs: Callable[..., Blobs]):
        self.folder, self.blobs = folder, blobs
        self.stores: list[AdapterStore] = []

    def writer(self) -> AdapterStore:
        """One at a time: the one before is closed."""
        if self.stores and not self.stores[0]._reads:
            self.stores.pop(0).close()
        remote = RemoteVersions(self.blobs(), DiskCopies(None))
        self.stores.insert(0, AdapterStore(self.folder / "writer", host_bytes=LARGE, remote=remote))
        return self.stores[0]

    def reader(self, name: str = "reader", *, host_bytes: int = 0, most_bytes: int | None = None) -> AdapterStore:
        remote = FollowedVersions(self.blobs(reads=True), DiskCopies(most_bytes))
        self.stores.append(AdapterStore(self.folder / name, host_bytes=host_bytes, remote=remote, reads=True))
        return self.stores[-1]


@pytest.fixture(params=["memory", "file", "s3"])
def world(request, tmp_path, monkeypatch):
    with contextlib.ExitStack() as stack:
        if request.param == "memory":
            name = request.node.name.replace("[", "-").replace("]", "")

            def blobs(**how) -> Blobs:
                return faulty(name, **how)
        else:
            if request.param == "s3":
                stack.enter_context(s3(monkeypatch))
            url = f"{request.param}://{tmp_path / 'bucket' if request.param == 'file' else 'bucket/x'}"

            def blobs(**how) -> Blobs:
                return Blobs(url, timeout_s=5, **how)

        world = World(tmp_path, blobs)
        yield world
        FAULTS.__init__()
        for store in world.stores:
            store.close()


def test_it_reads_what_was_there_and_what_comes(world):
    store = world.writer()
    before = put(store)
    store.flush()
    reader = world.reader()
    assert reader.take_news() == []
    assert same(reader.get(before.ref), before)
    after, other = put(store), put(store, "umbrella", "bot")
    store.flush()
    assert reader.latest("acme", "bot") == before.ref  # a question does not wait for the network
    assert reader.take_news() == [after.ref, other.ref]
    assert (reader.latest("acme", "bot"), reader.take_news()) == (after.ref, [])
    assert reader.named("bot", None) == [after.ref, other.ref]
    assert same(reader.get(after.ref), after)
    assert (reader.created(other.ref), reader.rank(other.ref)) == (store.created(other.ref), store.rank(other.ref))


def test_news_come_within_a_second_while_much_is_sent(world):
    """From the return of `wait_saved`, by which a publication is told."""
    store = world.writer()
    put(store)
    store.flush()
    reader, waited = world.reader(), []
    for _ in range(8):
        last, *_ = [put(store, name=f"bot-{n}") for n in range(4)]
        store.wait_saved(last.ref, 20)
        began = time.monotonic()
        while reader.latest("acme", "bot-0") != last.ref:
            reader.take_news()
            assert time.monotonic() < began + 10
        waited.append(time.monotonic() - began)
    assert sorted(waited)[len(waited) // 2] < 1


def test_what_is_deleted_is_gone_and_what_is_borrowed_stays(world):
    store = world.writer()
    adapters = [put(store) for _ in range(4)]
    put(store, name="other")
    store.flush()
    reader = world.reader(host_bytes=LARGE)
    reader.get(adapters[0].ref)
    reader.borrow(adapters[0].ref)
    store.delete_version(adapters[0].ref)
    store.prune(adapters[3].ref)
    store.flush()
    assert reader.take_news() == []
    assert reader.versions("acme", "bot") == [adapters[1].ref, adapters[2].ref]
    assert same(reader.get(adapters[0].ref), adapters[0])
    reader.give_back(adapters[0].ref)
    store.delete("acme", "bot")
    store.flush()
    assert reader.take_news() == []
    with pytest.raises(AdapterNotFound):
        reader.get(adapters[1].ref)
    assert reader.list(None) == [AdapterRef("acme", "other", 1)]


def test_one_that_is_deleted_before_it_is_told_is_not_found(world):
    store = world.writer()
    adapter = put(store)
    store.flush()
    reader = world.reader()
    store.delete_version(adapter.ref)
    store.flush()
    reader._files.news()  # it was resolved before, and is read after
    with pytest.raises(AdapterNotFound):
        reader.get(adapter.ref)


def test_a_start_of_the_writer_and_a_log_that_has_grown_are_noticed(world, monkeypatch):
    monkeypatch.setattr(change_log, "MOST_OBJECT_BYTES", 400)
    store = world.writer()
    put(store)
    store.flush()
    reader = world.reader()
    for _ in range(3):
        put(store)
        store.flush()
        assert len(reader.take_news()) == 1
    store = world.writer()
    new = [put(store, name=f"bot-{n}").ref for n in range(12)]
    store.flush()
    store.delete("acme", "bot-0")
    store.flush()
    assert sorted(reader.take_news()) == sorted(new[1:])
    assert len(reader.list(None)) == 12


def test_copies_of_an_earlier_process_are_used_or_removed(world):
    store = world.writer()
    kept, gone = put(store), put(store, name="gone")
    store.flush()
    reader = world.reader()
    for adapter in (kept, gone):
        reader.get(adapter.ref)
    world.stores.remove(reader)
    reader.close()
    store.delete("acme", "gone")
    store.flush()
    reader = world.reader()
    folder = world.folder / "reader" / "adapters" / "acme"
    assert ((folder / "bot" / "1").is_dir(), (folder / "gone" / "1").exists()) == (True, False)
    assert reader.is_here(kept.ref)
    assert same(reader.get(kept.ref), kept)


def test_copies_stay_within_their_bytes(world):
    store = world.writer()
    adapters = [put(store) for _ in range(4)]
    store.flush()
    reader = world.reader(most_bytes=1)
    for adapter in (*adapters, *adapters):
        assert same(reader.get(adapter.ref), adapter)
    assert sum(reader.is_here(adapter.ref) for adapter in adapters) <= 1


def test_it_changes_nothing(world):
    store = world.writer()
    adapter = put(store)
    store.flush()
    reader = world.reader()
    for change in (
        lambda: reader.mint("acme", "bot"),
        lambda: reader.delete("acme", "bot"),
        lambda: reader.delete_version(adapter.ref),
        lambda: world.blobs(reads=True).put_bytes("adapters/x", b""),
        lambda: world.blobs(reads=True).delete(["changes"]),
    ):
        with pytest.raises(StateInvalid):
            change()
    assert reader.latest("acme", "bot") == adapter.ref


def test_two_readers_have_two_folders(world):
    store = world.writer()
    put(store)
    store.flush()
    world.reader()
    with pytest.raises(StateInvalid, match="is in use"):
        world.reader()
    assert world.reader("another").list(None) == [AdapterRef("acme", "bot", 1)]


def test_nobody_wrote_yet(world):
    with pytest.raises(StateInvalid, match="no server keeps adapters in"):
        world.reader()


@pytest.mark.parametrize("world", ["memory"], indirect=True)
def test_without_the_network_what_is_known_is_answered(world):
    store = world.writer()
    first, second = put(store), put(store, name="far")
    store.flush()
    reader = world.reader()
    reader.get(first.ref)
    FAULTS.down = True
    assert reader.latest("acme", "bot") == first.ref
    assert same(reader.get(first.ref), first)
    for ask in (reader.take_news, lambda: reader.get(second.ref)):
        with pytest.raises(StorageAway):
            ask()
    FAULTS.down = False
    assert same(reader.get(second.ref), second)
    new = put(store)
    store.flush()
    assert reader.take_news() == [new.ref]


@pytest.mark.parametrize("world", ["memory"], indirect=True)
def test_nothing_is_listed_but_at_the_start(world):
    store = world.writer()
    put(store)
    store.flush()
    reader = world.reader()
    FAULTS.calls.clear()
    assert reader.take_news() == []
    assert FAULTS.calls == ["read"]
    put(store)
    store.flush()
    FAULTS.calls.clear()
    assert len(reader.take_news()) == 1
    assert FAULTS.calls == ["read"]


@pytest.mark.parametrize("world", ["memory"], indirect=True)
def test_changes_that_could_not_be_written_are_written_later(world):
    store = world.writer()
    put(store)
    store.flush()
    reader = world.reader()
    adapter = put(store)
    FAULTS.down = True
    time.sleep(0.1)
    FAULTS.down = False
    store.flush()
    assert reader.take_news() == [adapter.ref]
