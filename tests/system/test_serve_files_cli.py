"""`jaxlora files upload` and `files check`: when they wait, what they say of a file, and how they end."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys

import pytest
from fake_backend import serving
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from small_world import tiny_path
from typer.testing import CliRunner

from serve.cli import files as files_module
from serve.cli import main as cli

MODEL = str(tiny_path("tiny-llama-tied"))
FILE = {"id": "file-1", "bytes": 3, "created_at": 0, "purpose": "fine-tune", "filename": "t.jsonl"}
GOOD = [{"prompt": "one, two", "completion": "three"}, {"prompt": "three, four", "completion": "five"}]
LONG = {"prompt": "one", "completion": "two three " * 60}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """(command, exit code) → (stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def invoke(command: str, code: int = 0) -> tuple[str, str]:
        result = CliRunner().invoke(cli.app, command.split())
        assert result.exit_code == code, (result.output, result.exception)
        return result.stdout, result.stderr

    return invoke


def jsonl(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@contextlib.contextmanager
def judging(*statuses):
    """A server that says these of its only file, one after the other; yields (url, how often it was asked)."""
    asked, left = [], list(statuses)

    async def answer(request: Request):
        asked.append(request.method)
        status = left.pop(0)
        details = {"error": "line 3, text: is missing", "processed": "2 of 3 are longer"}.get(status)
        return JSONResponse(FILE | {"status": status, "status_details": details})

    app = FastAPI()
    app.add_api_route("/v1/files", answer, methods=["POST"])
    app.add_api_route("/v1/files/file-1", answer)
    with serving(app) as url:
        yield url, asked


def test_an_upload_waits_for_the_check_and_says_what_it_found(run, tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "FIRST_LOOK_S", 0.001)
    (tmp_path / "t.jsonl").write_text(jsonl(*GOOD))
    with judging("uploaded", "uploaded", "processed") as (url, asked):
        out, _ = run(f"files upload t.jsonl --url {url}")
    assert asked == ["POST", "GET", "GET"]
    assert out.endswith("t.jsonl  2 of 3 are longer\n")


def test_an_upload_of_a_bad_file_ends_with_1_and_the_reasons(run, tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "FIRST_LOOK_S", 0.001)
    (tmp_path / "t.jsonl").write_text("{}")
    for option in ("", " --json"):
        with judging("uploaded", "error") as (url, _):
            out, err = run(f"files upload t.jsonl --url {url}{option}", 1)
        assert "line 3, text: is missing" in out
        assert err == "jaxlora: t.jsonl is not usable; mend it and send it again\n"


def test_an_upload_that_does_not_wait_asks_once(run, tmp_path):
    (tmp_path / "t.jsonl").write_text("{}")
    with judging("uploaded") as (url, asked):
        out, _ = run(f"files upload t.jsonl --no-wait --url {url}")
    assert (asked, "uploaded" in out) == (["POST"], True)


def test_a_check_shows_counts_lengths_and_what_is_trained(run, tmp_path):
    (tmp_path / "t.jsonl").write_text(jsonl(*GOOD))
    out, _ = run(f"files check t.jsonl --model {MODEL}")
    first, tokens, *rest = out.splitlines()
    assert first == "t.jsonl: 2 examples of 2 lines in JSONL (2 prompt and completion)"
    report = json.loads(run(f"files check t.jsonl --model {MODEL} --json")[0])
    assert tokens.startswith(f"{report['tokens']} tokens, {report['trained_tokens']} of them trained (")
    assert sum(one["examples"] for one in report["histogram"]) == report["examples"] == 2
    assert report["trained_tokens"] < report["tokens"]
    trained = ["".join(r["text"] for r in one["runs"] if r["trained"]) for one in report["rendered"]]
    assert [text.startswith(row["completion"]) for text, row in zip(trained, GOOD, strict=True)] == [True, True]
    assert any("[[three" in line for line in rest)
    assert rest[-1] == "good: this file can be trained with"


def test_a_check_says_which_lane_would_just_hold_a_text_however_long_it_is(run, tmp_path):
    (tmp_path / "t.jsonl").write_text(jsonl({"text": "word, " * 3000}))
    out, _ = run(f"files check t.jsonl --model {MODEL} --lane-tokens 64", 1)
    least = int(re.search(r"lane_tokens = (\d+) would hold all", out)[1])
    run(f"files check t.jsonl --model {MODEL} --lane-tokens {least - 32}", 1)
    out, _ = run(f"files check t.jsonl --model {MODEL} --lane-tokens {least}", 0)
    assert "too long" not in out


def test_a_check_names_every_problem_and_every_long_line(run, tmp_path):
    rows = [
        *GOOD,
        LONG,
        {"prompt": "x"},
        *[{"text": i} for i in range(8)],
        {"prompt": "a", "completion": "\x1b[31mred"},
    ]
    (tmp_path / "t.jsonl").write_text(jsonl(*rows))
    out, _ = run(f"files check t.jsonl --model {MODEL} --lane-tokens 64", 1)
    assert "line 4, completion: is missing" in out
    assert [f"line {n}, text: must be a string, got a number" in out for n in range(5, 13)] == [True] * 8
    assert "longer than lane_tokens = 64 holds (line 3); lane_tokens = " in out
    assert "problems: 9" in out
    assert out.splitlines()[-1].startswith("bad: ")
    assert "\x1b" not in out
    assert "\\x1b[31mred" in out


@pytest.mark.parametrize(("choice", "code", "examples"), [("error", 1, 2), ("skip", 0, 2), ("truncate", 0, 3)])
def test_a_check_takes_the_same_choice_as_a_job(run, tmp_path, choice, code, examples):
    (tmp_path / "t.jsonl").write_text(jsonl(*GOOD, LONG))
    out, _ = run(f"files check t.jsonl --model {MODEL} --lane-tokens 64 --too-long {choice} --json", code)
    report = json.loads(out)
    assert (report["good"], report["examples"], report["long_numbers"]) == (not code, examples, [3])


def test_a_check_for_another_loss_refuses_the_lines(run, tmp_path):
    (tmp_path / "t.jsonl").write_text(jsonl(*GOOD))
    assert (
        "line 1, loss: loss dpo trains on preference pairs"
        in run(f"files check t.jsonl --model {MODEL} --loss dpo", 1)[0]
    )


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        ("hello\n", 1, "begins with 'hello', which is none of what is read"),
        ("", 1, "no example is in it"),
        (None, 2, "t.jsonl is no file; give one of training data"),
    ],
)
def test_a_check_of_what_is_no_training_data(run, tmp_path, content, code, says):
    if content is not None:
        (tmp_path / "t.jsonl").write_text(content)
    assert says in "".join(run(f"files check t.jsonl --model {MODEL}", code))


@pytest.mark.parametrize(
    ("option", "says"), [("--loss mse", "--loss must be one of"), ("--too-long cut", "--too-long must be")]
)
def test_a_check_names_an_option_that_is_wrong(run, tmp_path, option, says):
    assert says in run(f"files check t.jsonl --model {MODEL} {option}", 2)[1]


@pytest.mark.slow
def test_a_check_starts_no_device(tmp_path):
    """The tokenizer is all that it opens of the model."""
    (tmp_path / "t.jsonl").write_text(jsonl(*GOOD))
    code = (
        "import sys; from typer.testing import CliRunner; from serve.cli import main; "
        f"r = CliRunner().invoke(main.app, ['files', 'check', 't.jsonl', '--model', {MODEL!r}]); "
        "assert r.exit_code == 0, r.output; from jax._src import xla_bridge as x; assert not x._backends"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
