"""What one job may cost the others: its held-out loss is sliced and charged, its errors are its own, its files are read elsewhere."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import jax
import pytest
from jobs_world import make_jobs, request, trainer_of, weights
from train_world import examples, lora, optimizer, pairs

import train.data.examples as examples_module
from jaxlora.config.training import Loss
from jaxlora.core.lora import LAYER_TARGETS

MANY = 60  # held-out examples: more lanes than several steps have


def small_trainer(slots: int = 3):
    return trainer_of(slots, lanes=2, lane_tokens=32)


def heldout_losses(jobs, job):
    found = jobs.events(job.request.owner, job.id)
    return {e.data["step"]: e.data["heldout_loss"] for e in found if e.kind == "step" and "heldout_loss" in e.data}


def run_alone(folder: Path, asked):
    """(held-out losses, weights) of a job that nobody trains beside."""
    jobs, shelf = make_jobs(folder, small_trainer())
    job = jobs.create(asked)
    jobs.run()
    return heldout_losses(jobs, job), weights(shelf.adapters[job.result])


KINDS = {
    "examples": {},
    "pairs": {"data": pairs(1, 5), "heldout": pairs(2, 30), "loss": Loss(name="dpo", beta=0.1)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_others_step_on_while_a_held_out_loss_is_under_way(tmp_path, kind):
    """Between two of their steps it gets at most the lanes of a step, and it comes out as it does alone, bit for bit."""
    asked = request(1, steps=2, owner="slow", **{"evaluate_every": 1, "heldout": examples(2, MANY)} | KINDS[kind])
    wanted = run_alone(tmp_path / "alone", asked)
    jobs, shelf = make_jobs(tmp_path, small_trainer())
    slow, quick = jobs.create(asked), jobs.create(request(3, owner="quick", steps=60))
    waited = 0
    for step in range(1, 61):
        before = jobs.trainer.tenants[slow.id].losses[:] if slow.id in jobs.trainer.tenants else None
        jobs.step()
        assert quick.progress.step == step
        waited += before is not None and len(before) > 0 and not slow.final
        if slow.final:
            break
    assert waited > 10
    jobs.run()
    assert (heldout_losses(jobs, slow), weights(shelf.adapters[slow.result])) == wanted


def test_a_held_out_loss_is_charged_to_its_owner(tmp_path):
    """Two owners over one slot: one that evaluates as much as it trains has half the steps in the same turns."""
    steps = {}
    for evaluates in (False, True):
        jobs, _ = make_jobs(tmp_path / str(evaluates), small_trainer(1), quantum_steps=4)
        extra = {"heldout": examples(2, MANY), "evaluate_every": 1} if evaluates else {}
        one = jobs.create(request(1, owner="one", steps=500, **extra))
        two = jobs.create(request(3, owner="two", steps=500))
        while two.progress.step < 40:
            jobs.step()
        steps[evaluates] = one.progress.step
    assert 34 <= steps[False] <= 46
    assert 1 <= steps[True] <= 6  # some thirty times as many tokens for each of its steps


def test_a_job_that_pauses_while_it_is_evaluated_goes_on_with_the_rest(tmp_path, monkeypatch):
    asked = request(1, steps=3, evaluate_every=1, keep_best=True, heldout=examples(2, MANY))
    wanted = run_alone(tmp_path / "alone", asked)
    jobs, shelf = make_jobs(tmp_path, small_trainer(), states=tmp_path / "states", host_bytes=0)
    lanes, evaluator = [], jobs.trainer.evaluator
    evaluate = evaluator.evaluate
    monkeypatch.setattr(evaluator, "evaluate", lambda rows: lanes.extend(rows) or evaluate(rows))
    job = jobs.create(asked)
    while jobs.has_work:
        jobs.step()
        if not job.final:
            jobs.pause("acme", job.id)
            jobs.step()
            jobs.resume("acme", job.id)
    assert (heldout_losses(jobs, job), weights(shelf.adapters[job.result])) == wanted
    assert len({(id(row.sums), row.lane.token_J.tobytes()) for row in lanes}) == len(lanes)  # none of them twice


@pytest.mark.parametrize("step", [1, 3], ids=["in the midst", "at the end"])
def test_a_process_that_ends_while_a_job_is_evaluated_evaluates_it_when_it_is_back(tmp_path, step):
    asked = request(1, steps=3, evaluate_every=1, keep_best=True, heldout=examples(2, MANY))
    losses, adapter = run_alone(tmp_path / "alone", asked)
    states = tmp_path / "states"
    jobs, _ = make_jobs(tmp_path / "first", small_trainer(), states=states)
    job = jobs.create(asked)
    while job.progress.step < step:
        jobs.step()
    assert job.progress.heldout_due
    jobs.close()
    again, shelf = make_jobs(tmp_path / "second", small_trainer(), states=states)
    back = again.create(asked, id=job.id)
    again.run()
    assert heldout_losses(again, back) == {s: loss for s, loss in losses.items() if s >= step}
    if step == 1:  # what was best before is on no disk later on
        assert weights(shelf.adapters[back.result]) == adapter


# Errors.


def broken(*args, **kwargs):
    raise KeyError("somebody's data")


def break_seat(jobs, shelf, job):
    add = jobs.trainer.add
    jobs.trainer.add = lambda name, *a, **k: broken() if name == job.id else add(name, *a, **k)


def break_after_start(attribute, of):
    """Breaks the method of an object of the job's once it is in its slot."""

    def do(jobs, shelf, job):
        add = jobs.trainer.add

        def then(name, *args, **how):
            tenant = add(name, *args, **how)
            if name == job.id:
                target = of(jobs, job, tenant)
                setattr(target, attribute, broken)
            return tenant

        jobs.trainer.add = then

    return do


