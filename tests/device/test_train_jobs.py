"""A job by itself: which moves are legal, what its log keeps, which requests are refused, what counts as better."""

from __future__ import annotations

import itertools
import math

import pytest
from jobs_world import request
from train_world import examples

from jaxlora.core.errors import InvalidRequest, StateInvalid
from train.jobs.job import EventLog, Job, JobsConfig, Progress
from train.jobs.status import NEXT, JobStatus

LEGAL = {  # written out a second time, from the table of the fine-tuning wire, and our time slices and late failures
    ("validating_files", "queued"),
    ("validating_files", "failed"),
    ("validating_files", "cancelled"),
    ("queued", "running"),
    ("queued", "paused"),
    ("queued", "cancelled"),
    ("queued", "failed"),
    ("running", "paused"),
    ("running", "succeeded"),
    ("running", "failed"),
    ("running", "cancelled"),
    ("running", "queued"),
    ("paused", "queued"),
    ("paused", "cancelled"),
}


def job(state="queued", limit=10) -> Job:
    return Job(id="j", request=request(), created_s=0.0, log=EventLog(limit, itertools.count().__next__), state=state)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(NEXT, NEXT)))
def test_only_legal_moves_are_made(before, after):
    moved = job(before)
    if (before, after) in LEGAL:
        moved.move(after, "so it is", code="why")
        assert (moved.state, moved.code, moved.reason) == (after, "why", "so it is")
        assert [e.message for e in moved.log.after(0)] == [f"{after}: so it is"]
    else:
        with pytest.raises(StateInvalid, match=f"job j is {before} and cannot become {after}; (it may become|that is)"):
            moved.move(after, "no")
        assert (moved.state, moved.log.after(0)) == (before, [])


def test_final_states_are_those_without_a_way_out():
    assert [state for state in NEXT if job(state).final] == ["succeeded", "failed", "cancelled"]


def test_a_job_started_when_it_first_ran():
    one = job()
    assert one.started_s is None
    for to in (JobStatus.RUNNING, JobStatus.QUEUED, JobStatus.RUNNING):
        one.move(to, "started")
    assert [e.time_s for e in one.log.after(0)] == [0, 1, 2]
    assert one.started_s == 0


def test_the_log_is_bounded_and_steps_do_not_push_out_the_rest():
    log = EventLog(10, lambda: 7.0)
    log.add("state", "queued")
    for step in range(1, 101):
        log.add_step({"step": step, "loss": 1.0}, total=100, finite=step != 50)
    kept = log.after(0)
    assert [e.message for e in kept if e.kind != "step"] == [
        "queued",
        "the update of step 50 was not finite and is skipped",
    ]
    assert [e.data["step"] for e in kept if e.kind == "step"] == [96, 97, 98, 99, 100]
    assert [e.seq for e in kept] == sorted(e.seq for e in kept)
    assert kept[-1].seq == 102
    assert log.after(101) == kept[-1:]
    assert {e.time_s for e in kept} == {7.0}


def test_numbers_that_no_json_holds_are_left_out():
    log = EventLog(10, lambda: 0.0)
    log.add_step({"step": 3, "loss": math.nan, "grad_norm": math.inf, "lr": 0.5}, total=9, finite=False)
    assert log.after(0)[0].data == {"step": 3, "lr": 0.5}


def test_better_is_lower_and_never_nan():
    p = Progress()
    verdicts = []
    for step, loss in enumerate([math.nan, math.inf, 3.0, 2.0, math.nan, 2.0, 2.5, 1.0], start=1):
        p.step = step
        verdicts.append((p.judge(loss), p.best_step, p.best_loss, p.stale))
    assert [better for better, *_ in verdicts] == [False, False, True, True, False, False, False, True]
    assert verdicts[6][1:] == (4, 2.0, 3)
    assert verdicts[7][1:] == (8, 1.0, 0)
    assert Progress.from_json(p.to_json() | {"base": "more"}) == p


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"owner": "../x"}, "name"),
        ({"name": ""}, "name"),
        ({"seed": -1, "data": examples(0, 1)}, "seed"),
        ({"weight": 0.0}, "weight"),
        ({"weight": math.nan}, "weight"),
        ({"batch_size": 0}, "batch_size"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"evaluate_every": 1}, "evaluate_every"),
        ({"keep_best": True}, "keep_best"),
        ({"patience": 1, "heldout": examples(0, 1)}, "patience"),
    ],
)
def test_impossible_requests_are_refused(changes, field):
    with pytest.raises(InvalidRequest) as caught:
        request(**changes)
    assert caught.value.param == field


@pytest.mark.parametrize("field", ["keep", "quantum_steps", "events"])
def test_impossible_settings_are_refused(field):
    with pytest.raises(InvalidRequest, match=f"{field} must be at least 1, got 0"):
        JobsConfig(**{"states": None, field: 0})
