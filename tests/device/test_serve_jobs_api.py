"""Fine-tuning over HTTP with the official SDK: from a file to a model that is asked while it trains, and after."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace

import httpx2
import openai
import pytest
from jobs_api_world import BASE, ENDED, LORA, Server, ask, client_of, create, file_of, lines, wait_for
from pydantic import TypeAdapter
from safetensors.numpy import load_file
from serve_world import MODEL
from small_world import tiny_path

from jaxlora.config.serving import LimitsSection, TenantWeight
from jaxlora.core.adapter_size import adapter_size
from jaxlora.core.errors import InvalidRequest, QuotaExceeded, StateInvalid
from jaxlora.core.lora import LoraSpec
from serve.access.caller import Caller
from serve.api.adapters.service import AdapterService
from serve.api.jobs.schemas import CheckpointList, EventList, JobList, JobObject
from serve.jobs.results import draw_apart
from train.jobs.status import JobStatus

pytest_plugins = ["serve_fixtures"]


@pytest.fixture(scope="module")
def server(world, tmp_path_factory):
    it = Server(world, tmp_path_factory.mktemp("server"))
    with it.running() as url:
        yield it, url


@pytest.fixture(scope="module")
def adapters(server, tmp_path_factory):
    """What may be done with the server's adapters, without HTTP."""
    it = server[0]
    return AdapterService(
        it.runner,
        config=it.host.live.jobs.trainer.base.config,
        read_head=lambda: None,
        staging=tmp_path_factory.mktemp("staging") / "adapters",
        roots=(),
        quota=server[0].quota,
        deleted=lambda tenant, name: None,
    )


@pytest.fixture
def acme(server, request):
    """A tenant of the test's own."""
    name = request.node.originalname.removeprefix("test_").replace("_", "-")[:40].strip("-")
    with client_of(server[1], name) as client:
        yield client


def test_a_job_becomes_a_model(server, acme):
    job = create(server, acme, suffix="bot", metadata={"team": "a"})
    assert (job.status, job.object, job.fine_tuned_model) == ("validating_files", "fine_tuning.job", None)
    assert job.size is None
    assert job.organization_id == acme.api_key
    done = wait_for(acme, job.id, "succeeded")
    assert done.fine_tuned_model == f"ft:owner--tiny:{acme.api_key}:bot:{job.id[6:18]}"
    assert done.hyperparameters.n_epochs == 2
    assert done.hyperparameters.batch_size == 2
    steps = [e.data["tokens"] for e in acme.fine_tuning.jobs.list_events(job.id, limit=50) if e.type == "metrics"]
    assert done.trained_tokens == sum(steps) > max(steps)
    assert done.finished_at >= done.created_at
    answer = ask(acme, done.fine_tuned_model)
    assert answer.model == done.fine_tuned_model
    checkpoints = acme.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [c.step_number for c in checkpoints] == [6, 3]
    assert checkpoints[1].metrics.train_loss > checkpoints[0].metrics.train_loss
    assert ask(acme, checkpoints[1].fine_tuned_model_checkpoint).adapter_version == checkpoints[1].adapter_version
    assert ask(acme, done.fine_tuned_model + ":latest").adapter_version == answer.adapter_version
    assert (done.adapter, {c.adapter for c in checkpoints}) == ("bot", {"bot"})
    assert ask(acme, "bot").adapter_version == answer.adapter_version
    assert ask(acme, f"bot@{checkpoints[1].adapter_version}").adapter_version == checkpoints[1].adapter_version
    assert [m.id for m in acme.models.list()] == [BASE, "bot"]
    assert acme.models.retrieve(done.fine_tuned_model).root == "bot"


