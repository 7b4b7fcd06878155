"""The log: a line for each request, what it says, in both forms; and logging as it was afterwards."""

from __future__ import annotations

import io
import json
import logging
import sys
import time

import httpx2
import pytest
from fake_backend import BASE, HI, FakeBackend, serving

from jaxlora.core.errors import Unauthorized
from serve.access.caller import Caller
from serve.http.request_log import Answered
from serve.observability.logs import LOGGERS, log_answered, logging_to
from serve.server.app import create_app
from serve.server.gate import AppConfig


def by_key(connection):
    key = connection.headers.get("authorization", "").removeprefix("Bearer ")
    if not key:
        raise Unauthorized("no key")
    return Caller(owner=key, admin=False)


@pytest.fixture(scope="module")
def running():
    backend = FakeBackend()
    with serving(
        create_app(backend, AppConfig(default_max_tokens=64, caller_of=by_key, listeners=[log_answered]))
    ) as url:
        yield backend, url


@pytest.fixture
def http(running):
    running[0].submit_error = None
    with httpx2.Client(base_url=running[1], headers={"authorization": "Bearer acme"}) as client:
        yield client


@pytest.fixture
def log():
    stream = io.StringIO()
    with logging_to(stream, as_json=True):
        yield stream


def lines(log, count=1):
    """So many lines, as soon as they are there: a client has its answer a moment before."""
    deadline = time.monotonic() + 5
    while len(told := log.getvalue().splitlines()) < count and time.monotonic() < deadline:
        time.sleep(0.005)
    assert len(told) == count
    return [json.loads(line) for line in told]


def chat(http, **fields):
    return http.post("/v1/chat/completions", json={"model": BASE, "messages": HI} | fields)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_an_answer_has_a_line_with_its_tokens(http, log, stream):
    answer = chat(http, stream=stream, max_tokens=5)
    (line,) = lines(log)
    assert line.pop("duration_ms") > 0
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "answered",
        "level": "info",
        "logger": "serve.access",
        "request_id": answer.headers["x-request-id"],
        "tenant": "acme",
        "model": BASE,
        "method": "POST",
        "route": "/v1/chat/completions",
        "status": 200,
        "prompt_tokens": 20,
        "completion_tokens": 5,
    }


@pytest.mark.parametrize(
    ("method", "path", "told"),
    [
        pytest.param("GET", "/v1/models/nobody", {"status": 404, "code": "model_not_found"}, id="handler"),
        pytest.param("GET", "/nowhere", {"status": 404, "code": "not_found"}, id="framework"),
        pytest.param("PUT", "/v1/models", {"status": 405, "code": "method_not_allowed"}, id="method"),
        pytest.param("POST", "/v1/completions", {"status": 400, "code": "invalid_value"}, id="body"),
    ],
)
def test_a_refusal_has_a_line_with_its_code(http, log, method, path, told):
    http.request(method, path)
    (line,) = lines(log)
    assert told.items() <= line.items()
    assert "prompt_tokens" not in line


def test_who_has_no_key_is_no_tenant(running, log):
    httpx2.get(running[1] + "/v1/models")
    (line,) = lines(log)
    assert (line["status"], line["code"]) == (401, "invalid_api_key")
    assert "tenant" not in line


def test_an_error_in_a_stream_is_told_though_its_status_was_200(http, running, log):
    running[0].fail_after, running[0].failure = 2, RuntimeError("of our own")
    try:
        chat(http, stream=True)
    finally:
        running[0].fail_after = running[0].failure = None
    failed, answered = lines(log, 2)
    assert (answered["status"], answered["code"], answered["completion_tokens"]) == (200, "internal_error", 2)
    assert failed["level"] == "error"
    assert "RuntimeError: of our own" in failed["exception"]
    assert failed["request_id"] == answered["request_id"]


@pytest.mark.fault("T8")
def test_a_traceback_holds_no_local_variables(http, running, log):
    secret = "canary-in-a-local"
    running[0].submit_error = RuntimeError("of our own")
    chat(http, messages=[{"role": "user", "content": secret}])
    failed, _ = lines(log, 2)
    assert "Traceback" in failed["exception"]
    assert secret not in log.getvalue()


def answered(route, status, code=None):
    """One of an admin's key."""
    return Answered(
        request_id="req_1",
        method="GET",
        route=route,
        status=status,
        tenant="ops",
        began_s=0.0,
        duration_s=0.001,
        code=code,
        generated=None,
        traceparent=None,
    )


@pytest.mark.parametrize("route", ["/health", "/ready", "/metrics", "/v1/stats"])
@pytest.mark.parametrize(
    ("level", "told"), [("debug", ["debug", "debug", "info"]), ("info", ["info"]), ("warning", [])]
)
def test_polls_are_told_at_debug_unless_they_fail(route, level, told):
    stream = io.StringIO()
    with logging_to(stream, as_json=True, level=level):
        log_answered(answered(route, 200))
        log_answered(answered(route, 503, "starting"))
        log_answered(answered(route, 503, "unavailable"))
    assert [json.loads(line)["level"] for line in stream.getvalue().splitlines()] == told


def test_a_line_goes_where_stderr_is_now(monkeypatch):
    """A line that moves on the terminal takes the place of stderr while it does."""
    with logging_to(as_json=False):
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        logging.getLogger("serve").info("above it")
        assert "above it" in sys.stderr.getvalue()


def test_probes_are_told_only_when_they_fail(running, log):
    httpx2.get(running[1] + "/health")
    running[0].state = "it hangs"
    try:
        httpx2.get(running[1] + "/health")
    finally:
        running[0].state = "ok"
    assert [line["status"] for line in lines(log)] == [503]


def test_people_read_lines_without_colour_codes_in_a_file(http):
    stream = io.StringIO()
    with logging_to(stream, as_json=False):
        http.get("/v1/models")
        deadline = time.monotonic() + 10
        while "answered" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)  # the line is written after the answer
        logging.getLogger("jaxlora").warning("adapter %s: odd", "bot")
    first, second = stream.getvalue().splitlines()
    assert "\x1b" not in first
    assert "answered" in first
    assert "method=GET route=/v1/models status=200 tenant=acme duration_ms=" in first
    assert "adapter bot: odd" in second


def test_logging_ends_as_it_was():
    def state():
        loggers = [logging.getLogger(name) for name in LOGGERS]
        return [(x.level, x.propagate, list(x.handlers)) for x in loggers]

    before = state()
    with logging_to(io.StringIO(), as_json=True):
        assert state() != before
    assert state() == before
