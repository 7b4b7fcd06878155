"""A signal to end: not ready and refusing at once, open answers complete or end with an error, exit code 0."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from rich.console import Console
from serve_world import MODEL
from small_world import tiny_path

from jaxlora.config.base import ModelSection
from jaxlora.config.serving import ServeConfig
from serve.demo import command as demo
from serve.demo.tasks import demo_tasks
from serve.observability.logs import logging_to
from serve.runtime.snapshot import TrainingView
from serve.server import build
from serve.server.announcer import Announcer
from serve.server.uvicorn import HttpServer

TESTS = Path(__file__).parents[1] / "support"
TOKENS = 24


@dataclass
class Child:
    """A server in a process of its own."""

    process: subprocess.Popen
    url: str

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=10)

    def ended(self) -> int:
        return self.process.wait(timeout=60)


@contextlib.contextmanager
def server(folder: Path, *, grace_s: float, step_s: float = 0.1) -> Iterator[Child]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, str(TESTS / "drain_child.py"), str(folder), str(grace_s), str(step_s)]
    with subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        try:
            lines = []
            while not any(line.startswith("serving ") for line in lines):
                lines.append(process.stdout.readline())
                assert lines[-1], (lines, process.stderr.read())
            yield Child(process, lines[-1].split()[-1].removesuffix("/v1"))
        finally:
            process.kill()


def body(**changes) -> dict:
    return {"model": "tiny-llama-tied", "prompt": "x", "max_tokens": TOKENS, "ignore_eos": True, "seed": 1} | changes


@dataclass
class Stream:
    """A stream that a thread reads to its end."""

    child: Child
    changes: dict = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    begun: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()
        assert self.begun.wait(30)

    def read(self) -> None:
        asked = body(stream=True, **self.changes)
        with httpx2.stream("POST", self.child.url + "/v1/completions", json=asked, timeout=60) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    self.events.append(line.removeprefix("data: "))
                    self.begun.set()

    def end(self) -> list[str]:
        self.thread.join(60)
        assert not self.thread.is_alive()
        return self.events


def wait_for_door(child: Child) -> httpx2.Response:
    """What /ready says once the signal has arrived."""
    deadline = time.monotonic() + 10
    while (answer := child.get("/ready")).status_code == 200:
        assert time.monotonic() < deadline
    return answer


def check_refused(answer: httpx2.Response) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (503, "unavailable", "server_error")
    assert answer.headers["retry-after"] == "1"
    assert "stopping" in error["message"]


@pytest.mark.fault("C3")
def test_a_server_that_ends_completes_what_is_open_and_takes_nothing_new(tmp_path):
    with server(tmp_path, grace_s=60) as child:
        assert child.get("/ready").json() == child.get("/health").json() == {"status": "ok"}
        stream = Stream(child)
        child.process.send_signal(signal.SIGTERM)
        check_refused(wait_for_door(child))
        check_refused(httpx2.post(child.url + "/v1/completions", json=body(), timeout=10))
        check_refused(child.get("/v1/models"))
        assert child.get("/health").status_code == 200
        events = stream.end()
        assert child.ended() == 0
        assert [line for line in child.process.stderr if "[info" not in line] == []
        told = child.process.stdout.read().splitlines()
        waits = "stopping: 1 open request may take 60 s, or until another signal"
        assert told == [f"now: jaxlora chat --url {child.url}", waits, "stopped"]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
    assert (tmp_path / ".lock").exists()
    made = [path for folder in (tmp_path, tmp_path.with_name("data")) for path in folder.rglob("*")]
    assert {"jaxlora.sqlite", ".lock"} <= {path.name for path in made}
    assert [path for path in made if path.stat().st_mode & 0o077] == []  # whatever this process's umask
    assert all("error" not in json.loads(e) for e in events[:-1])


@pytest.mark.fault("C3")
@pytest.mark.slow
@pytest.mark.parametrize("by", ["time", "second signal"])
def test_what_is_open_when_the_time_is_over_ends_with_an_error_event(tmp_path, by):
    with server(tmp_path, grace_s=1.0 if by == "time" else 600.0, step_s=1.0) as child:
        stream = Stream(child)
        child.process.send_signal(signal.SIGTERM)
        wait_for_door(child)
        if by == "second signal":
            child.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        events = stream.end()
        assert child.ended() == 0
        assert time.monotonic() - began < 15  # of 24 s that the answer takes
        assert "1 requests are open" in child.process.stderr.read()
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["code"] == "unavailable"


@pytest.mark.slow
def test_ctrl_c_ends_alike_but_says_that_it_was_interrupted(tmp_path):
    with server(tmp_path, grace_s=60) as child:
        stream = Stream(child)
        child.process.send_signal(signal.SIGINT)
        check_refused(wait_for_door(child))
        assert json.loads(stream.end()[-2])["choices"][0]["finish_reason"] == "length"
        assert child.ended() != 0
        assert "KeyboardInterrupt" in child.process.stderr.read()


@pytest.mark.slow
def test_a_full_queue_is_refused_with_retry_after(tmp_path):
    with server(tmp_path, grace_s=0, step_s=0.5) as child:
        rows = [Stream(child) for _ in range(4)]
        answers: list[httpx2.Response] = []

        def post() -> None:
            answers.append(httpx2.post(child.url + "/v1/completions", json=body(max_tokens=1), timeout=60))

        waiting = [threading.Thread(target=post, daemon=True) for _ in range(6)]
        for thread in waiting:
            thread.start()
        deadline = time.monotonic() + 10
        while len(answers) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for answer in answers[:4]:
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
            assert answer.headers["retry-after"] == "1"
        child.process.send_signal(signal.SIGTERM)
        assert child.ended() == 0
        for row in rows:
            row.end()


@pytest.mark.parametrize(
    ("inside", "jobs", "told"),
    [
        (0, None, "stopping: nothing is open"),
        (0, {"paused": 3}, "stopping: nothing is open"),
        (2, {"running": 0}, "stopping: 2 open requests may take 30 s, or until another signal"),
        (
            1,
            {"running": 1, "queued": 2, "validating_files": 1, "paused": 5},
            "stopping: 1 open request may take 30 s, or until another signal; "
            "4 jobs will stop at a checkpoint and go on at the next start",
        ),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_who_stops_a_server_is_told_what_becomes_of_all_that_is_open(inside, jobs, told, as_json, capsys):
    training = None if jobs is None else TrainingView(jobs=jobs)
    watch = SimpleNamespace(snapshot=SimpleNamespace(training=training))
    announcer = Announcer(grace_s=30.0, as_json=as_json)
    with logging_to(as_json=as_json), announcer.until_stopped():
        announcer.ending(watch, 0)
        announcer.ready()
        announcer.ending(watch, inside)
    out, err = capsys.readouterr()
    lines = [json.loads(line)["event"] for line in err.splitlines()] if as_json else out.splitlines()
    assert lines == ["stopping before it is ready; what compiles now ends first", told, "stopped"]
    assert (out if as_json else err) == ""


def test_sigterm_ends_a_start_with_exit_code_0_and_leaves_the_handler_as_it_was(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end, Announcer(grace_s=30.0, as_json=False).until_stopped():
        signal.raise_signal(signal.SIGTERM)
    assert end.value.code == 0
    assert capsys.readouterr().out == "stopped\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_server_answers_while_it_starts_and_lets_nobody_in(tmp_path, monkeypatch):
    """Ctrl-C comes while it compiles; in this process, whose umask and cache of programs stay."""
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)  # stderr stays: uvicorn's logging would close what absl took for it
    monkeypatch.setattr("os.umask", lambda mask: 0)
    monkeypatch.setattr("jaxlora.model.compile_cache.enable", lambda folder: folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    answers, runners, make_runner = [], [], build.make_runner

    def make(*arguments):
        runners.append(make_runner(*arguments))
        return runners[-1]

    def begin(runner, opened, config, own, progress):
        assert runners == [runner], "each has KV pages and slots of its own"
        with progress.stage("compiling", of=4, unit="programs") as stage:
            stage.at(2)
            answers.extend(httpx2.get(f"http://127.0.0.1:{port}{path}") for path in ("/ready", "/health", "/v1/models"))
            raise KeyboardInterrupt

    monkeypatch.setattr(build, "make_runner", make)
    monkeypatch.setattr(build, "begin", begin)
    model = ModelSection(path=str(tiny_path(MODEL)), dtype="float32")
    folders = {"adapters": tmp_path / "store", "data": tmp_path / "data"}
    config = ServeConfig(model=model, port=port, kv_pages=8, host_adapters_gb=0.1, training=None, **folders)
    with pytest.raises(KeyboardInterrupt):
        build.main(config, None)
    for answer in answers:
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (503, "starting")
        assert "the server is starting: compiling 2 of 4 programs, " in error["message"]
    memory, sizes, opened, *ended = out.getvalue().splitlines()
    assert (memory.split(":")[0], sizes.split(":")[0]) == ("memory", "sizes")
    assert opened.startswith(f"opening {MODEL}: ")
    assert ended == ["stopping before it is ready; what compiles now ends first", "stopped"]
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"http://127.0.0.1:{port}/ready")


def test_the_main_thread_never_sleeps_so_long_that_it_misses_a_signal():
    """A join without a limit may: a signal that comes at the wrong moment wakes nobody."""
    limits, alive = [], iter([True, True, True, False])
    thread = SimpleNamespace(is_alive=lambda: next(alive), join=lambda limit=None: limits.append(limit))
    HttpServer(SimpleNamespace(interrupted=False), listening=None, thread=thread).wait()
    assert len(limits) == 3
    assert all(limit is not None and limit <= 1 for limit in limits)


def test_the_demo_goes_on_to_its_end_after_sigterm():
    """What follows the wait drains the server and saves the store."""
    task, before = demo_tasks(0)[0], signal.getsignal(signal.SIGTERM)

    def end() -> None:
        while signal.getsignal(signal.SIGTERM) is before:  # or it would end this process
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()
    demo.wait(Console(quiet=True), "http://127.0.0.1:1", task)
    assert signal.getsignal(signal.SIGTERM) is before
