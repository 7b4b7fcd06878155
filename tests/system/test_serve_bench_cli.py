"""`jaxlora bench serve` and `bench quantum` against servers over real HTTP: tables, JSON, whom they ask and what they refuse."""

import json
import xml.etree.ElementTree as ET

import pytest
from fake_backend import BASE, FakeBackend, serving
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from typer.testing import CliRunner

from jaxlora.core.errors import Unavailable
from serve.bench import load
from serve.cli import main as cli
from serve.server.app import create_app
from serve.server.gate import AppConfig

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


# ---- quantum

OWN_MS = 200.0  # of the server


class Swapping:
    """A server whose adapters share a slot: its tuning, and swaps that are one more with every request."""

    def __init__(self):
        self.backend, self.tuned, self.active_slots = FakeBackend(), [OWN_MS], None
        self.router = APIRouter()
        self.router.add_api_route("/v1/tuning", self.tuning, methods=["GET", "POST"], response_model=None)
        self.router.add_api_route("/v1/stats", self.stats, methods=["GET"], response_model=None)

    async def tuning(self, request: Request) -> JSONResponse:
        if request.method == "POST":
            self.tuned.append((await request.json())["quantum_ms"])
        return JSONResponse(
            {"object": "server.tuning", "quantum_ms": self.tuned[-1], "active_slots": self.active_slots}
        )

    async def stats(self) -> JSONResponse:
        return JSONResponse({"object": "server.stats", "slots": [{}] * 3, "swaps": len(self.backend.requests)})


@pytest.fixture
def swapping():
    it = Swapping()
    it.backend.adapters = {f"a{n}": 1 for n in range(4)}
    with serving(create_app(it.backend, AppConfig(default_max_tokens=64, routers=[it.router]))) as url:

        def run(*arguments):
            return CliRunner(env={"NO_COLOR": "1"}).invoke(cli.app, ["bench", "quantum", url, *SMALL, *arguments])

        it.run = run
        yield it


def test_each_quantum_gets_the_load_and_the_server_its_own_back(swapping):
    got = swapping.run("--quantum-ms", "50", "--quantum-ms", "12.5", "--json")
    assert got.exit_code == 0, got.output
    first, second = map(json.loads, got.stdout.splitlines())
    assert swapping.tuned == [OWN_MS, 50.0, 12.5, OWN_MS]
    assert (first["quantum_ms"], second["quantum_ms"]) == (50.0, 12.5)
    for point in (first, second):
        assert (point["load"]["requests"], point["load"]["failed"], point["load"]["tokens"]) == (6, 0, 30)
        assert point["swaps_s"] == pytest.approx(6 / point["load"]["wall_s"])  # not those of the two that warm up
    asked = swapping.backend.requests
    assert len({r.prompt for r in asked}) == len(asked) == 16
    models = [r.adapter.name for r in asked]
    assert sorted(models[:8]) == sorted(models[8:])  # the same adapters as often
    assert len(set(models)) > 1


def test_a_table_and_a_picture(swapping, tmp_path):
    got = swapping.run("--quantum-ms", "50", "--quantum-ms", "800", "--picture", str(tmp_path / "curve.svg"))
    assert got.exit_code == 0, got.output
    head, *lines = got.stdout.splitlines()
    assert head.split()[:3] == ["quantum", "ms", "tokens/s"]
    assert [line.split()[0] for line in lines] == ["50", "800"]
    text = (tmp_path / "curve.svg").read_text()
    shown = [node.text for node in ET.fromstring(text).iter("{http://www.w3.org/2000/svg}text")]
    assert [shown.count(label) for label in ("50 ms", "800 ms")] == [2, 2]  # of the median and of the 99th percentile
    assert "tokens a second" in shown
    assert text.count("://") == 1  # the name of SVG itself: it fetches nothing


def test_without_a_list_the_quanta_double(swapping):
    assert swapping.run("--json").exit_code == 0
    assert swapping.tuned == [OWN_MS, 25, 50, 100, 200, 400, 800, 1600, OWN_MS]


def test_failed_requests_are_told_and_the_quantum_is_put_back(swapping):
    swapping.backend.submit_error, swapping.backend.admit = Unavailable("the queue is full"), 5
    got = swapping.run("--quantum-ms", "50")
    assert got.exit_code == 1
    assert got.stdout.splitlines()[1].split()[-1] == "3"
    assert swapping.tuned == [OWN_MS, 50.0, OWN_MS]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_puts_the_quantum_back(swapping, monkeypatch, error):
    async def interrupted(*_):
        raise error

    monkeypatch.setattr(load, "closed_loop", interrupted)
    assert swapping.run("--quantum-ms", "50", "--quantum-ms", "100").exit_code != 0
    assert swapping.tuned == [OWN_MS, 50.0, OWN_MS]


@pytest.mark.parametrize(
    ("arguments", "slots", "told"),
    [
        (["--model", "a0", "--model", "a1", "--model", "a0"], None, "has 3 for the 2 asked"),
        ([], 4, "has 4 for the 4 asked"),
        (["--quantum-ms", "0"], None, "positive"),
        (["--picture", "/no/such/folder/x.svg"], None, "is no folder"),
    ],
)
def test_what_shows_nothing_is_refused_before_anything_changes(swapping, arguments, slots, told):
    swapping.active_slots = slots
    got = swapping.run(*arguments)
    assert got.exit_code == cli.ERROR_EXIT
    assert told in got.stderr
    assert got.stderr.count("\n") == 1
    assert (swapping.tuned, swapping.backend.requests) == ([OWN_MS], [])


def test_a_server_that_is_not_ours_has_no_quantum(running):
    got = CliRunner().invoke(cli.app, ["bench", "quantum", running[1]])
    assert got.exit_code == cli.ERROR_EXIT
    assert got.stderr.count("\n") == 1
