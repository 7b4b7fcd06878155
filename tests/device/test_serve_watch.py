"""What the device thread leaves for others to read: turns that hang, rates, snapshots."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from jaxlora.core.lora import AdapterRef
from serve.engine.page_cache import PageAllocator
from serve.engine.request import Request, SamplingParams
from serve.engine.scheduler import Limits, Scheduler
from serve.engine.slots import SlotTable
from serve.runtime.snapshot import TrainingView
from serve.runtime.watchdog import EVERY_S, HANG_S, RATE_S, Rates, Watch

LIMITS = Limits(rows=2, lanes=2, few_lanes=1, lane_tokens=4, waiting=9, waiting_tokens=900, host_pages=0)


@pytest.fixture
def clock():
    return SimpleNamespace(now=100.0)


@pytest.fixture
def engine(clock):
    scheduler = Scheduler(SlotTable(2), PageAllocator(8, 4), LIMITS, quantum_s=5.0, active=2)
    return SimpleNamespace(
        scheduler=scheduler, clock=lambda: clock.now, decoded_tokens=0, prefilled_tokens=0, resizes=0
    )


@pytest.fixture
def watch(engine, clock):
    return Watch(engine, clock=lambda: clock.now)


def add(engine, clock, name, count=1):
    ref = AdapterRef("acme", name, 1)
    for i in range(count):
        request = Request(
            id=f"{name}{i}", tenant="acme", adapter=ref, prompt=(1, 2), params=SamplingParams(max_tokens=4)
        )
        engine.scheduler.add(request, clock.now)
    return ref


def test_a_turn_that_lasts_is_a_hang_and_one_that_ends_is_not(watch, clock):
    watch.turn()
    clock.now += HANG_S
    assert watch.hangs_s() is None
    clock.now += 0.5
    assert watch.hangs_s() == HANG_S + 0.5 < 5.0
    watch.turn()
    assert watch.hangs_s() is None


def test_rest_is_no_hang_and_the_turn_after_it_may_be_one(watch, clock):
    assert watch.hangs_s() is None  # not started: it compiles
    watch.turn()
    watch.rest()
    clock.now += 1000
    assert watch.hangs_s() is None
    watch.turn()
    clock.now += 2 * HANG_S
    assert watch.hangs_s() == 2 * HANG_S


def test_what_is_patient_may_last(watch, clock):
    watch.turn()
    with watch.patience():
        clock.now += 1000
        assert watch.hangs_s() is None
    assert watch.hangs_s() is None
    clock.now += 2 * HANG_S
    assert watch.hangs_s() == 2 * HANG_S


def test_a_busy_thread_leaves_a_snapshot_now_and_then(watch, engine, clock):
    watch.turn()
    add(engine, clock, "bot")
    watch.turn()
    assert watch.snapshot.waiting == 0
    clock.now += EVERY_S
    assert watch.age_s() == EVERY_S
    watch.turn()
    assert (watch.snapshot.waiting, watch.age_s()) == (1, 0.0)
    for s in list(engine.scheduler._groups[AdapterRef("acme", "bot", 1)].values()):
        engine.scheduler.finish(s)
    watch.rest()
    clock.now += 100
    assert (watch.snapshot.waiting, watch.age_s()) == (0, 0.0)


def test_rates_are_of_the_last_seconds(watch, engine, clock):
    watch.turn()
    for _ in range(40):
        clock.now += EVERY_S
        engine.decoded_tokens += 50
        engine.prefilled_tokens += 5
        watch.turn()
    assert watch.rates() == Rates(decoded=100.0, prefilled=10.0, trained=0.0)
    assert len(watch._past) <= RATE_S / EVERY_S + 3
    watch.rest()
    clock.now += RATE_S / 2
    assert watch.rates().decoded == 50.0
    clock.now += RATE_S
    assert watch.rates().decoded == 0.0
    engine.decoded_tokens += 30  # a burst after a long rest
    clock.now += 100
    watch.turn()
    watch.rest()
    assert watch.rates().decoded == 3.0


def test_a_thread_that_rests_often_keeps_few_counts(watch, engine, clock):
    for _ in range(1000):
        clock.now += 0.001
        engine.decoded_tokens += 1
        watch.turn()
        watch.rest()
    assert len(watch._past) < 10
    assert watch.rates().decoded == pytest.approx(1000, rel=0.01)


def test_trained_tokens_have_a_rate(watch, clock):
    seen = iter([TrainingView(tokens=t, jobs={"running": 1}) for t in (0, 500)])
    watch.training = lambda: next(seen)
    watch.rest()
    clock.now += 5
    watch.rest()
    assert watch.rates().trained == 100.0
    assert watch.snapshot.training == TrainingView(tokens=500, jobs={"running": 1})


def test_a_snapshot_shows_slots_and_lines(watch, engine, clock):
    scheduler = engine.scheduler
    first = add(engine, clock, "first", 3)
    clock.now += 1
    second, third = add(engine, clock, "second"), add(engine, clock, "third")
    scheduler.plan(clock.now, [first, second])
    clock.now += 2
    watch.rest()
    seen = watch.snapshot
    assert [s.adapter for s in seen.slots] == [first, second]
    assert [s.active_s for s in seen.slots] == [2.0, 2.0]
    assert [(s.rows, s.waiting) for s in seen.slots] == [(1, 2), (1, 0)]
    assert [(w.adapter, w.waited_s, w.requests) for w in seen.waits] == [(third, 2.0, 1)]
    assert (seen.running, seen.parked, seen.waiting, seen.rows) == (2, 0, 3, 2)
    assert (seen.pages, seen.free_pages, seen.waiting_adapters) == (8, 6, 1)
    assert scheduler.active.waited_s.counts[:1] == [1]  # the second had its slot at once
    assert scheduler.active.waited_s.sum == 1.0  # the first waited


def test_a_preempted_request_is_told_and_counted(watch, engine, clock):
    first = add(engine, clock, "first")
    add(engine, clock, "second")
    third = add(engine, clock, "third")
    scheduler = engine.scheduler
    scheduler.plan(clock.now, [first, AdapterRef("acme", "second", 1)])
    clock.now += 6
    scheduler.plan(clock.now, [third])
    watch.rest()
    seen = watch.snapshot
    assert (seen.swaps, seen.parks, seen.parked, seen.running) == (1, 1, 1, 2)
    assert [w.adapter for w in seen.waits] == [first]
