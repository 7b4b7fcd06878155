"""Engines that fail and clients that go: each answer ends in one way, and no token stream outlives it."""

import json
import socket
import time

import httpx2
import openai
import pytest
from fake_backend import BASE, HI, events, serving

from jaxlora.core.errors import JaxLoraError, Overloaded, StateInvalid, Unavailable
from serve.server.app import create_app
from serve.server.gate import AppConfig

pytest_plugins = ["wire_fixtures"]


def test_overload_is_503_with_retry_after(client, backend, running):
    backend.submit_error = Overloaded("the queue is full; retry later")
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=BASE, messages=HI)
    assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
    assert caught.value.response.headers["retry-after"] == "1"


def test_a_refused_choice_cancels_the_admitted_ones(client, backend):
    backend.submit_error, backend.admit = Overloaded("the queue is full; retry later"), 2
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model=BASE, messages=HI, n=3)
    assert [s.cancelled.is_set() for s in backend.streams] == [True, True]


def test_a_conflict_is_not_retried(running, backend):
    backend.submit_error = StateInvalid("no free slot")
    with (
        openai.OpenAI(base_url=running[1] + "/v1", api_key="none", max_retries=2) as client,
        pytest.raises(openai.ConflictError) as caught,
    ):
        client.completions.create(model=BASE, prompt="x")
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert caught.value.response.request.headers["x-stainless-retry-count"] == "0"


def test_a_server_that_stops_is_asked_again(running, backend):
    backend.submit_error = Unavailable("the server has stopped")
    with (
        openai.OpenAI(base_url=running[1] + "/v1", api_key="none", max_retries=1) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.completions.create(model=BASE, prompt="x")
    assert (caught.value.status_code, caught.value.code) == (503, "unavailable")
    assert "x-should-retry" not in caught.value.response.headers
    assert caught.value.response.request.headers["x-stainless-retry-count"] == "1"


def test_a_stream_whose_time_is_over_ends_with_an_error_event(http, backend):
    backend.hang_after = 2
    body = {"model": BASE, "messages": HI, "stream": True}
    began = time.monotonic()
    answer = http.post("/v1/chat/completions", json=body, headers={"x-request-timeout-s": "0.5"})
    assert 0.4 < time.monotonic() - began < 5
    told = events(answer)
    assert told[-1] == "[DONE]"
    error = json.loads(told[-2])["error"]
    assert (error["code"], error["type"]) == ("deadline_exceeded", "server_error")
    assert backend.streams[0].cancelled.wait(5)


@pytest.mark.parametrize("value", ["0", "-1", "soon", "1e3", "nan", "", "9" * 30])
def test_a_time_that_is_none_is_refused(http, value):
    answer = http.post("/v1/completions", json={"model": BASE, "prompt": "x"}, headers={"x-request-timeout-s": value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-request-timeout-s")


def test_the_server_has_a_limit_of_its_own(backend):
    backend.hang_after = 0
    with (
        serving(create_app(backend, AppConfig(default_max_tokens=5, max_request_s=0.3))) as url,
        openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=2) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.completions.create(model=BASE, prompt="x", extra_headers={"x-request-timeout-s": "100"})
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
    assert caught.value.response.request.headers["x-stainless-retry-count"] == "0"  # it would only take as long again


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_token_is_a_plain_error(client, backend, stream):
    backend.fail_after, backend.failure = 0, Overloaded("no slot came free; retry later")
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=BASE, messages=HI, stream=stream)
    assert caught.value.code == "overloaded"


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        pytest.param(Overloaded("draining; retry later"), "overloaded", "draining", id="ours"),
        pytest.param(ValueError("/secret/path"), "internal_error", "internal error", id="foreign"),
        pytest.param(JaxLoraError("/secret/path"), "internal_error", "internal error", id="internal"),
        pytest.param(None, "internal_error", "internal error", id="cut_without_a_finish"),
    ],
)
def test_a_failure_midway_is_an_error_event_then_the_end_mark(http, client, backend, failure, code, message):
    backend.fail_after, backend.failure = 3, failure
    ask = {"model": BASE, "messages": HI, "stream": True, "n": 2}
    response = http.post("/v1/chat/completions", json=ask)
    *_, error, done = events(response)
    assert done == "[DONE]"
    assert json.loads(error)["error"]["code"] == code
    assert message in json.loads(error)["error"]["message"]
    assert "secret" not in response.text
    assert '"finish_reason":"stop"' not in response.text
    with pytest.raises(openai.APIError) as caught:
        list(client.chat.completions.create(**ask))
    assert caught.value.code == code
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(**ask | {"stream": False})
    assert caught.value.code == code


def test_silence_is_filled_with_comments_that_clients_skip(running, backend):
    backend.hang_after = 2
    body = {"model": BASE, "messages": HI, "stream": True}
    with (
        httpx2.Client(base_url=running[1]) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        lines = []
        for line in response.iter_lines():
            lines.append(line)
            if lines.count(": ping") == 2:
                break
    assert sum('"content":"r"' in line for line in lines) == 1
    assert backend.streams[0].cancelled.wait(2)


def test_a_stream_starts_within_the_ping_time_even_without_a_token(running, backend):
    backend.hang_after = 0
    body = {"model": BASE, "messages": HI, "stream": True}
    with (
        httpx2.Client(base_url=running[1]) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        lines = [line for line, _ in zip(response.iter_lines(), range(4), strict=False)]
    assert '"role":"assistant"' in lines[0]
    assert lines[2] == ": ping"


# --- clients that go


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hang_after", [0, 3])
def test_a_client_that_hangs_up_cancels_all_its_streams(running, backend, stream, hang_after):
    backend.hang_after = hang_after
    port = int(running[1].rsplit(":", 1)[1])
    body = json.dumps({"model": BASE, "messages": HI, "n": 3, "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + body)
        deadline = time.monotonic() + 5
        while len(backend.streams) < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        if stream and hang_after:
            connection.recv(100)
        assert not any(s.cancelled.is_set() for s in backend.streams)
    began = time.monotonic()
    assert [s.cancelled.wait(5) for s in backend.streams] == [True] * 3
    assert time.monotonic() - began < 4


def test_a_closed_stream_of_the_official_client_cancels(client, backend):
    backend.hang_after = 3
    stream = client.chat.completions.create(model=BASE, messages=HI, stream=True)
    next(iter(stream))
    stream.close()
    assert backend.streams[0].cancelled.wait(5)


def test_a_finished_answer_cancels_nothing(client, backend):
    client.chat.completions.create(model=BASE, messages=HI, n=2)
    list(client.chat.completions.create(model=BASE, messages=HI, n=2, stream=True))
    assert len(backend.streams) == 4
    assert not any(s.cancelled.is_set() for s in backend.streams)
