"""The reconciler over fake processes and a fake clock: starts, repairs with a growing wait, drains before it removes."""

from __future__ import annotations

import itertools
import logging

import pytest

from serve.cluster.autoscaler import Wanted
from serve.cluster.reconciler import LIVED_S, Group, Kind, Life, Reconciler

STOP_S = 50.0


class FakeProcess:
    """A process that is in whatever state a test gives it."""

    def __init__(self, name: str):
        self.name, self.state, self.why = name, Life.STARTING, ""
        self.stopping = self.killed = False

    def life(self):
        return self.state, self.why

    def stop(self):
        assert not self.stopping
        self.stopping = True

    def kill(self):
        self.killed, self.state = True, Life.ENDED


class World:
    """A group, all processes that it has started, and what was asked of it."""

    def __init__(self, prefix: str = "replica-"):
        self.started: list[FakeProcess] = []
        self.asked: list[str] = []
        self.may_drain = True
        self.group = Group(
            Kind(
                name_of=lambda number: f"{prefix}{number}",
                start=self.start,
                drained=self.drained,
                stop_s=STOP_S,
            )
        )

    def start(self, name):
        self.started.append(FakeProcess(name))
        return self.started[-1]

    def drained(self, name):
        self.asked.append(name)
        return self.may_drain

    def get_ready(self):
        for process in self.started:
            if process.state is Life.STARTING:
                process.state = Life.READY

    @property
    def alive(self):
        return sorted(process.name for process in self.started if process.state is not Life.ENDED)

    def filled(self, count: int) -> list[FakeProcess]:
        """So many, ready since time 0."""
        self.group.look(count, 0.0)
        self.get_ready()
        self.group.look(count, 0.0)
        return self.started


def ended(process: FakeProcess, why: str = "SIGKILL") -> None:
    process.state, process.why = Life.ENDED, why


def test_as_many_are_started_as_are_wanted():
    world = World()
    world.group.look(2, 0.0)
    assert world.alive == ["replica-0", "replica-1"]
    assert world.group.ready == {}
    world.get_ready()
    world.group.look(3, 1.0)
    assert set(world.group.ready) == {"replica-0", "replica-1"}
    assert world.alive == ["replica-0", "replica-1", "replica-2"]


def test_one_that_has_lived_is_started_again_at_once():
    world = World()
    first, _ = world.filled(2)
    ended(first)
    world.group.look(2, LIVED_S)
    assert set(world.group.ready) == {"replica-1"}
    assert [process.name for process in world.started] == ["replica-0", "replica-1", "replica-0"]
    assert first.killed  # what the cluster kept for it is free


@pytest.mark.parametrize("gets_ready", [False, True])
def test_one_that_ends_soon_is_started_after_longer_and_longer_waits(gets_ready, caplog):
    caplog.set_level(logging.INFO, "serve")
    world, now_s, starts = World(), 0.0, []
    for _ in range(9 * 600):
        count = len(world.started)
        world.group.look(1, now_s)
        if len(world.started) > count:
            starts.append(now_s)
        if gets_ready and world.started[-1].state is Life.STARTING:
            world.started[-1].state = Life.READY
        elif world.started[-1].state is not Life.ENDED:
            ended(world.started[-1], "no memory")
        now_s += 0.1
    waits = [b - a for a, b in itertools.pairwise(starts)]
    expected = [1, 2, 4, 8, 16, 32, 60, 60]
    assert waits[:8] == pytest.approx(expected, abs=0.5)
    told = [record.message for record in caplog.records if "no memory" in record.message]
    assert len(told) == len(starts)
    assert told[2].endswith("it is started again in 4 s: no memory")
    assert ("did not start" in told[0]) is not gets_ready


def test_it_goes_on_however_often_a_start_fails():
    world = World()
    for minute in range(3000):
        world.group.look(1, 60.0 * minute)
        ended(world.started[-1])
    assert len(world.started) > 1400


def test_one_that_is_still_starting_goes_before_one_that_answers():
    world = World()
    zero, one = world.filled(2)
    ended(zero)
    world.group.look(2, LIVED_S)
    world.group.look(1, LIVED_S + 1)
    assert world.alive == ["replica-1"]
    assert not one.stopping


def test_the_waits_begin_anew_when_one_has_lived():
    world, now_s = World(), 0.0
    for _ in range(4):
        world.group.look(1, now_s)
        ended(world.started[-1])
        world.group.look(1, now_s)
        now_s += 100
    world.group.look(1, now_s)
    world.get_ready()
    world.group.look(1, now_s)
    ended(world.started[-1])
    count = len(world.started)
    world.group.look(1, now_s + LIVED_S)
    assert len(world.started) == count + 1
    ended(world.started[-1])
    world.group.look(1, now_s + LIVED_S)
    world.group.look(1, now_s + LIVED_S + 1)
    assert len(world.started) == count + 2


def test_a_bad_start_is_told_until_one_is_ready():
    world = World()
    world.group.look(1, 0.0)
    ended(world.started[-1], "the folder is in use")
    world.group.look(1, 0.0)
    assert world.group.failure == "replica-0: the folder is in use"
    world.group.look(1, 5.0)
    world.get_ready()
    world.group.look(1, 6.0)
    assert world.group.failure is None


