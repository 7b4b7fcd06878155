"""A tenant that floods what comes before the engine, beside a quiet one: bodies, tokenising, threads, lists that wait."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from fake_backend import BASE, HI, ByteTokenizer, FakeBackend, serving

from jaxlora.config.serving import LimitsSection, NamedLimits
from serve.access.caller import Caller
from serve.access.rate_limit import Limiter
from serve.api.jobs.routes import JobsRoutes
from serve.db.database import Database
from serve.db.jobs import StoredJobs
from serve.http.idempotency import Once
from serve.server.app import create_app
from serve.server.gate import AppConfig

FLOOD = next(p for p in Path(__file__).parents if p.name == "tests") / "support" / "flood_child.py"
CROWD = 40  # more than any pool of threads has
TEXTS = {  # route → its body with a text
    "/v1/chat/completions": lambda text: {"model": BASE, "messages": [{"role": "user", "content": text}]},
    "/v1/completions": lambda text: {"model": BASE, "prompt": text},
    "/v1/responses": lambda text: {"model": BASE, "input": text},
    "/tokenize": lambda text: {"prompt": text},
}


class WatchedTokenizer(ByteTokenizer):
    """Counts what it is given; a text with SLOW in it waits for `gate`."""

    def __init__(self):
        self.texts, self.gate, self.held = 0, threading.Event(), threading.Event()

    def encode(self, text, **how):
        self._see(text)
        return super().encode(text, **how)

    def chat(self, messages, **how):
        self._see(str(messages))
        return super().chat(messages, **how)

    def _see(self, text):
        self.texts += 1
        if "SLOW" in text:
            self.held.set()
            assert self.gate.wait(20)


def by_header(connection) -> Caller:
    return Caller(owner=connection.headers["x-tenant"], admin=False)


@contextlib.contextmanager
def server(backend: FakeBackend, limits: LimitsSection | None = None, **how):
    """Yields what posts a body as a tenant."""
    config = AppConfig(default_max_tokens=8, caller_of=by_header, limiter=Limiter(limits or LimitsSection()), **how)
    with (
        serving(create_app(backend, config)) as url,
        httpx2.Client(base_url=url, timeout=20, limits=httpx2.Limits(max_connections=None)) as client,
    ):

        def post(tenant: str, path: str, body: dict | None = None, content: bytes | None = None) -> httpx2.Response:
            headers = {"x-tenant": tenant, "content-type": "application/json"}
            return client.post(path, content=json.dumps(body) if content is None else content, headers=headers)

        post.client = client
        yield post


@pytest.mark.parametrize("path", TEXTS)
def test_a_tenant_at_its_limit_has_nothing_tokenised(path):
    limits = LimitsSection(tenant=(NamedLimits(name="spent", requests_per_minute=1),))
    backend = FakeBackend(tokenizer=WatchedTokenizer())
    with server(backend, limits) as post:
        assert post("spent", path, TEXTS[path]("hi")).status_code == 200
        seen = backend.tokenizer.texts
        refused = [post("spent", path, TEXTS[path]("hi " * 40)) for _ in range(5)]
        assert [r.status_code for r in refused] == [429] * 5
        assert all(int(r.headers["retry-after"]) >= 1 for r in refused)
        assert backend.tokenizer.texts == seen
        assert post("other", path, TEXTS[path]("hi")).status_code == 200


@pytest.mark.parametrize("path", TEXTS)
def test_a_text_that_cannot_fit_the_context_is_not_tokenised(path):
    backend = FakeBackend(tokenizer=WatchedTokenizer())
    longest = max(len(backend.tokenizer.token_bytes(i)) for i in range(backend.tokenizer.vocab_size))
    with server(backend) as post:
        answer = post("acme", path, TEXTS[path]("x" * (longest * backend.context + 1)))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert str(backend.context) in answer.json()["error"]["message"]
    assert backend.tokenizer.texts == 0


def test_ids_beyond_the_context_are_not_looked_through():
    backend = FakeBackend()
    with server(backend) as post:
        for path, body in (
            ("/detokenize", {"tokens": [1] * 201}),
            ("/v1/completions", {"model": BASE, "prompt": [1] * 201}),
        ):
            answer = post("acme", path, body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_tokenize_and_detokenize_count_as_requests():
    with server(FakeBackend(), LimitsSection(requests_per_minute=2)) as post:
        assert post("acme", "/tokenize", {"prompt": "hi"}).status_code == 200
        assert post("acme", "/detokenize", {"tokens": [65]}).status_code == 200
        assert post("acme", "/detokenize", {"tokens": [65]}).status_code == 429
        assert post("acme", "/tokenize", {"prompt": "hi"}).status_code == 429


@pytest.mark.fault("T7")
def test_a_crowd_of_slow_texts_of_one_tenant_keeps_nobody_elses_waiting():
    backend = FakeBackend(tokenizer=WatchedTokenizer())
    with server(backend) as post, ThreadPoolExecutor(CROWD) as crowd:
        flood = [crowd.submit(post, "flood", "/tokenize", {"prompt": "SLOW"}) for _ in range(CROWD)]
        try:
            assert backend.tokenizer.held.wait(10)
            for path, body in TEXTS.items():
                assert post("quiet", path, body("hi")).status_code == 200
            assert not any(f.done() for f in flood)
        finally:
            backend.tokenizer.gate.set()
        assert {f.result().status_code for f in flood} == {200}


class HeldJobs(StoredJobs):
    """Jobs in a database that somebody else has locked."""

    gate = threading.Event()

    def shown(self, id, sees):
        assert self.gate.wait(20)
        return super().shown(id, sees)


@pytest.mark.fault("C6")
def test_a_crowd_that_waits_for_the_database_keeps_no_chat_waiting(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/jobs.sqlite")
    service = SimpleNamespace(stored=HeldJobs(database), names=None)
    routes = JobsRoutes(service, Once(database), Limiter(LimitsSection()))
    try:
        with server(FakeBackend(), routers=[routes.router()]) as post, ThreadPoolExecutor(CROWD) as crowd:
            headers = {"x-tenant": "flood"}
            flood = [
                crowd.submit(post.client.get, "/v1/fine_tuning/jobs/ftjob-1", headers=headers) for _ in range(CROWD)
            ]
            try:
                for _ in range(3):
                    assert post("quiet", "/v1/chat/completions", {"model": BASE, "messages": HI}).status_code == 200
                assert not any(f.done() for f in flood)
            finally:
                HeldJobs.gate.set()
            assert {f.result().status_code for f in flood} <= {404, 503}
    finally:
        database.close()


@pytest.mark.fault("R1", "T7")
@pytest.mark.parametrize(
    "what", ["values", *(pytest.param(w, marks=pytest.mark.slow) for w in ("too many values", "text", "of no model"))]
)
def test_loops_of_the_largest_bodies_leave_anothers_stream_half_of_its_tokens(what):
    """Eight loops of one tenant; tokens are counted in spans of one length: one alone, and the best of three beside them."""
    ids, text = [1] * 250_000, "x" * 3_300_000
    large = {
        "values": {"model": BASE, "prompt": ids, "user": text},
        "too many values": {"model": BASE, "prompt": ids * 5},
        "text": {"model": BASE, "prompt": text},
        "of no model": {"model": "none", "prompt": ids, "user": text},
    }[what]
    content, span_s = json.dumps(large).encode(), 1.0
    backend = FakeBackend(reply=lambda request: "x" * 5000, context=6000, pace_s=0.002)
    body = {"model": BASE, "messages": HI, "max_tokens": 5000, "stream": True}
    with (
        server(backend) as post,
        post.client.stream("POST", "/v1/chat/completions", json=body, headers={"x-tenant": "quiet"}) as stream,
    ):
        lines = (line for line in stream.iter_lines() if line.startswith("data: "))

        def tokens() -> int:
            ends, count = time.monotonic() + span_s, 0
            while time.monotonic() < ends:
                next(lines)
                count += 1
            return count

        alone = tokens()
        with flood(f"{post.client.base_url}/v1/completions", content) as answers:
            beside = max(tokens() for _ in range(3))
    assert beside >= alone / 2, (alone, beside, answers)


@contextlib.contextmanager
def flood(url: str, content: bytes, loops: int = 8):
    """Inside, another process posts the content in loops; yields its answers by status, which are there afterwards."""
    headers = json.dumps({"x-tenant": "flood", "content-type": "application/json"})
    command = [sys.executable, str(FLOOD), url, str(loops), headers]
    answers: dict[str, int] = defaultdict(int)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            child.stdin.write(f"{len(content)}\n".encode() + content)
            child.stdin.flush()
            assert child.stdout.readline() == b"began\n"
            yield answers
            child.stdin.write(b"\n")
            child.stdin.flush()
            answers |= json.loads(child.stdout.readline())
        finally:
            child.kill()
