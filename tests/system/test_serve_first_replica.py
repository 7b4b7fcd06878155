"""A front without a replica: requests wait for the first, which is asked nothing more once it drains."""

from __future__ import annotations

import asyncio
import threading
import time
from unittest.mock import AsyncMock

import httpx2
import openai
import pytest
from fake_backend import BASE, HI, serving
from test_serve_front import FakePeer, FakeServers, run, until
from test_serve_relay import CHAT, CONFIG, IDLE, LocalPeer, fake_server

from jaxlora.config.cluster import RouterSection, ScalingSection
from jaxlora.core.errors import Unavailable
from serve.api.gradient.errors import API, gradient_response
from serve.cluster.front import Followed
from serve.cluster.relay import Peers, Relay
from serve.cluster.router import Router
from serve.http.errors import ErrorShapes
from serve.server.gate import Gate

SCALING = ScalingSection(start_s=3, held=2)


def front(*, scaling: ScalingSection = SCALING, may_rest: bool = True, keeper: LocalPeer | None = None):
    """(the app before no replica yet, its peers)."""
    peers = Peers(Router(RouterSection()), scaling=scaling, may_rest=may_rest)
    peers.keeper = keeper

    async def keep(data):
        raise AssertionError("no body is that large")

    async def find(model):
        return None

    relay = Relay(peers, base_name=BASE, default_max_tokens=64, keep=keep, find=find)
    return Gate(relay, CONFIG, ErrorShapes({API: gradient_response})), peers


class Sending:
    """A request on a thread of its own."""

    def __init__(self, url: str, **changes: object):
        self.answer: httpx2.Response | None = None
        self._url, self._body = url, CHAT | changes
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        self.answer = httpx2.post(f"{self._url}/v1/chat/completions", json=self._body, timeout=30)

    def result(self) -> httpx2.Response:
        self._thread.join()
        assert self.answer is not None
        return self.answer


def held(peers: Peers, count: int) -> None:
    end = time.monotonic() + 5
    while peers.held != count:
        assert time.monotonic() < end, peers.held
        time.sleep(0.01)


class OnLoop:
    """The app, and a way to call something in its event loop."""

    def __init__(self, app):
        self.app, self.loop = app, None

    async def __call__(self, scope, receive, send):
        self.loop = asyncio.get_running_loop()
        await self.app(scope, receive, send)

    def call(self, work) -> None:
        async def run():
            work()

        asyncio.run_coroutine_threadsafe(run(), self.loop).result(5)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_waits_for_the_first_replica(stream):
    app, peers = front(scaling=ScalingSection(start_s=30))
    on_loop = OnLoop(app)
    with serving(on_loop) as url:
        sending = Sending(url, stream=stream)
        held(peers, 1)
        assert (peers.load().held, peers.load().asked, peers.load().replicas) == (1, 1, {})
        on_loop.call(lambda: peers.report("a", fake_server()[1], IDLE))
        assert sending.result().status_code == 200
    assert (peers.held, peers.load().asked, peers.load().replicas) == (0, 1, {"a": IDLE})


def test_one_that_does_not_come_in_time_and_one_too_many():
    app, peers = front()
    with serving(app) as url:
        waiting = [Sending(url), Sending(url, stream=True)]
        held(peers, 2)
        beyond = Sending(url).result()
        assert [one.answer for one in waiting] == [None, None]  # it was told at once
        answers = [beyond, *(one.result() for one in waiting)]
    assert [answer.status_code for answer in answers] == [503] * 3
    assert [answer.json()["error"]["code"] for answer in answers] == ["starting"] * 3
    assert [answer.headers["retry-after"] for answer in answers[1:]] == ["1", "1"]
    wait_s = int(beyond.headers["retry-after"])
    assert wait_s in (1, 2, 3)
    assert beyond.json()["error"]["message"] == f"a replica is being started for this; retry in ~{wait_s} s"
    assert peers.held == 0


def test_it_is_told_in_the_wires_own_form():
    app, _ = front(scaling=ScalingSection(start_s=40, held=0))
    with serving(app) as url:
        gradient = httpx2.post(f"{url}/api/models/x_model_adapter/complete", json={"query": "hi"})
        assert (gradient.status_code, gradient.headers["retry-after"]) == (503, "40")
        assert gradient.json() == {"type": "failed", "message": "a replica is being started for this; retry in ~40 s"}
        with (
            openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client,
            pytest.raises(openai.InternalServerError, match="a replica is being started for this"),
        ):
            client.chat.completions.create(model=BASE, messages=HI)


