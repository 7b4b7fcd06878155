"""Blobs: objects come back as they were or not at all, through an object store that is slow, failing and partial."""

from __future__ import annotations

import hashlib
import threading
import time
import zipfile

import pytest
from blobs_world import FAULTS, faulty

from jaxlora import blobs as blobs_module
from jaxlora.blobs import ATTEMPTS, Blobs
from jaxlora.errors import ConfigInvalid, NotFound, StorageFailed, StorageFull, Unavailable

DATA = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(blobs_module, "FIRST_WAIT_S", 0.001)


@pytest.fixture
def there(tmp_path):
    """A file, a folder with an empty folder, and a folder for what is on its way."""
    (tmp_path / "file").write_bytes(DATA)
    (tmp_path / "folder/deep/none").mkdir(parents=True)
    (tmp_path / "folder/deep/a").write_bytes(DATA)
    (tmp_path / "folder/b").write_bytes(b"")
    (tmp_path / "moving").mkdir()
    return tmp_path


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize("url", ["memory://one", "file://{}/root", "{}/root"], ids=["memory", "file", "path"])
def test_files_and_folders_come_back_and_go(url, there):
    blobs = Blobs(url.format(there), timeout_s=10)
    blobs.put("files/acme/1", there / "file")
    blobs.put_folder("adapters/acme/bot/1", there / "folder", there / "moving")
    blobs.put_bytes("deleted/acme/bot/1", b"x")
    assert blobs.list("files/") == {"files/acme/1": len(DATA)}
    assert blobs.list("adapters/").keys() == {"adapters/acme/bot/1.zip"}
    assert blobs.list("nothing/") == {}
    blobs.get("files/acme/1", there / "new/back", there / "moving", sha256=hashlib.sha256(DATA).hexdigest())
    blobs.get_folder("adapters/acme/bot/1", there / "new/folder", there / "moving")
    assert (there / "new/back").read_bytes() == DATA
    assert tree(there / "new/folder") == tree(there / "folder")
    blobs.delete(["files/acme/1", "adapters/acme/bot/1.zip", "not/there"])
    assert blobs.list("files/") == blobs.list("adapters/") == {}
    with pytest.raises(NotFound, match="no such object"):
        blobs.get("files/acme/1", there / "again", there / "moving")
    assert not list((there / "moving").iterdir())


def test_an_object_on_a_file_system_is_whole_or_not_there(there, monkeypatch):
    blobs = Blobs(f"file://{there}/root", timeout_s=10)
    blobs.put("a", there / "file")
    monkeypatch.setattr(blobs_module.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("no")))
    (there / "file").write_bytes(b"new")
    with pytest.raises(Unavailable):
        blobs.put("a", there / "file")
    assert blobs.list("") == {"a": len(DATA)}
    assert not list((there / "root").rglob("*.tmp"))


def test_what_fails_is_tried_again_and_given_up(there):
    blobs = faulty("tries")
    FAULTS.fail = [ConnectionError("reset")] * (ATTEMPTS - 1)
    blobs.put("a", there / "file")
    assert FAULTS.calls == ["write"] * ATTEMPTS
    FAULTS.down = True
    with pytest.raises(Unavailable, match="does not answer; try again later"):
        blobs.put("b", there / "file")
    with pytest.raises(Unavailable):
        blobs.list("")
    FAULTS.down = False
    assert blobs.list("") == {"a": len(DATA)}


def test_what_cannot_get_better_is_not_tried_again(there):
    blobs = faulty("refused")
    FAULTS.fail = [PermissionError("AccessDenied")]
    with pytest.raises(StorageFailed, match="refuses the server"):
        blobs.put("a", there / "file")
    assert FAULTS.calls == ["write"]
    blobs.put("a", there / "file")
    FAULTS.calls.clear()
    FAULTS.fail = [OSError(28, "No space left on device")]
    with pytest.raises(StorageFull):
        blobs.get("a", there / "back", there / "moving")
    assert FAULTS.calls == ["info"]


@pytest.mark.parametrize("fault", ["cut", "flip"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_damage_on_the_way_is_read_again_and_lasting_damage_refused(fault, kind, there):
    blobs = faulty(f"damage-{fault}-{kind}")
    blobs.put("a", there / "file")
    blobs.put_folder("a", there / "folder", there / "moving")

    def get(name: str) -> None:
        if kind == "file":
            blobs.get("a", there / name, there / "moving", sha256=hashlib.sha256(DATA).hexdigest())
        else:
            blobs.get_folder("a", there / name, there / "moving")

    setattr(FAULTS, fault, 1)
    get("once")
    assert (there / "once").exists()
    setattr(FAULTS, fault, 2)
    with pytest.raises(StorageFailed, match="damaged"):
        get("twice")
    assert not (there / "twice").exists()
    assert not list((there / "moving").iterdir())


def test_calls_that_hang_are_given_up_and_do_not_pile_up(there, monkeypatch):
    monkeypatch.setattr(blobs_module, "AT_ONCE", 3)
    blobs = faulty("hangs", timeout_s=0.05)
    FAULTS.hang = gate = threading.Event()
    before = threading.active_count()
    start = time.monotonic()
    for _ in range(3):
        with pytest.raises(Unavailable):
            blobs.put("a", there / "file")
    assert time.monotonic() - start < 5
    assert threading.active_count() - before <= 3
    gate.set()
    FAULTS.hang = None
    blobs.put("b", there / "file")


def test_paths_of_an_archive_stay_inside(there):
    blobs = faulty("hostile")
    with zipfile.ZipFile(there / "bad.zip", "w") as archive:
        archive.writestr("../../escaped", b"x")
    blobs.put("v.zip", there / "bad.zip")
    blobs.get_folder("v", there / "out/v", there / "moving")
    assert not [p for p in there.rglob("escaped") if (there / "out/v") not in p.parents]


def test_an_url_that_nothing_opens_is_refused_at_once():
    with pytest.raises(ConfigInvalid, match="extra `blobs` for s3, gs and az"):
        Blobs("nosuch://bucket", timeout_s=1)