def test_one_that_goes_is_drained_then_stopped_then_gone():
    world = World()
    zero, one = world.filled(2)
    world.may_drain = False
    for second in range(3):
        world.group.look(1, 10.0 + second)
    assert (world.asked, one.stopping) == (["replica-1"] * 3, False)
    world.may_drain = True
    world.group.look(1, 13.0)
    assert not one.stopping  # a request may be on its way
    world.group.look(1, 14.0)
    assert (one.stopping, one.killed, len(world.asked)) == (True, False, 4)
    world.group.look(1, 14.0 + STOP_S - 1)
    assert not one.killed
    ended(one, "it was told to stop")
    world.group.look(1, 14.0 + STOP_S - 1)
    assert one.killed
    assert (world.alive, len(world.group.places), zero.stopping) == (["replica-0"], 1, False)
    assert len(world.started) == 2


def test_one_that_does_not_stop_is_ended():
    world = World()
    _, one = world.filled(2)
    for second in range(3):
        world.group.look(1, float(second))
    assert one.stopping
    world.group.look(1, 1.0 + STOP_S)
    assert one.killed
    assert len(world.group.places) == 1


def test_one_that_is_not_ready_goes_at_once():
    world = World()
    world.filled(1)
    world.group.look(2, 1.0)
    world.group.look(1, 2.0)
    assert (world.alive, world.asked) == (["replica-0"], [])


def test_one_that_ends_while_it_leaves_is_not_started_again():
    world = World()
    _, one = world.filled(2)
    world.may_drain = False
    world.group.look(1, 1.0)
    ended(one)
    world.group.look(1, 2.0)
    assert (len(world.started), len(world.group.places)) == (2, 1)


def test_while_one_leaves_another_takes_a_place_of_its_own():
    world = World()
    world.filled(2)
    world.may_drain = False
    world.group.look(1, 1.0)
    world.group.look(2, 2.0)
    assert world.alive == ["replica-0", "replica-1", "replica-2"]
    world.may_drain = True
    for second in range(3):
        world.group.look(2, 3.0 + second)
    assert [process.name for process in world.started if process.stopping] == ["replica-1"]
    ended(world.started[1])
    world.group.look(3, 7.0)
    assert world.alive == ["replica-0", "replica-1", "replica-2"]


def test_those_with_the_least_work_go_first():
    world = World()
    world.filled(4)
    world.group.look(2, 1.0, {"replica-0": 1, "replica-2": 3, "replica-3": 2})
    world.group.look(2, 2.0)
    world.group.look(2, 3.0)
    assert [process.name for process in world.started if process.stopping] == ["replica-0", "replica-1"]


def test_to_zero_and_back():
    world = World()
    (zero,) = world.filled(1)
    for second in range(3):
        world.group.look(0, float(second))
    assert zero.stopping
    ended(zero)
    world.group.look(0, 4.0)
    assert world.group.places == []
    world.group.look(1, 5.0)
    assert world.alive == ["replica-0"]


class Cluster:
    """All groups of a cluster."""

    def __init__(self):
        self.keeper, self.front = World("keeper"), World("front")
        self.replicas, self.trainers = World("replica-"), World("trainer-")
        self.counts = Wanted(replicas=2, trainers=0)
        self.reconciler = Reconciler(
            keeper=self.keeper.group,
            front=self.front.group,
            replicas=self.replicas.group,
            trainers=self.trainers.group,
            wanted=lambda now_s: self.counts,
        )

    @property
    def alive(self):
        return [len(world.alive) for world in (self.keeper, self.front, self.replicas, self.trainers)]


def test_nobody_is_started_before_the_keeper_was_ready():
    cluster = Cluster()
    cluster.reconciler.look(0.0)
    cluster.reconciler.look(1.0)
    assert cluster.alive == [1, 0, 0, 0]
    cluster.keeper.get_ready()
    cluster.reconciler.look(2.0)
    assert cluster.alive == [1, 1, 2, 0]
    cluster.counts = Wanted(replicas=1, trainers=2)
    ended(cluster.keeper.started[0])
    ended(cluster.front.started[0])
    cluster.reconciler.look(3.0)  # the others are repaired meanwhile
    assert cluster.alive == [0, 0, 1, 2]
    cluster.reconciler.look(4.0)
    assert cluster.alive == [1, 1, 1, 2]


def test_trainers_with_the_fewest_jobs_go_first():
    cluster = Cluster()
    cluster.keeper.filled(1)
    cluster.counts = Wanted(replicas=0, trainers=2)
    for second in range(2):
        cluster.reconciler.look(float(second))
        cluster.trainers.get_ready()
    cluster.counts = Wanted(replicas=0, trainers=1, jobs={"trainer-0": 0, "trainer-1": 3})
    for second in range(2, 5):
        cluster.reconciler.look(float(second))
    assert [process.name for process in cluster.trainers.started if process.stopping] == ["trainer-0"]


def test_a_bad_start_of_any_is_told():
    cluster = Cluster()
    assert cluster.reconciler.failure is None
    cluster.keeper.filled(1)
    cluster.reconciler.look(0.0)
    ended(cluster.replicas.started[1], "no memory")
    cluster.reconciler.look(1.0)
    assert cluster.reconciler.failure == "replica-1: no memory"