def test_a_client_that_leaves_waits_no_more():
    app, peers = front(scaling=ScalingSection(start_s=30))
    with serving(app) as url:
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{url}/v1/chat/completions", json=CHAT, timeout=0.3)
        held(peers, 0)


def test_what_the_keeper_can_answer_it_answers():
    app, peers = front(keeper=fake_server()[1])
    with serving(app) as url:
        for path in ("/v1/models", "/version", "/health"):
            assert httpx2.get(url + path).status_code == 200
        ready = httpx2.get(f"{url}/ready")
        assert ready.json() == {"status": "ok", "detail": "no replica runs; the next request starts one"}
        sending = Sending(url)
        held(peers, 1)
        assert httpx2.get(f"{url}/ready").json()["detail"] == "a replica is being started"
        sending.result()
    assert peers.asked == 1  # probes and lists start nobody


def test_where_there_must_be_a_replica_it_is_not_ready():
    app, _ = front(may_rest=False, keeper=fake_server()[1])
    with serving(app) as url:
        response = httpx2.get(f"{url}/ready")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "starting")
        assert httpx2.get(f"{url}/health").status_code == 200


def test_without_a_keeper_it_is_not_ready_either():
    with serving(front()[0]) as url:
        assert httpx2.get(f"{url}/ready").status_code == 503


def test_the_next_estimate_is_what_the_last_start_took():
    now_s = 100.0
    peers = Peers(Router(RouterSection()), lambda: now_s, scaling=ScalingSection(start_s=60))
    waits = []
    for start_s in (0.0, 5.0, 30.0, 500.0):
        now_s = 100.0 + start_s
        waits.append(peers.starting().retry_after_s)
    assert waits == [60, 55, 30, 1]
    now_s = 112.5
    peers.report("a", FakePeer(), IDLE)
    peers.leave("a", peers.replicas["a"])
    now_s = 200.0
    assert peers.starting().retry_after_s == 13


# ---- a replica that drains


def test_one_that_drains_gets_nothing_though_it_is_the_only_one_and_its_successor_does():
    peers, first, second = Peers(Router(RouterSection())), FakePeer(), FakePeer()
    peers.report("a", first, IDLE)
    assert peers.serving
    peers.drain("a")
    assert (peers.serving, peers.load().replicas) == (False, {})
    peers.report("a", first, IDLE)
    peers.leave("a", first)  # a call to it failed
    peers.report("a", first, IDLE)  # but it is still there
    assert not peers.serving
    peers.report("a", second, IDLE)
    assert (peers.serving, set(peers.load().replicas)) == (True, {"a"})


def test_a_request_that_waits_is_not_given_to_one_that_drains():
    async def work():
        peers, first = Peers(Router(RouterSection()), scaling=ScalingSection(start_s=5)), FakePeer()
        peers.report("a", first, IDLE)
        peers.drain("a")
        waiting = asyncio.create_task(peers.first())
        await asyncio.sleep(0.05)
        peers.report("a", first, IDLE)
        await asyncio.sleep(0.05)
        assert not waiting.done()
        peers.report("b", FakePeer(), IDLE)
        await waiting

    run(work)


def test_the_front_is_asked_and_told_from_another_thread():
    """As the actor's methods are, which are not of the event loop."""

    async def work():
        servers = FakeServers({"trainer.1": FakePeer(), "replica-0.1": FakePeer()})
        peers, messages = Peers(Router(RouterSection())), asyncio.Queue()
        followed = Followed(None, servers, peers, lambda: None)
        messages.put_nowait({"type": "lifespan.startup"})
        life = asyncio.create_task(followed({"type": "lifespan"}, messages.get, AsyncMock()))
        await until(lambda: peers.replicas)
        load = await asyncio.to_thread(followed.call, peers.load)
        assert set(load.replicas) == {"replica-0"}
        await asyncio.to_thread(followed.call, lambda: peers.drain("replica-0"))
        assert not peers.serving
        messages.put_nowait({"type": "lifespan.shutdown"})
        await life
        with pytest.raises(Unavailable):
            await asyncio.to_thread(followed.call, peers.load)

    run(work)
