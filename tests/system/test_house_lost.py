"""`jaxlora serve` over the tiny model, whose device fails or hangs: clients are told, it exits with 1, and the next process goes on with its job."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import openai
import pytest
from small_world import tiny_path
from test_house_kill import CONFIG, STEPS, finished, job_of

TESTS = Path(__file__).parents[1] / "support"
MODEL = "tiny-llama-tied"


@contextlib.contextmanager
def server(folder: Path):
    """(process, its URL)."""
    (folder / "serve.toml").write_text("hang_s = 2.0\n" + CONFIG.format(model=tiny_path(MODEL)))
    command = [sys.executable, str(TESTS / "lost_child.py"), str(folder), "serve", str(folder / "serve.toml")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    with (
        (folder / "log.txt").open("a") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process,
    ):
        try:
            assert process.stdout is not None
            urls = (found[1] for line in process.stdout if (found := re.search(r"on (http://\S+)/v1", line)))
            yield process, next(urls)
        finally:
            process.kill()


def log_of(folder: Path) -> str:
    return (folder / "log.txt").read_text()


def break_it(folder: Path, how: str, url: str) -> list[str]:
    """Breaks the device in the middle of a stream, which must end in time; the data of its events."""
    body = {"model": MODEL, "prompt": "x", "max_tokens": 120, "ignore_eos": True, "stream": True}
    events = []
    with httpx2.stream("POST", url + "/v1/completions", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: "):
                continue
            events.append(line.removeprefix("data: "))
            if len(events) == 3:
                (folder / how).touch()
    return events


def check_broken(events: list[str]) -> None:
    assert len(events) > 3, events
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["code"] == "internal_error"
    assert all("error" not in json.loads(event) for event in events[:-2])


def await_bad_health(url: str) -> None:
    deadline = time.monotonic() + 20
    while httpx2.get(url + "/health").status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.fault("C4")
@pytest.mark.slow
@pytest.mark.parametrize("how", ["fail", "hang"])
def test_a_server_whose_device_is_lost_exits_with_1_and_the_next_one_goes_on_with_its_job(tmp_path, how):
    """One that fails ends by itself.  One that hangs says so in /health, and ends when it is told to, as nothing but a
    kill would if it waited for the device thread."""
    with server(tmp_path) as (process, url):
        with openai.OpenAI(base_url=url + "/v1", api_key="none", timeout=30) as client:
            job = job_of(client, tmp_path)
        events: list[str] = []
        reader = threading.Thread(target=lambda: events.extend(break_it(tmp_path, how, url)))
        reader.start()
        if how == "hang":
            await_bad_health(url)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1
        reader.join(10)
        check_broken(events)
    assert "the device is lost" in log_of(tmp_path)
    with server(tmp_path) as (process, url):
        with openai.OpenAI(base_url=url + "/v1", api_key="none", timeout=30) as client:
            done = finished(client, job.id)
            seen = {
                e.data["step"] for e in client.fine_tuning.jobs.list_events(job.id, limit=100) if e.type == "metrics"
            }
            assert sorted(seen) == list(range(1, STEPS + 1))
            answer = client.completions.create(model=done.fine_tuned_model, prompt="say", max_tokens=4)
            assert answer.choices[0].finish_reason
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
