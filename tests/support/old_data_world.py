"""A server on a folder that another version may have written, asked over HTTP alone: what it shows and what it goes on with."""

from __future__ import annotations

import contextlib
import json
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx2
from fake_backend import serving
from serve_world import MODEL
from small_world import FIXTURES, tiny_path
from whole_world import bearer, joined, whole_config

from jaxlora.checkpoints.load import open_base
from jaxlora.config.base import ONE_DEVICE, ModelSection
from jaxlora.config.serving import SizedTraining
from jaxlora.core.progress import Progress
from jaxlora.storage.adapter_store import AdapterStore

FOLDER = FIXTURES / "data_before_move"
SERVER, RUN = FOLDER / "server.tar.xz", FOLDER / "run.tar.xz"
STEPS, EVERY = 150, 20  # of a job that is interrupted or paused: its updates, and those between two checkpoints
FILES = {
    tenant: "\n".join(json.dumps({"prompt": f"{word} {i}", "completion": f" word{i}"}) for i in range(8)).encode()
    for tenant, word in (("acme", "say"), ("globex", "tell"))
}
TOKENS = 6  # of a completion that is compared
TRAIN = """
out = "out"
lanes = 2
lane_tokens = 32
slots = 2
max_rank = 2
steps = 6
save_every = 2
model = {{path = "{model}", dtype = "float32"}}
[[tenant]]
name = "one"
train = "one.jsonl"
rank = 2
alpha = 4.0
targets = ["q_proj", "v_proj"]
lr = 1e-2
schedule = "linear"
warmup_steps = 1
weight_decay = 0.01
batch = 2
seed = 3
"""


@dataclass(frozen=True)
class Server:
    """One that runs."""

    url: str

    def ask(self, key: str, method: str, path: str, *, status: int = 200, headers: dict | None = None, **body) -> dict:
        """The JSON that it answers."""
        got = httpx2.request(
            method, self.url + path, headers=bearer(key) | (headers or {}), timeout=60, follow_redirects=True, **body
        )
        assert got.status_code == status, (method, path, got.status_code, got.text[:500])
        return got.json()

    def content(self, key: str, file: str) -> bytes:
        """The bytes of a file."""
        got = httpx2.get(f"{self.url}/v1/files/{file}/content", headers=bearer(key), timeout=60)
        assert got.status_code == 200, got.text
        return got.content

    def greedy(self, key: str, model: str, prompt: str, tokens: int = TOKENS) -> tuple[list[int], float]:
        """(greedy tokens after a prompt, how far the best was above the second where that is least)."""
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 2}
        body |= {"ignore_eos": True, "return_tokens_as_token_ids": True}
        said = self.ask(key, "POST", "/v1/completions", json=body)["choices"][0]["logprobs"]
        tops = [sorted(top.values())[-2:] for top in said["top_logprobs"]]
        return [int(t.removeprefix("token_id:")) for t in said["tokens"]], min(best - second for second, best in tops)

    def job(self, key: str, id: str, *statuses: str) -> dict:
        """The job, when it has one of these statuses."""
        deadline = time.monotonic() + 120
        while (job := self.ask(key, "GET", f"/v1/fine_tuning/jobs/{id}"))["status"] not in statuses:
            assert job["status"] in ("validating_files", "queued", "running"), job
            assert time.monotonic() < deadline, job
            time.sleep(0.02)
        return job

    def events(self, key: str, id: str) -> list[dict]:
        """Its events, the oldest first."""
        found: list[dict] = []
        more = True
        while more:
            after = f"&after={found[-1]['id']}" if found else ""
            page = self.ask(key, "GET", f"/v1/fine_tuning/jobs/{id}/events?limit=100{after}")
            found, more = found + page["data"], page["has_more"]
        return found[::-1]

    def steps(self, key: str, id: str) -> list[int]:
        """The updates that its events tell of, in their order."""
        return [e["data"]["step"] for e in self.events(key, id) if e["type"] == "metrics"]


@contextlib.contextmanager
def server(folder: Path) -> Iterator[Server]:
    """A server over the tiny base, whose store and data are in the folder."""
    opened = open_base(ModelSection(path=str(tiny_path(MODEL)), dtype="float32"), ONE_DEVICE)
    settings = replace(
        whole_config(folder),
        slots=2,
        max_rank=4,
        rows=2,
        prefill_lanes=2,
        training=SizedTraining(slots=1, lanes=2, lane_tokens=32, longest_tokens=32, max_rank=4, publish_every=30),
    )
    with (
        contextlib.closing(AdapterStore(settings.adapters, host_bytes=10**8)) as store,
        joined(opened, settings, store) as it,
    ):
        try:
            it.runner.start()
            it.own.jobs.start(Progress(None))
            with serving(it.app) as url:
                yield Server(url)
        finally:
            it.runner.stop()


def unpack(archive: Path, folder: Path) -> Path:
    """The folder, with what is in the archive."""
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder


def expected() -> dict:
    """What the version that wrote the archives said of them, and how it went on."""
    return json.loads((FOLDER / "expected.json").read_text())


def fine_tune(server: Server, key: str, id: str, *, again: str | None = None) -> float:
    """Gradient's call on two samples: nats of all their tokens before it.  again: its Idempotency-Key."""
    headers = {} if again is None else {"idempotency-key": again}
    samples = [{"inputs": "Q: 2+2? A: 4"}, {"inputs": "Q: 3+3? A: 6"}]
    path = f"/api/models/{id}/fine-tune"
    return server.ask(key, "POST", path, json={"samples": samples}, headers=headers)["sumLoss"]


def upload(server: Server, key: str, tenant: str, *, again: str | None = None) -> dict:
    """The tenant's training file; again: its Idempotency-Key."""
    headers = {} if again is None else {"idempotency-key": again}
    form = {"data": {"purpose": "fine-tune"}, "files": {"file": (f"{tenant}.jsonl", FILES[tenant])}}
    return server.ask(key, "POST", "/v1/files", headers=headers, **form)


def write_run(folder: Path) -> Path:
    """The file of a training run in this folder, and what it trains on."""
    (folder / "one.jsonl").write_bytes(FILES["acme"])
    (folder / "job.toml").write_text(TRAIN.format(model=tiny_path(MODEL)))
    return folder / "job.toml"
