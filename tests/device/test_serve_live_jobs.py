"""Jobs beside serving: versions while they run, guests between their steps, and nobody's result changed by either."""

from __future__ import annotations

from collections import Counter

import jax
import numpy as np
import pytest
from live_world import LiveWorld, examples, job
from train_world import assert_same_bits

from jaxlora.core.errors import AdapterNotFinite, JaxLoraError
from serve.runtime.live_training import PUBLISH

pytest_plugins = ["serve_fixtures"]


@pytest.fixture
def live(world, tmp_path):
    return LiveWorld(world, tmp_path)


def weights(live, ref):
    return live.runner.engine.store.get(ref).weights


def test_a_job_is_published_every_few_steps_and_at_its_end(live):
    live.live.create("ftjob-a", job(1, owner="one", steps=5, checkpoint_every=3), publish=True)
    live.run()
    assert live.heard.states("ftjob-a")[-1] == "succeeded"
    assert live.heard.steps("ftjob-a") == [(2, False, False), (3, True, False), (4, False, False), (5, True, True)]
    refs = [p.ref for p in live.heard.published]
    assert [r.version for r in refs] == [1, 2, 3, 4]
    first, last = weights(live, refs[1]), weights(live, refs[3])
    assert any(not np.array_equal(x, y) for t in first for x, y in zip(first[t], last[t], strict=True))


def test_versions_that_are_no_checkpoints_make_way(live):
    live.live.create("ftjob-b", job(2, owner="two", steps=12, checkpoint_every=4), publish=True)
    live.run()
    kept = {p.ref.version for p in live.heard.published if p.checkpoint}
    left = {r.version for r in live.runner.engine.store.versions("two", "job-2")}
    newest = sorted(p.ref.version for p in live.heard.published)[-4:]
    assert kept <= left <= kept | set(newest)


def test_without_room_for_more_versions_a_job_goes_on_and_its_versions_make_way(live):
    live.full.add("full")
    live.live.create("ftjob-i", job(11, owner="full", steps=14, checkpoint_every=2), publish=True)
    while live.live.jobs.get("full", "ftjob-i").progress.step < 8:
        live.live.advance()
    live.full.clear()
    live.run()
    assert [s for s, checkpoint, _ in live.heard.steps("ftjob-i") if checkpoint] == [8, 10, 12, 14]
    assert live.heard.steps("ftjob-i")[-1] == (14, True, True)
    assert [s for s, checkpoint, _ in live.heard.steps("ftjob-i") if not checkpoint] == [2, 4, 6]
    told = [e for n in live.heard.news for e in n.events if "no checkpoint" in e.message]
    assert [(e.level, e.message.partition(" is")[0]) for e in told] == [("warn", f"step {s}") for s in (2, 4, 6)]
    assert {r.version for r in live.runner.engine.store.versions("full", "job-11")} == {4, 5, 6, 7}


@pytest.mark.parametrize("at", [3, 4], ids=["between two versions", "just published for latest"])
@pytest.mark.parametrize("move", ["cancel", "pause"])
def test_without_room_what_a_cancelled_job_has_learned_stays_and_a_paused_ones_makes_way(live, move, at):
    owner = f"full-{move}-{at}"
    live.full.add(owner)
    live.live.create("ftjob-j", job(12, owner=owner, steps=50), publish=True)
    while live.live.jobs.get(owner, "ftjob-j").progress.step < at or live.live.part == PUBLISH:
        live.live.advance()
    getattr(live.live, move)(owner, "ftjob-j")
    assert live.heard.steps("ftjob-j")[-1][:2] == (at, move == "cancel")
    assert live.runner.engine.store.latest(owner, "job-12") == live.heard.published[-1].ref


def test_a_job_that_does_not_publish_has_its_result_alone(live):
    live.live.create("ftjob-c", job(3, owner="three", checkpoint_every=2), publish=False)
    live.run()
    assert live.heard.steps("ftjob-c") == [(6, True, True)]


def test_events_are_told_once_and_in_order(live):
    live.live.create("ftjob-d", job(4, owner="four"), publish=True)
    live.run()
    seqs = [e.seq for n in live.heard.news for e in n.events]
    assert seqs == list(range(1, len(seqs) + 1))
    assert live.live.jobs.list(None) == []  # forgotten here: what is told is stored elsewhere