def test_a_job_says_how_large_its_adapter_is(server, acme):
    """By the tensors of the base's file: rank 2 on two projections of each layer."""
    done = wait_for(acme, create(server, acme, suffix="small").id, "succeeded")
    base = load_file(tiny_path(MODEL) / "model.safetensors")
    trainable = sum(2 * sum(v.shape) for k, v in base.items() if k.endswith(("q_proj.weight", "down_proj.weight")))
    whole = sum(v.size for v in base.values()) + trainable
    engine = server[0].runner.engine
    row = sum(x.nbytes // (x.shape[1] * x.shape[2]) for r in engine._pool.values() for x in (r.a_LNRX, r.b_LNRY))
    tables = sum(r.scale_LS.nbytes + r.rank_S.nbytes for r in engine._pool.values())
    assert done.size == {
        "trainable_parameters": trainable,
        "all_parameters": whole,
        "trainable_percent": pytest.approx(100 * trainable / whole),
        "bytes": 4 * trainable,
        "slot_bytes": row * engine.pool_spec.rank + tables // engine.pool_spec.slots,
    }
    (told,) = [
        e for e in acme.fine_tuning.jobs.list_events(done.id, limit=50) if e.message.startswith("Fine-tuned model")
    ]
    assert told.message.endswith(
        f"; trainable params: {trainable:,} || all params: {whole:,} || trainable%: {100 * trainable / whole:.4f} || "
        f"bytes: {4 * trainable:,}"
    )
    assert told.data["size"] == {k: v for k, v in done.size.items() if k != "slot_bytes"}


def test_a_job_without_a_name_is_called_as_its_file_is(server, acme):
    file = server[0].files.keep(acme.api_key, "Our notes, v2.jsonl", "fine-tune", lines().encode()).id
    jobs = [create(server, acme, training_file=file) for _ in range(2)]
    assert [j.adapter for j in jobs] == [f"our-notes-v2-{j.id[6:12]}" for j in jobs]
    for job in jobs:
        wait_for(acme, job.id, "succeeded")
        assert ask(acme, job.adapter).choices


def test_a_name_that_is_taken_is_refused_before_anything_is_made(server, acme, adapters):
    running = create(server, acme, suffix="harbor", extra={"max_steps": 5000})
    for taken, error, says in (
        ("harbor", openai.ConflictError, f"job {running.id} makes harbor; choose another name, or cancel that job"),
        ("pin", openai.BadRequestError, "pin is a word of the API"),
    ):
        with pytest.raises(error, match=says) as caught:
            create(server, acme, suffix=taken)
        assert caught.value.param == "suffix"
    with pytest.raises(StateInvalid, match="a job trains harbor"):
        adapters.place(Caller(owner=acme.api_key, admin=False, key_id="k"), "harbor")
    wait_for(acme, running.id, "running")
    while acme.fine_tuning.jobs.retrieve(running.id).progress["step"] < 3:
        time.sleep(0.01)
    acme.fine_tuning.jobs.cancel(running.id)
    with pytest.raises(
        openai.ConflictError, match="you have an adapter harbor; choose another name, or delete it first"
    ):
        create(server, acme, suffix="harbor")
    assert [j.id for j in acme.fine_tuning.jobs.list()] == [running.id]
    with client_of(server[1], "another-harbor") as other:
        wait_for(other, create(server, other, suffix="harbor").id, "succeeded")
    adapters.delete(acme.api_key, "harbor")
    again = wait_for(acme, create(server, acme, suffix="harbor").id, "succeeded")
    assert ask(acme, "harbor").adapter_version == ask(acme, again.fine_tuned_model).adapter_version
    for old in (running.id, running.id + ":latest"):
        with pytest.raises(openai.NotFoundError):  # its adapter is deleted; this one is another's
            ask(acme, again.fine_tuned_model.replace(again.id[6:18], old[6:18]) + old[len(running.id) :])


def test_a_job_that_was_not_stored_leaves_its_name_free(server, acme, monkeypatch):
    def fails(*args, **how):
        raise QuotaExceeded("no more")

    with monkeypatch.context() as patch:
        patch.setattr(type(server[0].host.service.stored), "insert", fails)
        with pytest.raises(openai.RateLimitError):
            create(server, acme, suffix="second")
    wait_for(acme, create(server, acme, suffix="second").id, "succeeded")


def test_the_base_has_its_name_alone(server):
    base = server[0].runner.catalog
    with pytest.raises(InvalidRequest, match="is the base model"):
        base.check_free("owner", "tiny", param="suffix")


def test_a_model_that_has_no_version_yet_says_so(server, acme, monkeypatch):
    it, hold = server[0], threading.Event()
    load = it.files.load
    monkeypatch.setattr(it.files, "load", lambda path, too_long: hold.wait(30) and load(path, too_long))
    job = create(server, acme, suffix="later")
    with pytest.raises(openai.NotFoundError, match="`later` has no version yet"):
        ask(acme, "later")
    with client_of(server[1], "stranger") as other, pytest.raises(openai.NotFoundError, match="does not exist"):
        ask(other, "later")
    hold.set()
    wait_for(acme, job.id, "succeeded")


def test_a_rank_of_nobodys_choice_fits_the_server(server, acme):
    """Of which the usual is four times too large."""
    job = create(server, acme, extra={"lora": {"target_modules": ["q_proj"]}})
    assert wait_for(acme, job.id, "succeeded").lora["rank"] == 4


def test_a_damaged_job_is_marked_and_the_others_are_listed(server, acme):
    jobs = [create(server, acme, metadata={"n": str(i)}).id for i in range(3)]
    for job in jobs:
        wait_for(acme, job, "succeeded")

    def damage(session):
        session.connection().exec_driver_sql(f"UPDATE jobs SET request = '{{' WHERE id = '{jobs[1]}'")

    server[0].database.write(damage)
    listed = list(acme.fine_tuning.jobs.list(limit=1))  # a page ends with it, and the next begins behind it
    assert [j.id for j in listed] == jobs[::-1]
    assert [j.status for j in listed] == ["succeeded", "failed", "succeeded"]
    assert [j.id for j in acme.fine_tuning.jobs.list(metadata={"n": "0"})] == [jobs[0]]
    marked = acme.fine_tuning.jobs.retrieve(jobs[1])
    assert (marked.error.code, marked.adapter) == ("storage_failed", listed[1].adapter)
    assert "record of this job is damaged" in marked.error.message
    answer = httpx2.get(f"{server[1]}/v1/fine_tuning/jobs/{jobs[1]}", headers=acme.auth_headers)
    TypeAdapter(JobObject).validate_json(answer.text, strict=True)
    with client_of(server[1], "stranger") as other, pytest.raises(openai.NotFoundError):
        other.fine_tuning.jobs.retrieve(jobs[1])


def test_what_becomes_of_examples_that_are_too_long_is_the_jobs_choice_and_is_told(server, acme):
    long = json.dumps({"prompt": "say 1 " * 40, "completion": "one"})
    id = server[0].files.keep(acme.api_key, "t.jsonl", "fine-tune", f"{lines()}\n{long}\n".encode()).id
    while (file := server[0].files.find(id, acme.api_key)[0]).status == "uploaded":
        time.sleep(0.02)
    assert (file.status, "1 of 7 is longer than" in file.status_details) == ("processed", True)
    refused = wait_for(acme, create(server, acme, training_file=id).id, "failed")
    assert refused.error.code == "invalid_training_file"
    assert "is longer than lane_tokens = 32 holds (line 7)" in refused.error.message
    assert 'set too_long = "skip" or "truncate"' in refused.error.message
    told = {}
    for choice in ("skip", "truncate"):
        extra = {"too_long": choice, "max_steps": 1, "publish": False}
        job = create(server, acme, training_file=id, validation_file=id, extra=extra)
        wait_for(acme, job.id, "succeeded")
        told[choice] = [e.message for e in acme.fine_tuning.jobs.list_events(job.id, limit=50) if e.level == "warn"]
    assert [len(events) for events in told.values()] == [1, 1]
    assert "1 of 7 is longer than lane_tokens = 32 holds and was left out (line 7)" in told["skip"][0]
    assert "and was cut (line 7); of 1 nothing to train remained" in told["truncate"][0]


@pytest.mark.parametrize("field", ["training_file", "validation_file", "evaluation.file"])
@pytest.mark.parametrize("id", ["", "file-of-nobody"])
def test_a_file_that_is_not_there_makes_no_job(server, acme, field, id):
    given = {"evaluation": {"file": id, "metrics": ["exact_match"]}} if field == "evaluation.file" else {field: id}
    known = {} if field == "training_file" else {"training_file": file_of(server, acme)}
    body = {"model": BASE, **known, **given}
    answer = httpx2.post(f"{server[1]}/v1/fine_tuning/jobs", json=body, headers=acme.auth_headers)
    error = {
        "message": f"there is no file {id!r}",
        "type": "invalid_request_error",
        "param": field,
        "code": "not_found",
    }
    assert (answer.status_code, answer.json()["error"]) == (404, error)
    assert list(acme.fine_tuning.jobs.list()) == []


@pytest.mark.parametrize("method", ["supervised", "dpo"])
def test_answers_are_what_the_document_says(server, acme, method):
    """Of a job that has just come, of one that has ended, of their events and checkpoints; types are checked strictly."""
    file = file_of(server, acme)  # not of pairs: the job of dpo fails, and is one all the same
    how = {"type": method, method: {"hyperparameters": {"n_epochs": 2}}}
    metadata = {"a": "b"} if method == "dpo" else None
    job = create(server, acme, training_file=file, method=how, metadata=metadata).id

    def told(path=""):
        answer = httpx2.get(f"{server[1]}/v1/fine_tuning/jobs{path}", headers=acme.auth_headers)
        assert answer.status_code == 200, answer.text
        return answer.text

    ended = False
    while not ended:
        shown = TypeAdapter(JobObject).validate_json(told(f"/{job}"), strict=True)
        TypeAdapter(JobList).validate_json(told(), strict=True)
        events = TypeAdapter(EventList).validate_json(told(f"/{job}/events"), strict=True)
        checkpoints = TypeAdapter(CheckpointList).validate_json(told(f"/{job}/checkpoints"), strict=True)
        ended = shown["status"] in ENDED
        time.sleep(0 if ended else 0.05)
    assert events["data"]
    assert bool(checkpoints["data"]) is (method == "supervised")
    assert (shown["error"] is None) is (method == "supervised")


@pytest.mark.fault("C5")
def test_a_repeated_request_makes_one_job(server, acme):
    file = file_of(server, acme)
    jobs = [
        create(server, acme, training_file=file, extra_headers={"Idempotency-Key": key}, extra={"max_steps": 5000}).id
        for key in ("once", "once", "twice")
    ]
    assert (jobs[0] == jobs[1], jobs[0] == jobs[2]) == (True, False)
    assert {j.id for j in acme.fine_tuning.jobs.list()} == set(jobs)
    for id in set(jobs):
        acme.fine_tuning.jobs.cancel(id)


def test_events_are_paged_newest_first_and_can_be_followed(server, acme):
    job = create(server, acme)
    with httpx2.stream(
        "GET",
        f"{server[1]}/v1/fine_tuning/jobs/{job.id}/events?stream=true",
        headers={"authorization": f"Bearer {acme.api_key}"},
        timeout=60,
    ) as answer:
        data = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    followed = [json.loads(d) for d in data[:-1]]
    wait_for(acme, job.id, "succeeded")
    listed = list(acme.fine_tuning.jobs.list_events(job.id, limit=3))
    assert [e.id for e in listed] == [e["id"] for e in reversed(followed)]
    steps = [e for e in followed if e["type"] == "metrics"]
    assert [e["data"]["step"] for e in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[0]["data"].keys() >= {"train_loss", "learning_rate", "grad_norm", "tokens", "total_steps"}
    assert followed[0]["message"].startswith("Created fine-tuning job")
    told = [e["message"].partition(":")[0] for e in followed]
    assert told[-3:] == ["step 6 of 6", "Fine-tuned model created", "succeeded"]
    assert told.index("step 3 of 6") < told.index("Checkpoint created at step 3") < told.index("step 4 of 6")
    assert [e["created_at"] for e in followed] == sorted(e["created_at"] for e in followed)


def test_a_model_answers_while_its_job_runs(server, acme):
    job = create(server, acme, extra={"max_steps": 400, "checkpoint_every": 5})
    while not (checkpoints := acme.fine_tuning.jobs.checkpoints.list(job.id).data):
        time.sleep(0.02)
    now = acme.fine_tuning.jobs.retrieve(job.id)
    assert now.status == "running"
    assert ask(acme, checkpoints[-1].fine_tuned_model_checkpoint).choices[0].finish_reason == "length"
    assert ask(acme, now.fine_tuned_model).adapter_version >= checkpoints[-1].adapter_version
    first = ask(acme, now.fine_tuned_model + ":latest").adapter_version
    end = time.monotonic() + 20
    while ask(acme, now.fine_tuned_model + ":latest").adapter_version == first:
        assert time.monotonic() < end
    assert acme.fine_tuning.jobs.cancel(job.id).status == "cancelled"


def test_an_adapter_that_a_job_makes_is_not_deleted_under_it(server, acme, adapters):
    job = create(server, acme, extra={"max_steps": 400})
    while (now := acme.fine_tuning.jobs.retrieve(job.id)).fine_tuned_model is None:
        time.sleep(0.02)
    with pytest.raises(StateInvalid, match="cancel the job first"):
        adapters.delete(acme.api_key, now.fine_tuned_model)
    acme.fine_tuning.jobs.cancel(job.id)
    adapters.delete(acme.api_key, now.fine_tuned_model)
    with pytest.raises(openai.NotFoundError):
        ask(acme, now.fine_tuned_model)


def test_pause_resume_and_cancel_take_effect_and_may_be_repeated(server, acme):
    job = create(server, acme, extra={"max_steps": 400})
    wait_for(acme, job.id, "running")
    assert acme.fine_tuning.jobs.pause(job.id).status == "paused"
    assert acme.fine_tuning.jobs.pause(job.id).status == "paused"
    step = acme.fine_tuning.jobs.retrieve(job.id).progress["step"]
    time.sleep(0.2)
    assert acme.fine_tuning.jobs.retrieve(job.id).progress["step"] == step
    assert acme.fine_tuning.jobs.resume(job.id).status in ("queued", "running")
    wait_for(acme, job.id, "running")
    cancelled = acme.fine_tuning.jobs.cancel(job.id)
    assert (cancelled.status, cancelled.error) == ("cancelled", None)
    assert acme.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    assert ask(acme, cancelled.fine_tuned_model).adapter_version is not None
    with pytest.raises(openai.ConflictError) as caught:
        acme.fine_tuning.jobs.resume(job.id)
    assert caught.value.response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("status", [JobStatus.VALIDATING_FILES, JobStatus.QUEUED])
def test_a_job_whose_files_are_being_read_can_be_cancelled_but_not_paused(server, acme, monkeypatch, status):
    """Queued it is after a restart: the database says where it stood, the device thread does not know it yet."""
    it, hold = server[0], threading.Event()
    load = it.files.load
    monkeypatch.setattr(it.files, "load", lambda path, too_long: hold.wait(30) and load(path, too_long))
    job = create(server, acme)
    it.host.service.recorder.change(job.id, lambda now: replace(now, status=status))
    with pytest.raises(openai.ConflictError):
        acme.fine_tuning.jobs.pause(job.id)
    assert acme.fine_tuning.jobs.resume(job.id).status == status
    assert acme.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    hold.set()
    wait_for(acme, create(server, acme).id, "succeeded")  # read after it
    assert acme.fine_tuning.jobs.retrieve(job.id).status == "cancelled"
    assert job.id not in [j.id for j in it.runner.call(lambda: it.host.live.jobs.list(None))]


def test_a_bad_file_makes_the_job_fail_and_says_why(server, acme, monkeypatch):
    monkeypatch.setattr(server[0].files, "_check", lambda record: None)  # it is asked for before the file is checked
    job = create(server, acme, training_file=file_of(server, acme, wrong=True))
    failed = wait_for(acme, job.id, "failed")
    assert failed.error.code == "invalid_training_file"
    assert "line 7" in failed.error.message
    assert "/" not in failed.error.message, "a path of the server"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"extra": {"learning_rate": 1e-3}}, "learning_rate"),
        ({"extra": {"early_stopping": {"patience": 2}}}, "early_stopping"),
        ({"extra": {"lora": {"target_modules": ["nothing"]}}}, "lora.target_modules"),
        ({"extra": {"unheard_of": 1}}, "unheard_of"),
        ({"hyperparameters": {"n_epochs": 3}}, "hyperparameters"),
        ({"method": {"type": "reinforcement"}}, "method.type"),
        ({"suffix": "a:b"}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations"),
    ],
)
def test_what_a_job_cannot_do_is_refused_by_name(server, acme, changes, param):
    with pytest.raises(openai.BadRequestError) as caught:
        create(server, acme, **changes)
    assert caught.value.param == param


