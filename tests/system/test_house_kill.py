"""`jaxlora serve` as a process that dies: what was answered is there when it is up again, and a job ends where it ends undisturbed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
from small_world import tiny_path

STEPS = 60
CONFIG = """
host = "127.0.0.1"
port = 0
slots = 2
max_rank = 4
rows = 2
kv_pages = 8
page_tokens = 32
prefill_lanes = 2
prefill_tokens = 32
default_max_tokens = 8
max_waiting = 16
max_waiting_tokens = 4096
max_request_s = 60
grace_s = 10
host_adapters_gb = 0.1
host_kv_gb = 0.1
adapters = "adapters"
data = "data"
[model]
path = "{model}"
dtype = "float32"
[training]
slots = 1
lanes = 2
lane_tokens = 32
publish_every = 4
[tuning]
quantum_ms = 200
"""


@contextlib.contextmanager
def server(folder: Path):
    """(process, client) of a server on this folder; killed if it is still there at the end."""
    (folder / "serve.toml").write_text(CONFIG.format(model=tiny_path("tiny-llama-tied")))
    with (folder / "log.txt").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve.cli.main", "serve", str(folder / "serve.toml")],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        try:
            assert process.stdout is not None
            found = None
            for line in process.stdout:
                if found := re.search(r"on (http://\S+)/v1", line):
                    break
            assert found is not None, (folder / "log.txt").read_text()[-2000:]
            with openai.OpenAI(base_url=found[1].rstrip(",") + "/v1", api_key="none", timeout=30) as client:
                yield process, client
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def job_of(client, folder: Path):
    lines = [{"prompt": f"say {i}", "completion": f" word{i}"} for i in range(8)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    file = client.files.create(file=folder / "train.jsonl", purpose="fine-tune")
    how = {"lora": {"r": 2}, "max_steps": STEPS, "checkpoint_every": 7, "learning_rate": 0.01}
    return client.fine_tuning.jobs.create(model="tiny-llama-tied", training_file=file.id, seed=5, extra_body=how)


def finished(client, id: str):
    end = time.monotonic() + 120
    while (job := client.fine_tuning.jobs.retrieve(id)).status != "succeeded":
        if job.status == "paused":  # it ran at three deaths of the server
            assert job.error.code == "server_died", job
            job = client.fine_tuning.jobs.resume(id)
        assert job.status in ("validating_files", "queued", "running"), job
        assert time.monotonic() < end, job
        time.sleep(0.05)
    return job


def weights(client, name: str) -> bytes:
    """Scores of a text under the model, to the last bit that JSON shows."""
    scored = client.completions.create(model=name, prompt="say 3 word3 and word5", max_tokens=0, echo=True, logprobs=0)
    return json.dumps(scored.choices[0].logprobs.token_logprobs).encode()


def run(folder: Path, kills: int, seed: int) -> tuple[list[int], bytes, object]:
    """A job on a server that is killed so often: (its steps, what its model scores, the job)."""
    draw = random.Random(seed)
    folder.mkdir()
    with server(folder) as (process, client):
        job = job_of(client, folder)
        if kills:
            time.sleep(draw.uniform(0.2, 2.5))
            process.send_signal(signal.SIGKILL)
    for kill in range(kills):
        with server(folder) as (process, client):
            assert client.files.retrieve(job.training_file).status in ("uploaded", "processed")
            if kill < kills - 1:
                time.sleep(draw.uniform(0.0, 1.5))
                process.send_signal(signal.SIGKILL)
                continue
            return ended(client, job.id)
    with server(folder) as (_, client):
        return ended(client, job.id)


def ended(client, id: str) -> tuple[list[int], bytes, object]:
    job = finished(client, id)
    steps = {e.data["step"] for e in client.fine_tuning.jobs.list_events(id, limit=100) if e.type == "metrics"}
    for checkpoint in client.fine_tuning.jobs.checkpoints.list(id, limit=50):
        assert weights(client, checkpoint.fine_tuned_model_checkpoint)  # what is listed can be asked
    return sorted(steps), weights(client, job.fine_tuned_model), job


@pytest.mark.fault("C1")
@pytest.mark.parametrize(
    ("kills", "seed"), [pytest.param(1, 1, marks=pytest.mark.slow), pytest.param(6, 2, marks=pytest.mark.soak)]
)
def test_a_job_ends_where_it_ends_undisturbed(tmp_path, kills, seed):
    _, wanted, _ = run(tmp_path / "undisturbed", 0, 0)
    steps, got, job = run(tmp_path / "killed", kills, seed)
    assert got == wanted
    assert steps == list(range(1, STEPS + 1))
    assert job.progress["step"] == STEPS
