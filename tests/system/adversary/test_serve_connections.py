"""Connections that hold descriptors and send no request: whoever has one to send is answered, and open answers go on."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from fake_backend import BASE

SUPPORT = Path(__file__).parents[2] / "support"
DESCRIPTORS, FLOOD = 256, 276
BODY = {"model": BASE, "prompt": "x", "stream": True, "ignore_eos": True, "max_tokens": 5000}
HALF = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-"


@contextlib.contextmanager
def server(*, header_timeout_s: float) -> Iterator[str]:
    """The URL of a server process with few descriptors."""
    command = [sys.executable, str(SUPPORT / "edge_world.py"), str(DESCRIPTORS), str(header_timeout_s)]
    paths = os.pathsep.join([str(SUPPORT.parents[1]), str(SUPPORT)])
    environment = os.environ | {"PYTHONPATH": paths}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with server(header_timeout_s=3600) as it:
        yield it


def connect(url: str, sent: bytes = HALF) -> socket.socket:
    at = urlsplit(url)
    connection = socket.create_connection((at.hostname, at.port), timeout=20)
    connection.sendall(sent)
    return connection


def stream(url: str, client: httpx2.Client):
    return client.stream("POST", url + "/v1/completions", json=BODY)


@pytest.mark.fault("R1")
def test_half_sent_heads_beyond_all_descriptors_leave_health_and_a_stream_alone(url):
    with httpx2.Client(timeout=20) as client, stream(url, client) as answer, contextlib.ExitStack() as held:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        for _ in range(FLOOD):
            held.enter_context(connect(url))
        for _ in range(3):
            assert httpx2.get(url + "/health", timeout=20).status_code == 200
        for _ in range(5):
            assert next(lines) is not None


def test_the_connection_that_has_waited_longest_makes_room_and_one_that_is_answered_does_not(url):
    with contextlib.ExitStack() as held:
        first = held.enter_context(connect(url))
        for _ in range(FLOOD):
            last = held.enter_context(connect(url))
        assert httpx2.get(url + "/health", timeout=20).status_code == 200
        with contextlib.suppress(ConnectionResetError):
            assert first.recv(100) == b""
        last.sendall(b"a: b\r\n\r\n")
        assert last.recv(100).startswith(b"HTTP/1.1 200")


def test_when_all_are_answered_another_request_is_refused_and_health_is_not(url):
    body = json.dumps(BODY).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    asked = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with contextlib.ExitStack() as held:
        for _ in range(DESCRIPTORS // 2):
            held.enter_context(connect(url, asked))
        answer = httpx2.post(url + "/v1/completions", json=BODY, timeout=20)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert "requests open" in answer.json()["error"]["message"]
        assert httpx2.get(url + "/health", timeout=20).status_code == 200


def test_a_head_that_does_not_come_in_time_is_told_and_a_silent_connection_is_closed():
    with server(header_timeout_s=0.3) as url:
        with connect(url) as begun, connect(url, b"") as silent:
            assert begun.recv(4000).startswith(b"HTTP/1.1 408")
            assert silent.recv(100) == b""
        with httpx2.Client(timeout=20) as client, stream(url, client) as answer:  # a head that came is not measured
            lines = answer.iter_lines()
            for _ in range(5):
                next(lines)