def test_a_rank_that_no_slot_holds_is_refused(server, acme):
    with pytest.raises(openai.BadRequestError) as caught:
        create(server, acme, extra={"lora": {"r": 64}})
    assert caught.value.code == "adapter_invalid"


def test_too_many_jobs_are_over_the_quota(server, acme):
    jobs = [create(server, acme, extra={"max_steps": 5000}) for _ in range(4)]
    with pytest.raises(openai.RateLimitError) as caught:
        create(server, acme)
    assert caught.value.code == "insufficient_quota"
    assert caught.value.response.headers["x-should-retry"] == "false"
    for job in jobs:
        acme.fine_tuning.jobs.cancel(job.id)
    wait_for(acme, create(server, acme).id, "succeeded")


def test_a_job_whose_versions_have_no_room_goes_on_and_the_next_job_is_refused(server, acme, monkeypatch):
    it = server[0]
    spec = LoraSpec(rank=LORA["r"], alpha=1.0, targets=tuple(LORA["target_modules"]))
    each = adapter_size(it.host.live.jobs.trainer.base.config, spec).nbytes
    monkeypatch.setattr(it.quota, "limits", LimitsSection(adapter_bytes=3 * each))
    job = create(server, acme, extra={"checkpoint_every": 1, "max_steps": 30})
    done = wait_for(acme, job.id, "succeeded")
    checkpoints = acme.fine_tuning.jobs.checkpoints.list(job.id, limit=100).data
    assert checkpoints[0].step_number == 30
    assert 3 <= len(checkpoints) < 30
    told = [e for e in acme.fine_tuning.jobs.list_events(job.id, limit=100) if "no checkpoint" in e.message]
    assert len(checkpoints) + len(told) == 30
    assert {e.level for e in told} == {"warn"}
    store = it.runner.engine.store
    refs = [v for ref in store.list(acme.api_key) for v in store.versions(acme.api_key, ref.name)]
    assert {c.step_number for c in checkpoints} <= {r.version for r in refs}
    assert len(refs) <= len(checkpoints) + 3  # those for `latest`
    assert {store.nbytes(r) for r in refs} == {each}
    with pytest.raises(openai.RateLimitError) as caught:
        create(server, acme)
    assert (caught.value.code, caught.value.response.headers["x-should-retry"]) == ("insufficient_quota", "false")
    assert acme.completions.create(model=done.fine_tuned_model, prompt="say", max_tokens=2).choices


