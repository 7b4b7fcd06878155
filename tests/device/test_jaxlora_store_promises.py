"""AdapterStore: what was said to be deleted stays deleted, and what could not be saved is tried again by itself."""

from __future__ import annotations

import shutil
import threading
import time

import pytest
from store_world import LARGE, make, put, same

from jaxlora.core.errors import AdapterNotFound, StorageAway
from jaxlora.core.lora import AdapterRef
from jaxlora.storage import adapter_store, version_files
from jaxlora.storage.adapter_store import AdapterStore
from jaxlora.storage.version_files import VersionFiles

pytest_plugins = ["store_fixtures"]


def test_a_failed_save_is_tried_again_by_itself_ever_later(open_store, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(adapter_store, "RETRY_S", 0.01)
    real, waits = version_files.save_version, []
    store = open_store()

    def save(*args):
        waits.append(store._retry_s)
        if len(waits) < 4:
            raise OSError("disk full")
        real(*args)

    monkeypatch.setattr(version_files, "save_version", save)
    store._retry_s = 0.01
    ref = put(store).ref
    with pytest.raises(OSError, match="disk full"):
        store.wait_saved(ref)
    assert store.unsaved() == 1
    until(lambda: store.unsaved() == 0)
    assert waits == [0.01, 0.02, 0.04, 0.08]
    assert store._retry_s == 0.01
    assert "acme/bot@1: disk full; tried again in" in caplog.text
    store.wait_saved(ref)
    shutil.copytree(tmp_path, tmp_path.with_suffix(".killed"))  # as a kill would leave it
    assert AdapterStore(tmp_path.with_suffix(".killed"), host_bytes=LARGE).versions("acme", "bot") == [ref]


def test_other_versions_are_saved_while_one_cannot_be(open_store, monkeypatch):
    real = version_files.save_version

    def save(folder, adapter, *args):
        if adapter.ref.name == "bad":
            raise OSError("no such disk")
        real(folder, adapter, *args)

    monkeypatch.setattr(version_files, "save_version", save)
    store = open_store()
    bad, good = put(store, name="bad"), put(store)
    store.wait_saved(good.ref)
    assert store.unsaved() == 1
    assert same(store.get(bad.ref), bad)


def test_a_wait_for_a_save_may_end_before_it(open_store, monkeypatch):
    gate, real = threading.Event(), version_files.save_version
    monkeypatch.setattr(version_files, "save_version", lambda *a: (gate.wait(10), real(*a)))
    store = open_store()
    ref = put(store).ref
    with pytest.raises(StorageAway, match="on its way"):
        store.wait_saved(ref, 0.0)
    gate.set()
    store.wait_saved(ref)
    store.wait_saved(ref, 0.0)


def test_one_version_is_deleted_for_good_before_its_files_are(open_store, tmp_path, monkeypatch):
    gate, store = threading.Event(), open_store()
    remove = store._remove
    monkeypatch.setattr(store, "_remove", lambda ref: (gate.wait(10), remove(ref))[1])  # nothing is written meanwhile
    kept, gone = put(store), put(store)
    store.flush()
    store.delete_version(gone.ref)
    killed = tmp_path.with_suffix(".killed")
    shutil.copytree(tmp_path, killed)  # as a kill would leave it
    assert (killed / "adapters/acme/bot/2").is_dir()
    again = AdapterStore(killed, host_bytes=LARGE)
    assert again.versions("acme", "bot") == [kept.ref]
    assert again.mint("acme", "bot").version == 3
    again.flush()
    assert sorted(p.name for p in (killed / "adapters/acme/bot").iterdir()) == ["1"]
    assert [p for p in (killed / "deleted").rglob("*") if p.is_file()] == []
    again.close()
    gate.set()
    store.flush()
    assert [p for p in (tmp_path / "deleted").rglob("*") if p.is_file()] == []


def test_a_version_that_is_deleted_while_it_is_saved_does_not_come_back(open_store, tmp_path, monkeypatch):
    """The save ends after the deletion was confirmed, and the process before it is complete."""
    begun, gate, real = threading.Event(), threading.Event(), version_files.save_version

    def save(*args):
        begun.set()
        gate.wait(10)
        real(*args)

    remove = threading.Event()
    delete = VersionFiles.delete
    monkeypatch.setattr(version_files, "save_version", save)
    monkeypatch.setattr(VersionFiles, "delete", lambda self, ref: (remove.wait(10), delete(self, ref))[1])
    store = open_store()
    ref = put(store).ref
    assert begun.wait(10)
    store.delete_version(ref)
    gate.set()
    until((tmp_path / "adapters/acme/bot/1/meta").exists)
    shutil.copytree(tmp_path, tmp_path.with_suffix(".killed"))
    remove.set()
    again = AdapterStore(tmp_path.with_suffix(".killed"), host_bytes=LARGE)
    assert again.list(None) == []
    again.close()


def test_what_was_trained_from_a_deleted_version_is_not_added(open_store):
    store = open_store()
    first = put(store)
    again = AdapterRef("acme", "bot", 2)
    store.delete("acme", "bot")
    with pytest.raises(AdapterNotFound):
        store.add("acme", "bot", make(again), after=first.ref)
    assert store.list(None) == []
    other = store.add("acme", "bot", make(again))  # somebody uploads one of this name
    with pytest.raises(AdapterNotFound):
        store.add("acme", "bot", make(again), after=first.ref)
    assert store.versions("acme", "bot") == [other]
    assert store.add("acme", "bot", make(again), after=other).version > other.version


def until(done) -> None:
    """Waits, at most as long as a hanging test may."""
    ends = time.monotonic() + 20
    while not done():
        assert time.monotonic() < ends
        time.sleep(0.005)
