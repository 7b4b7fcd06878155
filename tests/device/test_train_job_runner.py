"""Jobs over a trainer: what a job trains is what it trains alone, whatever happens to it on the way."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jobs_world import kinds, make_jobs, request, trainer_of, weights
from train_world import LANE_TOKENS, examples, lora, make_trainer, optimizer

from jaxlora.core.errors import (
    AdapterInvalid,
    AlreadyExists,
    BaseMismatch,
    DataInvalid,
    InvalidRequest,
    NotFound,
    StateInvalid,
)
from jaxlora.core.lora import ALL_TARGETS, LAYER_TARGETS, AdapterRef
from jaxlora.model.compile_cache import CompileCounter
from jaxlora.peft.folder import export_peft
from train.data.examples import Example
from train.jobs.job import JobRequest
from train.trainer import Trainer


def alone(r: JobRequest, trainer: Trainer | None = None) -> dict[str, bytes]:
    """The weights after training it with nothing but a trainer, of this shape."""
    trainer = make_trainer() if trainer is None else trainer
    trainer.add("t", r.spec, r.optimizer, r.data, batch_size=r.batch_size, seed=r.seed)
    while trainer.has_work:
        trainer.step()
    return weights(trainer.adapter("t"))


def jsonl(path: Path, data: list[Example]) -> Path:
    path.write_text("".join(json.dumps([e.tokens.tolist(), e.weights.tolist()]) + "\n" for e in data))
    return path


def load(path: Path) -> list[Example]:
    """What `jsonl` wrote."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as e:
        raise DataInvalid(f"{path.name} is not valid: {e}") from e
    return [Example(np.array(t, np.int32), np.array(w, np.float32)) for t, w in lines]


def bad_weights(data: list[Example]) -> list[Example]:
    """The same, so heavy that gradients overflow."""
    return [Example(e.tokens, e.weights * np.float32(3e38)) for e in data]


def test_jobs_train_what_they_train_alone(tmp_path):
    jobs, shelf = make_jobs(tmp_path)
    asked = [request(seed, steps=2 + seed) for seed in range(3)]
    made = [jobs.create(r) for r in asked]
    assert [j.state for j in made] == ["queued"] * 3
    jobs.run()
    assert [j.state for j in made] == ["succeeded"] * 3
    for job, r in zip(made, asked, strict=True):
        assert job.result == AdapterRef("acme", r.name, 1)
        assert weights(shelf.adapters[job.result]) == alone(r)
        assert job.request.data == ()  # what has ended holds no examples
        events = jobs.events("acme", job.id)
        assert kinds(jobs, job.id) == ["state"] * 3 + ["step"] * r.optimizer.total_steps + ["state"]
        step = events[3].data
        assert step.keys() == {"step", "loss", "accuracy", "lr", "grad_norm", "tokens", "tokens_per_s"}
        assert job.progress.tokens == sum(e.data["tokens"] for e in events if e.kind == "step")
        assert job.finished_s >= job.created_s
    assert jobs.list("acme") == made[::-1]
    assert jobs.list(None) == made[::-1]
    assert jobs.list("other") == []
    jobs.forget("acme", made[0].id)
    assert jobs.list("acme") == [made[2], made[1]]


def test_files_are_read_when_they_are_needed(tmp_path):
    reads = Counter()

    def counted(path):
        reads[path.name] += 1
        return load(path)

    jobs, shelf = make_jobs(tmp_path, load=counted)
    asked = request(1)
    data, heldout = jsonl(tmp_path / "data", asked.data), jsonl(tmp_path / "heldout", examples(9, 2))
    job = jobs.create(replace(asked, data=data, heldout=heldout))
    assert job.state == "validating_files"
    jobs.run()
    assert weights(shelf.adapters[job.result]) == alone(asked)
    assert reads == {"data": 2, "heldout": 2}  # when checked, and when it got its slot
    assert job.request.data == data


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "data is not valid: .*No such file"),
        ("empty", "no examples to train on"),
        ("long", "example 0 has 40 tokens, but a lane of 32"),
        ("heldout empty", "no held-out examples"),
        ("heldout long", "example 0 has 40 tokens"),
    ],
)
def test_a_job_with_bad_files_fails_with_the_reason_and_holds_nothing(tmp_path, case, message):
    jobs, _ = make_jobs(tmp_path, load=load)
    long, good = [Example(np.zeros(40, np.int32), np.r_[0, np.ones(39)].astype(np.float32))], examples(0, 3)
    data = jsonl(tmp_path / "data", {"empty": [], "long": long}.get(case, good))
    heldout = jsonl(tmp_path / "heldout", {"heldout empty": [], "heldout long": long}.get(case, good))
    if case == "missing":
        data.unlink()
    job = jobs.create(request(data=data, heldout=heldout))
    jobs.run()
    assert (job.state, job.code) == ("failed", "invalid_training_file")
    assert jobs.events("acme", job.id)[-1].level == "error"
    with pytest.raises(DataInvalid, match=message):
        raise DataInvalid(job.reason)
    assert (jobs.trainer.tenants, len(jobs._queue)) == ({}, 0)
    assert jobs.create(request(data=jsonl(tmp_path / "data", good))).state == "validating_files"  # the name is free


