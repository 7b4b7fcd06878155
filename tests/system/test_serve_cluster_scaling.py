"""`jaxlora up` by load: none, one, two replicas and back; and again after Ray's head was killed, ours or the operator's."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest
from cluster_world import Running, running, until
from small_world import tiny_path
from test_house_kill import STEPS, finished, job_of

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra `ray`"),
]
MODEL = tiny_path("tiny-llama-tied")
IDLE_S = 8
SCALING = f"""
most_replicas = 2
[cluster.scaling]
waiting_tokens = 8
rise_s = 1
idle_s = {IDLE_S}
start_s = 110
held = 8
"""
BODY = {"model": "tiny-llama-tied", "prompt": [5, 9, 20], "max_tokens": 6, "temperature": 0}


def ask(url: str, **changes: object) -> httpx2.Response:
    return httpx2.post(f"{url}/v1/completions", json=BODY | changes, timeout=120)


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}").exists()}


def heads(pids: set[int]) -> list[int]:
    """Those of Ray's head."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if b"gcs_server" in Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0]:
                found.append(pid)
    return found


class Asking:
    """So many threads that ask for something long again and again."""

    def __init__(self, url: str, threads: int, pause_s: float, tokens: int):
        self._url, self._pause_s, self._tokens = url, pause_s, tokens
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]
        self.answers: list[httpx2.Response] = []

    def _run(self):
        while not self._over.is_set():
            self.answers.append(ask(self._url, max_tokens=self._tokens, ignore_eos=True))
            self._over.wait(self._pause_s)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture(scope="module")
def up(tmp_path_factory) -> Iterator[Running]:
    with running("up", tmp_path_factory.mktemp("scaling"), MODEL, more=SCALING, replicas=0) as up:
        yield up
        assert up.stop() == 0


def test_none_one_two_one_none(up):
    assert up.pids("reads") == []
    ready = httpx2.get(f"{up.url}/ready").json()
    assert ready == {"status": "ok", "detail": "no replica runs; the next request starts one"}
    assert httpx2.get(f"{up.url}/v1/models").status_code == 200  # which the keeper answers

    began = time.monotonic()
    first = ask(up.url)
    print(f"the first answer came after {time.monotonic() - began:.1f} s")
    assert first.status_code == 200
    assert len(up.pids("reads")) == 1

    with Asking(up.url, 16, 0, 100) as many:
        began = time.monotonic()
        until(lambda: len(up.pids("reads")) == 2, 60)
        print(f"a second one began after {time.monotonic() - began:.1f} s")
        until(lambda: httpx2.get(f"{up.url}/ready").status_code == 200, 60)
    with Asking(up.url, 1, 1, 1) as few:
        until(lambda: len(up.pids("reads")) == 1, 120)
    assert {answer.status_code for answer in [*many.answers, *few.answers]} == {200}

    until(lambda: not up.pids("reads"), IDLE_S + 60)
    with Asking(up.url, 12, 60, 1) as crowd:  # eight of them may wait
        until(lambda: len(crowd.answers) == 4, 60)
        for refused in crowd.answers[:4]:
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "starting")
            assert "a replica is being started for this; retry in ~" in refused.text
            assert 1 <= int(refused.headers["retry-after"]) <= 110
        until(lambda: len(crowd.answers) == 12, 120)
    assert [answer.status_code for answer in crowd.answers[4:]] == [200] * 8
    assert {answer.json()["choices"][0]["text"] for answer in [ask(up.url)]} == {first.json()["choices"][0]["text"]}


def test_all_comes_back_after_rays_head_was_killed(up):
    """A job goes on, and none of the processes before is left to hold the claim."""
    said = ask(up.url).json()["choices"][0]["text"]
    with openai.OpenAI(base_url=up.url + "/v1", api_key="none", timeout=60, max_retries=0) as client:
        job = job_of(client, up.log.parent)
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "running", 60)
        servers = {*up.pids("reads"), *up.pids("writes"), *up.pids("answers")}
        assert len(servers) >= 3
        (head,) = heads(up.below())
        os.kill(head, signal.SIGKILL)
        began = time.monotonic()
        until(lambda: not alive(servers), 60)
        print(f"all servers had ended after {time.monotonic() - began:.1f} s")

        def answers() -> bool:
            try:
                return ask(up.url).status_code == 200
            except httpx2.TransportError:
                return False

        until(answers, 120)
        print(f"answers came again after {time.monotonic() - began:.1f} s")
        assert ask(up.url).json()["choices"][0]["text"] == said
        assert finished(client, job.id).status == "succeeded"
        steps = [e.data["step"] for e in client.fine_tuning.jobs.list_events(job.id, limit=100) if e.type == "metrics"]
        assert max(steps) == STEPS
    log = up.log.read_text()
    assert "Ray's head has not answered for 5 s; all servers end, and it is started again" in log


@contextlib.contextmanager
def operators_ray(port: int) -> Iterator[subprocess.Popen]:
    """A Ray cluster of one machine, which its operator runs; killed at the end, with all of its processes."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        others = taken.getsockname()[1]
    command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--node-ip-address=127.0.0.1", f"--port={port}", f"--node-manager-port={others}"]
    command += ["--num-cpus=4", "--include-dashboard=false", f"--object-store-memory={2**28}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield process
    finally:
        for pid in Running(process, "", Path()).below():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_a_cluster_of_the_operators_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # on 127.0.0.1 alone
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with contextlib.ExitStack() as stack:
        with operators_ray(port) as ray:
            until(lambda: listens(port), 60)
            time.sleep(5)  # its other processes
            up = stack.enter_context(running(f"up --address 127.0.0.1:{port}", tmp_path, MODEL, replicas=1))
            said = ask(up.url).json()["choices"][0]["text"]
            (head,) = heads(Running(ray, "", Path()).below())
            os.kill(head, signal.SIGKILL)
            until(lambda: f"waiting until one is there again at 127.0.0.1:{port}" in up.log.read_text(), 60)
            until(lambda: not up.pids("writes"), 120)
        time.sleep(5)
        assert up.process.poll() is None
        with operators_ray(port):
            until(lambda: "Ray is there again; all servers are started" in up.log.read_text(), 120)
            until(lambda: up.pids("reads") and listens(int(up.url.rsplit(":", 1)[1])), 120)
            assert ask(up.url).json()["choices"][0]["text"] == said
            assert up.stop() == 0