def test_what_happened_is_told_in_its_order(live):
    """A step and its held-out loss come before its version, and all of them before the next step."""
    live.live.create(
        "ftjob-p", job(18, owner="twelve", steps=4, heldout=examples(3, 2), evaluate_every=2), publish=True
    )
    live.run()
    told = [message.partition(":")[0] for message in live.heard.told if "is saved" not in message]
    steps = [message for message in told if message.startswith(("step", "version", "best", "succeeded"))]
    best = "best held-out loss so far"
    expected = ["step 1 of 4", "step 2 of 4", best, "version of step 2", "step 3 of 4", "step 4 of 4", best]
    assert [m for m in steps if m != best] == [
        m for m in [*expected, "version of step 4, the result", "succeeded"] if m != best
    ]
    assert steps[2] == best
    times = [event.time_s for news in live.heard.news for event in news.events]
    assert times == sorted(times)


@pytest.mark.parametrize("step", [3, 4], ids=["between two versions", "just published for latest"])
@pytest.mark.parametrize("move", ["cancel", "pause"])
def test_what_a_job_has_learned_is_a_version_when_it_leaves(live, move, step):
    owner = f"five-{move}-{step}"
    live.live.create("ftjob-e", job(5, owner=owner, steps=50), publish=True)
    while live.live.jobs.get(owner, "ftjob-e").progress.step < step or live.live.part == PUBLISH:
        live.live.advance()
    getattr(live.live, move)(owner, "ftjob-e")
    live.run()
    assert live.heard.steps("ftjob-e")[-1][:2] == (step, True)
    assert len({p.ref for p in live.heard.published}) == 2
    assert live.heard.states("ftjob-e")[-1] == {"cancel": "cancelled", "pause": "paused"}[move]


def test_a_guest_is_trained_between_steps_and_changes_no_job(world, tmp_path):
    """One slot for all: the job gives way, comes back, and ends where it ends alone, bit for bit."""
    results = []
    for guests in (0, 3):
        live = LiveWorld(world, tmp_path / str(guests))
        owner = f"six-{guests}"
        live.live.create("ftjob-f", job(6, owner=owner, steps=8), publish=True)
        state, reports = None, []
        for step in range(guests):
            for _ in range(25):
                live.live.advance()
            caller, _ = live.call(90, state=state, step=step)
            while caller.done.empty():
                live.live.advance()
            report, _, state = caller.done.get()
            reports.append(report)
        live.run()
        results.append(weights(live, live.heard.published[-1].ref))
        if guests:
            assert [r.nll for r in reports] == sorted((r.nll for r in reports), reverse=True)
            assert {r.targets for r in reports} == {reports[0].targets}
            assert reports[0].loss == pytest.approx(reports[0].nll / reports[0].targets, rel=1e-5)
    assert_same_bits(*results)


def test_calls_of_one_adapter_are_what_they_are_without_jobs(world, tmp_path):
    """Three calls in the midst of jobs of others equal three calls alone, moments and all."""
    ends = []
    for crowd in (False, True):
        live = LiveWorld(world, tmp_path / str(crowd), slots=2)
        if crowd:
            for i in range(2):
                live.live.create(f"ftjob-g{i}", job(7 + i, owner=f"seven-{i}", steps=40), publish=True)
        state = None
        for step in range(3):
            caller, _ = live.call(91, state=state, step=step)
            while caller.done.empty():
                live.live.advance()
            _, rows, state = caller.done.get()
        ends.append((jax.device_get(rows), state))
    assert_same_bits(*ends)


def test_a_guest_that_is_not_finite_changes_nothing_and_leaves(live):
    caller, call = live.call(92, bad=True)
    live.run()
    assert isinstance(caller.done.get(), AdapterNotFinite)
    assert call.name not in live.trainer.tenants
    assert live.trainer.free_slots(call.spec) == 1


def test_all_lanes_of_a_long_call_are_one_update(live):
    """More examples than a step has room for are one batch."""
    caller, call = live.call(93, count=40)
    live.run()
    report, _, _ = caller.done.get()
    assert report.targets == call.examples.examples.size_N.sum()
    assert report.step == 1


def test_who_does_nothing_costs_nothing(live):
    live.live.create("ftjob-h", job(10, owner="eight"), publish=True)
    live.run()
    assert not live.live.has_work
    live.live.poke()
    assert live.live.has_work
    assert live.run() == 1


# Calls and jobs of several owners.


