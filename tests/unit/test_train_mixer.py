import itertools
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.core.errors import AlreadyExists, DataInvalid, InvalidRequest, NotFound, StateInvalid
from train.data import mixer as mixer_module
from train.data.examples import CheckedExamples, Example, ExampleStream
from train.data.mixer import MAX_BATCH, Batches, Mixer

LENGTH = 12


def stream_of(predictions, seed=0, cursor=0):
    """Examples of these lengths; each starts with its own number, so that it can be told in a lane."""
    examples = []
    for i, n in enumerate(predictions):
        tokens = np.full(n + 1, 1000 + i, np.int32)
        weights = np.ones(n + 1, np.float32)
        weights[0] = 0
        examples.append(Example(tokens, weights))
    return ExampleStream(examples, seed, cursor)


def add(mixer, key, stream, *, batch_size, **options):
    """A tenant joins with the examples of a stream."""
    examples = CheckedExamples(stream.examples, "cross_entropy", mixer.length)
    mixer.add(key, Batches(examples, batch_size), stream, **options)


def inside(lanes):
    """The examples in these lanes, as (number, length), in no order."""
    found = Counter()
    for lane in lanes:
        for segment in range(1, int(lane.segment_J.max()) + 1):
            at = lane.segment_J == segment
            found[int(lane.token_J[at][0]), int(at.sum())] += 1
    return found


def expected(examples):
    return Counter((int(e.tokens[0]), e.predictions) for e in examples)


def shares(mixer, steps):
    """Tokens of each tenant over these steps."""
    got = Counter()
    for _ in range(steps):
        for key, lane in mixer.next().lanes:
            got[key] += int((lane.segment_J > 0).sum())
    return got


def one_lane(mixer, key, tokens=LENGTH, weight=1.0):
    add(mixer, key, stream_of([tokens]), batch_size=1, weight=weight)


# single cases


def test_everybody_fits_everybody_goes():
    mixer = Mixer(4, LENGTH)
    for key in "abcd":
        one_lane(mixer, key)
    for _ in range(3):
        assert sorted(mixer.next().due) == list("abcd")


def test_a_batch_of_several_lanes_comes_whole():
    mixer = Mixer(4, LENGTH)
    add(mixer, "big", stream_of([10] * 9), batch_size=3)
    one_lane(mixer, "a")
    one_lane(mixer, "b")
    for _ in range(12):
        batch = mixer.next()
        counts = Counter(key for key, _ in batch.lanes)
        assert counts["big"] in (0, 3)
        assert set(batch.due) == set(counts)


def test_a_batch_that_does_not_fit_comes_later_and_others_fill_the_gap():
    mixer = Mixer(3, LENGTH)
    add(mixer, "x", stream_of([10] * 4), batch_size=2)
    add(mixer, "y", stream_of([10] * 4), batch_size=2)
    one_lane(mixer, "z")
    dues = [set(mixer.next().due) for _ in range(6)]
    assert all(len(due & {"x", "y"}) == 1 and "z" in due for due in dues)
    assert sum("x" in due for due in dues) == 3


def test_equal_weights_share_tokens_whatever_the_batch_size():
    mixer = Mixer(4, LENGTH)
    add(mixer, "big", stream_of([LENGTH] * 8), batch_size=4)
    for i in range(7):
        one_lane(mixer, f"small{i}")
    got = list(shares(mixer, 400).values())
    jain = sum(got) ** 2 / (len(got) * sum(x * x for x in got))
    assert jain >= 0.95


def test_weight_buys_tokens_within_the_bound_on_waiting():
    mixer = Mixer(
        1, LENGTH
    )  # two tenants, one lane: nobody waits more than 3 steps, so at most 2 of 3 are one tenant's
    one_lane(mixer, "heavy", weight=9)
    one_lane(mixer, "light", weight=1)
    got = shares(mixer, 300)
    assert got["heavy"] == pytest.approx(2 * got["light"], rel=0.03)


def test_weight_is_met_when_slack_allows():
    mixer = Mixer(1, LENGTH, slack_steps=20)
    one_lane(mixer, "heavy", weight=3)
    one_lane(mixer, "light", weight=1)
    got = shares(mixer, 400)
    assert got["heavy"] == pytest.approx(3 * got["light"], rel=0.03)


