"""`jaxlora bench serve` against a server over real HTTP: its table, its JSON, whom it asks and what it refuses."""

import json

import pytest
from fake_backend import BASE
from typer.testing import CliRunner

from jaxlora.core.errors import Unavailable
from serve.cli import main as cli

pytest_plugins = ["wire_fixtures"]
SMALL = ("--requests", "6", "--warm-up", "2", "--clients", "3", "--prompt-tokens", "4", "--max-tokens", "5")


@pytest.fixture
def bench(running, backend):
    def run(*arguments):
        return CliRunner(env={"NO_COLOR": "1"}).invoke(cli.app, ["bench", "serve", running[1], *SMALL, *arguments])

    return run


def test_a_closed_loop_in_json(bench, backend):
    got = bench("--json")
    assert got.exit_code == 0, got.output
    report = json.loads(got.stdout)
    assert (report["requests"], report["failed"], report["tokens"]) == (6, 0, 30)
    assert report["first_token"]["p50_s"] > 0
    assert report["prompt_tokens"] == sum(len(r.prompt) for r in backend.requests[2:])
    assert len(backend.requests) == 8  # two to warm up
    assert {r.adapter.name for r in backend.requests} <= {"support", "ft-base-acme-x-1"}  # the adapters it lists
    assert {(r.params.max_tokens, r.params.temperature, r.params.ignore_eos) for r in backend.requests} == {
        (5, 0, True)
    }


def test_an_open_loop_as_a_table(running, backend):
    options = [
        "--requests",
        "5",
        "--chat",
        "--early-stop",
        "--model",
        BASE,
        "--max-tokens",
        "4",
        "--prompt-tokens",
        "4",
    ]
    got = CliRunner().invoke(cli.app, ["bench", "serve", running[1], "--rate", "500", *options])
    assert got.exit_code == 0, got.output
    assert "requests         5, 0 of them failed; models that answered: 1\n" in got.stdout
    assert {(r.adapter, r.params.ignore_eos) for r in backend.requests} == {(None, False)}


def test_a_trace_decides_who_is_asked(bench, backend, tmp_path):
    (tmp_path / "trace").write_text("support\nsupport\nft:base:acme:x:1\n")
    assert bench("--popularity", f"trace:{tmp_path / 'trace'}", "--clients", "1").exit_code == 0
    names = [r.adapter.name for r in backend.requests]
    assert names == ["support", "support", "ft-base-acme-x-1"] * 2 + ["support"] * 2


def test_failed_requests_are_told(bench, backend):
    backend.submit_error, backend.admit = Unavailable("the queue is full"), 5
    got = bench()
    assert got.exit_code == 1
    assert "requests         6, 3 of them failed" in got.stdout
    assert "failed 3 times: HTTP 503: the queue is full\n" in got.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--rate", "1"], "not both"), (["--popularity", "zipf:x"], "zipf:S"), (["--popularity", "trace:/no"], "/no")],
)
def test_a_wrong_option_is_refused_in_one_line(bench, arguments, told):
    got = bench(*arguments)
    assert got.exit_code == cli.ERROR_EXIT
    assert told in got.stderr
    assert got.stderr.count("\n") == 1
