"""The exchange of slots: bounded waits in simulation, and each rule by itself."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.core.errors import InvalidRequest
from jaxlora.core.lora import AdapterRef
from serve.engine.slot_scheduler import ActiveSet, Exchange, TokenShares, Work, quotas
from serve.engine.slots import SlotTable


def adapter(number: int, tenant: str = "acme", version: int = 1) -> AdapterRef:
    return AdapterRef(tenant, f"bot{number}", version)


def make(slots: int, quantum: float = 10.0, limit: int | None = None) -> ActiveSet:
    return ActiveSet(SlotTable(slots), quantum_s=quantum, limit=slots if limit is None else limit)


def step(active: ActiveSet, now: float, work: dict[AdapterRef, Work], slow: tuple[AdapterRef, ...] = ()) -> Exchange:
    """An exchange with all but the slow ones read, and every invariant checked."""
    before, pinned = dict(active.entered), set(active.pinned)
    ahead = max(8, active.limit)  # with fewer than there are slots, reading would be what is waited for
    ready = [ref for ref in active.wanted(work, ahead) if ref not in slow]
    result = active.exchange(now, work, ready)
    active.check()
    assert len(active.entered) <= max(active.limit, len(before))
    assert not set(result.leave) & pinned
    assert all(now - before[ref] >= active.quantum_s or len(before) > active.limit for ref in result.leave)
    assert {ref for ref, _ in result.load} <= set(ready)
    assert [active.slots.find(ref) for ref, _ in result.enter] == [slot for _, slot in result.enter]
    return result


def longest_waits(
    active: ActiveSet, work: dict[AdapterRef, Work], ticks: int, slow: tuple[AdapterRef, ...] = ()
) -> dict[AdapterRef, float]:
    """The longest time each adapter was without a slot while time went on by ones, with work that never ends."""
    gone, worst = dict.fromkeys(work, 0.0), dict.fromkeys(work, 0.0)
    for now in range(ticks):
        step(active, float(now), work, slow)
        for ref in work:
            gone[ref] = 0.0 if ref in active.entered else gone[ref] + 1
            worst[ref] = max(worst[ref], gone[ref])
    return worst


def check_bound(slots: int, adapters: int, quantum: int, pins: int) -> None:
    """Work that never ends for all adapters: the longest wait."""
    active = make(slots, quantum)
    pins = min(pins, slots - 1, adapters)
    work = {adapter(i): Work(0.0) for i in range(adapters)}
    for i in range(pins):
        active.pin(adapter(i))
    bound = math.ceil(max(adapters - slots, 0) / (slots - pins)) * quantum + 1
    worst = longest_waits(active, work, 2 * bound + 3 * quantum)
    assert max(worst.values()) <= bound
    assert all(worst[adapter(i)] == 0 for i in range(pins))


@pytest.mark.fault("T7")
@given(slots=st.integers(1, 9), adapters=st.integers(1, 24), quantum=st.integers(1, 12), pins=st.integers(0, 3))
@settings(max_examples=60)
def test_no_adapter_waits_longer_than_the_bound(slots, adapters, quantum, pins):
    check_bound(slots, adapters, quantum, pins)


@pytest.mark.slow
@pytest.mark.parametrize("slots", range(1, 13))
def test_no_adapter_waits_longer_than_the_bound_anywhere(slots):
    """1,200 of them."""
    for adapters in range(slots % 3 + 1, 61, 3):
        for quantum in (1, 2, 5, 11, 30):
            check_bound(slots, adapters, quantum, pins=(adapters + quantum) % min(slots, 3))


def test_two_adapters_with_long_backlogs_do_not_shut_out_the_third():
    """With age since arrival alone the old backlogs would alternate for ever."""
    active = make(1, 50)
    work = {adapter(0): Work(-1000.0), adapter(1): Work(-900.0), adapter(2): Work(0.0)}
    assert max(longest_waits(active, work, 5000).values()) <= 101


@pytest.mark.fault("T7")
@pytest.mark.parametrize("many", [1, 50, 200])
def test_another_tenants_adapters_never_lengthen_a_tenants_wait(many):
    active = make(4, 10)
    work = {adapter(i, "hoard"): Work(0.0) for i in range(many)} | {adapter(i, "small"): Work(0.0) for i in range(3)}
    worst = longest_waits(active, work, 1000)
    # Two slots are due to each, so three adapters take turns over two (or over three, beside a single one).
    assert max(worst[adapter(i, "small")] for i in range(3)) <= 11


def test_more_tenants_than_slots_take_turns_whatever_each_brings():
    active = make(2, 10)
    work = {adapter(i, "hoard"): Work(0.0) for i in range(40)} | {adapter(0, f"t{i}"): Work(0.0) for i in range(5)}
    worst = longest_waits(active, work, 2000)
    assert max(worst[adapter(0, f"t{i}")] for i in range(5)) <= math.ceil(4 / 2) * 10 + 1


def test_shares_of_slots_follow_weights():
    assert quotas({"a": 50, "b": 1}, {}, 8) == {"a": 7, "b": 1}
    assert quotas({"a": 50, "b": 50}, {}, 8) == {"a": 4, "b": 4}
    assert quotas({"a": 50, "b": 50}, {"a": 3.0}, 8) == {"a": 6, "b": 2}
    assert quotas({"a": 2, "b": 50, "c": 0}, {}, 8) == {"a": 2, "b": 6}
    assert quotas({"a": 9, "b": 9, "c": 9}, {}, 2) == {"a": 1, "b": 1, "c": 1}


def test_nothing_moves_unless_somebody_waits():
    active = make(2, 10)
    work = {adapter(0): Work(0.0), adapter(1): Work(0.0)}
    step(active, 0.0, work)
    for now in range(1, 200):
        assert step(active, float(now), work) == Exchange()
    assert active.swaps == 0


def test_idle_adapters_leave_first_and_those_in_their_quantum_stay():
    active = make(2, 10)
    work = {adapter(0): Work(0.0), adapter(1): Work(0.0)}
    step(active, 0.0, work)
    del work[adapter(1)]
    work[adapter(2)] = Work(1.0)
    assert step(active, 1.0, work) == Exchange(
        enter=[(adapter(2), 1)], load=[(adapter(2), 1)]
    )  # no quantum for the idle
    work[adapter(3)] = Work(2.0)
    assert step(active, 2.0, work) == Exchange()
    assert step(active, 10.0, work).leave == [adapter(0)]
    assert active.swaps == 1


def test_work_that_ends_and_begins_between_two_plans_does_not_renew_the_quantum():
    active = make(1, 10)
    work = {adapter(0): Work(0.0)}
    step(active, 0.0, work)
    work |= {adapter(1): Work(1.0)}
    for now in range(1, 10):
        work[adapter(0)] = Work(float(now))  # the request ended, and the next was there at once
        assert step(active, float(now), work) == Exchange()
    assert step(active, 10.0, work).leave == [adapter(0)]


def test_an_adapter_that_is_not_read_loses_its_turn_and_not_others():
    active = make(2, 10)
    stuck = adapter(9)
    work = {stuck: Work(-100.0)} | {adapter(i): Work(0.0) for i in range(4)}
    worst = longest_waits(active, work, 500, slow=(stuck,))
    assert worst[stuck] == 500
    assert max(w for ref, w in worst.items() if ref != stuck) <= 11
    assert step(active, 500.0, work).enter[0][0] == stuck  # it is first once it is there


def test_an_adapter_whose_rows_still_lie_in_a_slot_is_not_loaded_again():
    active = make(3, 10, limit=2)
    work = {adapter(i): Work(float(i)) for i in range(3)}
    for now in range(3):
        step(active, float(now), work)
    loads = 0
    for now in range(3, 300):
        loads += len(step(active, float(now), work).load)
    assert active.swaps > 10
    assert loads == 1  # of the third


def test_fewer_or_more_active_adapters_at_run_time():
    active = make(4, 10)
    work = {adapter(i): Work(float(i)) for i in range(6)}
    for now in range(4):
        step(active, float(now), work)
    active.limit = 2
    assert len(step(active, 5.0, work).leave) == 2  # at once, the longest active first
    assert set(active.entered) == {adapter(2), adapter(3)}
    active.limit = 4
    step(active, 6.0, work)
    assert len(active.entered) == 4


def test_pins_leave_one_slot_to_share():
    active = make(2, 10)
    active.pin(adapter(0))
    with pytest.raises(InvalidRequest, match="2 slots take at most 1 pinned"):
        active.pin(adapter(1))
    step(active, 0.0, {})
    assert adapter(0) in active.entered  # with nothing to do
    active.unpin(adapter(0))
    step(active, 1.0, {})
    assert adapter(0) not in active.entered


def test_a_tenant_that_comes_back_does_not_cash_in_its_absence():
    shares = TokenShares()
    shares.weights = {"heavy": 2.0}
    shares.keep(["light", "heavy"])
    shares.add("light", 100, 50)
    shares.add("heavy", 100, 50)
    assert (shares.served("light"), shares.served("heavy")) == (200.0, 100.0)
    shares.keep(["light"])
    shares.add("light", 300, 0)
    shares.keep(["light", "heavy"])
    assert shares.served("heavy") == shares.served("light") == 500.0


# ---- classes of slots ---------------------------------------------------------------------------------------------------


def classed(ranks: dict[AdapterRef, int], *slots: int, quantum: float = 10.0) -> ActiveSet:
    """Slots of these ranks, and adapters of those."""
    return ActiveSet(SlotTable(len(slots), slots), quantum_s=quantum, limit=len(slots), rank_of=ranks.__getitem__)


def ranks_in_use(active: ActiveSet) -> dict[AdapterRef, int]:
    return {ref: active.slots.rank(active.slots.find(ref)) for ref in active.entered}


def test_an_adapter_is_at_home_in_the_smallest_class_that_holds_it():
    small, middle, large = (adapter(i) for i in range(3))
    active = classed({small: 4, middle: 9, large: 32}, 32, 16, 4)
    step(active, 0.0, {ref: Work(0.0) for ref in (large, middle, small)})
    assert ranks_in_use(active) == {small: 4, middle: 16, large: 32}


def test_a_guest_takes_a_larger_slot_while_nobody_at_home_waits_and_is_the_first_to_leave():
    first, second, third, large = (adapter(i) for i in range(4))
    active = classed({first: 4, second: 4, third: 4, large: 32}, 32, 4)
    work = {ref: Work(float(i)) for i, ref in enumerate((first, second, third))}
    step(active, 0.0, work)
    assert ranks_in_use(active) == {first: 4, second: 32}
    work[large] = Work(1.0)
    step(active, 5.0, work)
    assert large not in active.entered  # the guest is within its quantum
    step(active, 10.0, work)
    assert ranks_in_use(active) == {third: 4, large: 32}
    step(active, 20.0, work)  # a home that somebody of its own holds takes no guest
    assert active.entered.keys() & {large} == {large}


@pytest.mark.parametrize("larges", [0, 1, 3])
def test_nobody_starves_in_any_class(larges):
    """Each waits for turns of its own class, and for a guest's quantum at most besides."""
    ranks = {adapter(i): 4 for i in range(5)} | {adapter(10 + i): 32 for i in range(larges)}
    active, quantum = classed(ranks, 32, 4, 4, quantum=10.0), 10.0
    work, entered, longest = {ref: Work(0.0) for ref in ranks}, dict.fromkeys(ranks, 0.0), dict.fromkeys(ranks, 0.0)
    for now in range(400):
        step(active, float(now), work)
        for ref in ranks:
            entered[ref] = float(now) if ref in active.entered else entered[ref]
            longest[ref] = max(longest[ref], now - entered[ref])
    for ref, rank in ranks.items():
        others, slots = (larges, 1) if rank == 32 else (5, 2)
        assert longest[ref] <= (math.ceil((others - slots) / slots) + 1) * (quantum + 2)
