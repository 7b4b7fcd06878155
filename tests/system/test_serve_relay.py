"""The front's relay over apps in this process: same answers, the right server, and what becomes of a server that fails."""

from __future__ import annotations

import asyncio
import copy
import json
import re
import time

import httpx2
import openai
import pytest
from fake_backend import BASE, HI, FakeBackend, events, serving

from jaxlora.config.cluster import RouterSection
from jaxlora.core.errors import Overloaded, StorageAway, Unavailable
from serve.cluster.answers import answered
from serve.cluster.peer import JOB, PeerGone
from serve.cluster.relay import CHUNK_BYTES, Alias, Peers, Relay
from serve.cluster.replica_view import Ask, Report
from serve.cluster.router import Router
from serve.http.errors import ErrorShapes
from serve.runtime.job_names import JobName
from serve.server.app import create_app
from serve.server.gate import AppConfig, Gate

IDLE = Report(asked_s=0.0, slots=2, rows=4, running_rows=0, running_tokens=0, waiting_tokens=0, adapters={})
CONFIG = AppConfig(default_max_tokens=64)
CHAT = {"model": BASE, "messages": HI}
FT = "ft:org--base:acme:x:012345678901"
AWAY = FT.replace("01", "ff")
JOB_NAME = JobName("acme", "bot", "x", "ftjob-" + "0123456789012345" * 2, {4: 2}, None, False)
ALIASES = {
    FT: Alias(tenant="acme", adapter="bot", job=JOB_NAME),
    FT + ":ckpt-step-4": Alias(tenant="acme", adapter="bot", job=JOB_NAME),
    "1_model_adapter": Alias(tenant="acme", adapter="bot", job=None),
}


class LocalPeer:
    """A server of this process.  `fails_after`: messages, after which it is gone; it remembers what it was asked."""

    def __init__(self, app, fails_after=None):
        self.app, self.fails_after = app, fails_after
        self.asked, self.closed = [], 0

    async def answer(self, scope, body):
        self.asked.append((scope, body))
        try:
            count = 0
            async for messages in answered(self.app, copy.deepcopy(scope), body):
                for message in messages:
                    if count == self.fails_after:
                        raise PeerGone("the server stopped before the answer was complete; retry")
                    count += 1
                    yield [message]
        finally:
            self.closed += 1


def fake_server(**settings):
    backend = FakeBackend(**settings)
    return backend, LocalPeer(create_app(backend, CONFIG))


class Order(Router):
    """Chooses the first by name that was not tried, and keeps what it was asked."""

    def __init__(self):
        super().__init__(RouterSection())
        self.asks, self.left, self.open = [], [], set()

    def send(self, ask, now_s, tried=()):
        self.asks.append(ask)
        sent = super().send(ask, now_s, {*"abc"} - {min({*self._replicas} - {*tried}, default="")})
        self.open.add(sent)
        return sent

    def end(self, sent, now_s):
        self.open.remove(sent)
        super().end(sent, now_s)

    def leave(self, name, now_s):
        if name in self._replicas:
            self.left.append(name)
        super().leave(name, now_s)


def front(*replicas, keeper=None):
    """(the app in front of them, its peers); the replicas are called a, b, …"""
    peers = Peers(Order())
    for name, peer in zip("abc", replicas, strict=False):
        peers.report(name, peer, IDLE)
    peers.keeper = keeper

    async def keep(data):
        async def kept():
            return data

        return kept()

    async def find(model):
        if model == AWAY:
            raise StorageAway("the database does not answer; retry soon")
        return ALIASES.get(model)

    relay = Relay(peers, base_name=BASE, default_max_tokens=64, keep=keep, find=find)
    return Gate(relay, CONFIG, ErrorShapes({})), peers


@pytest.fixture
def two():
    """Two replicas, of which the first is asked first."""
    return fake_server(), fake_server()


@pytest.fixture(scope="module")
def pair():
    """The addresses of one server, and of a front before two."""
    with (
        serving(create_app(FakeBackend(), CONFIG)) as direct,
        serving(front(fake_server()[1], keeper=fake_server()[1])[0]) as url,
    ):
        yield direct, url


