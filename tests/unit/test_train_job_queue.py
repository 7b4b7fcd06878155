"""The queue: slots by tokens per weight of an owner, whatever the number of jobs; no idle time saved up, no debt forgotten."""

from __future__ import annotations

from collections import Counter, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.jobs.fair_queue import FairQueue


def anyone(key: str) -> bool:
    """Every job fits every slot."""
    return True


def fill(queue: FairQueue, counts: dict[str, int], *, tokens: float = 10, weight: float = 1.0) -> None:
    for owner, count in counts.items():
        for i in range(count):
            queue.add(f"{owner}{i}", owner, weight=weight, tokens=tokens)


def serve(queue: FairQueue, slots: int, turns: int, tokens: int = 10) -> Counter:
    """Turns of each owner (the key's first letter) when a slot is given on as soon as its turn is over."""
    running, served = deque(), Counter()
    for _ in range(turns):
        while len(running) < slots and (key := queue.take(anyone)) is not None:
            running.append(key)
        key = running.popleft()
        queue.serve(key, tokens)
        queue.end_turn(key)
        served[key[0]] += 1
    return served


def test_one_owner_is_first_come_first_served():
    queue = FairQueue()
    fill(queue, {"a": 3})
    assert [queue.take(anyone) for _ in range(4)] == ["a0", "a1", "a2", None]


def test_slots_that_are_free_together_are_shared():
    queue = FairQueue()
    fill(queue, {"a": 100, "b": 2, "c": 1})
    assert [queue.take(anyone) for _ in range(5)] == ["a0", "b0", "c0", "a1", "b1"]


def test_a_hundred_times_the_jobs_give_no_larger_share():
    queue = FairQueue()
    fill(queue, {"a": 500, "b": 5, "c": 5})
    assert serve(queue, slots=4, turns=15) == {"a": 5, "b": 5, "c": 5}


def test_the_weight_of_an_owner_is_a_share():
    queue = FairQueue(lambda owner: {"b": 3.0}.get(owner, 1.0))
    fill(queue, {"a": 40, "b": 40})
    served = serve(queue, slots=2, turns=40)
    assert served["b"] == pytest.approx(30, abs=1)


def test_the_weight_of_a_job_buys_nothing_from_other_owners():
    queue = FairQueue()
    fill(queue, {"a": 40})
    fill(queue, {"b": 40}, weight=100.0)
    assert serve(queue, slots=2, turns=40) == {"a": 20, "b": 20}


def test_the_weight_of_a_job_orders_the_jobs_of_its_owner():
    queue = FairQueue()
    for key, weight in (("a-low", 1.0), ("a-high", 9.0), ("a-also-high", 9.0), ("b0", 1.0)):
        queue.add(key, key[0], weight=weight, tokens=10)
    assert [queue.take(anyone) for _ in range(5)] == ["a-high", "b0", "a-also-high", "a-low", None]


def test_what_an_owner_was_given_beside_its_jobs_is_charged_while_somebody_waits():
    queue = FairQueue()
    fill(queue, {"a": 4, "b": 4})
    queue.charge("a", 25)
    assert [queue.take(anyone) for _ in range(5)] == ["b0", "b1", "b2", "a0", "b3"]
    alone = FairQueue()
    alone.charge("a", 1000)
    fill(alone, {"a": 1, "b": 1})
    assert alone.take(anyone) == "a0"  # it took nothing from anybody


def test_what_was_used_counts_and_not_what_was_expected():
    """b's turns are expected to be as long as a's, but take a tenth."""
    queue = FairQueue()
    fill(queue, {"a": 30, "b": 300})
    turns = Counter()
    for _ in range(66):
        key = queue.take(anyone)
        queue.serve(key, 10 if key[0] == "a" else 1)
        queue.end_turn(key)
        turns[key[0]] += 1
    assert turns["b"] == pytest.approx(10 * turns["a"], abs=10)


