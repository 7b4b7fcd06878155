"""Threads on which tenants take turns: nobody has all of them, nobody goes twice before the others."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError

import pytest

from jaxlora.core.tenant_threads import TenantThreads


@pytest.fixture
def threads():
    made = TenantThreads(2, "test")
    yield made
    made.shutdown()


def test_a_tenant_of_many_long_calls_holds_one_thread(threads):
    hold, begun, running = threading.Event(), threading.Event(), []

    def long():
        running.append(None)
        begun.set()
        assert hold.wait(10)

    busy = [threads.submit("busy", long) for _ in range(5)]
    assert begun.wait(10)
    assert threads.submit("quiet", lambda x: x + 1, 1).result(10) == 2
    assert threads.submit("other", lambda: 3).result(10) == 3
    assert len(running) == 1
    hold.set()
    for future in busy:
        future.result(10)
    assert len(running) == 5


def test_tenants_take_turns_and_each_ones_calls_keep_their_order():
    threads, hold, order = TenantThreads(1, "test"), threading.Event(), []
    first = threads.submit("a", hold.wait, 10)
    futures = [threads.submit(name[0], order.append, name) for name in ("a1", "a2", "a3", "b1", "b2", "c1")]
    hold.set()
    for future in (first, *futures):
        future.result(10)
    assert order == ["b1", "c1", "a1", "b2", "a2", "a3"]
    threads.shutdown()


def test_an_error_is_the_callers_and_a_cancelled_call_does_not_run(threads):
    hold, ran = threading.Event(), []
    first = threads.submit("a", hold.wait, 10)
    cancelled, failing = threads.submit("a", ran.append, 1), threads.submit("a", lambda: 1 // 0)
    assert cancelled.cancel()
    hold.set()
    with pytest.raises(ZeroDivisionError):
        failing.result(10)
    assert first.result(10)
    assert ran == []
    assert threads.submit("a", lambda: "next").result(10) == "next"


def test_shutdown_waits_for_what_runs_and_cancels_what_waits():
    threads, begun, hold = TenantThreads(1, "test"), threading.Event(), threading.Event()

    def long():
        begun.set()
        return hold.wait(10)

    running = threads.submit("a", long)
    waiting = [threads.submit(tenant, lambda: None) for tenant in "aab"]
    assert begun.wait(10)
    threading.Timer(0.05, hold.set).start()
    threads.shutdown()
    assert running.result(0)
    for future in waiting:
        with pytest.raises(CancelledError):
            future.result(0)
    with pytest.raises(RuntimeError):
        threads.submit("a", lambda: None)