def test_a_weight_may_change_under_way():
    mixer = Mixer(1, LENGTH, slack_steps=10)
    one_lane(mixer, "a")
    one_lane(mixer, "b")
    assert shares(mixer, 40) == {"a": 20 * LENGTH, "b": 20 * LENGTH}
    mixer.set_weight("a", 3.0)
    assert shares(mixer, 40)["a"] == pytest.approx(30 * LENGTH, abs=2 * LENGTH)
    for weight in (0.0, math.nan):
        with pytest.raises(InvalidRequest, match="weight must be positive"):
            mixer.set_weight("a", weight)
    with pytest.raises(NotFound, match="tenant c is not training"):
        mixer.set_weight("c", 1.0)


def test_equal_weights_with_unequal_examples_share_tokens_not_turns():
    mixer = Mixer(1, LENGTH, slack_steps=20)
    one_lane(mixer, "long", tokens=12)
    one_lane(mixer, "short", tokens=4)
    got = shares(mixer, 400)
    assert got["long"] == pytest.approx(got["short"], rel=0.03)


def test_who_joins_late_does_not_catch_up():
    mixer = Mixer(1, LENGTH, slack_steps=50)
    one_lane(mixer, "early")
    shares(mixer, 200)
    one_lane(mixer, "late")
    got = shares(mixer, 40)
    assert abs(got["early"] - got["late"]) <= 2 * LENGTH


def test_split_batch_accumulates_and_is_due_with_its_last_lane():
    mixer = Mixer(2, LENGTH)
    stream = stream_of([10] * 7)
    add(mixer, "huge", stream, batch_size=5, split=True)
    reference = stream_of([10] * 7)
    for round_ in range(1, 5):
        lanes = []
        for _ in range(3):  # 2 + 2 + 1 lanes
            before = stream.cursor
            batch = mixer.next()
            lanes += [lane for _, lane in batch.lanes]
            assert before == (round_ - 1) * 5
        assert batch.due == ["huge"]
        assert stream.cursor == round_ * 5
        assert inside(lanes) == expected(reference.take(5))


def test_split_batch_keeps_nobody_waiting():
    mixer = Mixer(2, LENGTH)
    add(mixer, "huge", stream_of([10] * 50), batch_size=40, split=True)
    for key in "abc":
        one_lane(mixer, key)
    assert mixer.longest_wait == 3
    dues = [mixer.next().due for _ in range(200)]
    for key in "abc":
        turns = [i for i, due in enumerate(dues) if key in due]
        assert max(b - a for a, b in itertools.pairwise(turns)) <= 3
    assert any("huge" in due for due in dues)


def test_remove_in_the_middle_of_a_split_batch_does_not_consume_it():
    mixer = Mixer(1, LENGTH)
    add(mixer, "huge", stream_of([10] * 7), batch_size=3, split=True)
    for _ in range(5):
        mixer.next()
    assert mixer.remove("huge") == 3


def test_resume_from_the_cursor_goes_on_with_the_same_batches():
    whole, first = Mixer(2, LENGTH), Mixer(2, LENGTH)
    for mixer in (whole, first):
        add(mixer, "a", stream_of([3, 4, 5, 6, 7], seed=9), batch_size=2)
    wanted = [inside(lane for _, lane in whole.next().lanes) for _ in range(9)]
    got = [inside(lane for _, lane in first.next().lanes) for _ in range(4)]
    second = Mixer(2, LENGTH)
    add(second, "a", stream_of([3, 4, 5, 6, 7], seed=9, cursor=first.remove("a")), batch_size=2)
    assert got + [inside(lane for _, lane in second.next().lanes) for _ in range(5)] == wanted


def test_a_packing_worse_than_the_promised_lanes_is_replaced(monkeypatch):
    """First-fit decreasing may need more lanes for smaller examples; the promise of `add` must hold all the same."""
    mixer = Mixer(2, LENGTH)
    add(mixer, "a", stream_of([4, 5, 6, 5]), batch_size=4)
    monkeypatch.setattr(mixer_module, "first_fit_decreasing", lambda sizes, length: [[i] for i in range(len(sizes))])
    batch = mixer.next()
    assert len(batch.lanes) == 2
    assert inside(lane for _, lane in batch.lanes) == expected(stream_of([4, 5, 6, 5]).take(4))


@pytest.mark.parametrize(
    ("lanes", "needs", "wait"),
    [
        (4, [1] * 4, 2),
        (4, [1] * 9, 4),  # ceil(9 / 4) + 1
        (1, [1] * 5, 6),
        (4, [4], 2),
        (4, [4, 1, 1], 4),  # a step each at worst
        (4, [2, 2, 2, 2, 2, 2], 5),  # ceil(12 / 3) + 1
        (2, [], 0),
    ],
)
def test_longest_wait_by_hand(lanes, needs, wait):
    mixer = Mixer(lanes, LENGTH)
    for i, need in enumerate(needs):
        add(mixer, str(i), stream_of([LENGTH] * 20), batch_size=need)
    assert mixer.longest_wait == wait


