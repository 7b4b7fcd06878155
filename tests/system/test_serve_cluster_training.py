"""`jaxlora up` with trainers as processes: jobs end as on one server, though trainers are killed and drained meanwhile."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
from pathlib import Path

import openai
import pytest
import up_child
from cluster_world import running, until
from small_world import tiny_path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra `ray`"),
]
MODEL = tiny_path("tiny-llama-tied")
BY_LOAD = """
most_trainers = 2
[cluster.scaling]
waiting_jobs = 1
job_wait_s = 1
idle_s = 5
"""
STEPS, JOBS = 200, 4
HOW = {"lora": {"r": 2}, "max_steps": STEPS, "checkpoint_every": 25, "learning_rate": 0.01}


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url + "/v1", api_key="none", timeout=60, max_retries=60)


def begun(client: openai.OpenAI, folder: Path, seed: int) -> str:
    lines = [{"prompt": f"say {i}", "completion": f" word{i}"} for i in range(8)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    file = client.files.create(file=folder / "train.jsonl", purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny-llama-tied", training_file=file.id, seed=seed, suffix=f"job-{seed}", extra_body=HOW
    )
    return job.id


def finished(client: openai.OpenAI, id: str):
    def ended():
        job = client.fine_tuning.jobs.retrieve(id)
        assert job.status in ("validating_files", "queued", "running", "succeeded"), job
        return job.status == "succeeded" and job

    return until(ended, 240)


def result_of(folder: Path, client: openai.OpenAI, id: str, seed: int) -> dict[str, bytes]:
    """The weights that a job has made, as they lie on the disk: its newest version."""
    finished(client, id)
    (name,) = (folder / "adapters").glob(f"adapters/*/job-{seed}")
    weights = max((v for v in name.iterdir() if v.name.isdigit()), key=lambda v: int(v.name)) / "weights"
    found = {str(f.relative_to(weights)): f.read_bytes() for f in weights.glob("*/[0-9]*")}
    assert len(found) >= 14, "two for each of seven projections"
    return found


@pytest.fixture(scope="module")
def wanted(tmp_path_factory) -> list[dict[str, bytes]]:
    """What the jobs make on one server."""
    alone = tmp_path_factory.mktemp("alone")
    with running("serve", alone, MODEL) as one, client_of(one.url) as client:
        made = [result_of(alone, client, begun(client, alone, seed), seed) for seed in range(JOBS)]
        assert one.stop() == 0
    assert all(one != other for n, one in enumerate(made) for other in made[:n])
    return made


def test_trainers_come_by_the_line_and_go(tmp_path, wanted):
    """From none to two and back; jobs that waited at the keeper move, and end as on one server."""
    with running("up", tmp_path, MODEL, more=BY_LOAD, replicas=1) as up, client_of(up.url) as client:
        assert up.pids("trains") == []
        ids = [begun(client, tmp_path, seed) for seed in range(JOBS)]
        began = time.monotonic()
        until(lambda: len(up.pids("trains")) == 2, 120)
        print(f"two trainers were there after {time.monotonic() - began:.1f} s")
        assert [result_of(tmp_path, client, id, seed) for seed, id in enumerate(ids)] == wanted
        until(lambda: not up.pids("trains"), 120)
        assert up.stop() == 0


def test_killed_and_drained_trainers_change_no_result(tmp_path, wanted):
    together = tmp_path
    program = (up_child.__file__, "trainer-1")
    with running("up", together, MODEL, program=program, replicas=1, trainers=2) as up, client_of(up.url) as client:
        ids = [begun(client, together, seed) for seed in range(JOBS)]
        until(lambda: [client.fine_tuning.jobs.retrieve(id).status for id in ids].count("running") >= 3, 120)
        (first,) = up.pids("trains, as trainer-0")
        os.kill(first, signal.SIGKILL)
        up.process.send_signal(signal.SIGUSR1)
        until(lambda: "trainer-1 is drained" in up.log.read_text(), 60)
        assert [result_of(together, client, id, seed) for seed, id in enumerate(ids)] == wanted
        until(lambda: len(up.pids("trains")) == 2, 60)
        for id in ids:
            steps = [e.data["step"] for e in client.fine_tuning.jobs.list_events(id, limit=100) if e.type == "metrics"]
            assert max(steps) == STEPS
        assert up.stop() == 0