def break_heldout(jobs, shelf, job):
    packed = jobs.trainer.evaluator.packed

    class Broken:
        def __init__(self, whole):
            self.whole, self.lane = whole, broken

        def __len__(self):
            return len(self.whole)

    jobs.trainer.evaluator.packed = lambda units, loss: (
        Broken(packed(units, loss)) if units is job.request.heldout else packed(units, loss)
    )


def break_shelf(jobs, shelf, job):
    add = shelf.add
    shelf.add = lambda owner, name, adapter: broken() if name == job.request.name else add(owner, name, adapter)


BROKEN = {
    "seat": break_seat,
    "batch": break_after_start("peek", lambda jobs, job, tenant: tenant.stream),
    "event": break_after_start("add_step", lambda jobs, job, tenant: job.log),
    "held-out": break_heldout,
    "result": break_shelf,
}


@pytest.mark.parametrize("stage", BROKEN)
def test_an_error_of_one_job_ends_that_job_and_the_others_go_on(tmp_path, stage):
    others = [request(3, owner="a", steps=6), request(4, owner="b", steps=4, heldout=examples(7, 3))]
    wanted = [run_alone(tmp_path / r.owner, r)[1] for r in others]
    jobs, shelf = make_jobs(tmp_path, small_trainer())
    made = [jobs.create(r) for r in others]
    bad = jobs.create(request(5, owner="bad", steps=3, heldout=examples(8, 3)))
    BROKEN[stage](jobs, shelf, bad)
    jobs.run()
    assert (bad.state, bad.code) == ("failed", "internal_error")
    assert bad.reason == "an internal error (KeyError); the server's log says more"  # and nothing of what it was
    assert [weights(shelf.adapters[job.result]) for job in made] == wanted
    assert (jobs.trainer.tenants, jobs._live, len(jobs._parking)) == ({}, {}, 0)


def test_an_error_of_reading_ends_that_job(tmp_path):
    jobs, _ = make_jobs(tmp_path, small_trainer(), load=broken)
    good, bad = jobs.create(request(3)), jobs.create(request(5, data=tmp_path / "data"))
    jobs.run()
    assert [(job.state, job.code) for job in (good, bad)] == [("succeeded", None), ("failed", "internal_error")]


def test_an_error_of_a_device_program_is_nobodys(tmp_path):
    jobs, shelf = make_jobs(tmp_path, small_trainer())

    def lost(*args):
        raise jax.errors.JaxRuntimeError("INTERNAL: the device is gone")

    shelf.add = lost
    job = jobs.create(request(3))
    with pytest.raises(jax.errors.JaxRuntimeError, match="the device is gone"):
        jobs.run()
    assert job.state == "running"


# Where work is done.


def test_examples_are_looked_at_where_their_files_are_read(tmp_path, monkeypatch):
    """Neither a check of each example nor their packing or shuffling runs on the trainer's thread."""
    seen = Counter()
    at = examples_module.ExampleStream._at

    def noted_at(stream, place):
        before = stream._epoch
        unit = at(stream, place)
        if stream._epoch != before:
            seen["shuffle", threading.current_thread() is threading.main_thread()] += 1
        return unit

    monkeypatch.setattr(examples_module.ExampleStream, "_at", noted_at)
    for name in ("check_kind", "check_length", "first_fit_decreasing"):
        inner = getattr(examples_module, name)

        def noted(*args, inner=inner, name=name):
            seen[name, threading.current_thread() is threading.main_thread()] += 1
            return inner(*args)

        monkeypatch.setattr(examples_module, name, noted)
    data = {"data": examples(1, 40), "heldout": examples(2, 40)}
    jobs, _ = make_jobs(tmp_path, small_trainer(), load=lambda path: data[path.name])
    files = {name: tmp_path / name for name in data}
    job = jobs.create(request(1, spec=lora(2, LAYER_TARGETS), optimizer=optimizer(total_steps=2), **files))
    jobs.run()
    assert job.state == "succeeded"
    assert not any(on_main for _, on_main in seen), seen
    assert {name for name, _ in seen} == {"check_kind", "check_length", "first_fit_decreasing", "shuffle"}