# refusals


def test_next_without_tenants():
    with pytest.raises(StateInvalid, match="add one first"):
        Mixer(2, LENGTH).next()


@pytest.mark.parametrize(("lanes", "length", "slack"), [(0, 4, 1), (1, 0, 1), (1, 4, -1)])
def test_impossible_mixer(lanes, length, slack):
    with pytest.raises(InvalidRequest):
        Mixer(lanes, length, slack)


@pytest.mark.parametrize(
    ("predictions", "options", "error", "says"),
    [
        ([4], {"batch_size": 0}, InvalidRequest, "batch_size must be in"),
        ([4], {"batch_size": MAX_BATCH + 1}, InvalidRequest, "batch_size must be in"),
        ([4], {"batch_size": 1, "weight": 0.0}, InvalidRequest, "weight must be positive"),
        ([4], {"batch_size": 1, "weight": math.nan}, InvalidRequest, "weight must be positive"),
        ([4, LENGTH + 1], {"batch_size": 1}, DataInvalid, "14 tokens, but a lane of 12 positions"),
        ([10] * 3, {"batch_size": 3}, InvalidRequest, "can need 3 lanes of 12 positions, but a step has 2"),
        ([12, 12, 1], {"batch_size": 3}, InvalidRequest, "can need 3 lanes"),  # 12 twice, from two epochs, and 12
    ],
)
def test_add_refuses(predictions, options, error, says):
    mixer = Mixer(2, LENGTH)
    with pytest.raises(error, match=says):
        add(mixer, "a", stream_of(predictions), **options)
    assert len(mixer) == 0


def test_add_twice_and_remove_unknown():
    mixer = Mixer(2, LENGTH)
    one_lane(mixer, "a")
    with pytest.raises(AlreadyExists):
        one_lane(mixer, "a")
    with pytest.raises(NotFound):
        mixer.remove("b")


# tenants that are held while they are evaluated


def evaluate(mixer, steps, tokens):
    """The order of steps ("." and how many tenants) and of evaluations (the key) of so many tokens each."""
    order = []
    for _ in range(steps):
        turn = mixer.held_turn()
        if turn:
            mixer.charge({turn[0]: tokens})
            order.append(turn[0])
        if len(mixer):
            order.append(len(mixer.next().due))
    return order


def test_who_is_held_has_no_lanes_and_pays_for_its_evaluation_like_for_training():
    """Half the tokens each: an evaluation of three steps' tokens comes after each third step of the other."""
    mixer = Mixer(1, LENGTH, slack_steps=50)
    one_lane(mixer, "held")
    one_lane(mixer, "busy")
    mixer.hold("held")
    assert len(mixer) == 1
    order = evaluate(mixer, 60, 3 * LENGTH)
    assert order == ["held", 1, 1, 1] * 20


def test_who_is_held_waits_no_longer_than_who_trains():
    mixer = Mixer(1, LENGTH)
    for key in ("held", "a", "b"):
        one_lane(mixer, key)
    mixer.hold("held")
    order = evaluate(mixer, 40, 100 * LENGTH)  # so much that its share would be used up for long
    places = [i for i, x in enumerate(order) if x == "held"]
    assert all(b - a <= 1 + mixer.longest_wait for a, b in itertools.pairwise(places))
    assert len(places) >= 40 // mixer.longest_wait


def test_a_larger_weight_is_evaluated_more():
    mixer = Mixer(1, LENGTH, slack_steps=100)
    for key, weight in (("heavy", 3.0), ("light", 1.0), ("busy", 1.0)):
        one_lane(mixer, key, weight=weight)
    for key in ("heavy", "light"):
        mixer.hold(key)
    order = evaluate(mixer, 100, LENGTH)
    assert order.count("heavy") == pytest.approx(3 * order.count("light"), abs=3)


def test_who_was_held_goes_on_where_it_was_and_who_was_done_leaves():
    mixer = Mixer(2, LENGTH)
    one_lane(mixer, "a")
    mixer.hold("a")
    mixer.hold("done")  # it has no batches here any more
    with pytest.raises(StateInvalid):
        mixer.next()
    assert set(mixer.held_turn()) == {"a", "done"}
    mixer.release("a")
    mixer.release("done")
    mixer.release("nobody")
    assert (mixer.held_turn(), mixer.next().due) == ([], ["a"])
    mixer.hold("a")
    assert mixer.remove("a") == 1
    assert (len(mixer), mixer.held_turn()) == (0, [])


