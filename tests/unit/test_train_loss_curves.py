"""What is drawn of losses: bounded, finite, and the same bytes for the same losses."""

from __future__ import annotations

import math

from train.run.loss_curves import LossCurves, drawn, thinned, write_pictures


def test_a_long_curve_is_thinned_to_means_of_neighbours():
    steps, losses = thinned((range(1, 10_001), [float(i % 2) for i in range(10_000)]), most=1000)
    assert len(steps) == len(losses) == 1000
    assert set(losses) == {0.5}
    assert (steps[0], steps[-1]) == (5.5, 9995.5)


def test_a_short_curve_stays_but_for_what_is_not_finite():
    assert thinned(((1, 2, 3, 4), (3.0, math.nan, math.inf, 1.0)), most=4) == ([1, 4], [3.0, 1.0])
    assert thinned(((), ())) == ([], [])


def test_pictures_have_both_curves_of_every_adapter_and_are_repeatable(tmp_path):
    train = (list(range(1, 40)), [1.0 + 1 / i for i in range(1, 40)])
    whole = {"harbor": LossCurves(train=train, heldout=((10, 30), (1.5, 1.2))), "quay": LossCurves(train=train)}
    pictures = drawn(whole)
    assert pictures == drawn(whole)
    assert pictures["png"].startswith(b"\x89PNG")
    alone = drawn({"harbor": LossCurves(train=train), "quay": LossCurves(train=train)})
    assert pictures["svg"].count(b"stroke-dasharray") > alone["svg"].count(b"stroke-dasharray")
    write_pictures({}, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "loss.svg"]
