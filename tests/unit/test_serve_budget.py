"""The budget against a clock that is made: what streams wait, what either side gets, and what follows a change of mind."""

from __future__ import annotations

import random

import pytest

from jaxlora.core.errors import InvalidRequest
from serve.engine.telemetry import Histogram
from serve.runtime.budget import Budget, BudgetSettings

STEP_S, PARTS = 0.030, {"forward": 0.025, "backward": 0.040, "update": 0.055}


class Device:
    """Runs what the budget decides; a part and a step take what they take, with some noise."""

    def __init__(self, budget: Budget, step_s: float = STEP_S, parts: dict[str, float] = PARTS, noise: float = 0.0):
        self.budget, self.step_s, self.parts, self.noise = budget, step_s, parts, noise
        self.now, self.random = 0.0, random.Random(0)
        self.gaps: list[float] = []  # between the ends of serving steps
        self.trained_s, self.turn, self.last = 0.0, 0, 0.0

    def take(self, seconds: float) -> tuple[float, float]:
        start = self.now
        self.now += seconds * (1 + self.noise * self.random.random())
        return start, self.now

    def train(self, beside: bool) -> None:
        part = list(self.parts)[self.turn % len(self.parts)]
        self.turn += 1
        start, end = self.take(self.parts[part])
        self.trained_s += end - start
        self.budget.trained(start, end, part, beside=beside)

    def serve(self, decoded: bool = True, beside: bool = True) -> None:
        start, end = self.take(self.step_s)
        self.budget.served(start, end, decoded=decoded, beside=beside)
        self.gaps.append(end - self.last)
        self.last = end

    def run(self, seconds: float, urgent: bool = False) -> None:
        """Both have work all the time."""
        until, self.gaps, self.trained_s, self.last = self.now + seconds, [], 0.0, self.now
        while self.now < until:
            part = list(self.parts)[self.turn % len(self.parts)]
            if self.budget.trains(self.now, part, urgent=urgent):
                self.train(beside=True)
            else:
                self.serve()

    def p99(self) -> float:
        return sorted(self.gaps)[int(0.99 * len(self.gaps))]


def test_by_default_a_token_takes_at_most_three_times_what_it_takes_alone():
    device = Device(Budget())
    device.run(30)
    assert max(device.gaps[1:]) <= 3 * STEP_S + 1e-9
    assert device.trained_s >= 0.45 * 30
    assert device.budget.target_s == pytest.approx(3 * STEP_S)


def test_noise_costs_no_more_than_itself():
    device = Device(Budget(), noise=0.5)
    device.run(60)
    assert device.p99() <= 3 * STEP_S * 1.5
    assert device.trained_s >= 0.4 * 60


def test_what_a_step_takes_is_learned_beside_training_too():
    """A server that grows slower or faster moves its target, though it never stops training."""
    device = Device(Budget())
    device.run(10)
    device.step_s = 0.1
    device.run(60)
    assert device.budget.target_s == pytest.approx(0.3)
    assert max(device.gaps[1:]) <= 0.3 + 1e-9
    device.step_s = 0.02
    device.run(60)
    assert device.budget.target_s == pytest.approx(0.06)


def test_a_target_that_is_set_is_held_from_the_next_step_on():
    device = Device(Budget(BudgetSettings(training_floor=0.0)))
    device.run(10)
    for target_s in (0.09, 0.2, 0.086):
        device.budget.settings.set(target_s=target_s)
        device.run(20)
        assert max(device.gaps[1:]) <= target_s + 1e-9
        assert device.trained_s > 0
    device.budget.settings.set(target_s=None)
    device.run(10)
    assert device.p99() == pytest.approx(3 * STEP_S, rel=0.2)


def test_training_keeps_its_floor_where_no_part_fits():
    device = Device(Budget(BudgetSettings(target_s=0.031, training_floor=0.4)))
    device.run(30)
    assert 0.38 <= device.trained_s / 30 <= 0.5
    assert max(device.gaps[1:]) <= STEP_S + max(PARTS.values()) + 1e-9  # a token waits for one part
    device = Device(Budget(BudgetSettings(target_s=0.031, training_floor=0.4)), parts={"tiny": 0.001})
    device.run(30)
    assert 0.38 <= device.trained_s / 30 <= 0.5


@pytest.mark.fault("T7")
def test_serving_keeps_its_floor_where_everything_fits():
    device = Device(Budget(BudgetSettings(target_s=60.0, serving_floor=0.3)))
    device.run(30)
    assert 0.5 <= device.trained_s / 30 <= 0.72


def test_of_a_part_that_was_never_seen_one_runs_at_a_time():
    device = Device(Budget(), parts={f"part {i}": 0.02 for i in range(40)})
    device.run(1.5)  # and most are new
    assert max(device.gaps[1:]) <= 0.02 + STEP_S + 1e-9


def test_without_a_floor_training_waits_until_it_fits():
    device = Device(Budget(BudgetSettings(target_s=0.031, training_floor=0.0)))
    for _ in PARTS:
        device.train(beside=False)
    device.run(30)
    assert device.trained_s == 0


def test_a_request_without_its_first_token_comes_before_training():
    device = Device(Budget())
    for _ in range(20):
        device.train(beside=False)  # alone, at full speed
    device.run(0.4, urgent=True)
    assert device.trained_s == 0
    device.run(30, urgent=True)  # a line that never ends: the floor alone
    assert 0.38 <= device.trained_s / 30 <= 0.5


def test_steps_that_compute_prompts_teach_nothing_about_tokens():
    device = Device(Budget())
    device.run(5)
    device.step_s = 1.0
    for _ in range(40):
        device.serve(decoded=False)
    assert device.budget.target_s == pytest.approx(3 * STEP_S)


def test_time_alone_is_no_share():
    device = Device(Budget())
    for _ in range(100):
        device.train(beside=False)
        device.serve(beside=False)
    assert device.budget.training_share == 0
    device.run(5)
    assert 0.4 <= device.budget.training_share <= 0.7


@pytest.mark.parametrize(
    ("numbers", "named"),
    [
        ({"slowdown": 0.9}, "slowdown"),
        ({"slowdown": None}, "slowdown"),
        ({"target_s": 0.0}, "target_s"),
        ({"target_s": float("nan")}, "target_s"),
        ({"training_floor": 1.0}, "training_floor"),
        ({"serving_floor": -0.1}, "serving_floor"),
        ({"serving_floor": "much"}, "serving_floor"),
        ({"training_floor": 0.6, "serving_floor": 0.4}, "training_floor"),
        ({"target_s": 0.1, "floor": 0.1}, "floor"),
    ],
)
def test_settings_out_of_range_change_nothing(numbers, named):
    settings = BudgetSettings()
    with pytest.raises(InvalidRequest) as caught:
        settings.set(**numbers)
    assert caught.value.param == named
    assert settings == BudgetSettings()


def test_a_histogram_counts_what_it_is_told():
    times = Histogram((0.1, 1.0))
    assert (times.total, times.lines()) == (0, [])
    for value in (0.05, 0.1, 0.5, 7.0):
        times.observe(value)
    assert (times.counts, times.total, times.sum) == ([2, 1, 1], 4, pytest.approx(7.65))
    assert [line.split()[:4] for line in times.lines()] == [
        ["<=", "0.1", "s", "2"],
        ["<=", "1", "s", "1"],
        [">", "1", "s", "1"],
    ]
