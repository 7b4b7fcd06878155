"""Which choice is taken, against a loop that shares nothing with it."""

from __future__ import annotations

import math

import pytest

from serve.api.gradient.complete import choose

SCORES = [-3.0, -1.0, -2.0, -1.0]


def take(scores=SCORES, *, temperature=1.0, top_k=0, top_p=1.0, drawn=0.0):
    return choose(scores, temperature=temperature, top_k=top_k, top_p=top_p, drawn=drawn)


def test_at_temperature_0_the_best_is_taken_and_the_first_of_equals():
    assert [take(temperature=0, drawn=d) for d in (0.0, 0.5, 0.999)] == [1, 1, 1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_shares_are_those_of_a_softmax(temperature):
    count = 4000
    drawn = [take(temperature=temperature, drawn=(i + 0.5) / count) for i in range(count)]
    weights = [math.exp(s / temperature) for s in SCORES]
    for i, weight in enumerate(weights):
        assert drawn.count(i) / count == pytest.approx(weight / sum(weights), abs=1 / count)


@pytest.mark.parametrize(
    ("top_k", "top_p", "left"),
    [
        pytest.param(1, 1.0, {1}, id="the_best"),
        pytest.param(3, 1.0, {1, 2, 3}, id="three"),
        pytest.param(99, 1.0, {0, 1, 2, 3}, id="all"),
        pytest.param(-1, 0.39, {1}, id="nucleus_of_one"),
        pytest.param(-1, 0.7, {1, 3}, id="nucleus_of_two"),
        pytest.param(3, 0.9, {1, 2, 3}, id="p_after_k"),
        pytest.param(2, 0.6, {1, 3}, id="p_of_what_k_left"),
    ],
)
def test_what_is_cut_off_is_never_taken(top_k, top_p, left):
    assert {take(top_k=top_k, top_p=top_p, drawn=i / 500) for i in range(500)} == left


def test_far_scores_neither_overflow_nor_vanish():
    assert take([-5000.0, -4000.0], temperature=0.01, drawn=0.999) == 1
    assert take([0.0], drawn=0.9999999) == 0
