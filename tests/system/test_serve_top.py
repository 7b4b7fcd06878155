"""`jaxlora top` against a server's state, and against all that is no such server."""

from __future__ import annotations

import json

import httpx2
import pytest
from fake_backend import FakeBackend, serving
from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import TypeAdapter
from rich.console import Console
from typer.testing import CliRunner

from jaxlora.core.lora import AdapterRef
from serve.access.caller import Caller
from serve.api.openai.routes import ERRORS
from serve.api.stats import StatsObject, StatsRoutes
from serve.cli.http_client import AnswerFailed, ApiClient
from serve.cli.main import app as cli
from serve.cli.top import look, read, screen
from serve.runtime.snapshot import JobView, SlotView, Snapshot, TrainingView, WaitView
from serve.runtime.watchdog import Rates
from serve.server.app import create_app
from serve.server.gate import AppConfig

BOT, CAT = AdapterRef("acme", "bot", 3), AdapterRef("zoo", "cat", 1)


class Still:
    """A watch that always sees the same."""

    snapshot = Snapshot(
        at_s=1.0,
        running=3,
        parked=1,
        waiting=7,
        rows=8,
        pages=10,
        free_pages=4,
        host_pages=0,
        host_pages_limit=0,
        queried_tokens=0,
        found_tokens=0,
        parks=2,
        recomputed_tokens=0,
        swaps=5,
        resizes=0,
        decoded_tokens=100,
        prefilled_tokens=50,
        slots=(
            SlotView(rank=32, adapter=BOT, active_s=1.25, pinned=True, rows=3, waiting=2),
            SlotView(rank=8, adapter=None, active_s=None, pinned=False, rows=0, waiting=0),
        ),
        waits=(WaitView(adapter=CAT, waited_s=0.75, requests=4),),
        waiting_adapters=30,
        training=TrainingView(
            tokens=10,
            steps=2,
            jobs={"running": 1, "queued": 4, "failed": 0},
            open=(JobView(id="ftjob-1", owner="acme", name="bot", state="running", step=2, steps=9, loss=1.5),),
        ),
    )

    def age_s(self):
        return 0.25

    def rates(self):
        return Rates(decoded=123.4, prefilled=50.0, trained=0.0)


def by_key(connection):
    return Caller(owner="acme", admin=connection.headers.get("authorization") == "Bearer boss")


@pytest.fixture(scope="module")
def url():
    backend = FakeBackend()
    wire = StatsRoutes(backend, Still())
    with serving(
        create_app(backend, AppConfig(default_max_tokens=8, caller_of=by_key, routers=[wire.router()]))
    ) as url:
        yield url


@pytest.fixture(scope="module")
def stats(url):
    answer = httpx2.get(url + "/v1/stats", headers={"authorization": "Bearer boss"})
    assert answer.status_code == 200
    return answer.json()


def top(*arguments):
    return CliRunner().invoke(cli, ["top", *arguments])


def text_of(stats):
    console = Console(width=80)
    with console.capture() as captured:
        console.print(screen(stats))
    return captured.get()


def test_the_state_is_told_as_json(stats):
    assert stats["slots"][0] == {
        "rank": 32,
        "adapter": {"tenant": "acme", "name": "bot", "version": 3},
        "active_s": 1.25,
        "pinned": True,
        "rows": 3,
        "waiting": 2,
    }
    assert stats["waits"][0]["waited_s"] == 0.75
    assert stats["tokens_per_s"] == {"decoded": 123.4, "prefilled": 50.0, "trained": 0.0}
    assert (stats["health"], stats["age_s"], stats["training"]["jobs"]["queued"]) == ("ok", 0.25, 4)
    TypeAdapter(StatsObject).validate_python(stats)  # as the document says


def test_the_screen_shows_slots_lines_rates_and_jobs(stats):
    text = text_of(stats)
    for words in ("acme/bot@3", "pinned", "1.2 s", "zoo/cat@1", "and 29 more", "123 generated", "running 3/8"):
        assert words in text, words
    for words in ("KV 60%", "ftjob-1", "2/9", "1.500", "1 running, 4 queued"):
        assert words in text, words
    assert "failed" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_server_that_neither_trains_nor_waits_shows_less(stats):
    text = text_of(stats | {"training": None, "waits": []})
    assert "acme/bot@3" in text
    assert "waiting for a slot" not in text
    assert "training" not in text


def test_a_sick_server_says_so(stats):
    assert "hangs" in text_of(stats | {"health": "it hangs"})


def test_json_once_is_one_object(url, stats):
    result = top("--url", url, "--key", "boss", "--json", "--once")
    assert (result.exit_code, result.output.count("\n")) == (0, 1)
    assert json.loads(result.output) == stats


def test_once_prints_the_screen(url):
    result = top("--url", url + "/v1", "--key", "boss", "--once")
    assert result.exit_code == 0
    assert "acme/bot@3" in result.output


def test_without_an_admins_key_it_is_one_line_and_exit_2(url):
    result = top("--url", url, "--once")
    assert result.exit_code == 2
    assert "role admin" in result.output
    assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"object": "list"}, 200, "no jaxlora server"),
        (["a"], 200, "no jaxlora server"),
        ({"detail": "x"}, 404, "HTTP 404"),
    ],
    ids=["other", "list", "error"],
)
def test_what_is_no_such_server_is_told(body, status, words):
    router = APIRouter(responses=ERRORS)
    router.add_api_route("/v1/stats", lambda: JSONResponse(body, status), methods=["GET"], response_model=None)
    with serving(create_app(FakeBackend(), AppConfig(default_max_tokens=8, routers=[router]))) as url:
        result = top("--url", url, "--once")
    assert (result.exit_code, words in result.output) == (2, True)


def test_no_server_is_told():
    result = top("--url", "http://127.0.0.1:9", "--once")
    assert (result.exit_code, "no server answers" in result.output) == (2, True)


def test_a_server_that_goes_away_is_told_on_the_screen():
    with ApiClient("http://127.0.0.1:9", None) as server:
        assert "no server answers" in str(look(server))
        with pytest.raises(AnswerFailed):
            read(server)
