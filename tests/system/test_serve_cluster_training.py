"""`jaxlora up` with trainers as processes: jobs end as on one server, though trainers are killed and drained meanwhile."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
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


def test_killed_and_drained_trainers_change_no_result(tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    with running("serve", alone, MODEL) as one, client_of(one.url) as client:
        wanted = [result_of(alone, client, begun(client, alone, seed), seed) for seed in range(JOBS)]
        assert one.stop() == 0
    assert all(one != other for n, one in enumerate(wanted) for other in wanted[:n])
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
