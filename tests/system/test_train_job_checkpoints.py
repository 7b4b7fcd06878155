"""Jobs and their checkpoints: a job that was killed, or found the disk full, ends with the bits of one that was not."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import jobs_child
import numpy as np
import pytest
from jobs_world import kinds, make_jobs, request, weights
from train_world import examples, lora, make_trainer, optimizer

from jaxlora.core.errors import NotFound, StateInvalid
from jaxlora.core.lora import LAYER_TARGETS
from jaxlora.storage.checkpoints import read_meta

ROOT = Path(__file__).resolve().parents[2]


def steps_on_disk(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in folder.iterdir())


def finish(folder: Path, asked, job_id: str, **config) -> tuple[dict[str, bytes], list[str]]:
    """(weights, messages of its events) of a job, created anew over what is on disk and run to its end."""
    jobs, shelf = make_jobs(folder, states=folder / "states", **config)
    job = jobs.create(asked, id=job_id)
    jobs.run()
    assert job.state == "succeeded", job.reason
    return weights(shelf.adapters[job.result]), [e.message for e in jobs.events(asked.owner, job_id)]


# in one process


@pytest.mark.parametrize("stopped_at", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 6))])
def test_a_job_created_again_goes_on_from_its_newest_checkpoint(tmp_path, stopped_at):
    asked = request(1, steps=8, checkpoint_every=2, heldout=examples(2, 2), evaluate_every=1, keep_best=True)
    whole, _ = finish(tmp_path / "whole", asked, "job")
    first, _ = make_jobs(tmp_path, states=tmp_path / "states")
    first.create(asked, id="job")
    for _ in range(stopped_at):
        first.step()
    first.close()
    assert read_meta(tmp_path / "states" / "job")["step"] == stopped_at
    got, messages = finish(tmp_path, asked, "job")
    assert got == whole
    assert f"running: goes on from step {stopped_at}" in messages


def test_a_released_job_goes_on_elsewhere_and_its_neighbour_where_it_is(tmp_path):
    """Between any two parts of steps; while it is not saved the other may not have it."""
    asked = request(1, steps=8, checkpoint_every=3, heldout=examples(2, 2), evaluate_every=1, keep_best=True)
    near = request(3, steps=8)
    whole, beside = finish(tmp_path / "whole", asked, "job")[0], finish(tmp_path / "beside", near, "near")[0]
    for parts in range(0, 24, 5):
        folder = tmp_path / str(parts)
        first, shelf = make_jobs(folder / "first", states=folder / "states")
        job, other = first.create(asked, id="job"), first.create(near, id="near")
        for _ in range(parts):
            first.advance()
        step = job.progress.step
        first.release("acme", "job")
        with pytest.raises(NotFound):
            first.release("acme", "job")
        assert "job" not in first.trainer.tenants
        while first.states.is_writing("job"):
            time.sleep(0.001)
        assert not step or steps_on_disk(folder / "states" / "job")[-1] == step
        got, messages = finish(folder, asked, "job")
        assert got == whole
        assert not step or f"running: goes on from step {step}" in messages
        first.run()
        assert weights(shelf.adapters[other.result]) == beside
        with pytest.raises(StateInvalid):
            first.release("acme", "near")


def test_what_may_not_be_saved_is_not(tmp_path):
    allowed = {"kept"}
    jobs, _ = make_jobs(tmp_path, states=tmp_path / "states", may_save=allowed.__contains__)
    for id, seed in (("kept", 1), ("lost", 2), ("left", 3)):
        jobs.create(request(seed, steps=9, checkpoint_every=2), id=id)
    for _ in range(3):
        jobs.step()
    jobs.release("acme", "left", save=False)
    jobs.close()
    assert {folder.name for folder in (tmp_path / "states").iterdir()} == {"kept"}
    assert steps_on_disk(tmp_path / "states" / "kept") == [2, 3]


def test_the_newest_and_the_best_are_kept_and_the_best_comes_back(tmp_path):
    """The best held-out loss is early; after a restart its weights are delivered all the same."""
    asked = request(
        1,
        data=examples(1, 2),
        heldout=examples(2, 3),
        optimizer=optimizer(lr=0.1, total_steps=9),
        checkpoint_every=1,
        evaluate_every=1,
        keep_best=True,
    )
    whole, messages = finish(tmp_path / "whole", asked, "job")
    assert "succeeded: 9 of 9 steps; its weights are those of step 2" in messages
    jobs, _ = make_jobs(tmp_path, states=tmp_path / "states", keep=2)
    jobs.create(asked, id="job")
    for _ in range(7):
        jobs.step()
        jobs._writer.flush()
    jobs.close()
    assert steps_on_disk(tmp_path / "states" / "job") == [2, 6, 7]
    assert finish(tmp_path, asked, "job")[0] == whole


def test_a_best_that_is_on_no_disk_is_told_and_sought_anew(tmp_path):
    asked = request(1, steps=6, checkpoint_every=1, heldout=examples(2, 2), evaluate_every=1, keep_best=True)
    jobs, _ = make_jobs(tmp_path, states=tmp_path / "states")
    job = jobs.create(asked, id="job")
    while job.progress.step < 4 or job.progress.best_step == job.progress.step:
        jobs.step()
        jobs._writer.flush()
    jobs.close()
    best = tmp_path / "states" / "job" / str(job.progress.best_step)
    best.rename(tmp_path / "elsewhere")
    _, messages = finish(tmp_path, asked, "job")
    assert any("on no disk; the best is sought anew" in m for m in messages)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"seed": 5}, "seed"),
        ({"data": examples(5, 5)}, "examples"),
        ({"spec": lora(2, LAYER_TARGETS)}, "spec"),
    ],
)
def test_the_checkpoints_of_another_job_are_refused(tmp_path, change, word):
    asked = request(1, steps=2)
    finish(tmp_path, asked, "job")
    jobs, _ = make_jobs(tmp_path, states=tmp_path / "states")
    job = jobs.create(replace(asked, **change), id="job")
    jobs.run()
    assert (job.state, job.code) == ("failed", StateInvalid.code)
    assert f"were made with another {word}; create a new job" in job.reason


def test_pause_cancel_and_end_write_a_checkpoint_and_say_so(tmp_path):
    jobs, _ = make_jobs(tmp_path, states=tmp_path / "states")
    made = [jobs.create(request(i, steps=4), id=f"job{i}") for i in range(3)]
    jobs.step()
    jobs.pause("acme", "job0")
    jobs.cancel("acme", "job1")
    jobs.run()
    assert [j.state for j in made] == ["paused", "cancelled", "succeeded"]
    assert [steps_on_disk(tmp_path / "states" / j.id) for j in made] == [[1], [1], [4]]
    assert [kinds(jobs, j.id).count("checkpoint") for j in made] == [1, 1, 1]


def test_a_new_job_starts_from_the_checkpoint_of_another(tmp_path):
    """With its weights and moments; its own schedule and its own examples, from the first."""
    first = request(1, steps=3)
    finish(tmp_path, first, "first")
    jobs, shelf = make_jobs(tmp_path, states=tmp_path / "states")
    asked = request(2, steps=3, start=tmp_path / "states" / "first")
    job = jobs.create(asked)
    wrong = jobs.create(replace(asked, name="wrong", spec=lora(2, LAYER_TARGETS)))
    jobs.run()
    trainer = make_trainer()
    trainer.add("a", first.spec, first.optimizer, first.data, batch_size=2, seed=1)
    while trainer.has_work:
        trainer.step()
    trainer.add("b", asked.spec, asked.optimizer, asked.data, batch_size=2, seed=2, resume=(trainer.unseat("a"), 0, 0))
    while trainer.has_work:
        trainer.step()
    assert weights(shelf.adapters[job.result]) == weights(trainer.adapter("b"))
    assert (wrong.state, wrong.code) == ("failed", "adapter_invalid")


def test_a_job_that_was_over_is_delivered_and_not_trained_on(tmp_path):
    """It stopped early, and the process died between its last checkpoint and its delivery."""
    asked = request(1, steps=50, heldout=examples(2, 2), evaluate_every=1, patience=2)
    asked = replace(asked, optimizer=optimizer(lr=0.3, total_steps=50))
    jobs, shelf = make_jobs(tmp_path, states=tmp_path / "states")
    job = jobs.create(asked, id="job")
    jobs.run()
    assert job.progress.step < 50
    again, messages = finish(tmp_path, asked, "job")
    assert again == weights(shelf.adapters[job.result])
    assert not any(m.startswith("step ") and "loss" in m for m in messages)


# in processes of their own


def child(folder: Path, steps: int, *more: str) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    command = [sys.executable, "-u", str(ROOT / "tests" / "support" / "jobs_child.py"), str(folder), str(steps), *more]
    env = os.environ | {"PYTHONPATH": path}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def adapters(folder: Path) -> dict[str, dict[str, bytes]]:
    got = {}
    for path in sorted((folder / "out").glob("*.npz")):
        with np.load(path) as arrays:
            got[path.stem] = {name: arrays[name].tobytes() for name in arrays}
    return got


@cache
def uninterrupted(steps: int) -> dict[str, dict[str, bytes]]:
    """What the same jobs come to when nothing happens."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = jobs_child.start(Path(folder), steps)
        jobs.run()
        assert {job.state for job in jobs.list(None)} == {"succeeded"}
        return adapters(Path(folder))