def plain(response):
    """What a client reads, but for ids and times."""
    text = re.sub(r'("(?:id|item_id|created|created_at|completed_at)": ?)("[^"]*"|[0-9.]+)', r"\1…", response.text)
    headers = {k: v for k, v in response.headers.items() if k not in ("date", "x-request-id", "content-length")}
    return response.status_code, headers, text


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/chat/completions", CHAT),
        ("POST", "/v1/chat/completions", CHAT | {"stream": True}),
        ("POST", "/v1/chat/completions", CHAT | {"model": "support@7", "n": 2}),
        ("POST", "/v1/chat/completions", CHAT | {"model": "nobody"}),
        ("POST", "/v1/chat/completions", CHAT | {"max_tokens": -1}),
        ("POST", "/v1/chat/completions", "{no json"),
        ("POST", "/v1/chat/completions", None),
        ("POST", "/v1/completions", {"model": BASE, "prompt": ["one", "two"], "stream": True}),
        ("POST", "/v1/responses", {"model": BASE, "input": "hi"}),
        ("POST", "/v1/responses", {"model": BASE, "input": "hi", "stream": True}),
        ("POST", "/tokenize", {"model": BASE, "prompt": "hi"}),
        ("POST", "/detokenize", {"model": BASE, "tokens": [104, 105]}),
        ("GET", "/tokenizer_info", None),
        ("GET", "/v1/models", None),
        ("GET", "/v1/models/support", None),
        ("GET", "/v1/models/nobody", None),
        ("PUT", "/v1/chat/completions", CHAT),
        ("GET", "/nowhere", None),
        ("GET", "/health", None),
        ("GET", "/ready", None),
        ("GET", "/version", None),
        ("GET", "/", None),
    ],
)
def test_answers_are_those_of_one_server(pair, method, path, body):
    content = body if isinstance(body, str | None) else json.dumps(body)
    headers = {} if content is None else {"content-type": "application/json"}
    direct, through = (httpx2.request(method, url + path, content=content, headers=headers) for url in pair)
    assert plain(direct) == plain(through)
    assert through.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("method", "path", "body", "by_keeper"),
    [
        ("POST", "/v1/chat/completions", {"model": BASE}, False),
        ("POST", "/v1/chat/completions", {"model": FT}, False),
        ("POST", "/v1/completions", {"model": f"{BASE}:{FT}:latest"}, True),
        ("GET", "/v1/models", None, False),
        ("GET", "/v1/models/acme/support", None, False),
        ("GET", f"/v1/models/{FT}", None, False),
        ("GET", f"/v1/models/{FT}:latest", None, True),
        ("DELETE", "/v1/models/support", None, True),
        ("POST", "/api/models/x_model_adapter/complete", {"query": "hi"}, False),
        ("POST", "/api/models/x_model_adapter/fine-tune", {"samples": []}, True),
        ("POST", "/api/models", {"model": {}}, True),
        ("GET", "/api/models", None, True),
        ("POST", "/v1/files", None, True),
        ("GET", "/v1/fine_tuning/jobs", None, True),
        ("POST", "/v1/adapters", None, True),
        ("GET", "/v1/stats", None, True),
        ("POST", "/v1/chat/completions/x", None, True),
    ],
)
def test_who_answers(method, path, body, by_keeper):
    (_, replica), (_, keeper) = fake_server(), fake_server()
    with serving(front(replica, keeper=keeper)[0]) as url:
        httpx2.request(method, url + path, json=body)
    assert (len(replica.asked), len(keeper.asked)) == (not by_keeper, by_keeper)


