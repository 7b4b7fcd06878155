"""How many replicas and trainers there should be: by hand, for any load at all, and in a simulated day."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.config.cluster import ClusterSection, ScalingSection
from jaxlora.core.errors import ConfigInvalid
from serve.cluster.autoscaler import Autoscaler, Load, ReplicaScaler, TrainerScaler
from serve.cluster.replica_view import Report

CONFIG = ScalingSection(waiting_tokens=10, busy=0.5, rise_s=2, idle_s=30, waiting_jobs=4, job_wait_s=5)
ROWS, SLOTS = 4, 2


def says(running: int = 0, waiting: int = 0, adapters: tuple[int, ...] = (), first: int = 0) -> Report:
    """adapters: the tokens of each; they are called first, first + 1 and so on."""
    return Report(
        asked_s=0.0,
        slots=SLOTS,
        rows=ROWS,
        running_rows=running,
        running_tokens=10 * running,
        waiting_tokens=waiting,
        adapters={("acme", str(first + i)): tokens for i, tokens in enumerate(adapters)},
    )


def load(*reports: Report, held: int = 0, asked: int = 0) -> Load:
    return Load(replicas={str(i): report for i, report in enumerate(reports)}, held=held, asked=asked)


LONG = says(running=ROWS, waiting=10 * ROWS + 1)  # short of rows
FULL = says(running=ROWS, waiting=10 * ROWS)
IDLE = says()


# ---- replicas


def test_tokens_that_wait_ask_for_one_more_when_they_wait_for_long():
    scaler = ReplicaScaler(1, 4, CONFIG)
    assert [scaler.wanted(load(LONG), float(s)) for s in range(4)] == [1, 1, 2, 2]
    scaler = ReplicaScaler(1, 4, CONFIG)
    seen = [LONG, LONG, FULL, LONG, LONG, LONG]
    assert [scaler.wanted(load(report), float(s)) for s, report in enumerate(seen)] == [1, 1, 1, 1, 1, 2]


def test_while_one_starts_no_more_are_asked_for():
    scaler = ReplicaScaler(1, 8, CONFIG)
    assert {scaler.wanted(load(LONG), 3.0 + s) for s in range(20)} == {1, 2}
    assert scaler.wanted(load(LONG, LONG), 24.0) == 2  # it has just come
    assert scaler.wanted(load(LONG, LONG), 26.0) == 3
    assert scaler.wanted(load(*[LONG] * 4), 27.0) == 4
    assert scaler.wanted(load(*[LONG] * 4), 29.0) == 6
    assert scaler.wanted(load(*[LONG] * 6), 31.0) == 6
    assert scaler.wanted(load(*[LONG] * 6), 33.0) == 8


@pytest.mark.parametrize(("long", "wanted"), [(2, 4), (3, 6)])
def test_where_half_have_room_the_others_ask_for_nobody(long, wanted):
    scaler = ReplicaScaler(1, 9, CONFIG)
    reports = [LONG] * long + [FULL] * (4 - long)
    scaler.wanted(load(*reports), 0.0)
    assert scaler.wanted(load(*reports), 2.0) == wanted


@pytest.mark.parametrize(("tokens", "wanted"), [((5, 5, 0, 0, 0), 1), ((5, 5, 1), 2)])
def test_an_adapter_that_waits_for_a_slot_asks_for_one_more(tokens, wanted):
    scaler = ReplicaScaler(1, 4, CONFIG)
    report = says(running=2, adapters=tokens)
    scaler.wanted(load(report), 0.0)
    assert scaler.wanted(load(report), 2.0) == wanted


@pytest.mark.parametrize(
    ("reports", "carries"),
    [
        ([says(running=2), IDLE, IDLE], 1),  # half of four rows is two
        ([says(running=3), IDLE, IDLE], 2),
        ([says(running=2), says(running=2), says(running=2)], 3),
        ([says(running=1, waiting=20), IDLE, IDLE], 1),  # half of ten tokens, for four rows
        ([says(running=1, waiting=21), IDLE, IDLE], 2),
        ([says(1, adapters=(5,)), says(1, adapters=(5,)), IDLE], 1),  # the same one
        ([says(1, adapters=(5,)), says(1, adapters=(5,), first=9), IDLE], 2),
        ([says(1, adapters=(5, 0)), says(1, adapters=(5,)), IDLE], 1),  # the second has no work
        ([says(running=4), says(running=4), IDLE], 3),  # there is no more than there is
    ],
)
def test_fewer_are_enough_where_they_have_room_to_spare(reports, carries):
    scaler = ReplicaScaler(1, 3, CONFIG)
    scaler.wanted(load(*[FULL] * 3), 0.0)
    assert scaler.wanted(load(*reports), 29.9) == 3
    assert scaler.wanted(load(*reports), 30.0) == carries


def test_one_busy_look_within_the_time_keeps_them():
    scaler = ReplicaScaler(1, 3, CONFIG)
    for second in range(100):
        report = FULL if second % 25 == 0 else IDLE
        assert scaler.wanted(load(report, report, report), float(second)) == 3
    assert scaler.wanted(load(IDLE, IDLE, IDLE), 104.9) == 3
    assert scaler.wanted(load(IDLE, IDLE, IDLE), 105.0) == 1


def test_nobody_is_there_after_a_time_without_a_request_and_one_request_starts_one():
    scaler = ReplicaScaler(0, 3, CONFIG)
    assert scaler.wanted(load(), 0.0) == 0
    assert scaler.wanted(load(held=1, asked=1), 1.0) == 1
    assert scaler.wanted(load(IDLE, asked=1), 2.0) == 1
    assert scaler.wanted(load(IDLE, asked=2), 20.0) == 1  # one that no report has seen
    assert scaler.wanted(load(IDLE, asked=2), 49.9) == 1
    assert scaler.wanted(load(IDLE, asked=2), 50.0) == 0
    assert scaler.wanted(load(asked=3), 60.0) == 1


def test_replicas_that_have_died_stay_wanted():
    scaler = ReplicaScaler(1, 3, CONFIG)
    scaler.wanted(load(FULL, FULL, FULL), 0.0)
    assert scaler.wanted(load(), 10.0) == 3


reports = st.builds(
    says,
    running=st.integers(0, ROWS),
    waiting=st.sampled_from([0, 0, 1, 40, 41, 1000]),
    adapters=st.lists(st.integers(0, 3), max_size=4).map(tuple),
    first=st.integers(0, 3),
)
looks = st.lists(
    st.tuples(st.floats(0.1, 10), st.lists(reports, max_size=5), st.integers(0, 3), st.integers(0, 1)), max_size=60
)


@settings(max_examples=300)
@given(st.integers(0, 2), st.integers(0, 4), looks)
def test_counts_stay_within_their_bounds_and_never_come_down_soon_after_they_went_up(least, more, seen):
    """For any load.  So up, down and up again takes longer than the time."""
    most = max(1, least + more)
    scaler = ReplicaScaler(least, most, CONFIG)
    now_s, asked, last = 0.0, 0, least
    rose: dict[int, float] = {}  # to so many or more: when last
    for passed_s, replicas, held, came in seen:
        now_s, asked = now_s + passed_s, asked + came
        count = scaler.wanted(load(*replicas, held=held, asked=asked), now_s)
        assert least <= count <= most
        assert count <= max(last, len(replicas) + math.ceil(len(replicas) / 2), 1)
        if count > last:
            rose |= dict.fromkeys(range(last + 1, count + 1), now_s)
        for n in range(count + 1, last + 1):
            assert n not in rose or now_s - rose[n] >= CONFIG.idle_s
        last = count


# ---- trainers


@dataclass
class Jobs:
    waiting: int = 0
    longest_wait_s: float = 0.0
    trainers: dict[str, int] = field(default_factory=dict)


def test_trainers_by_the_length_of_the_line_and_by_its_wait():
    scaler = TrainerScaler(0, 3, CONFIG)
    assert scaler.wanted(Jobs(), 0.0) == 0
    assert scaler.wanted(Jobs(3, 4.9), 1.0) == 0
    assert scaler.wanted(Jobs(1, 5.0), 2.0) == 1
    assert scaler.wanted(Jobs(8, 1.0), 3.0) == 2
    assert scaler.wanted(Jobs(4, 1.0, {"a": 2, "b": 1}), 4.0) == 3
    assert scaler.wanted(Jobs(100, 100.0, {"a": 2, "b": 1}), 5.0) == 3


def test_trainers_go_when_they_hold_nothing_and_nothing_waits_for_a_time():
    scaler = TrainerScaler(0, 3, CONFIG)
    assert scaler.wanted(Jobs(8), 0.0) == 2
    assert scaler.wanted(Jobs(0, 0.0, {"a": 4, "b": 4}), 10.0) == 2
    assert scaler.wanted(Jobs(0, 0.0, {"a": 0, "b": 1}), 20.0) == 2
    assert scaler.wanted(Jobs(0, 0.0, {"a": 0, "b": 1}), 40.0) == 1
    assert scaler.wanted(Jobs(0, 0.0, {"a": 0, "b": 0}), 69.9) == 1
    assert scaler.wanted(Jobs(0, 0.0, {"a": 0}), 70.0) == 0


def test_what_nobody_says_stays():
    both = Autoscaler(ClusterSection(replicas=1, most_replicas=3, most_trainers=2, scaling=CONFIG))
    assert (both.wanted(None, None, 0.0).replicas, both.wanted(None, None, 0.0).trainers) == (1, 0)
    both.wanted(load(LONG), Jobs(8, 0.0, {"trainer-0": 5}), 1.0)
    wanted = both.wanted(load(LONG), None, 3.0)
    assert (wanted.replicas, wanted.trainers, wanted.jobs) == (2, 2, {"trainer-0": 5})
    assert both.wanted(None, None, 1000.0) == wanted


# ---- a simulated day


@dataclass
class Simulated:
    """Replicas that start slowly; requests of ten tokens, one a row and a second, go to whoever has the fewest."""

    scaler: ReplicaScaler
    start_s: int = 10
    now_s: int = 0
    asked: int = 0
    replicas: list[int] = field(default_factory=list)  # requests at each that is ready
    starting: list[int] = field(default_factory=list)  # when each is ready
    held: int = 0
    counts: list[int] = field(default_factory=list)

    def hold(self, rate: int, seconds: int) -> list[int]:
        """Returns the counts of these seconds, in each of which so many requests come."""
        for _ in range(seconds):
            self.now_s += 1
            self.replicas += [0 for ready_s in self.starting if ready_s <= self.now_s]
            self.starting = [ready_s for ready_s in self.starting if ready_s > self.now_s]
            self.asked += rate
            self.held += rate
            while self.replicas and self.held:
                self.replicas[self.replicas.index(min(self.replicas))] += 1
                self.held -= 1
            said = [says(min(n, ROWS), 10 * max(0, n - ROWS)) for n in self.replicas]
            count = self.scaler.wanted(load(*said, held=self.held, asked=self.asked), float(self.now_s))
            self.replicas = [max(0, n - ROWS) for n in self.replicas][: max(count, 0)]
            self.starting = self.starting[: max(0, count - len(self.replicas))]
            self.starting += [self.now_s + self.start_s] * (count - len(self.replicas) - len(self.starting))
            self.counts.append(count)
        return self.counts[-seconds:]


def test_a_day_of_load():
    """Nothing, then what six rows do, then thirty, then two, then nothing."""
    day = Simulated(ReplicaScaler(0, 8, CONFIG))
    assert set(day.hold(0, 20)) == {0}
    morning = day.hold(6, 120)
    assert morning[0] == 1
    assert 2 <= morning[-1] <= 4
    noon = day.hold(14, 200)
    assert noon[-1] >= 4
    assert day.hold(1, 100)[-1] == 1
    assert set(day.hold(0, 100)[-60:]) == {0}
    changes = [b - a for a, b in zip(day.counts, day.counts[1:], strict=False) if a != b]
    turns = sum(a * b < 0 for a, b in itertools.pairwise(changes))
    assert turns <= 3


# ---- settings


@pytest.mark.parametrize(
    ("given_", "told"),
    [
        ({"replicas": 0}, "replicas must be at least 1, or 0 where most_replicas lets requests start one, got 0"),
        ({"replicas": -1, "most_replicas": 2}, "replicas must be at least 1"),
        ({"replicas": 3, "most_replicas": 2}, "most_replicas must be at least replicas = 3, got 2"),
        ({"replicas": 0, "most_replicas": 0}, "most_replicas must be at least 1, got 0"),
        ({"trainers": -1}, "trainers must be 0 or more, got -1"),
        ({"trainers": 2, "most_trainers": 1}, "most_trainers must be at least trainers = 2, got 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(given_, told):
    with pytest.raises(ConfigInvalid, match=re.escape(told)):
        ClusterSection(**given_)


@pytest.mark.parametrize(
    ("given_", "told"),
    [
        ({"busy": 1.1}, "busy must be in (0, 1], got 1.1"),
        ({"idle_s": 0}, "idle_s must be positive"),
        ({"held": -1}, "held must be 0 or more"),
        ({"waiting_jobs": 0}, "waiting_jobs must be at least 1"),
    ],
)
def test_scaling_that_means_nothing_is_refused(given_, told):
    with pytest.raises(ConfigInvalid, match=re.escape(told)):
        ScalingSection(**given_)


def test_counts_without_limits_are_fixed():
    fixed, ranged = ClusterSection(replicas=3), ClusterSection(replicas=0, most_replicas=4, most_trainers=2)
    assert (fixed.replica_limit, fixed.trainer_limit, fixed.server_limit) == (3, 0, 4)
    assert (ranged.replica_limit, ranged.trainer_limit, ranged.server_limit) == (4, 2, 7)
