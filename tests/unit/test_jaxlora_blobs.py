"""Blobs: objects come back as they were or not at all, through an object store that is slow, failing and partial."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from blobs_world import FAULTS, faulty, s3
from obstore.exceptions import PermissionDeniedError
from obstore.store import MemoryStore

from jaxlora.core.errors import ConfigInvalid, NotFound, StorageFailed, StorageFull, Unavailable
from jaxlora.storage import object_store as blobs_module
from jaxlora.storage.object_store import ATTEMPTS, Blobs

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


@pytest.mark.parametrize("url", ["memory:///", "file://{}/root", "{}/a root"], ids=["memory", "file", "path"])
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


def test_an_object_on_a_file_system_is_whole_or_not_there(there):
    """Another process is killed while it writes one; no part of it is seen."""
    blobs = Blobs(f"file://{there}/root", timeout_s=10)
    blobs.put("a", there / "file")
    gate = os.open(_fifo(there / "slow"), os.O_RDWR)
    os.write(gate, b"half of it")
    child = subprocess.Popen([sys.executable, "-c", WRITER, str(there / "root"), str(there / "slow")])
    try:
        deadline = time.monotonic() + 30
        while not [p for p in (there / "root").iterdir() if p.name != "a" and p.is_file() and p.stat().st_size]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.kill()
        child.wait()
        os.close(gate)
    assert blobs.list("") == {"a": len(DATA)}
    assert blobs.get_bytes("a") == DATA


WRITER = """
import sys
from obstore.store import LocalStore
LocalStore(sys.argv[1]).put("a", iter(lambda: open(sys.argv[2], "rb", 0).read(4), b""), chunk_size=4)
"""


def _fifo(path):
    os.mkfifo(path)
    return path


def test_what_fails_is_tried_again_and_given_up(there, monkeypatch):
    with s3(monkeypatch) as server:
        blobs = Blobs("s3://bucket/some/prefix", timeout_s=20)
        assert server.objects == {}
        server.fail = [503] * (ATTEMPTS - 1)
        server.asked.clear()
        blobs.put("a", there / "file")
        assert server.asked == ["PUT"] * ATTEMPTS
        assert server.objects == {"some/prefix/a": DATA}
        server.fail = [500] * ATTEMPTS
        with pytest.raises(Unavailable, match="does not answer; try again later"):
            blobs.put("b", there / "file")
        server.fail = [500] * ATTEMPTS
        with pytest.raises(Unavailable):
            blobs.list("")
        assert blobs.list("") == {"a": len(DATA)}
        server.cut = 1  # the rest is asked for
        blobs.get("a", there / "back", there / "moving", sha256=hashlib.sha256(DATA).hexdigest())
        assert (there / "back").read_bytes() == DATA
        blobs.delete(["a", "never"])
        assert server.objects == {}


def test_a_server_that_is_silent_is_given_up(there, monkeypatch):
    with s3(monkeypatch) as server:
        blobs = Blobs("s3://bucket", timeout_s=0.2)
        server.hang = threading.Event()
        start = time.monotonic()
        with pytest.raises(Unavailable):
            blobs.put_bytes("a", b"x")
        assert 0.5 < time.monotonic() - start < 5


def test_what_cannot_get_better_is_refused(there, monkeypatch):
    blobs = faulty("refused")
    FAULTS.fail = [PermissionDeniedError("AccessDenied")]
    with pytest.raises(StorageFailed, match="refuses the server"):
        blobs.put("a", there / "file")
    with s3(monkeypatch) as server:
        blobs = Blobs("s3://bucket", timeout_s=20)
        server.fail, server.asked = [403], []
        with pytest.raises(StorageFailed, match="refuses the server"):
            blobs.put("a", there / "file")
        assert server.asked == ["PUT"]


def test_a_full_disk_of_this_machine_is_told(there, monkeypatch):
    blobs = faulty("full")
    blobs.put("a", there / "file")
    (there / "full").mkdir()
    monkeypatch.setattr(blobs_module.uuid, "uuid4", lambda: SimpleNamespace(hex="copy"))
    (there / "full/copy").symlink_to("/dev/full")
    with pytest.raises(StorageFull):
        blobs.get("a", there / "back", there / "full")


def opened(kind, there):
    return faulty(there.name) if kind == "memory" else Blobs(f"file://{there}/root", timeout_s=10)


@pytest.mark.parametrize("kind", ["memory", "file", "s3"])
def test_an_object_is_made_once_and_replaced_only_as_it_was_read(kind, there, monkeypatch):
    with s3(monkeypatch) if kind == "s3" else contextlib.nullcontext():
        blobs = Blobs("s3://bucket/p", timeout_s=10) if kind == "s3" else opened(kind, there)
        first = blobs.put_if("a", b"1", None)
        assert first
        assert blobs.put_if("a", b"other", None) is None
        assert blobs.get_with_version("a") == (b"1", first)
        second = blobs.put_if("a", b"22", first)
        assert second not in (None, first)
        assert blobs.put_if("a", b"333", first) is None
        assert blobs.put_if("never", b"x", second) is None
        assert blobs.get_with_version("a") == (b"22", second)


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_of_many_that_replace_it_at_once_one_does(kind, there):
    blobs = opened(kind, there)
    version = blobs.put_if("a", b"begin", None)
    with ThreadPoolExecutor(8) as pool:
        for turn in range(20):
            tries = list(pool.map(lambda n, v=version, t=turn: blobs.put_if("a", b"%d %d" % (t, n), v), range(8)))
            (version,) = [t for t in tries if t is not None]
            assert blobs.get_bytes("a") == b"%d %d" % (turn, next(n for n, t in enumerate(tries) if t))


def test_a_place_that_lets_a_second_writer_in_is_refused():
    class Careless(MemoryStore):
        def put(self, path, file, *, mode=None):
            return super().put(path, file)

    with pytest.raises(StorageFailed, match="does not keep a second writer out"):
        Blobs("careless://", timeout_s=1, store=Careless())


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


def test_what_one_read_may_take_is_bounded_however_many_calls_it_makes(there, monkeypatch):
    """Each call takes most of what one may; together they may take no more than one, and the time of the bytes."""
    blobs, clock, limits = faulty("bounded", timeout_s=1.0), [0.0], []
    blobs.put_folder("a", there / "folder", there / "moving")
    size = sum(blobs.list("a").values()) or sum(blobs.list("").values())
    monkeypatch.setattr(blobs_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def within(self, limit_s, call):
        limits.append(limit_s)
        clock[0] += 0.9 * limit_s
        return call()

    monkeypatch.setattr(Blobs, "_within", within)
    FAULTS.flip = 1  # so that it is read twice
    blobs.get_folder("a", there / "back", there / "moving")
    assert len(limits) == 4
    assert clock[0] <= ATTEMPTS * 1.0 + 2 * size / blobs_module.SLOWEST_BYTES_S


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


def test_a_missing_bucket_is_refused(monkeypatch):
    with s3(monkeypatch) as server:
        server.fail = [404]
        with pytest.raises(ConfigInvalid, match="there is no such bucket"):
            Blobs("s3://bucket", timeout_s=20)


def test_an_url_that_nothing_opens_is_refused_at_once():
    with pytest.raises(ConfigInvalid, match="name an URL such as s3://BUCKET/PREFIX"):
        Blobs("nosuch://bucket", timeout_s=1)
