"""`jaxlora jobs` and `jaxlora files`: what they ask of a server, and what they print of its answers."""

from __future__ import annotations

import json

import pytest
from fake_backend import serving
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from typer.testing import CliRunner

from serve.api.jobs.schemas import JobBody
from serve.cli import jobs as commands
from serve.cli import main as cli

FILE = {
    "id": "file-1",
    "status": "processed",
    "bytes": 3,
    "created_at": 0,
    "purpose": "fine-tune",
    "filename": "t.jsonl",
}
JOB = {
    "id": "ftjob-1",
    "status": "running",
    "created_at": 0,
    "fine_tuned_model": None,
    "adapter": "harbor",
    "error": None,
    "size": {
        "trainable_parameters": 250,
        "all_parameters": 20000,
        "trainable_percent": 1.25,
        "bytes": 1000,
        "slot_bytes": 4096,
    },
    "progress": {"step": 2, "total_steps": 9, "train_loss": 1.5, "valid_loss": None},
}
FAILED = JOB | {
    "id": "ftjob-2",
    "status": "failed",
    "size": None,
    "error": {"code": "bad_file", "message": "no examples"},
}
METRICS = {"type": "metrics", "level": "info", "created_at": 0}
EVENTS = [
    METRICS | {"id": "ftevent-2", "level": "warn", "message": "second", "data": {"step": 2, "train_loss": 1.5}},
    METRICS | {"id": "ftevent-1", "message": "first", "data": {"step": 1, "train_loss": 2.5, "valid_loss": 2.0}},
]
CHECKPOINT = {"step_number": 4, "adapter": "harbor", "adapter_version": 7, "metrics": {"step": 4, "train_loss": 0.25}}
NEXT = "now: jaxlora chat harbor --url "


class Jobs:
    """Answers as the routes of jobs and files do, and keeps (method, path, body or None)."""

    def __init__(self):
        self.requests: list[tuple[str, str, object]] = []
        self.followed = 0
        self.end = {"status": "succeeded"}  # of the job that is followed

    async def __call__(self, path: str, request: Request) -> Response:
        is_json = request.headers.get("content-type") == "application/json"
        body = await request.json() if is_json else None
        self.requests.append((request.method, path, body))
        if "stream" in request.query_params:
            # Each stream ends before the job does, but for the last, which has nothing new.
            if self.followed:
                assert request.query_params["after"] == EVENTS[-self.followed]["id"]
            event = ""
            if self.followed < len(EVENTS):
                self.followed += 1
                event = f"data: {json.dumps(EVENTS[-self.followed])}\n\n: ping\n\n"
            return PlainTextResponse(event + "data: [DONE]\n\n", media_type="text/event-stream")
        if path.endswith("/content"):
            return PlainTextResponse("abc")
        entries = {
            "files": [FILE],
            "fine_tuning/jobs": [JOB, FAILED],
            "fine_tuning/jobs/ftjob-1/events": EVENTS,
            "fine_tuning/jobs/ftjob-2/events": [],
            "fine_tuning/jobs/ftjob-1/checkpoints": [CHECKPOINT],
        }
        if request.method == "GET" and path in entries:  # a page an entry
            at = int(request.query_params.get("after", 0))
            page = entries[path][at : at + 1]
            return JSONResponse({"data": page, "has_more": at + 1 < len(entries[path]), "last_id": str(at + 1)})
        return JSONResponse(FILE if path.startswith("files") else FAILED if "ftjob-2" in path else self.job())

    def job(self) -> dict:
        return JOB | self.end if self.followed == len(EVENTS) else JOB


@pytest.fixture
def server():
    return Jobs()


@pytest.fixture
def run(server, tmp_path, monkeypatch):
    """(command, exit code it ends with) → what it prints."""
    monkeypatch.chdir(tmp_path)
    app = FastAPI()
    app.add_api_route("/v1/{path:path}", server.__call__, methods=["GET", "POST", "DELETE"], response_model=None)
    with serving(app) as url:

        def invoke(command: str, code: int = 0) -> str:
            result = CliRunner().invoke(cli.app, [*command.split(), "--url", url])
            assert result.exit_code == code, result.output
            return result.output

        yield invoke


def test_a_job_is_created_with_every_option_and_followed(run, server, tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    options = (
        "--heldout file-9 --name s --epochs 2 --batch 4 --lr 0.1 --rank 8 --alpha 16 --checkpoint-every 5 --seed 7"
    )
    out = run(f"jobs create train.jsonl --model m {options} --follow")
    uploaded, (method, path, body), *_ = server.requests
    assert (uploaded[:2], method, path) == (("POST", "files"), "POST", "fine_tuning/jobs")
    assert body == {
        "model": "m",
        "training_file": "file-1",
        "validation_file": "file-9",
        "suffix": "s",
        "seed": 7,
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}}},
        "lora": {"r": 8, "alpha": 16.0},
        "learning_rate": 0.1,
        "checkpoint_every": 5,
    }
    JobBody.model_validate(body)
    *lines, last = out.splitlines()
    assert [line.split()[-1] for line in lines] == ["harbor", "first", "second"]
    assert "ftjob-1  running                 2/9  loss 1.5000" in out
    assert last.startswith(NEXT)


