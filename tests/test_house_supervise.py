"""`jaxlora serve --supervise` over the tiny model: its device fails or hangs, clients are told, and it is up again with its job."""

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
from queue import SimpleQueue

import httpx2
import openai
import pytest
from small_world import tiny_path
from test_house_kill import CONFIG, STEPS, finished, job_of

TESTS = Path(__file__).parent
MODEL = "tiny-llama-tied"


@contextlib.contextmanager
def server(folder: Path, *flags: str):
    """(process, queue of the URLs at which its servers answer, one after another)."""
    (folder / "serve.toml").write_text("hang_s = 1.0\n" + CONFIG.format(model=tiny_path(MODEL)))
    command = [sys.executable, str(TESTS / "lost_child.py"), str(folder), "serve", str(folder / "serve.toml"), *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    urls: SimpleQueue[str] = SimpleQueue()

    def read(lines) -> None:
        for line in lines:
            if found := re.search(r"on (http://\S+)/v1", line):
                urls.put(found[1])

    with (
        (folder / "log.txt").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process,
    ):
        threading.Thread(target=read, args=[process.stdout], daemon=True).start()
        try:
            yield process, urls
        finally:
            process.kill()


def log_of(folder: Path) -> str:
    return (folder / "log.txt").read_text()


def events_of(url: str) -> list[str]:
    """The data of all events of a stream, which must end in time."""
    body = {"model": MODEL, "prompt": "x", "max_tokens": 120, "ignore_eos": True, "stream": True}
    with httpx2.stream("POST", url + "/v1/completions", json=body, timeout=60) as answer:
        return [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]


def break_it(folder: Path, how: str, url: str) -> list[str]:
    """Breaks the device in the middle of a stream; its events."""
    threading.Timer(0.5, (folder / how).touch).start()
    return events_of(url)


def check_broken(events: list[str]) -> None:
    assert len(events) > 3, events
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["code"] == "internal_error"
    assert all("error" not in json.loads(event) for event in events[:-2])


@pytest.mark.slow
@pytest.mark.parametrize(("how", "reason"), [("fail", "it ended"), ("hang", "/health says 503 for 5 s")])
def test_a_server_whose_device_is_lost_is_up_again_and_its_job_goes_on(tmp_path, how, reason):
    with server(tmp_path, "--supervise", "--log", "json") as (process, urls):
        url = urls.get(timeout=120)
        with openai.OpenAI(base_url=url + "/v1", api_key="none", timeout=30) as client:
            job = job_of(client, tmp_path)
        check_broken(break_it(tmp_path, how, url))
        url = urls.get(timeout=120)
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
    told = [json.loads(line) for line in log_of(tmp_path).splitlines() if line.startswith("{")]
    (restart,) = [line for line in told if line["event"] == "the server failed and is started again"]
    assert (restart["reason"], restart["exit_code"], restart["restarts"]) == (reason, 1, 1)
    assert sum(line["event"] == "server answers" for line in told) == 2


@pytest.mark.slow
def test_a_server_whose_device_hangs_ends_when_it_is_told_to(tmp_path):
    """Nothing but a kill would end it, if it waited for the device thread."""
    with server(tmp_path) as (process, urls):
        url = urls.get(timeout=120)
        events: list[str] = []
        reader = threading.Thread(target=lambda: events.extend(break_it(tmp_path, "hang", url)))
        reader.start()
        deadline = time.monotonic() + 20
        while httpx2.get(url + "/health").status_code == 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1
        reader.join(10)
        check_broken(events)
    assert "the device is lost" in log_of(tmp_path)
