"""A device thread that dies or hangs: the health check says so within five seconds, and an idle one is well."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time

import httpx2
import pytest
from fake_backend import serving
from fastapi import APIRouter
from serve_world import BASE, ask

from jaxlora.core.errors import Unavailable
from serve.engine.engine import Engine
from serve.runtime.device_thread import DeviceThread
from serve.runtime.watchdog import HANG_S, Watch
from serve.server.app import create_app, make_http
from serve.server.gate import AppConfig
from serve.server.uvicorn import bound

pytest_plugins = ["serve_fixtures"]
SOON_S = 0.2


class Stuck(Engine):
    """An engine whose step waits until it is let go on, and then fails if it is told to."""

    def prepare(self) -> None:
        self.go_on, self.entered, self.fail = threading.Event(), threading.Event(), False

    def step(self, deliver=None):
        self.entered.set()
        assert self.go_on.wait(20)
        if self.fail:
            raise RuntimeError("the device is gone")
        return super().step(deliver)


@pytest.fixture
def stuck(world):
    """A running server that is taken for hanging after SOON_S."""
    engine = world.engine()
    engine.__class__ = Stuck
    engine.prepare()
    runner = DeviceThread(engine, base_name=BASE)
    runner.watch = Watch(engine, hang_s=SOON_S)
    runner.start()
    with serving(create_app(runner, AppConfig(default_max_tokens=8))) as url:
        yield runner, url
    engine.go_on.set()
    runner.stop()


def health(url):
    answer = httpx2.get(url + "/health")
    return answer.status_code, answer.json()


def until(url, status):
    deadline = time.monotonic() + 5
    while (told := health(url))[0] != status:
        assert time.monotonic() < deadline, told
        time.sleep(0.02)
    return told[1]


def submit(runner):
    runner._send(lambda: runner.admit(ask("r", max_tokens=2), lambda _: None))


def test_the_limit_is_told_in_time():
    assert HANG_S < 5.0


@pytest.mark.fault("C4")
def test_a_step_that_does_not_end_is_503_and_health_returns_with_it(stuck):
    runner, url = stuck
    time.sleep(2 * SOON_S)
    assert health(url) == (200, {"status": "ok"})  # idle
    submit(runner)
    error = until(url, 503)["error"]
    assert error["code"] == "unavailable"
    assert "in one step for" in error["message"]
    assert httpx2.get(url + "/ready").status_code == 503
    runner.engine.go_on.set()
    assert until(url, 200) == {"status": "ok"}


def test_a_message_that_does_not_end_is_503_too(stuck):
    runner, url = stuck
    gate = threading.Event()
    runner._send(gate.wait)
    assert "in one step for" in until(url, 503)["error"]["message"]
    gate.set()
    until(url, 200)


def test_what_compiles_is_well(stuck):
    runner, url = stuck
    gate = threading.Event()

    def compiling():
        with runner.watch.patience():
            gate.wait()

    runner._send(compiling)
    time.sleep(2 * SOON_S)
    assert health(url)[0] == 200
    gate.set()


def test_a_thread_that_dies_is_503_at_once(stuck, caplog):
    runner, url = stuck
    runner.engine.fail = True
    runner.engine.go_on.set()
    submit(runner)
    assert until(url, 503)["error"]["message"] == "the device thread has ended"


# --- the end of a server whose device is lost


@contextlib.contextmanager
def ending(stuck):
    """(runner, server, url) of the stuck engine behind a server that ends by itself."""
    runner, _ = stuck
    router = APIRouter()

    @router.post("/v1/endless")
    async def endless() -> None:
        await asyncio.Event().wait()

    http = make_http(
        runner,
        AppConfig(default_max_tokens=8, max_request_s=60, routers=[router]),
        listening=bound("127.0.0.1", 0),
        grace_s=60,
    )
    http.start()
    try:
        yield runner, http, http.url
    finally:
        http.stop()


def stream(url, told):
    """Reads a stream on a thread of its own, and leaves its status and events."""
    body = {"model": BASE, "prompt": [5, 6, 7], "max_tokens": 4, "stream": True}

    def read():
        with httpx2.stream("POST", url + "/v1/completions", json=body, timeout=30) as answer:
            told.append((answer.status_code, answer.read().decode()))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def endless(url, told):
    """Asks for what never comes, and does not come from the device thread, on a thread of its own."""

    def read():
        answer = httpx2.post(url + "/v1/endless", timeout=30)
        told.append((answer.status_code, answer.text))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def check_failed(told):
    ((status, body),) = told
    assert status == 500
    assert json.loads(body)["error"]["code"] == "internal_error"
    assert "device" not in body


@pytest.mark.fault("C4")
def test_a_thread_that_dies_ends_the_server_after_open_requests_have_got_their_errors(stuck, monkeypatch, caplog):
    monkeypatch.setattr("serve.server.uvicorn.LAST_WORDS_S", 2)
    with ending(stuck) as (runner, http, url):
        told, others = [], []
        reader, other = stream(url, told), endless(url, others)
        wait_for_work(runner)
        until_inside(http, 2)
        runner.engine.fail = True
        runner.engine.go_on.set()
        reader.join(10)
        check_failed(told)
        other.join(10)
        check_failed(others)
        http.thread.join(10)
        assert not http.thread.is_alive()
        assert not runner.end(None)


def test_a_hang_does_not_keep_the_server_from_ending(stuck, monkeypatch, caplog):
    """Neither who is in the device thread's hands nor who waits for it to look is left without an answer."""
    monkeypatch.setattr("serve.runtime.device_thread.END_S", 0.3)
    with ending(stuck) as (runner, http, url):
        told, late = [], []
        reader = stream(url, told)
        wait_for_work(runner)
        late_reader = stream(url, late)
        while runner._inbox.empty():
            time.sleep(0.01)
        http.server.drain()
        http.server.drain()
        for one in (reader, late_reader, http.thread):
            one.join(10)
            assert not one.is_alive()
        check_failed(told)
        check_failed(late)
        assert runner.lost
        assert not runner.end(0.1)
        with pytest.raises(Unavailable):
            runner.call(int)


def test_a_step_that_does_not_end_in_time_is_a_lost_device(stuck, caplog):
    runner, _ = stuck
    submit(runner)
    wait_for_work(runner)
    assert not runner.lost
    assert not runner.end(0.2)
    assert runner.lost
    assert "nobody waits for it any more" in caplog.text


def until_inside(http, count):
    deadline = time.monotonic() + 10
    while http.server._drain.inside < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_work(runner):
    deadline = time.monotonic() + 10
    while not runner.engine.entered.is_set():
        assert time.monotonic() < deadline
        time.sleep(0.01)