def lines(process: subprocess.Popen) -> Iterator[str]:
    assert process.stdout is not None
    yield from process.stdout


def ended(process: subprocess.Popen) -> str:
    """The rest of its output; it must have ended by itself."""
    out, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    return out


@pytest.mark.fault("C1")
@pytest.mark.parametrize(
    ("kills", "steps"),
    [
        pytest.param(2, 24, id="2 kills", marks=pytest.mark.slow),
        pytest.param(20, 200, id="20 kills", marks=pytest.mark.soak),
    ],
)
def test_kill_9_at_any_moment_changes_no_bit(tmp_path, kills, steps):
    """Each process lives until a checkpoint is written and then some random time, often amid the next one."""
    rng, resumed = random.Random(kills), 0
    for _ in range(kills):
        process = child(tmp_path / "killed", steps)
        for line in lines(process):
            resumed += "goes on from step" in line
            if "checkpoint" in line:
                break
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.communicate()
        assert process.returncode == -9  # it had not ended by itself
    resumed += ended(child(tmp_path / "killed", steps)).count("goes on from step")
    assert resumed >= kills
    assert adapters(tmp_path / "killed") == uninterrupted(steps)


@pytest.mark.fault("R9")
def test_a_full_disk_pauses_jobs_keeps_the_last_checkpoint_and_changes_no_bit(tmp_path):
    """Files over a few bytes fail in the writing, inside the storage library, as on a full disk."""
    output = ended(child(tmp_path / "full", 12, "full"))
    told = [line for line in output.splitlines() if "was not written" in line]
    assert told
    assert all("could not be written: File too large" in line for line in told), told
    assert "paused: its checkpoint was not written" in output
    assert adapters(tmp_path / "full") == uninterrupted(12)
