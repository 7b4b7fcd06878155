"""Lease: one process at a time writes to object storage."""

from __future__ import annotations

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from blobs_world import FAULTS, faulty, s3

from jaxlora.core.errors import StateInvalid, StorageAway, Unavailable
from jaxlora.storage import lease as lease_module
from jaxlora.storage import object_store as blobs_module
from jaxlora.storage.lease import LEASE, Lease
from jaxlora.storage.object_store import Blobs
from jaxlora.storage.remote_states import StateCopies

SPAN_S = 2.4  # a busy machine stands still for half of it


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(blobs_module, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(lease_module, "SPAN_S", SPAN_S)
    monkeypatch.setattr(lease_module, "CLOCK_S", 0.2)
    yield
    FAULTS.__init__()


@pytest.fixture
def machine(request, tmp_path):
    """(objects as a machine sees them, its lease)."""
    made = []

    def open_(name: str, **how):
        blobs = faulty(request.node.name)
        made.append(Lease(blobs, tmp_path / name, **how))
        return blobs, made[-1]

    yield open_
    for lease in made:
        lease._end.set()
        lease._thread.join()


def crash(lease: Lease) -> None:
    lease._end.set()
    lease._thread.join()


def test_a_second_server_waits_and_is_refused_while_the_first_lives(machine):
    blobs, _ = machine("one")
    told = []
    with pytest.raises(StateInvalid, match=r"in use by .*; stop that server"):
        machine("two", waiting=told.append)
    assert len(told) == 1
    blobs.put_bytes("a", b"x")


def test_who_crashed_is_followed_when_its_time_is_over_and_writes_nothing_more(machine):
    one, lease = machine("one")
    crash(lease)
    began = time.monotonic()
    two, _ = machine("two")
    assert time.monotonic() - began > SPAN_S / 2
    with pytest.raises(Unavailable, match="could not be renewed"):
        one.put_bytes("a", b"old")
    two.put_bytes("a", b"new")
    assert two.get_bytes("a") == b"new"


def test_who_was_taken_over_finds_out_and_stops_writing(machine, tmp_path):
    one, lease = machine("one")
    assert one.put_if(LEASE, b'{"owner": "another", "until": 99999999999}', one.get_with_version(LEASE)[1])
    lease._thread.join(5)
    for write in (lambda: one.put_bytes("a", b"x"), lambda: one.delete(["a"]), lambda: one.put("a", tmp_path / "no")):
        with pytest.raises(StateInvalid, match="taken over by another"):
            write()
    lease.close()
    assert b"another" in one.get_bytes(LEASE), "it gives back only its own"


def test_the_same_server_goes_on_at_once_and_an_ended_one_leaves_it_free(machine):
    _, lease = machine("one")
    crash(lease)
    began = time.monotonic()
    _, lease = machine("one")
    lease.close()
    machine("two")
    assert time.monotonic() - began < SPAN_S


class Busy(Exception):
    """What a contender of a race makes of having to wait."""


def refuse(_who: str) -> None:
    raise Busy


@pytest.mark.fault("C7")
@pytest.mark.parametrize("kind", ["memory", "file"])
def test_of_two_that_take_it_at_once_one_has_it(kind, request, tmp_path):
    """A hundred times: at first it is not there, then it is free, and both have seen so before one writes."""
    met = threading.Barrier(2)

    class Racing(Lease):
        raced = False

        def _read(self):
            found = super()._read()
            if not self.raced:
                self.raced = True
                met.wait(10)
            return found

    def seen_by(name: str) -> Blobs:
        url = f"file://{tmp_path}/objects"
        return faulty(request.node.name) if kind == "memory" else Blobs(url, timeout_s=10)

    blobs = {name: seen_by(name) for name in ("one", "two")}

    def contend(name: str) -> Lease | None:
        (tmp_path / name).mkdir(exist_ok=True)
        try:
            return Racing(blobs[name], tmp_path / name, waiting=refuse)
        except (StateInvalid, Busy):
            return None

    with ThreadPoolExecutor(2) as pool:
        for turn in range(100):
            leases = list(pool.map(contend, blobs))
            (held,) = [lease for lease in leases if lease is not None]
            held.check()
            crash(held) if turn == 99 else held.close()
    with pytest.raises(Busy):
        Lease(blobs["one"], tmp_path, waiting=refuse)


@pytest.mark.fault("C7")
def test_an_owner_that_was_paused_finds_that_it_lost_it_and_writes_nothing(machine, monkeypatch):
    """It had read its own name and was about to renew it when it was paused; another took over meanwhile."""
    one, paused = machine("one")
    reached, gate, replace = threading.Event(), threading.Event(), paused._replace

    def late(found, epoch, *, held):
        reached.set()
        gate.wait(10)
        return replace(found, epoch, held=held)

    monkeypatch.setattr(paused, "_replace", late)
    assert reached.wait(5)
    two, lease = machine("two")
    two.put_bytes("a", b"new")
    with pytest.raises(Unavailable, match="could not be renewed"):
        one.put_bytes("a", b"old")
    gate.set()
    paused._thread.join(5)
    for write in (lambda: one.put_bytes("a", b"old"), lambda: one.delete(["a"])):
        with pytest.raises(StateInvalid, match="taken over by another"):
            write()
    assert two.get_bytes("a") == b"new"
    lease.check()
    paused.close()
    assert lease._owner.encode() in two.get_bytes(LEASE), "it gives back only its own"


def test_a_renewal_whose_answer_is_lost_loses_nothing(tmp_path, monkeypatch):
    with s3(monkeypatch) as server:
        blobs = Blobs("s3://bucket", timeout_s=5)
        lease = Lease(blobs, tmp_path)
        for _ in range(3):
            server.lost, until = 1, lease._until
            deadline = time.monotonic() + 10
            while lease._until == until:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        blobs.put_bytes("a", b"x")
        lease.close()
        with pytest.raises(Unavailable):
            blobs.put_bytes("a", b"y")


def test_a_short_outage_passes_and_a_long_one_stops_the_writing_until_it_is_over(machine):
    blobs, _ = machine("one")
    FAULTS.down = True
    time.sleep(SPAN_S + 0.4)
    with pytest.raises(Unavailable, match="could not be renewed"):
        blobs.delete(["a"])
    FAULTS.down = False
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            blobs.put_bytes("a", b"x")
            break
        except Unavailable:
            time.sleep(0.05)
    assert blobs.get_bytes("a") == b"x"


@pytest.mark.parametrize("off_s", [-86400.0, 86400.0])
def test_a_wrong_clock_takes_no_lease_and_keeps_none(machine, monkeypatch, off_s):
    one, lease = machine("one")
    now = time.time
    monkeypatch.setattr(lease_module.time, "time", lambda: now() + off_s)
    with pytest.raises(StateInvalid, match="in use by"):
        machine("two")
    monkeypatch.setattr(lease_module.time, "time", now)
    crash(lease)
    monkeypatch.setattr(lease_module.time, "time", lambda: now() - 86400)  # set back after the last renewal
    time.sleep(SPAN_S)
    with pytest.raises(Unavailable, match="could not be renewed"):
        one.put_bytes("a", b"old")


def test_a_copied_folder_gets_no_lease_at_once(machine, tmp_path):
    machine("one")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    with pytest.raises(StateInvalid, match="in use by"):
        machine("copy")


def test_each_who_takes_it_has_a_higher_epoch(machine):
    epochs = []
    for name in ("one", "two", "one"):
        blobs, lease = machine(name)
        lease.close()
        epochs.append((lease.epoch, blobs.epoch))
    assert epochs == [(1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize("change", ["put_bytes", "put", "delete"])
def test_a_writer_that_wakes_after_its_span_writes_nothing(machine, monkeypatch, tmp_path, change):
    """It had checked the lease and was paused before its call; another took over and wrote."""
    one, lease = machine("one")
    reached, gate, within, errors = threading.Event(), threading.Event(), one._within, []

    def paused(limit_s, call):
        reached.set()
        gate.wait(10)
        return within(limit_s, call)

    monkeypatch.setattr(one, "_within", paused)
    (tmp_path / "file").write_bytes(b"old")
    changes = {
        "put_bytes": lambda: one.put_bytes("a", b"old"),
        "put": lambda: one.put("a", tmp_path / "file"),
        "delete": lambda: one.delete(["a"]),
    }

    def write() -> None:
        try:
            changes[change]()
        except Exception as error:
            errors.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    assert reached.wait(5)
    lease._end.set()
    two, _ = machine("two")
    two.put_bytes("a", b"new")
    gate.set()
    writer.join(10)
    assert two.get_bytes("a") == b"new"
    assert [type(error) for error in errors] == [StorageAway]


def test_a_checkpoint_of_a_lost_epoch_stands_in_nobodys_place(machine, tmp_path):
    """Both wrote step 5; the one that lost the lease removes its own, and the newest epoch's is brought."""
    copies, folders = {}, {}
    for name in ("one", "two"):
        blobs, lease = machine(name)
        folders[name] = tmp_path / name / "states/job"
        (folders[name] / "5").mkdir(parents=True)
        (folders[name] / "5/meta").write_text(name)
        copies[name] = StateCopies(blobs, tmp_path / name / "states", "jobs")
        if name == "one":
            copies[name].send(folders[name])
            blobs.put_bytes("jobs/job/4.zip", b"of an older version")
            copies[name] = StateCopies(blobs, tmp_path / name / "states", "jobs")
            blobs.delete(["jobs/job/5.1.zip"])  # so that the other, too, sends it
            lease.close()
    copies["two"].send(folders["two"])
    blobs.put_bytes("jobs/job/5.1.zip", b"late, of the first")
    assert sorted(blobs.list("jobs/")) == ["jobs/job/5.1.zip", "jobs/job/5.2.zip"]
    found = StateCopies(blobs, tmp_path / "three", "jobs")
    found.bring(tmp_path / "three/job")
    assert (tmp_path / "three/job/5/meta").read_text() == "two"
    found.delete(tmp_path / "three/job")
    assert blobs.list("jobs/") == {}
