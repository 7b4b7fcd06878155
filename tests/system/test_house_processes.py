"""`jaxlora train` by two processes that hold one mesh: what it leaves is what one process leaves on the same mesh.

Tolerances are those of test_house_mesh: losses 1e-5 of the largest, weights 2e-5.
"""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_world import tiny_path
from test_train_run_losses import CHATS, PAIRS, ROLLOUTS

from jaxlora.config.base import MeshSection, ModelSection
from jaxlora.config.serving import ServeConfig
from jaxlora.core.errors import ConfigInvalid
from jaxlora.model import multihost
from jaxlora.model.mesh import make_mesh
from jaxlora.storage.adapter_store import AdapterStore

ROOT = Path(__file__).parents[2]
DEVICES = 4
TENANTS = {  # eps well above rounding: an update of a near-zero gradient is not a coin toss
    "chat": (CHATS, 'rank = 4\ntargets = ["q_proj", "down_proj", "lm_head"]\ndropout = 0.2\nclip = 0.5'),
    "pair": (PAIRS, 'rank = 2\nloss = "dpo"'),
    "play": (ROLLOUTS, 'rank = 1\nloss = "dro"'),
}
WAIT_S = 240
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # several processes compile anew


def write_job(folder: Path, count: int, steps: int) -> Path:
    """A file of three tenants on a mesh of 2x1x2."""
    tenants = []
    for seed, (name, (lines, settings)) in enumerate(TENANTS.items()):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        tenants.append(f"""
[[tenant]]
name = "{name}"
train = "{name}.jsonl"
heldout = "{name}.jsonl"
alpha = 4.0
lr = 1e-2
eps = 1e-2
schedule = "constant"
warmup_steps = 0
weight_decay = 0.1
batch = 2
seed = {seed}
{settings}
""")
    path = folder / "job.toml"
    path.write_text(f"""
out = "out"
lanes = 4
lane_tokens = 64
slots = 3
max_rank = 4
steps = {steps}
save_every = 1000
model = {{path = "{tiny_path("tiny-llama-tied")}", dtype = "float32"}}
mesh = {{data = 2, fsdp = 1, tensor = 2, processes = {count}}}
{"".join(tenants)}""")
    return path


def start(job: Path, count: int) -> list[subprocess.Popen]:
    """The command in as many processes, which share four virtual devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}"}
    return [start_one(job, count, i, place) for i in range(count)]


def start_one(job: Path, count: int, i: int, place: dict[str, str]) -> subprocess.Popen:
    """One of them; every warning is an error."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // count} {QUICK}",
        "PYTHONPATH": str(ROOT),
        "PYTHONHASHSEED": str(i),
        "COLUMNS": "200",
        "JAX_PROCESS_ID": str(i),
    }
    command = [sys.executable, "-W", "error", "-m", "serve.cli.main", "train", str(job)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env | place, cwd=job.parent, **pipes)


def ended(started: list[subprocess.Popen], code: int) -> list[str]:
    """What each of them printed, when all have ended with this code."""
    try:
        printed = [process.communicate(timeout=WAIT_S) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [p.returncode for p in started] == [code] * len(started), printed
    return [out + err for out, err in printed]


def rows(job: Path, name: str) -> list[dict[str, str]]:
    """A tenant's metrics.csv."""
    path = job.parent / "out" / name / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def compare(two: Path, one: Path, steps: int) -> None:
    """What the two jobs left is the same: every step of every tenant, written once, and what it made of the weights."""
    for name in TENANTS:
        got, want = rows(two, name), rows(one, name)
        assert [row["step"] for row in got] == [str(n) for n in range(1, steps + 1)]
        assert [row["step"] for row in want] == [row["step"] for row in got]
        for column in ("loss", "grad_norm", "accuracy", "tokens"):
            x, y = (np.array([float(row[column]) for row in found]) for found in (got, want))
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max(), err_msg=f"{name} {column}")
        got, want = (load_file(job.parent / "out" / name / "peft/adapter_model.safetensors") for job in (two, one))
        assert got.keys() == want.keys()
        for key, y in want.items():
            np.testing.assert_allclose(got[key], y, rtol=0, atol=2e-5, err_msg=f"{name} {key}")
        assert max(np.abs(y).max() for key, y in want.items() if "lora_B" in key) > 1e-3
    entries = [sorted(p.relative_to(job.parent) for p in (job.parent / "out").iterdir()) for job in (two, one)]
    assert entries[0] == entries[1]
    store = AdapterStore(two.parent / "out/store", host_bytes=10**8)
    assert sorted((ref.name, ref.version) for ref in store.list(None)) == [(name, 1) for name in sorted(TENANTS)]
    store.close()


