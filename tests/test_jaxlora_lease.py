"""Lease: one process at a time writes to object storage."""

from __future__ import annotations

import time

import pytest
from blobs_world import FAULTS, faulty

from jaxlora import blobs as blobs_module
from jaxlora import lease as lease_module
from jaxlora.blobs import LEASE
from jaxlora.errors import StateInvalid, Unavailable
from jaxlora.lease import Lease


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(blobs_module, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(lease_module, "SPAN_S", 0.9)
    monkeypatch.setattr(lease_module, "CLOCK_S", 0.1)
    monkeypatch.setattr(lease_module, "SETTLE_S", 0.01)
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
    assert time.monotonic() - began > 0.5
    with pytest.raises(Unavailable, match="could not be renewed"):
        one.put_bytes("a", b"old")
    two.put_bytes("a", b"new")
    assert two.get_bytes("a") == b"new"


def test_who_was_taken_over_finds_out_and_stops_writing(machine, tmp_path):
    one, lease = machine("one")
    one.lease(b'{"owner": "another", "until": 99999999999}')
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
    assert time.monotonic() - began < 0.7


def test_a_short_outage_passes_and_a_long_one_stops_the_writing_until_it_is_over(machine):
    blobs, _ = machine("one")
    FAULTS.down = True
    time.sleep(1.3)
    with pytest.raises(Unavailable, match="could not be renewed"):
        blobs.delete(["a"])
    FAULTS.down = False
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            blobs.put_bytes("a", b"x")
            break
        except Unavailable:
            time.sleep(0.05)
    assert blobs.get_bytes("a") == b"x"