@pytest.mark.parametrize(
    ("path", "body", "ask"),
    [
        ("/v1/chat/completions", CHAT | {"max_tokens": 5}, Ask(tenant="local", adapter=None, tokens=5, beginning="hi")),
        (
            "/v1/chat/completions",
            {"model": f"{BASE}:bot@3", "messages": [{"role": "user", "content": "x" * 999}]},
            Ask(tenant="local", adapter="bot", tokens=64 + 250, beginning="x" * 256),
        ),
        (
            "/v1/completions",
            {"model": "acme/bot", "prompt": ["one", "two"], "max_tokens": 1},
            Ask(tenant="acme", adapter="bot", tokens=1, beginning="one"),
        ),
        (
            "/v1/responses",
            {"model": "bot", "input": "say", "max_output_tokens": 2},
            Ask(tenant="local", adapter="bot", tokens=2, beginning="say"),
        ),
        (
            "/api/models/1_model_adapter/complete",
            {"query": "q"},
            Ask(tenant="acme", adapter="bot", tokens=64, beginning="q"),
        ),
        (
            "/api/models/1_base_ml_model/complete",
            {"query": "q"},
            Ask(tenant="local", adapter=None, tokens=64, beginning="q"),
        ),
        (
            "/v1/completions",
            {"model": f"{BASE}:{FT}:ckpt-step-4", "prompt": "x"},
            Ask(tenant="acme", adapter="bot", tokens=64, beginning="x"),
        ),
        (
            "/v1/chat/completions",
            {"model": 5, "messages": "x"},
            Ask(tenant="local", adapter=None, tokens=64, beginning="x"),
        ),
        (
            "/v1/completions",
            {"model": "bot", "prompt": "x", "max_tokens": 10**30},
            Ask(tenant="local", adapter="bot", tokens=2**20, beginning="x"),
        ),
        ("/v1/chat/completions", [1, 2], Ask(tenant="local", adapter=None, tokens=64, beginning="")),
    ],
)
def test_what_the_router_is_asked(two, path, body, ask):
    app, peers = front(two[0][1])
    with serving(app) as url:
        sent = len(httpx2.post(url + path, json=body).request.content) // 4
    (asked,) = peers.router.asks
    prompt = 250 if "x" * 999 in json.dumps(body) else 0
    assert (asked.tenant, asked.adapter, asked.beginning) == (ask.tenant, ask.adapter, ask.beginning)
    assert asked.tokens == ask.tokens - prompt + sent


def test_a_replica_learns_with_a_request_what_the_models_job_has_made(two):
    (_, first), (_, second) = two
    first.fails_after = 0
    with serving(front(first, second)[0]) as url:
        httpx2.post(url + "/v1/completions", json={"model": FT, "prompt": "x"})
        httpx2.get(url + f"/v1/models/{FT}:ckpt-step-4")
        httpx2.post(url + "/v1/completions", json={"model": "acme/bot", "prompt": "x"})
    assert [scope["state"].get(JOB) for scope, _ in first.asked + second.asked] == [JOB_NAME] * 3 + [None]


def test_a_name_that_cannot_be_looked_up_just_now_is_to_be_asked_again(two):
    with serving(front(two[0][1])[0]) as url:
        response = httpx2.post(url + "/v1/completions", json={"model": AWAY, "prompt": "x"})
    assert (response.status_code, response.headers["retry-after"], two[0][1].asked) == (503, "1", [])
    assert response.json()["error"]["code"] == StorageAway.code


