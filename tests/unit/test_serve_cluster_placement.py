"""Where jobs are placed: by hand for each rule, and by chance for what must always hold."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest

from serve.cluster.training.placement import PATIENCE_S, Place, PlacedJob, Slots, decide

KEEPER = Place(name="keeper", slots=(Slots(count=1, rank=8),), is_keeper=True)


def place(name: str, count: int = 1, rank: int = 8, **how) -> Place:
    return Place(name=name, slots=(Slots(count=count, rank=rank),), **how)


def job(id: str, owner: str = "", *, rank: int = 4, since_s: float = 0.0, **how) -> PlacedJob:
    return PlacedJob(id=id, owner=owner or id, rank=rank, since_s=since_s, **how)


def run(id: str, where: str, owner: str = "", **how) -> PlacedJob:
    return job(id, owner, place=where, runs=True, **how)


def decided(places, jobs, weights=None, now_s=1.0):
    found = decide(places, jobs, lambda owner: (weights or {}).get(owner, 1.0), now_s)
    return dict(found.placed), sorted(found.released)


def test_without_trainers_the_keeper_takes_all():
    assert decided([KEEPER], [job("a"), job("b"), job("c")]) == ({"a": "keeper", "b": "keeper", "c": "keeper"}, [])


def test_trainers_come_before_the_keeper_and_no_slot_is_given_twice():
    jobs = [job(id, since_s=at) for at, id in enumerate("abcd")]
    assert decided([KEEPER, place("t0"), place("t1")], jobs) == ({"a": "t0", "b": "t1", "c": "keeper"}, [])


def test_a_slot_must_fit_and_one_that_fits_nowhere_stops_nobody():
    jobs = [job("wide", rank=16), job("slim", since_s=0.5)]
    assert decided([KEEPER, place("t0")], jobs) == ({"slim": "t0"}, [])
    two = Place(name="t0", slots=(Slots(count=1, rank=4), Slots(count=1, rank=16)))
    assert decided([two], [run("a", "t0"), *jobs]) == ({"wide": "t0"}, [])


def test_a_job_goes_where_its_owner_has_fewest_then_where_most_slots_are_free():
    jobs = [run("a", "t0", "me"), job("b", "me")]
    assert decided([place("t0", 5), place("t1", 2)], jobs)[0] == {"b": "t1"}
    assert decided([place("t0", 2), place("t1", 3)], [job("b")])[0] == {"b": "t1"}


@pytest.mark.parametrize(("weights", "first"), [({}, "poor"), ({"rich": 4.0}, "rich")])
def test_owners_with_the_fewest_running_jobs_by_weight_go_first(weights, first):
    jobs = [run("r1", "t0", "rich"), run("r2", "t0", "rich"), run("p1", "t0", "poor")]
    line = [job("r3", "rich", since_s=0.0), job("p2", "poor", since_s=0.5)]
    placed, _ = decided([place("t0", 4)], [*jobs, *line], weights)
    assert placed == {("p2" if first == "poor" else "r3"): "t0"}


def test_one_that_has_waited_too_long_goes_first():
    line = [run("r1", "t0", "rich"), job("r2", "rich", since_s=0.0), job("p1", "poor", since_s=PATIENCE_S)]
    assert decided([place("t0", 2)], line, now_s=PATIENCE_S - 1)[0] == {"p1": "t0"}
    assert decided([place("t0", 2)], line, now_s=PATIENCE_S)[0] == {"r2": "t0"}


def test_who_drains_is_given_nothing_and_lets_go_of_all_once():
    jobs = [run("a", "t0"), job("b", place="t0", leaves=True), job("c", place="t0", arrives=True), job("d")]
    assert decided([KEEPER, place("t0", 9, drains=True), place("t1")], jobs) == ({"d": "t1"}, ["a"])


def test_with_all_trainers_draining_the_keeper_takes_all():
    jobs = [run("a", "keeper"), job("b"), job("c")]
    assert decided([KEEPER, place("t0", 9, drains=True)], jobs) == ({"b": "keeper", "c": "keeper"}, [])


def test_jobs_that_wait_for_a_slot_move_to_trainers_that_have_one():
    waiting = [job(id, place="keeper", since_s=at) for at, id in enumerate("bcd")]
    jobs = [run("a", "keeper"), *waiting]
    assert decided([KEEPER, place("t0", 2)], jobs) == ({}, ["b", "c"])
    on_their_way = [run("a", "keeper"), *(replace(j, leaves=j.id != "d") for j in waiting)]
    assert decided([KEEPER, place("t0", 2)], on_their_way) == ({}, []), "their slots are not promised again"
    assert decided([KEEPER, place("t0", 3)], on_their_way) == ({}, ["d"])
    assert decided([KEEPER, place("t0", 2)], [run("a", "keeper"), job("e", place="keeper")]) == ({}, ["e"])
    assert decided([KEEPER], jobs) == ({}, [])


def test_a_slot_goes_to_the_line_before_it_goes_to_jobs_of_the_keeper():
    jobs = [run("a", "keeper"), job("b", place="keeper"), job("c", since_s=0.5)]
    assert decided([KEEPER, place("t0")], jobs) == ({"c": "t0"}, [])


@dataclass
class Life:
    """A job of the simulation: how much is left to do."""

    job: PlacedJob
    left: int


class Group:
    """A cluster that obeys every decision a moment later."""

    def __init__(self, seed: int):
        self.draw = random.Random(seed)
        self.places = {"keeper": KEEPER}
        self.lives: dict[str, Life] = {}
        self.done: list[str] = []
        self.now_s, self.named = 0.0, 0

    def happen(self) -> None:
        """Something comes, goes, or drains."""
        what = self.draw.random()
        trainers = [name for name in self.places if name != "keeper"]
        if what < 0.3:
            self.named += 1
            id = f"j{self.named}"
            rank = self.draw.choice((2, 4, 8))
            one = job(id, self.draw.choice("abc"), rank=rank, since_s=self.now_s)
            self.lives[id] = Life(one, self.draw.randint(1, 6))
        elif what < 0.4 and len(trainers) < 4:
            self.named += 1
            slots = self.draw.choice([(Slots(count=2, rank=8),), (Slots(count=1, rank=2), Slots(count=1, rank=8))])
            self.places[f"t{self.named}"] = Place(name=f"t{self.named}", slots=slots)
        elif what < 0.45 and trainers:
            gone = self.draw.choice(trainers)
            del self.places[gone]
            for life in self.lives.values():
                if life.job.place == gone:
                    life.job = self.in_line(life.job)
        elif what < 0.5 and trainers:
            name = self.draw.choice(trainers)
            self.places[name] = replace(self.places[name], drains=True)

    def in_line(self, one: PlacedJob) -> PlacedJob:
        return replace(one, place=None, runs=False, arrives=False, leaves=False, since_s=self.now_s)

    def obey(self) -> None:
        """Who leaves is in line, who arrives gets a slot if there is one, who runs goes on."""
        for life in list(self.lives.values()):
            if life.job.leaves:
                life.job = self.in_line(life.job)
        for name, where in self.places.items():
            here = [life for life in self.lives.values() if life.job.place == name]
            for life in here:
                life.job = replace(life.job, arrives=False)
            for bucket in where.slots:
                held = [life for life in here if where.bucket(life.job.rank) == bucket]
                for life in held:
                    running = sum(other.job.runs for other in held)
                    life.job = replace(life.job, runs=life.job.runs or running < bucket.count)
        for id, life in list(self.lives.items()):
            life.left -= life.job.runs
            if life.left <= 0:
                del self.lives[id]
                self.done.append(id)

    def decide(self) -> tuple[int, int]:
        """Carries out one decision, having checked it; how many were placed and released."""
        jobs = [life.job for life in self.lives.values()]
        decision = decide(self.places.values(), jobs, lambda owner: 1.0, self.now_s)
        assert not set(decision.placed) & set(decision.released)
        assert len(set(decision.released)) == len(decision.released)
        for id, name in decision.placed.items():
            life = self.lives[id]
            assert life.job.place is None, "no job is at two places"
            assert not self.places[name].drains
            life.job = replace(life.job, place=name, arrives=True)
        for id in decision.released:
            assert self.lives[id].job.place is not None
            assert not self.lives[id].job.leaves
            self.lives[id].job = replace(self.lives[id].job, leaves=True)
        for name, where in self.places.items():
            for bucket in where.slots if name != "keeper" else ():
                ranks = [life.job.rank for life in self.lives.values() if life.job.place == name]
                assert sum(where.bucket(rank) == bucket for rank in ranks) <= bucket.count
        return len(decision.placed), len(decision.released)

    def step(self, *, happens: bool) -> tuple[int, int]:
        self.now_s += 1.0
        if happens:
            self.happen()
        moved = self.decide()
        self.obey()
        return moved


@pytest.mark.parametrize("seed", range(60))
def test_no_job_is_at_two_places_nobody_starves_and_who_drains_is_emptied(seed):
    group = Group(seed)
    for _ in range(150):
        group.step(happens=True)
    for _ in range(3):
        group.step(happens=False)
    drained = {name for name, where in group.places.items() if where.drains}
    assert not [life for life in group.lives.values() if life.job.place in drained]
    for _ in range(8 * len(group.lives) + 8):
        group.step(happens=False)
    assert group.lives == {}, "each has had its slot"
    assert len(group.done) == len(set(group.done))


@pytest.mark.parametrize("seed", range(20))
def test_when_nothing_happens_nobody_moves(seed):
    group = Group(seed)
    for _ in range(60):
        group.step(happens=True)
    for life in group.lives.values():
        life.left = 10**6
    moved = [group.step(happens=False) for _ in range(len(group.lives) + 10)]
    assert moved[-1] == (0, 0)
