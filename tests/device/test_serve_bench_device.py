"""`jaxlora bench device`: what it would say on the day, run in short form on this machine; and what it does with trouble."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from jaxlora.core.errors import ConfigInvalid
from pallas_kernels.bench import checks
from serve.bench import device
from serve.bench.device import FULL, SHORT, measure_device
from serve.bench.random_base import SHAPES, open_random
from serve.bench.roofline import weights_bytes
from serve.cli import main as cli


def run(*arguments):
    return CliRunner(env={"NO_COLOR": "1"}).invoke(cli.app, ["bench", "device", *arguments])


@pytest.fixture
def parts(monkeypatch):
    """Has every part of a run do nothing but say its name; a test puts its own in their places."""
    done = []

    def does(name):
        return lambda self, *args: done.append(name)

    for name in ("check", "time_ops", "time_base"):
        monkeypatch.setattr(device._Run, name, does(name))
    monkeypatch.setattr(device, "ceilings", lambda *_args, **_kwargs: device.Ceilings(read_bytes_s=1e9, flops_s=1e9))
    return done


def measured(minutes=1.0):
    return measure_device(SHORT, minutes=minutes, tests=None, say=lambda line: None)


@pytest.mark.slow
def test_the_whole_run_in_short_form(tmp_path):
    result = run("--short", "--output", str(tmp_path / "cpu.json"))
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "cpu.json").read_text())
    assert report["device"] == "cpu: cpu"
    assert report["versions"]["jax"]
    assert {check["op"] for check in report["checks"]} == set(checks.CHECKED)
    assert {row["op"] for row in report["ops"]} == set(device.cases.OPS)
    assert [step["step"] for step in report["steps"]["tiny"]] == list(SHORT.steps)
    (training,) = report["training"]["tiny"]
    assert training["sizes"]["tenants"] == SHORT.tenants
    streams = report["streams"]["tiny"]
    assert streams["training_off"]["count"] == SHORT.streams.streams * (SHORT.streams.tokens - 1)
    assert streams["trained_steps"] > 0
    assert report["left_out"] == report["failed"] == {}


@pytest.mark.parametrize("op", ["rms_norm", "top_k", "draw"])
def test_a_body_that_computes_something_else_is_found(op, monkeypatch):
    assert all(check.passed for check in checks.check(op))
    monkeypatch.setattr(checks, "rms_norm", lambda x, weight, eps: x * 1.03)
    monkeypatch.setattr(checks, "top_k", lambda x, count: (x[:, :count], jnp.zeros((len(x), count), jnp.int32)))
    monkeypatch.setattr(checks, "draw", lambda x, most, choices, filtered: (jnp.zeros(len(x), jnp.int32), most))
    assert not any(check.passed for check in checks.check(op))


def test_a_result_that_is_not_a_number_does_not_pass(monkeypatch):
    monkeypatch.setattr(checks, "rms_norm", lambda x, weight, eps: x * jnp.nan)
    assert not any(check.passed for check in checks.check("rms_norm"))


def test_a_number_that_is_none_is_found_in_any_of_several_results():
    """As those of a gradient are."""
    good, bad = np.ones(3), np.array([1, np.nan, 1])
    assert math.isnan(checks._error([good, bad], [good, good]))
    assert math.isnan(checks._error([bad, good], [good, good]))


def test_a_run_without_time_names_what_it_left_out(parts):
    report = measured(minutes=0.0)
    assert parts == []
    assert report.left_out["a random base of tiny"] == "no time was left"
    assert report.passed  # nothing is wrong


@pytest.mark.parametrize(
    ("error", "where", "passes"), [(MemoryError(), "left_out", True), (RuntimeError("no such kernel"), "failed", False)]
)
def test_a_part_that_fails_is_named_and_the_next_one_runs(error, where, passes, parts, monkeypatch):
    def fails(self, *args):
        raise error

    monkeypatch.setattr(device._Run, "time_ops", fails)
    report = measured()
    assert "ops in a layer of smollm2-135m" in getattr(report, where)
    assert parts[-1] == "time_base"
    assert report.passed == passes


def test_sizes_for_an_accelerator_are_refused_on_a_cpu():
    with pytest.raises(ConfigInvalid, match="add --short"):
        measure_device(replace(FULL, shapes=("1b",)), minutes=1.0, tests=None, say=lambda line: None)


@pytest.mark.parametrize(
    ("arguments", "wanted"), [(["--short", "--shape", "8b"], "not both"), (["--output", "no/x"], "folder")]
)
def test_what_does_not_go_together_is_refused(arguments, wanted):
    result = run(*arguments)
    assert result.exit_code == 2
    assert wanted in result.output


def test_tests_of_the_kernels_are_run_and_told(tmp_path, monkeypatch):
    folder = tmp_path / "tests" / "device"
    folder.mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    (folder / "test_pallas_kernels_x.py").write_text("def test_ok(): pass\ndef test_not(): assert 0\n")
    passed, last = device._run_tests(folder)
    assert not passed
    assert "1 failed, 1 passed" in last


def test_a_random_base_has_the_bytes_of_its_shape():
    base = open_random("tiny", "float32").base
    c = SHAPES["tiny"]
    attention = c.d_model * (c.heads + 2 * c.kv_heads) * c.head_dim + c.heads * c.head_dim * c.d_model
    layers = c.layers * (attention + 3 * c.d_model * c.d_ff + 2 * c.d_model)
    assert weights_bytes(base) == pytest.approx(4 * (layers + c.d_model + c.vocab * c.d_model), rel=0.01)


def test_an_unknown_shape_is_refused_before_anything_is_measured(parts):
    with pytest.raises(ConfigInvalid, match="unknown shape 9b; known: tiny, 1b, 4b, 8b"):
        measure_device(replace(SHORT, shapes=("tiny", "9b")), minutes=1.0, tests=None, say=lambda line: None)
    assert parts == []