def test_a_job_goes_on_from_an_adapter(server, acme):
    first = wait_for(acme, create(server, acme).id, "succeeded")
    again = create(server, acme, model=first.fine_tuned_model, extra={"lora": None})
    done = wait_for(acme, again.id, "succeeded")
    assert done.lora["rank"] == LORA["r"]
    with pytest.raises(openai.BadRequestError) as caught:
        create(server, acme, model=first.fine_tuned_model)
    assert caught.value.param == "lora"


def test_held_out_losses_and_scores_are_a_curve(server, acme):
    heldout = file_of(server, acme, count=3)
    table = "prompt,completion\n" + "".join(f"say {i}, word{i}\n" for i in range(3))
    asked = server[0].files.keep(acme.api_key, "asked.csv", "fine-tune", table.encode()).id
    scoring = {"file": asked, "metrics": ["exact_match", "choice_accuracy"], "max_tokens": 4, "samples": 2}
    job = create(server, acme, validation_file=heldout, extra={"eval_every": 3, "evaluation": scoring})
    done = wait_for(acme, job.id, "succeeded")
    assert done.progress["valid_loss"] > 0
    assert [c.metrics.valid_loss is None for c in acme.fine_tuning.jobs.checkpoints.list(job.id).data] == [False, False]

    def scores():
        found = [e for e in acme.fine_tuning.jobs.list_events(job.id, limit=50) if "exact_match" in (e.data or {})]
        return {e.data["step"]: e.data for e in found}

    end = time.monotonic() + 30
    while 6 not in (curve := scores()):
        assert time.monotonic() < end, curve
        time.sleep(0.1)
    assert curve[6]["samples"] == 2
    assert 0 <= curve[6]["choice_accuracy"] <= 1