@pytest.mark.parametrize(
    ("changed", "message"),
    [("data", "changed while it waited"), ("heldout", "example 0 has 40 tokens")],
)
def test_a_file_that_changes_in_line_fails_its_job(tmp_path, changed, message):
    jobs, _ = make_jobs(tmp_path, trainer_of(1, lanes=2, lane_tokens=32), load=load)
    first = jobs.create(request(0, steps=5))
    paths = {name: jsonl(tmp_path / name, examples(1, 3)) for name in ("data", "heldout")}
    second = jobs.create(request(1, **paths))
    while second.state == "validating_files":
        jobs.step()
    jsonl(paths[changed], examples(2, 1, 40, 40))
    jobs.run()
    assert (first.state, second.state) == ("succeeded", "failed")
    assert message in second.reason


REFUSED = {
    "rank": (AdapterInvalid, "rank 9 exceeds", {"spec": lora(9, LAYER_TARGETS)}),
    "no examples": (DataInvalid, "no examples to train on", {"data": []}),
    "long": (DataInvalid, "a lane of 32", {"data": examples(0, 1, LANE_TOKENS + 2, LANE_TOKENS + 2)}),
    "batch": (InvalidRequest, "batch_size must be", {"batch_size": 4097}),
    "no heldout": (DataInvalid, "no held-out examples", {"heldout": []}),
    "name": (AlreadyExists, "trains bot0 and is running; cancel it", {"name": "bot0"}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_job_leaves_no_trace(tmp_path, case):
    error, message, changes = REFUSED[case]
    jobs, shelf = make_jobs(tmp_path)
    asked = request(0)
    job = jobs.create(asked)
    jobs.step()
    with pytest.raises(error, match=message):
        jobs.create(request(1, **changes))
    assert jobs.list(None) == [job]
    with pytest.raises(AlreadyExists, match=f"job {job.id} exists"):
        jobs.create(request(1), id=job.id)
    jobs.run()
    assert weights(shelf.adapters[job.result]) == alone(asked)


def test_a_pool_without_the_target_refuses(tmp_path):
    jobs, _ = make_jobs(tmp_path, trainer_of(1, lanes=2, lane_tokens=32))
    with pytest.raises(AdapterInvalid, match="lm_head is not supported"):
        jobs.create(request(spec=lora(2, ALL_TARGETS)))


def test_another_owners_job_is_not_found(tmp_path):
    jobs, _ = make_jobs(tmp_path)
    job = jobs.create(request())
    for call in (jobs.get, jobs.pause, jobs.resume, jobs.cancel, jobs.events, jobs.forget):
        for owner, job_id in (("other", job.id), ("acme", "ftjob-none")):
            with pytest.raises(NotFound, match=f"no job '{job_id}'"):
                call(owner, job_id)
    assert job.state == "queued"


@pytest.mark.parametrize("after_steps", [0, 1, 3])
def test_pause_and_resume_change_nothing(tmp_path, after_steps):
    """The neighbour's slot and the order of examples included."""
    jobs, shelf = make_jobs(tmp_path, host_bytes=0)  # what is parked goes to files
    asked = request(3, steps=5)
    other = jobs.create(request(4, steps=9))
    job = jobs.create(asked)
    for _ in range(after_steps):
        jobs.step()
    assert jobs.pause("acme", job.id).state == "paused"
    assert jobs.pause("acme", job.id).code == "paused_by_owner"  # again: nothing happens
    assert [e.message for e in jobs.events("acme", job.id)].count("paused: its owner asked for it") == 1
    jobs.step()
    assert job.progress.step == after_steps
    if after_steps:
        assert len(list((tmp_path / "parked").iterdir())) == 1
        assert jobs.adapter("acme", job.id).spec == asked.spec
    assert jobs.resume("acme", job.id).state == "queued"
    jobs.run()
    assert list((tmp_path / "parked").iterdir()) == []
    assert weights(shelf.adapters[job.result]) == alone(asked)
    assert weights(shelf.adapters[other.result]) == alone(request(4, steps=9))


def test_illegal_moves_are_refused_and_repeated_ones_do_nothing(tmp_path):
    jobs, _ = make_jobs(tmp_path)
    job = jobs.create(request())
    assert jobs.resume("acme", job.id).state == "queued"
    with pytest.raises(StateInvalid, match="cancel it first"):
        jobs.forget("acme", job.id)
    with pytest.raises(StateInvalid, match="has no weights"):
        jobs.adapter("acme", job.id)
    jobs.run()
    for call in (jobs.pause, jobs.resume, jobs.cancel):
        with pytest.raises(StateInvalid, match=f"job {job.id} is succeeded and cannot become .*; that is final"):
            call("acme", job.id)
    with pytest.raises(StateInvalid, match="has no weights; its result is "):
        jobs.adapter("acme", job.id)


@pytest.mark.parametrize("state", ["validating_files", "queued", "opening", "running", "paused"])
def test_a_cancelled_job_lets_go_of_everything(tmp_path, state):
    jobs, shelf = make_jobs(tmp_path, trainer_of(1, lanes=2, lane_tokens=32), load=load)
    in_file = state in ("validating_files", "opening")
    data = jsonl(tmp_path / "data", examples(0, 3)) if in_file else examples(0, 3)
    first = jobs.create(request(5, steps=1)) if state == "queued" else None
    job = jobs.create(request(0, data=data, steps=50))
    if state == "opening":
        while job.id not in {x.job.id for x in jobs._readers.opening()}:
            jobs.step()
    elif state in ("queued", "running", "paused"):
        jobs.step()
    if state == "paused":
        jobs.pause("acme", job.id)
    assert job.state == ("queued" if state == "opening" else state)
    assert jobs.cancel("acme", job.id).state == "cancelled"
    assert jobs.cancel("acme", job.id).state == "cancelled"
    jobs.run()
    assert (job.state, job.result) == ("cancelled", None)
    assert (len(jobs._queue), len(jobs._parking), jobs._queue._turns, jobs._live, jobs._labels) == (0, 0, {}, {}, {})
    assert [ref.name for ref in shelf.adapters] == ([] if first is None else ["bot5"])
    assert jobs.create(request(0, steps=1)).state == "queued"
    jobs.run()
    assert len(shelf.adapters) == (1 if first is None else 2)


@pytest.mark.fault("A2")
def test_updates_that_are_not_finite_pause_the_job_which_can_go_on(tmp_path):
    jobs, shelf = make_jobs(tmp_path)
    good = request(1, steps=12)
    bad = request(2, steps=12, data=bad_weights(examples(2, 5)), optimizer=optimizer(lr=3e38, total_steps=12))
    jobs_made = [jobs.create(good), jobs.create(bad)]
    jobs.run()
    neighbour, job = jobs_made
    assert weights(shelf.adapters[neighbour.result]) == alone(good)
    assert (job.state, job.code) == ("paused", "not_finite")
    assert "5 updates in a row were not finite" in job.reason
    assert job.progress.skipped == job.progress.bad_steps == 5
    assert Counter(kinds(jobs, job.id)) == {"state": 4, "step": 5, "skipped": 5}
    assert all(math.isfinite(v) for e in jobs.events("acme", job.id) for v in e.data.values())
    before = weights(jobs.adapter("acme", job.id))
    jobs.resume("acme", job.id)
    jobs.run()
    assert (job.state, job.progress.skipped) == ("paused", 10)  # the same again, from the weights it had
    assert weights(jobs.adapter("acme", job.id)) == before
    assert jobs.cancel("acme", job.id).state == "cancelled"


def test_time_slices_share_one_slot_and_change_no_weight(tmp_path):
    """Two owners over one slot of two steps a turn; the one with two jobs gets no more."""
    jobs, shelf = make_jobs(tmp_path, trainer_of(1, lanes=2, lane_tokens=32), quantum_steps=2, host_bytes=0)
    asked = {
        "a1": request(1, owner="a", steps=6),
        "a2": request(2, owner="a", steps=6),
        "b1": request(3, owner="b", steps=6),
    }
    made = {name: jobs.create(r) for name, r in asked.items()}
    order = []
    while jobs.has_work:
        order += [jobs._jobs[report.tenant].request.owner for report in jobs.step()]
    assert order.count("b") == 6
    assert "".join(order).startswith("aabb")
    assert abs(order[:12].count("a") - 6) <= 2
    moved = [e.message for e in jobs.events("a", made["a1"].id)]
    assert moved.count("queued: its time slice is over; others wait") >= 1
    for name, job in made.items():
        assert weights(shelf.adapters[job.result]) == alone(asked[name], trainer_of(1, lanes=2, lane_tokens=32))


def test_an_owners_share_of_a_step_grows_neither_with_its_jobs_nor_with_their_weights(tmp_path):
    jobs, _ = make_jobs(tmp_path, owner_weight=lambda owner: {"b": 2.0}.get(owner, 1.0))
    asked = [request(i, owner="a", weight=w, steps=9) for i, w in enumerate([100.0, 50.0, 50.0])]
    asked.append(request(3, owner="b", steps=9))
    made = [jobs.create(r) for r in asked]
    jobs.step()
    in_mixer = jobs.trainer._mixer._tenants
    assert [in_mixer[job.id].share.weight for job in made] == [0.5, 0.25, 0.25, 2.0]
    jobs.pause("a", made[0].id)
    jobs.step()
    assert [in_mixer[job.id].share.weight for job in made[1:]] == [0.5, 0.5, 2.0]
    jobs.trainer.add("guest", lora(2, LAYER_TARGETS), optimizer(), examples(9, 3), batch_size=1, seed=1)
    jobs.add_guest("guest", "b")
    jobs.step()
    assert [in_mixer[name].share.weight for name in (made[3].id, "guest")] == [1.0, 1.0]


def test_no_job_moves_for_its_time_slice_when_nobody_waits(tmp_path):
    jobs, _ = make_jobs(tmp_path, trainer_of(1, lanes=2, lane_tokens=32), quantum_steps=1)
    made = [jobs.create(request(i, steps=4)) for i in range(2)]  # one owner: first come, first served
    jobs.run()
    assert [[e.message for e in jobs.events("acme", j.id)].count("running: started") for j in made] == [1, 1]
    assert not any("time slice" in e.message for j in made for e in jobs.events("acme", j.id))


def test_continues_from_an_adapter_or_a_peft_folder(tmp_path):
    jobs, shelf = make_jobs(tmp_path)
    first = jobs.create(request(1))
    jobs.run()
    adapter = shelf.adapters[first.result]
    export_peft(adapter, tmp_path / "peft", jobs.trainer.base.config, base_name="small")
    made = [
        jobs.create(request(2, name="from-adapter", start=adapter)),
        jobs.create(request(2, name="from-peft", start=tmp_path / "peft")),
    ]
    jobs.run()
    got = [weights(shelf.adapters[job.result]) for job in made]
    trainer, r = make_trainer(), request(2)
    resume = (trainer.seat_of(adapter), 0, 0)
    trainer.add("t", r.spec, r.optimizer, r.data, batch_size=r.batch_size, seed=r.seed, resume=resume)
    while trainer.has_work:
        trainer.step()
    assert got == [weights(trainer.adapter("t"))] * 2
    with pytest.raises(AdapterInvalid, match="ask for the same"):
        jobs.create(request(3, start=adapter, spec=lora(2, LAYER_TARGETS)))
    with pytest.raises(BaseMismatch, match="another base"):
        jobs.create(request(3, start=replace(adapter, base_hash="other")))
    lost = jobs.create(request(3, start=tmp_path / "nothing"))
    jobs.run()
    assert (lost.state, lost.code) == ("failed", "adapter_invalid")


def test_a_full_shelf_pauses_the_job_and_resume_delivers(tmp_path):
    jobs, shelf = make_jobs(tmp_path)
    add, shelf.add = shelf.add, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    asked = request(1)
    job = jobs.create(asked)
    jobs.run()
    assert (job.state, job.code) == ("paused", "storage_failed")
    assert "No space left on device" in job.reason
    shelf.add = add
    jobs.resume("acme", job.id)
    jobs.run()
    assert job.state == "succeeded"
    assert weights(shelf.adapters[job.result]) == alone(asked)


def test_nothing_compiles_whatever_jobs_do(tmp_path):
    trainer = make_trainer()
    trainer.warm_up()
    jobs, _ = make_jobs(tmp_path, trainer, quantum_steps=2, host_bytes=0, states=tmp_path / "states")
    with CompileCounter() as counter:
        made = [
            jobs.create(request(i, owner=f"o{i % 3}", steps=3 + i % 4, heldout=examples(i, 2), evaluate_every=1))
            for i in range(15)
        ]
        jobs.step()
        jobs.pause("o1", made[1].id)
        jobs.cancel("o2", made[2].id)
        jobs.step()
        jobs.resume("o1", made[1].id)
        jobs.run()
    assert {j.state for j in made} == {"succeeded", "cancelled"}
    assert not counter.retraced, counter
