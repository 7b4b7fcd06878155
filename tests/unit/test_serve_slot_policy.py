"""When a server changes the number of its slots: under lasting need alone, one size at a time, and never to and fro."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.config.serving import SlotSize
from serve.engine.slots import GAP_S, PATIENCE_S, REST_S, ROOM, Demand, SlotPolicy

SIZES = (SlotSize(slots=4, pages=100), SlotSize(slots=8, pages=80), SlotSize(slots=16, pages=40))
QUANTUM = 0.2
CALM = Demand(adapters=3, waited_s=0.0, pages=10, shortages=0)
CROWD = replace(CALM, adapters=20, waited_s=1.0)  # of adapters, for which there are no slots


class Clock:
    """A policy, and a load that stays until it is changed."""

    def __init__(self, at: int = 1):
        self.policy, self.size, self.now = SlotPolicy(SIZES, SIZES[at]), SIZES[at], 1000.0
        self.shortages = 0
        self.changes: list[tuple[float, int]] = []  # when, and to how many slots

    def run(self, seconds: float, demand: Demand, *, short: bool = False, every: float = 0.5) -> list[int]:
        """The sizes it changes to in this time; `short`: requests lack pages all the time."""
        begun = len(self.changes)
        for _ in range(round(seconds / every)):
            self.now += every
            self.look(demand, short=short)
        return [slots for _, slots in self.changes[begun:]]

    def look(self, demand: Demand, *, short: bool) -> None:
        self.shortages += short
        size = self.policy.choose(self.now, replace(demand, shortages=self.shortages), QUANTUM)
        if size is not None:
            self.policy.set(self.now, size)
            self.size = size
            self.changes.append((self.now, size.slots))


def test_adapters_that_wait_get_slots_one_size_at_a_time():
    clock = Clock(at=0)
    assert clock.run(PATIENCE_S - 1, CROWD) == []
    assert clock.run(2, CROWD) == [8]
    assert clock.run(REST_S - 2, CROWD) == []
    assert clock.run(4, CROWD) == [16]
    assert clock.run(100, CROWD) == []


def test_requests_that_lack_pages_get_those_of_idle_slots():
    clock = Clock(at=2)
    assert clock.run(PATIENCE_S - 1, CALM, short=True) == []
    assert clock.run(2, CALM, short=True) == [8]
    assert clock.run(REST_S + 2, CALM, short=True) == [4]
    assert clock.run(100, CALM, short=True) == []


@pytest.mark.parametrize(
    ("demand", "short"),
    [
        (CALM, False),
        (replace(CROWD, waited_s=QUANTUM), False),
        (replace(CROWD, adapters=8), False),
        (replace(CROWD, pages=int(ROOM * 40) + 1), False),
        (CROWD, True),
        (replace(CALM, adapters=5), True),
    ],
    ids=["calm", "no longer than a quantum", "slots enough", "KV without room", "both lack", "slots in use"],
)
def test_otherwise_nothing_changes(demand, short):
    assert Clock().run(200, demand, short=short) == []


def test_a_need_that_comes_and_goes_lasts_and_one_that_stays_away_does_not():
    clock, away_s = Clock(at=0), GAP_S - 1
    for _ in range(int(PATIENCE_S / away_s) + 1):
        clock.run(0.5, CROWD)
        assert clock.run(away_s, CALM) == []
    assert [slots for _, slots in clock.changes] == [8]
    clock = Clock(at=0)
    for _ in range(20):
        assert clock.run(PATIENCE_S - 1, CROWD) == []
        clock.run(GAP_S + 1, CALM)


def test_a_server_that_slept_starts_to_count_anew():
    clock = Clock(at=0)
    clock.run(PATIENCE_S - 1, CROWD)
    clock.now += 3600
    assert clock.run(PATIENCE_S - 1, CROWD) == []


def test_a_change_by_hand_is_followed_by_a_rest():
    clock = Clock(at=0)
    clock.policy.set(clock.now, SIZES[1])
    assert clock.run(REST_S - 1, CROWD) == []
    assert clock.run(2, CROWD) == [16]


LOADS = st.builds(
    Demand,
    adapters=st.integers(0, 24),
    waited_s=st.sampled_from([0.0, 0.1, 0.5, 3.0]),
    pages=st.integers(0, 100),
    shortages=st.just(0),
)


@settings(deadline=None)
@given(
    at=st.integers(0, 2),
    loads=st.lists(st.tuples(LOADS, st.booleans(), st.floats(1.0, 60.0)), min_size=1, max_size=12),
)
def test_changes_are_rare_small_and_take_from_nobody_and_a_steady_load_has_them_in_one_direction(at, loads):
    clock = Clock(at)
    for demand, short, seconds in loads:
        for _ in range(round(seconds / 0.5)):
            clock.now += 0.5
            before = clock.size
            clock.look(demand, short=short)
            assert abs(SIZES.index(clock.size) - SIZES.index(before)) <= 1
            if clock.size.slots < before.slots:
                assert demand.adapters <= clock.size.slots
            if clock.size.slots > before.slots:
                assert demand.adapters > before.slots
                assert demand.pages <= clock.size.pages
    assert all(b[0] - a[0] >= REST_S for a, b in zip(clock.changes, clock.changes[1:], strict=False))
    demand, short, _ = loads[-1]
    steady = [clock.size.slots, *clock.run(20 * REST_S, demand, short=short)]
    assert steady in (sorted(steady), sorted(steady, reverse=True))
    assert len(steady) <= len(SIZES)