def test_results_are_a_file(server, acme):
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server[0].host.service, "draw", lambda curves: drawn.append(curves) or draw_apart(curves))
        job = create(server, acme, validation_file=file_of(server, acme, count=3), extra={"eval_every": 3})
        wait_for(acme, job.id, "succeeded")
        end = time.monotonic() + 60
        while len(files := acme.fine_tuning.jobs.retrieve(job.id).result_files) < 3:
            assert time.monotonic() < end
            time.sleep(0.05)
    found = [server[0].files.find(file, acme.api_key) for file in files]
    assert [record.filename.partition("-")[0] for record, _ in found] == ["step_metrics", "loss", "loss"]
    assert {record.purpose for record, _ in found} == {"fine-tune-results"}
    table, png, svg = (path for _, path in found)
    rows = table.read_text().splitlines()
    assert rows[0].startswith("step,train_loss")
    assert len(rows) == 7
    ((name, curves),) = drawn[0].items()
    assert (name, list(curves.train[0]), list(curves.heldout[0])) == (job.adapter, [1, 2, 3, 4, 5, 6], [3, 6])
    assert [float(row.split(",")[3]) for row in (rows[3], rows[6])] == list(curves.heldout[1])
    assert png.read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in svg.read_bytes()
    record = server[0].host.service.stored.get(job.id, None)
    assert record.created_s <= record.started_s <= record.finished_s


