"""Where adapters lie on three replicas that are processes: in few places, and a hot one in more for as long as it is hot."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from cluster_world import CONFIG
from small_world import tiny_path

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra `ray`"),
]
CHILD = Path(__file__).parents[1] / "support/residence_child.py"


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What the child prints: 64 adapters over 4 slots of each of three replicas."""
    folder = tmp_path_factory.mktemp("residence")
    text = CONFIG.format(model=tiny_path("tiny-llama-tied")).replace("slots = 3\n", "slots = 4\n", 1)
    # A third of the usual time, so that the test need not wait for longer.
    (folder / "serve.toml").write_text(text + "[cluster.router]\nfall_s = 10.0\n")
    with (folder / "log.txt").open("w") as log:
        child = subprocess.run(
            [sys.executable, str(CHILD), str(folder)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            check=False,
            timeout=280,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
    assert child.returncode == 0, child.stdout[-2000:] + (folder / "log.txt").read_text()[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


def test_few_adapters_lie_twice(said):
    ours, round_robin = (statistics.mean(said["twice"][name]) for name in ("Ours", "RoundRobin"))
    print(f"twice: {ours:.1%} by the router, {round_robin:.1%} by round robin, of {said['asked']} requests")
    assert min(len(looks) for looks in said["twice"].values()) >= 12
    assert ours <= 0.1
    assert ours < round_robin / 2


def test_a_hot_adapter_goes_to_three_replicas_and_comes_back(said):
    print(f"replicas that served it, in each five seconds: {said['hot']}")
    assert said["hot"][0] == 3
    assert said["hot"][1] == 3
    assert said["hot"][-2:] == [1, 1]