@pytest.mark.parametrize(
    "command", ["jobs create file-9 --model m --suffix harbor --follow", "jobs events ftjob-1 --follow"]
)
@pytest.mark.parametrize(
    ("end", "code", "says"),
    [
        ({"status": "succeeded"}, 0, NEXT),
        (
            {"status": "failed", "error": {"code": "x", "message": "no examples"}},
            1,
            "jaxlora: ftjob-1 failed: no examples\n",
        ),
        ({"status": "cancelled"}, 1, "jaxlora: ftjob-1 cancelled\n"),
    ],
)
def test_whoever_follows_a_job_ends_as_it_does(run, server, command, end, code, says):
    server.end = end
    out = run(command, code)
    assert says in out
    assert (NEXT in out) is (code == 0)


def test_ctrl_c_leaves_the_job_that_is_followed_alone_and_says_how_to_go_on(run, server, monkeypatch):
    shown = []

    def interrupted(entry, line, as_json):
        shown.append(line(entry))
        if len(shown) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(commands, "print_entry", interrupted)
    out = run("jobs create file-9 --model m --follow", 130)
    url = out.partition("--url ")[2].split()[0]
    assert out.splitlines() == [
        "",
        "ftjob-1 goes on",
        f"  follow it again:  jaxlora jobs events ftjob-1 --follow --url {url}",
        f"  end it:  jaxlora jobs cancel ftjob-1 --url {url}",
        "jaxlora: interrupted",
    ]
    assert [method for method, _, _ in server.requests] == ["POST", "GET", "GET"]


def test_in_json_nothing_stands_beside_the_objects(run):
    lines = run("jobs create file-9 --model m --follow --json").splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["ftjob-1", "ftevent-1", "ftevent-2"]
    assert json.loads(run("jobs show ftjob-1 --json"))["id"] == "ftjob-1"


def test_a_job_is_shown_with_its_losses(run):
    """In ASCII: this output is no terminal."""
    out = run("jobs show ftjob-1")
    assert out.isascii()
    _, size, *lines = out.splitlines()
    assert size == (
        "trainable params: 250 || all params: 20,000 || trainable%: 1.2500 || bytes: 1,000, 4,096 in a slot"
    )
    assert [line.strip() for line in lines[-2:]] == ["1" + " " * 66 + "2", "loss by step:  . training  o held out"]
    assert lines[0].startswith("       2.5 |.")
    assert lines[7].startswith("       1.5 |")
    assert lines[7].endswith(".")
    assert sum(line.count("o") for line in lines[:8]) == 1


def test_options_that_are_not_given_are_not_sent(run, server):
    out = run("jobs create file-9 --model m --method dpo --steps 3")
    assert "\nto follow it: jaxlora jobs events ftjob-1 --follow --url http://127.0.0.1:" in out
    ((_, _, body),) = server.requests
    method = {"type": "dpo", "dpo": {"hyperparameters": {}}}
    assert body == {"model": "m", "training_file": "file-9", "method": method, "max_steps": 3}
    JobBody.model_validate(body)


@pytest.mark.parametrize(
    ("command", "request_", "words"),
    [
        ("jobs cancel ftjob-1", ("POST", "fine_tuning/jobs/ftjob-1/cancel"), "ftjob-1 is cancelled\n"),
        ("jobs pause ftjob-1", ("POST", "fine_tuning/jobs/ftjob-1/pause"), "ftjob-1 is paused\n"),
        ("jobs resume ftjob-1", ("POST", "fine_tuning/jobs/ftjob-1/resume"), "ftjob-1 is in line again\n"),
        ("jobs show ftjob-2", ("GET", "fine_tuning/jobs/ftjob-2"), "\nbad_file: no examples\n"),
        ("jobs checkpoints ftjob-1", ("GET", "fine_tuning/jobs/ftjob-1/checkpoints"), "harbor@7  train_loss 0.2500\n"),
        ("files show file-1", ("GET", "files/file-1"), "fine-tune  t.jsonl\n"),
        ("files list", ("GET", "files"), "fine-tune  t.jsonl\n"),
        ("files delete file-1", ("DELETE", "files/file-1"), "deleted file-1\n"),
    ],
    ids=lambda x: x.replace(" ", "-") if isinstance(x, str) else "",
)
def test_a_command_is_one_request_and_a_line(run, server, command, request_, words):
    assert run(command).endswith(words)
    assert server.requests[0][:2] == request_
    assert len(server.requests) == 1 + command.startswith("jobs show")  # whose losses are in its events


def test_lists_are_read_to_their_end(run):
    assert [line.split()[0] for line in run("jobs list").splitlines()] == ["ftjob-1", "ftjob-2"]
    assert [json.loads(line)["id"] for line in run("jobs list --json").splitlines()] == ["ftjob-1", "ftjob-2"]


def test_events_are_printed_the_oldest_first(run):
    for command in ("jobs events ftjob-1", "jobs events ftjob-1 --follow"):
        lines = [line for line in run(command).splitlines() if NEXT not in line]
        assert [line.split("  ")[1] for line in lines] == ["first", "warn: second"]


def test_a_file_is_fetched_under_its_name_and_replaces_none(run, tmp_path):
    assert run("files download file-1") == "wrote file-1 into t.jsonl\n"
    assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl"]
    assert (tmp_path / "t.jsonl").read_text() == "abc"
    assert run("files download file-1", 2) == "jaxlora: t.jsonl exists; name another file with --out\n"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("files upload nowhere", "nowhere is no file; give one of training data"),
        ("jobs show ..", "'..' is no id"),
    ],
)
def test_what_is_wrong_is_told_before_the_server_is_asked(run, server, command, words):
    assert run(command, 2) == f"jaxlora: {words}\n"
    assert server.requests == []
