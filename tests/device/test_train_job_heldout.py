"""Held-out losses of jobs: when they are taken, early stopping, and which weights are delivered."""

from __future__ import annotations

from jobs_world import kinds, make_jobs, request, weights
from train_world import examples, make_trainer, optimizer

OVERFIT = {"optimizer": optimizer(lr=0.1, total_steps=9), "data": examples(1, 2), "heldout": examples(2, 3)}


def by_hand(r):
    """(held-out loss, weights) after each step of training it with nothing but a trainer."""
    trainer = make_trainer()
    trainer.add("t", r.spec, r.optimizer, r.data, batch_size=r.batch_size, seed=r.seed)
    course = []
    while trainer.has_work:
        trainer.step()
        course.append((trainer.evaluate(r.heldout, "t").nll, weights(trainer.adapter("t"))))
    return course


def heldout_losses(jobs, job):
    return {
        e.data["step"]: e.data["heldout_loss"]
        for e in jobs.events("acme", job.id)
        if "heldout_loss" in e.data and e.kind == "step"
    }


def test_it_is_taken_every_n_steps_and_after_the_last(tmp_path):
    jobs, _ = make_jobs(tmp_path)
    made = [
        jobs.create(request(1, evaluate_every=2, steps=5, heldout=examples(7, 3))),
        jobs.create(request(2, steps=3, heldout=examples(8, 2))),
        jobs.create(request(3, steps=3)),
    ]
    asked = [job.request for job in made]
    jobs.run()
    for job, r, steps in zip(made[:2], asked, ([2, 4, 5], [3]), strict=False):
        course = by_hand(r)
        assert heldout_losses(jobs, job) == {step: course[step - 1][0] for step in steps}
    assert heldout_losses(jobs, made[2]) == {}


def test_several_jobs_share_one_evaluation(tmp_path, monkeypatch):
    jobs, _ = make_jobs(tmp_path)
    calls, evaluator = [], jobs.trainer.evaluator
    evaluate = evaluator.evaluate
    monkeypatch.setattr(evaluator, "evaluate", lambda rows: calls.append(len(rows)) or evaluate(rows))
    for i in range(3):
        jobs.create(request(i, steps=2, heldout=examples(i, 2), evaluate_every=1))
    jobs.run()
    assert calls == [3, 3]


def test_the_best_weights_are_delivered(tmp_path):
    jobs, shelf = make_jobs(tmp_path, host_bytes=0)
    asked = request(1, evaluate_every=1, keep_best=True, **OVERFIT)
    course = by_hand(asked)
    losses = [loss for loss, _ in course]
    best = losses.index(min(losses))
    assert 0 < best < len(losses) - 2, losses  # else this shows nothing
    last = jobs.create(request(1, name="last", evaluate_every=1, **OVERFIT))
    job = jobs.create(asked)
    jobs.run()
    assert (job.progress.best_step, job.progress.best_loss) == (best + 1, losses[best])
    assert weights(shelf.adapters[job.result]) == course[best][1]
    assert weights(shelf.adapters[last.result]) == course[-1][1]
    assert jobs.events("acme", job.id)[-1].message.endswith(f"its weights are those of step {best + 1}")
    assert len(jobs._parking) == 0


def test_it_stops_early_and_not_before(tmp_path):
    asked = request(1, evaluate_every=1, patience=2, **OVERFIT)
    losses = [loss for loss, _ in by_hand(asked)]
    best, stop = losses[0], None
    stale = 0
    for step, loss in enumerate(losses, start=1):
        stale = 0 if loss < best or step == 1 else stale + 1
        best = min(best, loss)
        if stale == 2:
            stop = step
            break
    assert stop is not None
    assert stop < len(losses)
    jobs, _ = make_jobs(tmp_path)
    job = jobs.create(asked)
    jobs.run()
    assert (job.state, job.progress.step) == ("succeeded", stop)
    assert "stopped early: 2 held-out losses in a row" in jobs.events("acme", job.id)[-1].message
    assert kinds(jobs, job.id).count("best") == sum(
        loss < min(losses[:i], default=float("inf")) for i, loss in enumerate(losses[:stop])
    )


def test_a_pause_forgets_neither_the_best_nor_the_patience(tmp_path):
    asked = request(1, evaluate_every=1, keep_best=True, patience=3, **OVERFIT)
    results = []
    for pauses in (False, True):
        jobs, shelf = make_jobs(tmp_path, host_bytes=0)
        job = jobs.create(asked)
        while jobs.has_work:
            jobs.step()
            if pauses and job.state == "running":
                jobs.pause("acme", job.id)
                jobs.resume("acme", job.id)
        results.append((job.progress.step, job.progress.best_step, weights(shelf.adapters[job.result])))
    assert results[0] == results[1]
