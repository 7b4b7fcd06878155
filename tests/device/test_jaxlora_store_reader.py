"""A store that reads what another one writes: what is on the disk is seen at the next question, and nothing is changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_world import LARGE, make, put, same

from jaxlora.core.errors import AdapterNotFound, StateInvalid
from jaxlora.core.lora import AdapterRef
from jaxlora.storage import change_log
from jaxlora.storage.adapter_store import AdapterStore
from jaxlora.storage.change_log import ChangeLog, ChangeReader

pytest_plugins = ["store_fixtures"]


@pytest.fixture
def open_reader(tmp_path):
    """Opens stores that read the folder which `open_store` writes."""
    opened = []

    def reader() -> AdapterStore:
        opened.append(AdapterStore(tmp_path, host_bytes=LARGE, reads=True))
        return opened[-1]

    yield reader
    for store in opened:
        store.close()


def test_it_reads_what_was_there_and_what_comes(open_store, open_reader):
    store = open_store()
    before = put(store)
    store.flush()
    reader = open_reader()
    assert reader.take_news() == []
    assert same(reader.get(before.ref), before)
    after, other = put(store), put(store, "umbrella", "bot")
    store.flush()
    assert reader.latest("acme", "bot") == after.ref
    assert reader.versions("acme", "bot") == [before.ref, after.ref]
    assert reader.named("bot", None) == [after.ref, other.ref] == reader.list(None)
    assert same(reader.get(after.ref), after)
    assert reader.created(after.ref) == store.created(after.ref)
    assert (reader.take_news(), reader.take_news()) == ([after.ref, other.ref], [])


def test_it_sees_nothing_before_it_is_complete_on_the_disk(open_store, open_reader, monkeypatch):
    store, seen = open_store(), []
    put(store)
    store.flush()
    reader = open_reader()
    save = store._files.save

    def watched(adapter, created):
        seen.append(reader.latest("acme", "bot").version)
        save(adapter, created)
        seen.append(reader.latest("acme", "bot").version)

    monkeypatch.setattr(store._files, "save", watched)
    put(store)
    store.flush()
    assert seen == [1, 2]


def test_what_is_deleted_is_gone_and_what_is_borrowed_stays(open_store, open_reader):
    store = open_store()
    adapters = [put(store) for _ in range(3)]
    put(store, name="other")
    store.flush()
    reader = open_reader()
    reader.get(adapters[0].ref)
    reader.borrow(adapters[0].ref)
    store.delete_version(adapters[0].ref)
    store.prune(adapters[2].ref)
    store.flush()
    assert reader.versions("acme", "bot") == [adapters[1].ref]
    assert same(reader.get(adapters[0].ref), adapters[0])
    with pytest.raises(AdapterNotFound):
        reader.get(adapters[2].ref)
    store.delete("acme", "other")
    assert [ref.name for ref in reader.list(None)] == ["bot"]
    assert reader.take_news() == []


def test_a_deletion_that_was_promised_to_a_client_holds(open_store, open_reader, monkeypatch):
    """Before its files are gone, for readers that are there and for those that come."""
    store = open_store()
    ref = put(store).ref
    store.flush()
    reader = open_reader()
    monkeypatch.setattr(store, "_enqueue", lambda item: None)
    store.delete_version(ref)
    assert reader.latest("acme", "bot") is None
    assert open_reader().latest("acme", "bot") is None


@pytest.mark.parametrize(
    "change",
    [
        lambda store, ref: store.mint("acme", "bot"),
        lambda store, ref: store.put(make(AdapterRef("acme", "bot", 2))),
        lambda store, ref: store.add("acme", "bot", make(ref)),
        lambda store, ref: store.delete("acme", "bot"),
        lambda store, ref: store.delete_version(ref),
        lambda store, ref: store.prune(ref),
    ],
    ids=["mint", "put", "add", "delete", "delete-version", "prune"],
)
def test_it_changes_nothing(open_store, open_reader, tmp_path, change):
    store = open_store()
    ref = put(store).ref
    store.flush()
    reader = open_reader()
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    with pytest.raises(StateInvalid, match="only read here"):
        change(reader, ref)
    reader.close()
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before
    assert store.versions("acme", "bot") == [ref]


def test_it_follows_a_writer_that_starts_again(open_store, open_reader):
    """What the one before had no time to tell is found."""
    store = open_store()
    kept, gone = put(store), put(store)
    store.flush()
    reader = open_reader()
    told = store._files._changes
    store._files._changes = ChangeLog(Path(told._path.parent) / "lost")
    new = put(store)
    store.delete_version(gone.ref)
    store.close()
    assert reader.versions("acme", "bot") == [kept.ref, gone.ref]
    again = open_store()
    assert reader.versions("acme", "bot") == [kept.ref, new.ref] == again.versions("acme", "bot")
    assert reader.take_news() == [new.ref]


def test_it_follows_one_through_many_changes(open_store, open_reader, monkeypatch):
    """The file of changes is begun again and again meanwhile; the newest version never goes back."""
    monkeypatch.setattr(change_log, "MOST_BYTES", 200)
    store = open_store()
    put(store)
    store.flush()
    reader, seen = open_reader(), []
    for number in range(40):
        put(store)
        if number % 3 == 2:
            store.flush()  # or the last that is on the disk may go
            store.delete_version(store.versions("acme", "bot")[0])
        seen.append(reader.latest("acme", "bot").version)
    store.flush()
    assert seen == sorted(seen)
    assert reader.versions("acme", "bot") == store.versions("acme", "bot")


def test_a_folder_that_no_store_ever_had_is_refused(tmp_path):
    with pytest.raises(StateInvalid, match=f"no server keeps the adapter store {tmp_path}/none yet"):
        AdapterStore(tmp_path / "none", host_bytes=LARGE, reads=True)
    assert not (tmp_path / "none").exists()


def test_an_unchanged_file_is_looked_at_and_not_read(tmp_path, monkeypatch):
    log, ref = ChangeLog(tmp_path / "changes"), AdapterRef("acme", "bot", 7)
    reader = ChangeReader(tmp_path / "changes")
    assert reader.news() is None
    log.add([ref, AdapterRef("acme", "bot", 8)], came=True)
    log.add([ref], came=False)
    assert reader.news() == [(True, ref), (True, AdapterRef("acme", "bot", 8)), (False, ref)]
    monkeypatch.setattr("builtins.open", lambda *_: pytest.fail("it is read again"))
    assert reader.news() == []


def test_a_line_on_its_way_is_read_when_it_is_whole(tmp_path):
    log = ChangeLog(tmp_path / "changes")
    reader = ChangeReader(tmp_path / "changes")
    reader.news()
    log.add([AdapterRef("acme", "bot", 1)], came=True)
    with (tmp_path / "changes").open("ab") as file:
        file.write(b"+acme/bo")
        file.flush()
        assert reader.news() == [(True, AdapterRef("acme", "bot", 1))]
        file.write(b"t/12\n")
    assert reader.news() == [(True, AdapterRef("acme", "bot", 12))]
