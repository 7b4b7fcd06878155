"""A device thread that dies or hangs: the health check says so within five seconds, and an idle one is well."""

from __future__ import annotations

import threading
import time

import httpx2
import pytest
from fake_house import serving
from serve_world import BASE, ask

from serve.app import create_app
from serve.engine import Engine
from serve.runner import Runner
from serve.watch import HANG_S, Watch

pytest_plugins = ["serve_fixtures"]
SOON_S = 0.2


class Stuck(Engine):
    """An engine whose step waits until it is let go on, and then fails if it is told to."""

    def prepare(self) -> None:
        self.go_on, self.fail = threading.Event(), False

    def step(self):
        assert self.go_on.wait(20)
        if self.fail:
            raise RuntimeError("the device is gone")
        return super().step()


@pytest.fixture
def stuck(world):
    """A running server that is taken for hanging after SOON_S."""
    engine = world.engine()
    engine.__class__ = Stuck
    engine.prepare()
    runner = Runner(engine, base_name=BASE)
    runner.watch = Watch(engine, hang_s=SOON_S)
    runner.start()
    with serving(create_app(runner, default_max_tokens=8)) as url:
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