def parts_until(live, done, most: int = 4000) -> int:
    """Parts that run until it is so."""
    for parts in range(most):
        if done():
            return parts
        live.live.advance()
    raise AssertionError(f"not within {most} parts")


def test_long_calls_hold_neither_jobs_nor_the_calls_of_others(world, tmp_path):
    """Three owners' calls of 300 samples over two slots: a job and a fourth owner's call go on beside the first."""
    live = LiveWorld(world, tmp_path, slots=2)
    live.live.create("ftjob-k", job(13, owner="nine", steps=400), publish=False)
    running = live.live.jobs.get("nine", "ftjob-k")
    parts_until(live, lambda: running.progress.step >= 2)
    long = [live.call(60 + i, owner=f"long-{i}", count=300)[0] for i in range(3)]
    parts_until(live, lambda: live.live._seated)
    parts_until(live, lambda: running.progress.step >= 6)
    short, _ = live.call(70, owner="short", count=1)
    parts_until(live, lambda: not short.done.empty())
    assert all(caller.done.empty() for caller in long)
    seen = running.progress.step
    parts_until(live, lambda: running.progress.step >= seen + 3)
    assert all(caller.done.empty() for caller in long)
    live.live.cancel("nine", "ftjob-k")
    live.run()
    for i, caller in enumerate(long):
        report, _, _ = caller.done.get_nowait()
        assert report.step == 1, i


def test_an_owner_has_one_call_at_a_time_and_owners_take_turns(world, tmp_path):
    live = LiveWorld(world, tmp_path, slots=2)
    order = []
    for seed, owner in ((80, "many"), (81, "many"), (82, "many"), (83, "many"), (84, "few"), (85, "other")):
        caller, _ = live.call(seed, owner=owner, count=1)
        caller.updated = lambda *_, owner=owner: order.append(owner)
    while live.live.has_work:
        seated = [call.owner for call in live.live._seated.values()]
        assert len(set(seated)) == len(seated)
        live.live.advance()
    assert Counter(order) == {"many": 4, "few": 1, "other": 1}
    assert set(order[:3]) == {"many", "few", "other"}


def test_calls_without_end_leave_a_job_its_steps(live):
    """One slot, and a new call as soon as one is done: the job has a step between any two of them."""
    live.live.create("ftjob-l", job(14, owner="ten", steps=5), publish=False)
    calls = 0
    caller, _ = live.call(50, owner="a", count=1)
    other, _ = live.call(51, owner="b", count=1)
    while "succeeded" not in live.heard.states("ftjob-l"):
        live.live.advance()
        for owner in "ab":
            if owner == "a" and not caller.done.empty():
                caller, calls = live.call(100 + calls, owner="a", count=1)[0], calls + 1
            if owner == "b" and not other.done.empty():
                other, calls = live.call(100 + calls, owner="b", count=1)[0], calls + 1
        assert calls < 40
    assert calls >= 4


def test_a_call_is_paid_for_by_its_owner(live, monkeypatch):
    live.live.create("ftjob-m", job(15, owner="eleven", steps=3), publish=False)
    paid = []
    monkeypatch.setattr(live.live.jobs._queue, "charge", lambda *what: paid.append(what))
    calls = [live.call(seed, owner=owner, count=count)[1] for seed, owner, count in ((52, "a", 2), (54, "b", 30))]
    live.run()
    assert sorted(paid) == [(call.owner, call.examples.examples.size_N.sum()) for call in calls]


def test_an_error_of_one_call_or_publication_is_its_owners_alone(live, monkeypatch):
    """Neither ends the device's thread: the caller is told, the job fails, another job goes on."""
    caller, call = live.call(53, owner="broken")
    monkeypatch.setattr(caller, "updated", lambda *_: {}["somebody's data"])
    live.run()
    error = caller.done.get_nowait()
    assert (type(error), error.code) == (JaxLoraError, "internal_error")
    assert call.name not in live.trainer.tenants
    live.live.create("ftjob-n", job(16, owner="broken", steps=6), publish=True)
    live.live.create("ftjob-o", job(17, owner="whole", steps=6), publish=True)
    publish = live.live._publisher.publish
    monkeypatch.setattr(
        live.live._publisher,
        "publish",
        lambda owner, *args, **how: {}["somebody's data"] if owner == "broken" else publish(owner, *args, **how),
    )
    live.run()
    assert [live.heard.states(f"ftjob-{x}")[-1] for x in "no"] == ["failed", "succeeded"]
