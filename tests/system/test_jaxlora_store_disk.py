"""AdapterStore on disk: damage is found, a kill leaves complete versions, a folder has one store."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import orbax.checkpoint as ocp
import pytest
from store_world import kill_at_work, make, put, same

from jaxlora.core.errors import AdapterNotFound, StateInvalid, StorageFailed
from jaxlora.core.lora import AdapterRef
from jaxlora.storage import adapter_files, version_files
from jaxlora.storage.adapter_store import AdapterStore

pytest_plugins = ["store_fixtures"]


def test_put_serves_while_storage_is_blocked(open_store, monkeypatch):
    gate = threading.Event()
    real = version_files.save_version
    monkeypatch.setattr(version_files, "save_version", lambda *a: (gate.wait(10), real(*a)))
    store = open_store(host_bytes=0)
    ref = store.mint("acme", "bot")
    adapter = make(ref)
    started = time.monotonic()
    store.put(adapter)
    assert same(store.get(ref), adapter)
    assert store.latest("acme", "bot") == ref
    assert time.monotonic() - started < 5
    gate.set()
    store.flush()
    assert store.host_memory().held == 0
    assert same(store.get(ref), adapter)


def test_failed_saves_stay_in_memory_and_are_reported(open_store, monkeypatch, caplog):
    broken = True
    real = version_files.save_version

    def save(*args):
        if broken:
            raise OSError("disk full")
        real(*args)

    monkeypatch.setattr(version_files, "save_version", save)
    store = open_store(host_bytes=0)
    adapter = put(store)
    with pytest.raises(StorageFailed, match=r"acme/bot@1.*disk full"):
        store.flush()
    assert "acme/bot@1: disk full" in caplog.text  # a server flushes only when it stops
    assert same(store.get(adapter.ref), adapter)
    broken = False
    store.flush()
    store.close()
    assert same(open_store().get(adapter.ref), adapter)


def test_close_reports_what_is_lost_and_may_come_twice(open_store, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(version_files, "save_version", fail)
    store = open_store()
    put(store)
    for _ in range(2):
        with pytest.raises(StorageFailed, match="disk full"):
            store.close()


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


@pytest.mark.fault("C12")
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


@pytest.mark.parametrize("damage", ["short", "long", "gone"])
def test_an_array_of_another_size_is_found(open_store, tmp_path, damage):
    ref, folder = saved_folder(open_store, tmp_path)
    path = folder / "weights" / "q_proj.a" / adapter_files.CHUNK
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(data[:-4] if damage == "short" else data + bytes(4))
    with pytest.raises(StorageFailed, match=r"acme/bot@1: its (files|bytes) on disk"):
        open_store().get(ref)


def test_a_load_is_a_plain_read_and_orbax_reads_the_same(open_store, tmp_path, monkeypatch):
    """Orbax's own reading takes several times the CPU of a plain one, but what is written stays a checkpoint of its."""
    ref, folder = saved_folder(open_store, tmp_path)
    shapes = {t: (a.shape, b.shape) for t, (a, b) in make(ref).weights.items()}
    weights = adapter_files._restore(folder.parent, 1, shapes)
    assert same(replace(make(ref), weights=weights), make(ref))
    monkeypatch.setattr(adapter_files, "_restore", None)
    assert same(open_store().get(ref), make(ref))


def test_a_version_that_was_written_compressed_still_loads(open_store, tmp_path):
    """As this project wrote them before 2026-11-26: all arrays in one compressed OCDBT."""
    ref, folder = saved_folder(open_store, tmp_path)
    shutil.rmtree(folder / "weights")
    tree = {target: {"a": a, "b": b} for target, (a, b) in make(ref).weights.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "weights", tree)
    assert (folder / "weights" / "manifest.ocdbt").exists()
    assert same(open_store().get(ref), make(ref))


def test_saving_says_nothing(open_store, caplog):
    put(open_store())
    open_store()
    assert caplog.text == ""


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


CHILD = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from store_world import put
from jaxlora.storage.adapter_store import AdapterStore
store = AdapterStore(Path(sys.argv[1]), host_bytes=0)
while True:
    ref = put(store).ref
    if ref.version % 3 == 0:
        store.flush()
        print(*(r.version for r in store.versions("acme", "bot")), flush=True)