def test_a_replica_gone_before_its_answer_is_passed_over(two):
    (_, first), (_, second) = two
    first.fails_after = 0
    app, peers = front(first, second)
    with serving(app) as url:
        response = httpx2.post(url + "/v1/chat/completions", json=CHAT)
        assert httpx2.post(url + "/v1/chat/completions", json=CHAT).status_code == 200
    assert (response.status_code, response.json()["choices"][0]["message"]["content"]) == (200, "Grüße 🌍 0.0")
    assert (len(first.asked), len(second.asked)) == (1, 2)
    assert (peers.router.left, list(peers.replicas)) == (["a"], ["b"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_sent_to_two_at_most(two, stream):
    (_, first), (_, second) = two
    first.fails_after = second.fails_after = 0
    third = fake_server()[1]
    with serving(front(first, second, third)[0]) as url:
        response = httpx2.post(url + "/v1/chat/completions", json=CHAT | {"stream": stream})
    assert (response.status_code, response.headers["retry-after"], third.asked) == (503, "1", [])
    assert response.json()["error"]["code"] == Unavailable.code


def test_a_stream_that_breaks_ends_with_an_error(two):
    (_, first), (_, second) = two
    first.fails_after = 3
    with serving(front(first, second)[0]) as url:
        response = httpx2.post(url + "/v1/chat/completions", json=CHAT | {"stream": True})
    *_, error, done = events(response)
    assert (response.status_code, done, second.asked) == (200, "[DONE]", [])
    assert json.loads(error)["error"]["type"] == "server_error"


def test_the_client_library_raises_for_it(two):
    (_, first), _ = two
    first.fails_after = 3
    with (
        serving(front(first)[0]) as url,
        openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.APIError, match="stopped before the answer was complete"),
    ):
        list(client.chat.completions.create(model=BASE, messages=HI, stream=True))


def test_an_answer_in_one_piece_that_breaks_is_cut(two):
    (_, first), (_, second) = two
    first.fails_after = 1
    with serving(front(first, second)[0]) as url, pytest.raises(httpx2.RemoteProtocolError):
        httpx2.post(url + "/v1/chat/completions", json=CHAT)
    assert second.asked == []


def test_a_refusal_is_taken_to_another_and_the_last_one_is_told():
    full = {"submit_error": Overloaded("the queue is full; retry later"), "admit": 0}
    (_, first), (_, second), (_, third) = fake_server(**full), fake_server(), fake_server(**full)
    with serving(front(first, second)[0]) as url:
        assert httpx2.post(url + "/v1/chat/completions", json=CHAT).status_code == 200
    for replicas in ((first, third), (first,)):
        app, peers = front(*replicas)
        with serving(app) as url:
            response = httpx2.post(url + "/v1/chat/completions", json=CHAT)
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert response.json()["error"]["code"] == Overloaded.code
        assert peers.router.left == []


def test_without_servers_it_says_so():
    with serving(front()[0]) as url:
        for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/files"), ("GET", "/ready")):
            response = httpx2.request(method, url + path, json=None if method == "GET" else CHAT)
            assert (response.status_code, response.headers["retry-after"]) == (503, "1")


def test_whoever_leaves_frees_what_the_request_holds(two):
    (backend, peer), _ = two
    backend.hang_after = 3
    app, peers = front(peer)
    with serving(app) as url:
        with httpx2.stream("POST", url + "/v1/chat/completions", json=CHAT | {"stream": True}) as response:
            next(response.iter_bytes())
        assert backend.streams[0].cancelled.wait(5)
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(url + "/v1/chat/completions", json=CHAT, timeout=0.5)
        assert backend.streams[1].cancelled.wait(5)
        deadline = time.monotonic() + 5
        while peer.closed < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert (peer.closed, peers.router.open) == (2, set())


def test_a_large_body_comes_in_parts_and_whole():
    seen = []

    async def app(scope, receive, send):
        more, got = True, b""
        while more:
            message = await receive()
            got, more = got + message["body"], message["more_body"]
        seen.append(got)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    peers, sent = Peers(Router(RouterSection())), bytes(range(256)) * (CHUNK_BYTES // 100)
    peers.keeper = peer = LocalPeer(app)
    kept = []

    async def keep(data):
        kept.append(data)

        async def part():
            return data

        return part()

    relay = Relay(peers, base_name=BASE, default_max_tokens=64, keep=keep, find=None)
    config = AppConfig(default_max_tokens=64, body_limits={"/v1/files": 10**9})
    with serving(Gate(relay, config, ErrorShapes({}))) as url:
        assert httpx2.post(url + "/v1/files", content=sent).text == "ok"
    assert seen == [sent]
    assert len(peer.asked[0][1]) == len(kept) + 1 > 2
    assert all(len(part) < 2 * CHUNK_BYTES for part in kept)


def test_the_id_is_the_same_on_both_sides(two):
    (_, peer), _ = two
    with serving(front(peer)[0]) as url:
        response = httpx2.post(url + "/v1/chat/completions", json=CHAT)
    assert peer.asked[0][0]["state"] == {"request_id": response.headers["x-request-id"]}


def test_what_another_process_reads_is_plain(two):
    """Nothing of the front's own objects is carried along."""
    (_, peer), _ = two
    with serving(front(peer)[0]) as url:
        httpx2.post(url + "/v1/chat/completions?x=1", json=CHAT)
    scope, body = peer.asked[0]
    flat = json.dumps(scope, default=lambda value: value.decode("latin-1"))
    assert (scope["query_string"], body[0][:1], "caller" in flat) == (b"x=1", b"{", False)


def test_an_app_that_fails_after_it_began_is_cut():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        raise RuntimeError("a mistake of ours")

    async def read():
        async for _ in answered(app, {}, [b""]):
            pass

    with pytest.raises(RuntimeError, match="a mistake of ours"):
        asyncio.run(read())
