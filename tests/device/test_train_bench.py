"""`jaxlora bench train` and what it times: full lanes, the base's own backward pass, figures that follow from times, no compile."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_world import tiny_path
from train_world import CONFIG, small_base
from typer.testing import CliRunner

from pallas_kernels.bench.run import Timing
from serve.cli import main as cli
from train import bench
from train.bench import StepTime, TrainingSizes, base_pass, examples_of, full_lanes

TINY = str(tiny_path("tiny-llama-tied"))
SIZES = TrainingSizes(tenants=3, lanes=2, tokens=32, rank=2)
OPTIONS = ("--model", TINY, "--tenants", "3", "--lanes", "2", "--tokens", "32", "--rank", "2", "--dtype", "float32")


def run(*arguments):
    return CliRunner(env={"NO_COLOR": "1"}).invoke(cli.app, ["bench", "train", *OPTIONS, *arguments])


@pytest.fixture
def known_times(monkeypatch):
    """Two rounds whose times are known; everything runs once all the same."""
    seconds = {"together": [0.5, 0.6], "alone": [0.4, 0.3], "floor": [0.2, 0.4]}

    def measure(runs, rounds):
        for step in runs.values():
            jax.block_until_ready(step())
        assert rounds == 2
        return {name: Timing(cpu_s=np.array(s), wall_s=np.array(s) * 2) for name, s in seconds.items()}

    monkeypatch.setattr(bench, "measure", measure)


def test_the_report_follows_from_the_times(known_times):
    got = run("--rounds", "2", "--json")
    assert got.exit_code == 0, got.output
    report = json.loads(got.stdout)
    assert report["together"] == {
        "tokens": 192,  # 3 tenants, 2 lanes each, 32 tokens
        "wall_s": 1.0,
        "cpu_s": 0.5,
        "tokens_s": 192.0,
        "tokens_cpu_s": 384.0,
    }
    assert (report["alone"]["tokens"], report["floor"]["tokens"]) == (64, 192)
    assert report["gain"] == pytest.approx(3 * 0.3 / 0.5)
    assert report["efficiency"] == pytest.approx(0.2 / 0.5)
    assert (report["dtype"], report["compiles"]) == ("float32", 0)
    assert report["sizes"] == {"tenants": 3, "lanes": 2, "tokens": 32, "rank": 2}


def test_a_real_run_as_a_table():
    got = run("--rounds", "1")
    assert got.exit_code == 0, got.output
    lines = got.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["cpu:", "alone", "together", "floor", "gain", "compiles"]
    assert "tokens per CPU second" in lines[1]
    assert lines[-1] == "compiles after the warm-up: 0"


def test_a_compile_after_the_warm_up_is_counted_and_fails(known_times, monkeypatch):
    measure = bench.measure

    def compiling(runs, rounds):
        jax.jit(lambda x: x * 3 - 1)(jnp.arange(7)).block_until_ready()
        return measure(runs, rounds)

    monkeypatch.setattr(bench, "measure", compiling)
    got = run("--rounds", "2")
    assert got.exit_code == 1
    assert int(got.stdout.splitlines()[-1].removeprefix("compiles after the warm-up: ")) >= 1


def test_lanes_that_are_not_whole_blocks_are_refused_in_one_line():
    got = run("--tokens", "33")
    assert got.exit_code == cli.ERROR_EXIT
    assert (
        got.stderr == "jaxlora: lane_tokens must be a multiple of 32 or smaller than that, such as 32 or 64; got 33\n"
    )


def test_an_accelerator_has_no_cpu_time(monkeypatch):
    timing = Timing(cpu_s=np.array([1.0]), wall_s=np.array([0.25]))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    got = StepTime.of(64, timing)
    assert (got.cpu_s, got.tokens_cpu_s, got.tokens_s, got.seconds) == (None, None, 256.0, 0.25)
    assert "CPU" not in str(got)


def test_examples_fill_their_lanes_and_tenants_differ():
    first, second = (examples_of(n, SIZES, CONFIG.vocab) for n in (0, 1))
    assert [e.predictions for e in first + second] == [32] * 4
    assert len({e.tokens.tobytes() for e in first + second}) == 4
    batch = full_lanes(first, [4, 5])
    assert np.asarray(batch.weight_GJ).all()
    assert np.asarray(batch.slot_G).tolist() == [4, 5]
    for g, example in enumerate(first):
        assert np.asarray(batch.token_GJ[g]).tolist() == example.tokens[:-1].tolist()
        assert np.asarray(batch.target_GJ[g]).tolist() == example.tokens[1:].tolist()


def test_the_floor_goes_back_to_the_first_layer():
    """Its gradient is what the loss does when the norm of the first layer changes, on all lanes."""
    base, batch = small_base(), full_lanes(examples_of(0, SIZES, CONFIG.vocab), [-1, -1])
    gradient = np.asarray(base_pass(base, batch)())
    norm = base.layers["attn_norm"]
    assert gradient.shape == norm.shape
    step, at = 1e-2, int(np.abs(gradient[0]).argmax())

    def loss(change):
        of = replace(base, layers={**base.layers, "attn_norm": norm.at[0, at].add(change)})
        return float(bench.lane_losses(of, bench.LaneLora({}), batch, dropout=False)[0])

    assert (loss(step) - loss(-step)) / (2 * step) == pytest.approx(float(gradient[0, at]), rel=0.02)