"""


@pytest.mark.fault("C2")
@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 3])
def test_killed_while_saving_leaves_only_complete_versions(kills, tmp_path):
    """A process that saves without pause is killed; all that is listed loads, and nothing confirmed is lost."""
    confirmed: set[int] = set()
    for kill in range(kills):
        confirmed |= kill_at_work(CHILD, tmp_path, kill=kill)
        store = AdapterStore(tmp_path, host_bytes=0)
        listed = store.versions("acme", "bot")
        assert confirmed
        assert {r.version for r in listed} >= confirmed
        for ref in listed:
            assert same(store.get(ref), make(ref))
        assert store.mint("acme", "bot").version > listed[-1].version
        store.close()


@pytest.mark.fault("C2")
def test_leftovers_of_a_killed_save_are_invisible_and_cleared(open_store, tmp_path, monkeypatch):
    ref, _ = saved_folder(open_store, tmp_path)
    store = open_store()
    monkeypatch.setattr(adapter_files.shutil, "rmtree", lambda *a, **k: None)  # the process dies before its rename
    monkeypatch.setattr(adapter_files, "sync_tree", lambda folder: (_ for _ in ()).throw(OSError("killed")))
    put(store)
    with pytest.raises(StorageFailed):
        store.close()
    monkeypatch.undo()
    assert list((tmp_path / "trash").iterdir())
    store = open_store()
    assert store.versions("acme", "bot") == [ref]
    new = put(store)
    assert new.ref.version == ref.version + 2
    store.flush()
    assert not list((tmp_path / "trash").iterdir())
    assert same(store.get(new.ref), new)


# --- one store per folder, and its end


def test_a_folder_that_is_open_is_refused_by_name(open_store, tmp_path):
    store = open_store()
    put(store)
    with pytest.raises(StateInvalid, match=f"{tmp_path} is in use"):
        AdapterStore(tmp_path, host_bytes=0)
    store.close()
    assert open_store().mint("acme", "bot").version == 2


def test_a_folder_that_another_process_has_is_refused_until_it_is_dead(open_store, tmp_path):
    code = CHILD.format(paths=[str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "support")])
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
        try:
            child.stdout.readline()
            with pytest.raises(StateInvalid, match="in use"):
                open_store()
        finally:
            child.kill()
    assert open_store().latest("acme", "bot") is not None


def test_a_closed_store_refuses_changes_and_ends_again(open_store):
    store = open_store()
    ref = put(store).ref
    late = make(store.mint("acme", "bot"))
    store.close()
    for change in (
        lambda: store.mint("acme", "bot"),
        lambda: store.put(late),
        lambda: store.delete("acme", "bot"),
        lambda: store.delete_version(ref),
    ):
        with pytest.raises(StateInvalid, match="closed"):
            change()
    closer = threading.Thread(target=store.close, daemon=True)
    closer.start()
    closer.join(10)
    assert not closer.is_alive()


def test_changes_that_race_the_end_are_done_or_refused(open_store):
    """Whatever a put or a delete returned from has happened; the end waits for nobody for ever."""
    for _ in range(15):
        store = open_store()
        put(store, name="other")
        ready, done = threading.Barrier(3), []

        def change(work, store=store, ready=ready, done=done):
            ready.wait()
            with contextlib.suppress(StateInvalid, AdapterNotFound):
                done.append(work())

        threads = [
            threading.Thread(target=change, args=(work,), daemon=True)
            for work in (lambda store=store: put(store).ref, lambda store=store: store.delete("acme", "other"))
        ]
        closer = threading.Thread(target=lambda store=store, ready=ready: (ready.wait(), store.close()), daemon=True)
        for thread in [*threads, closer]:
            thread.start()
        for thread in [*threads, closer]:
            thread.join(10)
            assert not thread.is_alive()
        again = open_store()
        for ref in (r for r in done if r is not None):
            assert again.get(ref).ref == ref
        assert (None in done) == (again.latest("acme", "other") is None)


# --- one version of several


def test_one_version_is_deleted_and_never_comes_back(open_store, tmp_path):
    store = open_store()
    adapters = [put(store) for _ in range(3)]
    gone = adapters[1]
    store.flush()
    store.delete_version(gone.ref)
    assert store.versions("acme", "bot") == [adapters[0].ref, adapters[2].ref]
    for call in (store.get, store.created, store.rank, store.delete_version):
        with pytest.raises(AdapterNotFound):
            call(gone.ref)
    with pytest.raises(StateInvalid, match="deleted"):
        store.put(make(gone.ref))
    store.flush()
    with pytest.raises(StateInvalid, match="deleted"):
        store.put(make(gone.ref))
    assert sorted(p.name for p in (tmp_path / "adapters/acme/bot").iterdir()) == ["1", "3"]
    assert list((tmp_path / "trash").iterdir()) == []
    again = open_store()
    assert again.versions("acme", "bot") == [adapters[0].ref, adapters[2].ref]
    assert same(again.get(adapters[0].ref), adapters[0])
    assert again.mint("acme", "bot").version == 4


def test_a_version_deleted_before_its_save_leaves_nothing(open_store, tmp_path, monkeypatch):
    gate = threading.Event()
    real = version_files.save_version
    monkeypatch.setattr(version_files, "save_version", lambda *a: (gate.wait(10), real(*a)))
    store = open_store()
    saving, waiting = put(store), put(store)
    started = time.monotonic()
    for adapter in (saving, waiting):
        store.delete_version(adapter.ref)
    assert time.monotonic() - started < 5  # waits for no disk
    assert store.list(None) == []
    gate.set()
    store.flush()
    assert list((tmp_path / "adapters/acme/bot").glob("*")) == []  # where the save had not begun there is no folder
    assert store.host_memory().held == 0
    with pytest.raises(AdapterNotFound):
        store.delete("acme", "bot")
    assert put(store).ref.version == 3
