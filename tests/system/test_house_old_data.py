"""What the version before the modules moved to folders left on disk opens now: it is served, listed and gone on with."""

from __future__ import annotations

import csv
import io
import sqlite3
import time
from collections import defaultdict
from contextlib import closing

import httpx2
import pytest
from old_data_world import FILES, RUN, SERVER, STEPS, expected, fine_tune, server, unpack, upload, write_run
from typer.testing import CliRunner
from whole_world import bearer

from serve.cli import main as cli

EXPECTED = expected()
KEYS, JOBS, AFTER = EXPECTED["keys"], EXPECTED["jobs"], EXPECTED["after"]
ACME = KEYS["acme"]
NEAR = 1e-4  # of losses: float32 on another processor


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A server on the folder, whose answers to repeated requests are as fresh as they were then."""
    folder = unpack(SERVER, tmp_path_factory.mktemp("old"))
    with closing(sqlite3.connect(folder / "data/jaxlora.sqlite")) as database:
        changed = database.execute("UPDATE idempotency SET created_s = ?", [time.time()]).rowcount
        assert changed > 0
        database.commit()
    with server(folder) as it:
        yield it


@pytest.mark.parametrize("who", KEYS)
def test_keys_open_the_door(old, who):
    seen = {a["tenant"] for a in old.ask(KEYS[who], "GET", "/v1/adapters")["data"]}
    assert seen == ({"acme", "globex"} if who == "root" else {who})
    assert httpx2.get(old.url + "/v1/models", headers=bearer(KEYS[who] + "x")).status_code == 401


@pytest.mark.parametrize("completion", EXPECTED["completions"], ids=lambda c: f"{c['tenant']}-{c['model'][:20]}")
def test_adapters_are_served(old, completion):
    tokens, margin = old.greedy(KEYS[completion["tenant"]], completion["model"], completion["prompt"])
    assert tokens == completion["tokens"]
    assert margin > 1e-3


@pytest.mark.parametrize("tenant", FILES)
def test_files_are_listed_and_hold_their_bytes(old, tenant):
    wanted = EXPECTED["files"][tenant]
    (file,) = [f for f in old.ask(KEYS[tenant], "GET", "/v1/files")["data"] if f["purpose"] == "fine-tune"]
    assert {k: file[k] for k in ("id", "filename", "bytes", "created_at")} == {
        k: wanted[k] for k in ("id", "filename", "bytes", "created_at")
    }
    assert old.content(KEYS[tenant], file["id"]) == FILES[tenant]


def test_jobs_that_had_ended_or_waited_are_as_they_were(old):
    statuses = {j["id"]: j["status"] for j in old.ask(ACME, "GET", "/v1/fine_tuning/jobs")["data"]}
    assert statuses.keys() == set(JOBS.values())
    for status in ("succeeded", "cancelled"):
        assert statuses[JOBS[status]] == status
        assert old.events(ACME, JOBS[status]) == EXPECTED["events"][JOBS[status]]
    done = old.job(ACME, JOBS["succeeded"], "succeeded")
    assert done["metadata"] == {"team": "red"}
    assert (done["training_file"], done["progress"]["step"]) == (EXPECTED["files"]["acme"]["id"], 5)


@pytest.mark.fault("C11")
def test_a_job_that_was_interrupted_goes_on_from_its_checkpoint(old):
    id = JOBS["running"]
    done = old.job(ACME, id, "succeeded")
    assert [e["message"] for e in old.events(ACME, id) if "goes on" in e["message"]] == AFTER["went_on"]
    assert sorted(set(old.steps(ACME, id))) == list(range(1, STEPS + 1))
    # The steps that it had done after its checkpoint, and does again.  The later ones are chaotic: rounding decides them.
    losses: dict[int, list[float]] = defaultdict(list)
    for event in old.events(ACME, id):
        if event["type"] == "metrics":
            losses[event["data"]["step"]].append(event["data"]["train_loss"])
    again = [pair for pair in losses.values() if len(pair) == 2]
    assert len(again) == 3
    assert [after for _, after in again] == pytest.approx([before for before, _ in again], rel=NEAR)
    assert done["progress"]["train_loss"] < again[-1][1] / 4
    tokens, _ = old.greedy(ACME, done["fine_tuned_model"], AFTER["final"]["prompt"])
    assert len(tokens) == len(AFTER["final"]["tokens"])


def test_a_job_that_was_paused_goes_on(old):
    id = JOBS["paused"]
    before = len(EXPECTED["events"][id])
    assert old.events(ACME, id)[:before] == EXPECTED["events"][id]
    old.ask(ACME, "POST", f"/v1/fine_tuning/jobs/{id}/resume")
    old.job(ACME, id, "succeeded")
    steps = old.steps(ACME, id)
    assert steps == list(range(1, STEPS + 1))  # none was lost: it paused with a checkpoint


def test_a_repeated_request_is_answered_as_then(old):
    assert upload(old, ACME, "acme", again="file-1")["id"] == EXPECTED["files"]["acme"]["id"]
    gradient = EXPECTED["gradient"]
    assert [fine_tune(old, ACME, gradient["id"], again=f"call-{i}") for i in range(3)] == gradient["losses"]


def test_an_adapter_that_calls_train_goes_on_with_its_moments(old):
    """The second loss would be another one after an update with new moments."""
    assert [fine_tune(old, ACME, EXPECTED["gradient"]["id"]) for _ in range(2)] == pytest.approx(
        AFTER["losses"], rel=NEAR
    )


@pytest.mark.fault("C11")
@pytest.mark.slow
def test_a_training_run_goes_on_from_its_checkpoint(tmp_path):
    folder = unpack(RUN, tmp_path)
    states = {p.name for p in (folder / "out/one/state").iterdir()}
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(cli.app, ["train", str(write_run(folder))])
    assert result.exit_code == 0, result.output
    assert states == {"2"}
    assert "one: step 2 of 6, from its checkpoint" in result.output
    got, wanted = (
        [{k: float(row[k]) for k in ("step", "loss", "lr", "grad_norm")} for row in csv.DictReader(io.StringIO(text))]
        for text in ((folder / "out/one/metrics.csv").read_text(), EXPECTED["metrics"])
    )
    assert [row["step"] for row in got] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(got, wanted, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