def jobs(tmp_path: Path, steps: int) -> tuple[Path, Path]:
    """The same file for two processes and for one, in folders of their own."""
    for folder in ("two", "one"):
        (tmp_path / folder).mkdir()
    return write_job(tmp_path / "two", 2, steps), write_job(tmp_path / "one", 1, steps)


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_the_lead_alone_prints_and_writes(tmp_path):
    two, one = jobs(tmp_path, 4)
    lead, other = ended(start(two, 2), 0)
    ended(start(one, 1), 0)
    compare(two, one, 4)
    assert "held-out examples" in lead
    assert "memory: " in lead, "the plan that both made"
    assert all(name in lead and name not in other for name in TENANTS)


def wait_for_steps(job: Path, started: list[subprocess.Popen]) -> None:
    """Until a tenant has done three steps."""
    until = time.monotonic() + WAIT_S
    while len(rows(job, "chat")) < 3 and time.monotonic() < until and all(p.poll() is None for p in started):
        time.sleep(0.01)


@pytest.mark.fault("C9")
@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_a_process_that_is_killed_ends_the_other(tmp_path, dead):
    job = write_job(tmp_path, 2, 1000)
    started = start(job, 2)
    wait_for_steps(job, started)
    killed_s = time.monotonic()
    started[dead].kill()
    try:
        started[1 - dead].communicate(timeout=WAIT_S)
    finally:
        started[1 - dead].kill()
    started[dead].communicate()
    assert time.monotonic() - killed_s < 60
    assert started[1 - dead].returncode != 0
    assert 3 <= len(rows(job, "chat")) < 1000


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_both_go_on_from_their_checkpoint(tmp_path):
    two, one = jobs(tmp_path, 1000)
    started = start(two, 2)
    wait_for_steps(two, started)
    started[1].send_signal(signal.SIGINT)
    lead, _ = ended(started, 130)
    assert "every state is saved in out" in lead
    steps = {name: max(int(p.name) for p in (two.parent / "out" / name / "state").iterdir()) for name in TENANTS}
    assert all(3 <= step < 1000 for step in steps.values())
    last = max(steps.values()) + 2
    for count, job in ((2, two), (1, one)):
        write_job(job.parent, count, last)
    lead, _ = ended(start(two, 2), 0)
    for name, step in steps.items():
        assert f"{name}: step {step} of {last}, from its checkpoint" in lead
    ended(start(one, 1), 0)
    compare(two, one, last)


# what is refused


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID must be a number from 0 to 1, got '2'"),
        ({"JAX_COORDINATOR_ADDRESS": "here"}, "JAX_COORDINATOR_ADDRESS must be host:port of process 0, got 'here'"),
    ],
)
def test_an_impossible_place_is_refused(monkeypatch, environment, told):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigInvalid, match=told):
        multihost.join(2)


@pytest.mark.slow
def test_a_process_that_does_not_know_where_to_meet_is_refused(tmp_path):
    (printed,) = ended([start_one(write_job(tmp_path, 2, 1), 2, 1, {})], 2)
    assert "Set JAX_COORDINATOR_ADDRESS to host:port of process 0" in printed
    assert not (tmp_path / "out").exists()


def test_a_mesh_must_hold_devices_of_every_process():
    devices = [SimpleNamespace(process_index=i // 2) for i in range(4)]
    with pytest.raises(ConfigInvalid, match="a mesh of 1x1x2 leaves process 1 without a device in it; there are 4"):
        make_mesh(tensor=2, devices=devices)


def test_a_server_runs_in_one_process():
    mesh = MeshSection(data=2, fsdp=1, tensor=1, processes=2)
    with pytest.raises(ValueError, match=r"mesh\.processes must be 1"):
        ServeConfig(model=ModelSection(path="smollm2"), mesh=mesh)
