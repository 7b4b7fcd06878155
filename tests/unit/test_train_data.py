"""Examples and pairs, the order of a stream, and packing."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.core.errors import DataInvalid
from train.data.examples import (
    CheckedExamples,
    Example,
    ExampleStream,
    PackedExamples,
    Pair,
    Rollout,
    fill_lane,
    first_fit_decreasing,
    pair_margins,
    real_tokens,
)


def of_length(n, first=0):
    """n distinct tokens; every prediction trained with its own weight."""
    weights = np.arange(n, dtype=np.float32)
    return Example(np.arange(first, first + n, dtype=np.int32), weights)


@pytest.mark.parametrize(
    ("tokens", "weights", "says"),
    [
        (np.arange(3, dtype=np.int64), np.ones(3, np.float32), "int32"),
        (np.arange(3, dtype=np.int32), np.ones(3), "float32"),
        (np.arange(3, dtype=np.int32), np.array([0, 1], np.float32), "3 tokens but 2 weights"),
        (np.arange(1, dtype=np.int32), np.zeros(1, np.float32), "at least 2"),
        (np.arange(2, dtype=np.int32), np.zeros(2, np.float32), "no trainable token"),
        (np.arange(2, dtype=np.int32), np.ones(2, np.float32), "weights\\[0\\] must be 0"),
        (np.arange(2, dtype=np.int32), np.array([0, np.nan], np.float32), "finite"),
    ],
)
def test_example_refuses(tokens, weights, says):
    with pytest.raises(DataInvalid, match=says):
        Example(tokens, weights)


def test_a_pair_of_equal_answers_and_rollouts_that_disagree_are_refused():
    with pytest.raises(DataInvalid, match="are the same"):
        Pair(of_length(3), of_length(3))
    ones, mask = np.ones(3, np.float32), np.ones(3, np.bool_)
    for fields, says in (((ones, ones[:2], mask), "differ in length"), ((ones, ones * np.nan, mask), "finite")):
        with pytest.raises(DataInvalid, match=says):
            Rollout(*fields)
    with pytest.raises(DataInvalid, match="4 tokens but 3 logprobs"):
        dataclasses.replace(of_length(4), rollout=Rollout(ones, ones, mask))


# the stream


def firsts(examples):
    return [int(e.tokens[0]) for e in examples]


def numbered(count):
    return [of_length(2, first=i) for i in range(count)]


def test_stream_shows_every_example_once_an_epoch_in_changing_order():
    stream = ExampleStream(numbered(10), seed=3)
    epochs = [firsts(stream.take(10)) for _ in range(3)]
    assert all(sorted(e) == list(range(10)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3
    assert firsts(ExampleStream(numbered(10), seed=4).take(10)) != epochs[0]


def test_stream_order_is_the_written_one():
    """Guards resumption across releases: these numbers may never change."""
    assert firsts(ExampleStream(numbered(6), seed=7).take(12)) == [4, 3, 2, 1, 0, 5, 1, 4, 3, 2, 5, 0]


@settings(max_examples=50)
@given(st.integers(1, 9), st.integers(0, 2**62), st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_stream_resumes_exactly_and_does_not_depend_on_the_takes(count, seed, takes):
    whole = firsts(ExampleStream(numbered(count), seed).take(sum(takes) + 20))
    stream, seen = ExampleStream(numbered(count), seed), []
    for n in takes:
        assert firsts(stream.peek(n)) == whole[len(seen) : len(seen) + n]
        seen += firsts(stream.take(n))
        assert stream.cursor == len(seen)
    resumed = ExampleStream(numbered(count), seed, cursor=stream.cursor)
    assert seen + firsts(resumed.take(20)) == whole


@pytest.mark.parametrize(("count", "seed", "cursor"), [(0, 0, 0), (1, -1, 0), (1, 0, -1)])
def test_stream_refuses(count, seed, cursor):
    with pytest.raises(DataInvalid):
        ExampleStream(numbered(count), seed, cursor)


# packing


def pack(units, length):
    """All lanes of these examples or pairs."""
    loss = "dpo" if any(isinstance(unit, Pair) for unit in units) else "cross_entropy"
    packed = PackedExamples(CheckedExamples(units, loss, length))
    return [packed.lane(number) for number in range(len(packed))]


def test_pack_lays_out_by_hand():
    lanes = pack([of_length(3, first=10), of_length(5, first=20)], 7)
    assert len(lanes) == 1
    lane = lanes[0]
    assert list(lane.token_J) == [20, 21, 22, 23, 10, 11, 0]
    assert list(lane.target_J) == [21, 22, 23, 24, 11, 12, 0]
    assert list(lane.weight_J) == [1, 2, 3, 4, 1, 2, 0]
    assert list(lane.position_J) == [0, 1, 2, 3, 0, 1, 0]
    assert list(lane.segment_J) == [1, 1, 1, 1, 2, 2, 0]
    assert real_tokens(lanes) == 6
    assert {lane.token_J.dtype, lane.target_J.dtype, lane.position_J.dtype, lane.segment_J.dtype} == {np.dtype("i4")}
    assert lane.weight_J.dtype == np.float32


def first_fit_by_hand(sizes, capacity):
    """Each, the largest first, into the first group with room."""
    groups, room = [], []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        g = next((g for g, free in enumerate(room) if free >= sizes[i]), len(groups))
        if g == len(groups):
            groups.append([])
            room.append(capacity)
        groups[g].append(i)
        room[g] -= sizes[i]
    return groups


@settings(max_examples=200)
@given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.lists(st.integers(1, c), max_size=60), st.just(c))))
def test_packing_is_first_fit_by_hand(case):
    sizes, capacity = case
    assert [group.tolist() for group in first_fit_decreasing(sizes, capacity)] == first_fit_by_hand(sizes, capacity)


@pytest.mark.parametrize("sizes", [[17], [3, 17, 40, 251]], ids=["all alike", "of few lengths"])
def test_packing_many_examples_costs_little_more_for_each(sizes):
    """CPU time of sixteen times as many is far from 256 times as much."""

    def seconds(count):
        given = np.resize(sizes, count)
        began = time.process_time()
        groups = first_fit_decreasing(given, 256)
        took = time.process_time() - began
        assert sum(map(len, groups)) == count
        return took

    few, many = (min(seconds(count) for _ in range(3)) for count in (5_000, 80_000))
    assert many < 64 * few, (few, many)


def test_examples_are_checked_once_and_packed_first_fit():
    units = [of_length(n) for n in (3, 9, 5, 8, 2, 4)]
    packed = PackedExamples(CheckedExamples(units, "cross_entropy", 8))
    wanted = first_fit_by_hand([n - 1 for n in (3, 9, 5, 8, 2, 4)], 8)
    assert [packed.lane(number).units for number in range(len(packed))] == [tuple(units[i] for i in g) for g in wanted]
    with pytest.raises(DataInvalid, match="example 1 has 9 tokens"):
        CheckedExamples(units, "cross_entropy", 7)
    with pytest.raises(DataInvalid, match="loss dpo trains on preference pairs"):
        CheckedExamples(units, "dpo", 8)


def test_pack_is_first_fit_decreasing():
    lanes = pack([of_length(n + 1) for n in (2, 5, 4, 7, 1, 3)], 8)
    assert [real_tokens([lane]) for lane in lanes] == [8, 8, 6]  # 7+1, 5+3, 4+2


def test_pack_refuses_an_example_longer_than_a_lane():
    assert len(pack([of_length(9)], 8)) == 1
    with pytest.raises(DataInvalid, match="example 1 has 10 tokens, but a lane of 8 positions holds at most 9"):
        pack([of_length(3), of_length(10)], 8)


def test_pack_keeps_a_pair_in_one_lane_with_the_chosen_answer_first():
    pairs = [Pair(of_length(n, 10 * n), of_length(m, 50 + 10 * m)) for n, m in ((3, 2), (4, 4), (2, 3))]
    lanes = pack(pairs, 8)
    assert [
        [int(lane.token_J[lane.segment_J == s][0]) for s in (1, 2, 3, 4) if s in lane.segment_J] for lane in lanes
    ] == [
        [40, 90],
        [30, 70, 20, 80],
    ]
    assert lanes[0].units == (pairs[1],)
    assert list(lanes[1].pair_J) == [1, 1, -1, 1, -1, -1, 0, 0]
    assert list(lanes[1].segment_J) == [1, 1, 2, 3, 4, 4, 0, 0]
    with pytest.raises(DataInvalid, match="pair 0 has 6 and 5 tokens, but a lane of 8 positions holds at most 10"):
        pack([Pair(of_length(6), of_length(5))], 8)


def test_pair_margins_by_hand():
    """Weights 1, 2, … of each answer; what stands in the padding and where the weight is 0 does not count."""
    first, second = Pair(of_length(3), of_length(2)), Pair(of_length(2), of_length(4))
    second.rejected.weights[2] = 0
    (lane,) = pack([second, first], 8)
    logprob = np.float32([-1, -4, np.nan, -2, -1, -2, -3, np.inf])
    reference = np.float32([-2, -3, 0, -2.5, -2, -4, -1, -np.inf])
    expected = [1 * (-1 + 2) - (1 * (-4 + 3) + 3 * (-2 + 2.5)), 1 * (-1 + 2) + 2 * (-2 + 4) - 1 * (-3 + 1)]
    np.testing.assert_allclose(pair_margins(lane, logprob, reference), expected)


def test_fill_lane_puts_what_was_sampled_beside_its_target():
    numbers = np.arange(4, dtype=np.float32)
    rollout = Rollout(-numbers, 10 * numbers, numbers > 2)
    lane = fill_lane([dataclasses.replace(of_length(4), rollout=rollout), of_length(2)], 6)
    assert list(lane.reference_J) == [-1, -2, -3, 0, 0, 0]
    assert list(lane.advantage_J) == [10, 20, 30, 0, 0, 0]
    assert list(lane.ratio_J) == [False, False, True, False, False, False]
    assert not lane.pair_J.any()


@settings(max_examples=60)
@given(st.lists(st.integers(2, 17), max_size=30))
def test_pack_keeps_every_example_whole(lengths):
    examples = [of_length(n, first=100 * i) for i, n in enumerate(lengths)]
    lanes = pack(examples, 16)
    found = []
    for lane in lanes:
        count = int(lane.segment_J.max())
        for segment in range(1, count + 1):
            at = np.flatnonzero(lane.segment_J == segment)
            assert (np.diff(at) == 1).all()
            assert list(lane.position_J[at]) == list(range(len(at)))
            tokens = [*lane.token_J[at], lane.target_J[at[-1]]]
            assert list(lane.weight_J[at]) == list(range(1, len(at) + 1))
            found.append(tuple(int(t) for t in tokens))
        padding = lane.segment_J == 0
        assert not lane.weight_J[padding].any()
    assert sorted(found) == sorted(tuple(int(t) for t in e.tokens) for e in examples)
    assert real_tokens(lanes) == sum(n - 1 for n in lengths)
    assert len(lanes) <= max(1, 2 * (sum(n - 1 for n in lengths) + 15) // 16)
