"""The harness that compares us with others, run for real with ours alone: two tokens of the real model, a training step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_round_of_ours(tmp_path):
    options = ["--peers", "jaxlora", "jaxlora-trainer", "--cases", "8-over-8", "train-alone", "--rounds", "1"]
    options += ["--answer", "2", "--wait-s", "0", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "out/samples.json").read_text())
    assert found["skipped"] == {}
    serving, training = found["samples"]
    assert (serving["peer"], serving["tokens"], len(serving["texts"])) == ("jaxlora", 16, 8)
    assert len(set(serving["texts"])) > 1
    assert (training["peer"], training["tokens"]) == ("jaxlora-trainer", 2 * 4 * 128)
    assert serving["cpu_s"] > 0
    assert training["peak_bytes"] > 10**8
    assert "| jaxlora | " in (tmp_path / "out/table.md").read_text()