def test_lists_are_the_callers_and_can_be_filtered(server, acme):
    jobs = [create(server, acme, metadata={"n": str(i % 2)}) for i in range(3)]
    listed = list(acme.fine_tuning.jobs.list(limit=2))
    assert [j.id for j in listed] == [j.id for j in reversed(jobs)]
    assert [j.id for j in acme.fine_tuning.jobs.list(metadata={"n": "1"})] == [jobs[1].id]
    with client_of(server[1], "stranger") as other:
        assert list(other.fine_tuning.jobs.list()) == []
        bodies = set()
        for id in (jobs[0].id, "ftjob-" + "0" * 32):
            for call in (other.fine_tuning.jobs.retrieve, other.fine_tuning.jobs.cancel, other.fine_tuning.jobs.pause):
                with pytest.raises(openai.NotFoundError) as caught:
                    call(id)
                bodies.add(caught.value.response.text.replace(id, "ID"))
        assert len(bodies) == 1
    for job in jobs:
        wait_for(acme, job.id, "succeeded")


def test_a_weight_of_a_tenant_means_the_same_for_training_as_for_serving(server):
    """The server's, as it is now: what the file says when it is read again counts from the next step on."""
    it = server[0]
    before, heavy = it.runner.tuning, TenantWeight(name="heavy", weight=3.0)
    try:
        it.runner.call(lambda: it.runner.tune(replace(before, tenant=(heavy,))))
        assert [it.host.live.jobs._owner_weight(owner) for owner in ("heavy", "other")] == [3.0, 1.0]
    finally:
        it.runner.call(lambda: it.runner.tune(before))
    assert it.host.live.jobs._owner_weight("heavy") == 1.0