def test_a_batch_that_cannot_be_made_is_that_tenants_alone(monkeypatch):
    mixer = Mixer(3, LENGTH)
    for key in "abc":
        one_lane(mixer, key)
    broken = mixer._tenants["b"].stream
    monkeypatch.setattr(broken, "peek", lambda count: [][count])
    batch = mixer.next()
    assert sorted(batch.due) == ["a", "c"]
    assert [(key, type(error)) for key, error in batch.faults] == [("b", IndexError)]


# properties


@dataclass(frozen=True)
class Plan:
    predictions: list[int]
    batch_size: int
    weight: float
    seed: int
    split: bool


plans = st.builds(
    Plan,
    predictions=st.lists(st.integers(1, LENGTH), min_size=1, max_size=6),
    batch_size=st.integers(1, 5),
    weight=st.sampled_from([0.1, 1.0, 1.0, 7.0]),
    seed=st.integers(0, 99),
    split=st.booleans(),
)
# What happens between steps: nothing, a tenant joins, or the one at this place leaves.
changes = st.lists(st.one_of(st.none(), st.none(), plans, st.integers(0, 9)), min_size=5, max_size=40)


def join(mixer, key, plan):
    """True when the mixer took the tenant."""
    try:
        add(
            mixer,
            key,
            stream_of(plan.predictions, plan.seed),
            batch_size=plan.batch_size,
            weight=plan.weight,
            split=plan.split,
        )
    except InvalidRequest:
        assert not plan.split
        return False
    return True


@settings(max_examples=150)
@given(st.integers(1, 6), st.integers(0, 2), st.lists(plans, min_size=1, max_size=7), changes)
def test_nothing_is_lost_and_nobody_waits_too_long(lanes, slack, starters, later):
    mixer = Mixer(lanes, LENGTH, slack)
    present, reference, begun, promise = {}, {}, {}, {}

    def enter(key, plan):
        if join(mixer, key, plan):
            present[key], reference[key] = plan, stream_of(plan.predictions, plan.seed)
            begun[key], promise[key] = [], math.inf

    for i, plan in enumerate(starters):
        enter(f"s{i}", plan)
    for i, change in enumerate(later):
        if isinstance(change, Plan):
            enter(f"j{i}", change)
        elif change is not None and change < len(present):
            key = list(present)[change]
            assert mixer.remove(key) == reference[key].cursor
            del present[key]
        if not present:
            continue
        promised = mixer.longest_wait
        batch = mixer.next()
        assert 1 <= len(batch.lanes) <= lanes
        counts = Counter(key for key, _ in batch.lanes)
        assert set(counts) <= set(present)
        assert set(batch.due) <= set(counts)
        assert len(set(batch.due)) == len(batch.due)
        for key in counts:
            begun[key] += [lane for k, lane in batch.lanes if k == key]
            if key in batch.due:  # all its lanes are here, with exactly the next batch of its own stream
                assert inside(begun[key]) == expected(reference[key].take(present[key].batch_size))
                begun[key] = []
            else:
                assert present[key].split
        for key in present:  # every promise since it was last in a batch is kept, not only the latest
            promise[key] = min(promise[key], promised) - 1
            assert key in counts or promise[key] > 0, key
            if key in counts:
                promise[key] = promised


@settings(max_examples=60)
@given(st.integers(1, 5), st.lists(st.tuples(st.integers(1, LENGTH), st.floats(0.01, 100)), min_size=1, max_size=12))
def test_tenants_of_one_lane_wait_at_most_tenants_over_lanes_plus_one(lanes, tenants):
    mixer = Mixer(lanes, LENGTH)
    for i, (tokens, weight) in enumerate(tenants):
        one_lane(mixer, str(i), tokens, weight)
    last = dict.fromkeys(map(str, range(len(tenants))), 0)
    for step in range(1, 60):
        batch = mixer.next()
        assert len(batch.lanes) == min(lanes, len(tenants))  # no lane idle while somebody waits
        last |= dict.fromkeys(batch.due, step)
        assert all(step + 1 - at <= math.ceil(len(tenants) / lanes) + 1 for at in last.values())


@settings(max_examples=30)
@given(st.lists(plans, min_size=1, max_size=6))
def test_same_calls_same_batches(starters):
    def run():
        mixer = Mixer(5, LENGTH)
        for i, plan in enumerate(starters):
            join(mixer, str(i), plan)
        if not len(mixer):
            return []
        batches = [mixer.next() for _ in range(12)]
        return [([(k, lane.token_J.tobytes()) for k, lane in b.lanes], b.due) for b in batches]

    assert run() == run()