def test_time_away_is_not_saved_up():
    queue = FairQueue()
    fill(queue, {"a": 50})
    serve(queue, slots=1, turns=20)
    fill(queue, {"b": 50})
    assert serve(queue, slots=1, turns=20) == {"a": 10, "b": 10}


def test_a_debt_is_not_forgotten_by_leaving():
    """a is given far more than its turn was thought to be, leaves, and comes back."""
    queue = FairQueue()
    fill(queue, {"a": 1, "b": 30})
    assert queue.take(anyone) == "a0"
    queue.serve("a0", 100)
    queue.end_turn("a0")
    fill(queue, {"a": 30})
    assert serve(queue, slots=1, turns=10) == {"b": 10}


def test_a_job_that_is_taken_out_costs_nothing():
    queue = FairQueue()
    fill(queue, {"a": 2, "b": 2})
    queue.remove("a0")
    assert "a0" not in queue
    assert len(queue) == 3
    assert [queue.take(anyone) for _ in range(2)] == ["a1", "b0"]
    queue.end_turn("a1")  # unused
    fill(queue, {"c": 1})
    assert [queue.take(anyone) for _ in range(2)] == ["c0", "b1"]


def test_a_turn_is_renewed_unless_someone_had_less():
    queue = FairQueue()
    fill(queue, {"a": 2})
    assert queue.take(anyone) == "a0"
    queue.serve("a0", 10)
    assert list(queue.over(2)) == []
    queue.serve("a0", 10)
    assert list(queue.over(2)) == ["a0"]
    assert queue.renew("a0", 20, anyone)  # its own brother waits, nobody else
    assert list(queue.over(1)) == []
    queue.serve("a0", 10)
    fill(queue, {"b": 1})
    assert queue.renew("a0", 20, anyone) is False
    queue.end_turn("a0")
    assert queue.take(anyone) == "b0"


@settings(max_examples=60)
@given(
    counts=st.lists(st.integers(1, 40), min_size=2, max_size=6),
    slots=st.integers(1, 8),
    tokens=st.lists(st.integers(1, 30), min_size=6, max_size=6),
)
def test_owners_who_wait_are_never_far_apart(counts, slots, tokens):
    """While two owners both wait, their tokens differ by what their slots can hold, however many jobs each has."""
    queue = FairQueue()
    size = dict(zip("abcdef", tokens, strict=True))
    for owner, count in zip("abcdef", counts, strict=False):
        fill(queue, {owner: count}, tokens=size[owner])
    waiting = Counter(dict(zip("abcdef", counts, strict=False)))
    given_out, running = Counter(), deque()
    while len(queue) or running:
        while len(running) < slots and (key := queue.take(anyone)) is not None:
            running.append(key)
            waiting[key[0]] -= 1
            given_out[key[0]] += size[key[0]]
            left = [owner for owner in waiting if waiting[owner]]
            if len(left) > 1:
                assert max(given_out[o] for o in left) - min(given_out[o] for o in left) <= max(tokens)
        key = running.popleft()
        queue.serve(key, size[key[0]])
        queue.end_turn(key)
    assert given_out == {o: c * size[o] for o, c in zip("abcdef", counts, strict=False)}


def test_a_job_that_does_not_fit_is_passed_over_and_keeps_its_place():
    """Of its owner the next one goes, or another owner; it is first again when a slot for it is free."""
    queue = FairQueue()
    for key in ("a-wide", "a0", "b0"):
        queue.add(key, key[0], weight=1, tokens=10)

    def narrow(key: str) -> bool:
        return "wide" not in key

    assert [queue.take(narrow) for _ in range(3)] == ["a0", "b0", None]
    assert queue.take(anyone) == "a-wide"


def test_a_turn_ends_only_for_who_fits_the_slot():
    queue = FairQueue()
    queue.add("a0", "a", weight=1, tokens=10)
    assert queue.take(anyone) == "a0"
    queue.add("b-wide", "b", weight=1, tokens=10)
    queue.serve("a0", 10)
    assert queue.renew("a0", 10, lambda key: "wide" not in key)
    queue.serve("a0", 10)
    assert queue.renew("a0", 10, anyone) is False
