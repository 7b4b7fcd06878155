"""SingleFlight: one call for all who ask at once, its result and its error for each of them, and nothing kept of it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxlora.storage.disk_cache import DiskCopies
from jaxlora.storage.single_flight import SingleFlight


class Work:
    """A call that waits until all who ask are in line."""

    def __init__(self, result):
        self.result, self.calls = result, 0
        self.begun, self.gate = threading.Event(), threading.Event()

    def __call__(self):
        self.calls += 1
        self.begun.set()
        assert self.gate.wait(10)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def ask_at_once(pool, work, ask, count=8):
    """Futures of `count` who ask, of whom all but the first come while it is working."""
    asked = [pool.submit(ask)]
    assert work.begun.wait(10)
    inside = threading.Barrier(count)  # the late ones and this thread

    def late():
        inside.wait(10)
        return ask()

    asked += [pool.submit(late) for _ in range(count - 1)]
    inside.wait(10)
    threading.Timer(0.2, work.gate.set).start()
    return asked


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as it:
        yield it


def test_all_who_ask_at_once_get_the_result_of_one_call(pool):
    flight, work = SingleFlight(), Work(object())
    asked = ask_at_once(pool, work, lambda: flight.get("a", lambda: None, work))
    assert all(f.result(10) is work.result for f in asked)
    assert work.calls == 1
    assert flight.get("a", lambda: None, work) is work.result
    assert work.calls == 2, "nothing is kept"


def test_all_who_ask_at_once_get_its_error_and_the_next_tries_again(pool):
    flight, work = SingleFlight(), Work(OSError("no"))
    asked = ask_at_once(pool, work, lambda: flight.get("a", lambda: None, work))
    assert all(f.exception(10) is work.result for f in asked)
    assert work.calls == 1
    assert flight.get("a", lambda: None, lambda: 5) == 5


def test_keys_do_not_wait_for_each_other(pool):
    flight, work = SingleFlight(), Work(1)
    first = pool.submit(flight.get, "a", lambda: None, work)
    assert work.begun.wait(10)
    assert flight.get("b", lambda: None, lambda: 2) == 2
    work.gate.set()
    assert first.result(10) == 1


def test_what_is_there_is_not_made_nor_what_came_while_the_call_was_prepared():
    flight = SingleFlight()
    assert flight.get("a", lambda: 0, lambda: pytest.fail("it is there")) == 0
    found = iter([None, 7])  # another call ended between the two looks
    assert flight.get("a", lambda: next(found), lambda: pytest.fail("it has come")) == 7


def test_a_copy_is_brought_once_for_all_who_use_it(pool, tmp_path):
    copies, path = DiskCopies(None), tmp_path / "copy"
    work = Work(None)

    def use():
        with copies.using(path, lambda to: (work(), to.write_bytes(b"x"))):
            return path.read_bytes()

    assert [f.result(10) for f in ask_at_once(pool, work, use)] == [b"x"] * 8
    assert work.calls == 1


def test_a_copy_that_cannot_be_brought_fails_all_who_wait_and_is_tried_again(pool, tmp_path):
    copies, path = DiskCopies(0), tmp_path / "copy"
    work = Work(ConnectionError("away"))

    def use():
        with copies.using(path, lambda to: work()):
            return

    assert all(f.exception(10) is work.result for f in ask_at_once(pool, work, use))
    assert work.calls == 1
    with copies.using(path, lambda to: to.write_bytes(b"x")):
        copies.add(path, lambda p: p.unlink())
        assert path.exists(), "nobody takes it from who uses it"
    assert not path.exists()
