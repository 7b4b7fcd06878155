"""The bench: the forms it compares are the same product, what it counts is right by hand, and it runs on tiny shapes."""

from __future__ import annotations

import json
from itertools import groupby
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import F32, assert_close, floats

from pallas_kernels.bench import run as bench
from pallas_kernels.bench.cases import GATHERED_ALTERNATIVES, MODELS, OPS, Model, Sizes
from pallas_kernels.gathered_lora.op import gathered_lora_reference

TINY = Model(d=8, heads=4, kv_heads=2, head=4, ff=12, vocab=16)
SIZES = Sizes(rows=6, adapters=3, slots=5, rank=2, lanes=2, tokens=4, context=5)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """One tiny model in place of all."""
    monkeypatch.setattr(bench, "MODELS", {"tiny": TINY})
    monkeypatch.setattr(bench, "ceilings", lambda dtype, rounds: bench.Ceilings(read_bytes_s=1e9, flops_s=1e9))


@pytest.mark.parametrize("form", GATHERED_ALTERNATIVES.values(), ids=GATHERED_ALTERNATIVES.keys())
def test_alternatives_are_the_same_product(form):
    rng = np.random.default_rng(0)
    slot_T = jnp.array([2, -1, 0, 2, 4, -1, 1], jnp.int32)
    args = floats(rng, 7, 6), floats(rng, 5, 3, 6), floats(rng, 5, 3, 4), floats(rng, 5), slot_T
    assert_close(jax.jit(form)(*args), gathered_lora_reference(*map(jnp.asarray, args)), F32)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_all_forms_of_a_case_give_what_ours_gives(op):
    """But for the base product.  float32, so that forms agree closely."""
    cases = list(OPS[op](TINY, "float32", SIZES))
    assert cases
    for case in cases:
        assert {"ours", "base"} < set(case.forms)
        out = {name: jax.jit(form)(*args) for name, (form, args) in case.forms.items()}
        for name in set(out) - {"ours", "base"}:
            assert_close(out[name], out["ours"], {"rtol": 1e-4, "atol": 1e-5})
        assert case.bytes > 0
        assert case.flops > 0


def test_what_decode_must_move_and_compute_by_hand():
    case = next(OPS["gathered_lora"](TINY, "bfloat16", SIZES))
    features = (8 + 16) + (8 + 8) + (8 + 8)  # q, k, v: in and out
    assert case.flops == 2 * 6 * 2 * features
    assert case.bytes == 3 * 2 * features * 2 + 6 * (8 + 16 + 8 + 8) * 2
    slots = np.asarray(case.forms["ours"][1][3])
    assert len(set(slots.tolist())) == SIZES.adapters


def test_forms_run_in_turn_and_are_warm():
    log = []
    timings = bench.measure({"a": lambda: log.append("a"), "b": lambda: log.append("b")}, rounds=3)
    assert log[:5] == ["a", "a", "b", "b", "a"]
    assert [name for name, _ in groupby(log)] == ["a", "b"] * 4
    assert set(timings) == {"a", "b"}
    for t in timings.values():
        assert t.cpu_s.shape == t.wall_s.shape == (3,)
        assert t.best_s == t.seconds.min()
        assert all(0 <= cpu_s < 60 and 0 <= wall_s < 60 for cpu_s, wall_s in zip(t.cpu_s, t.wall_s, strict=True))


def test_short_calls_are_timed_many_at_a_time_and_long_ones_alone(monkeypatch):
    now_s, log = [0.0], []

    def run(name, took_s):
        log.append(name)
        now_s[0] += took_s

    monkeypatch.setattr(
        bench, "time", SimpleNamespace(perf_counter=lambda: now_s[0], process_time=lambda: 2 * now_s[0])
    )
    timings = bench.measure(
        {
            "short": lambda: run("short", 0.001),
            "shorter": lambda: run("shorter", 1e-6),
            "long": lambda: run("long", 1.0),
        },
        rounds=2,
    )
    assert [log.count(name) for name in timings] == [2 + 2 * 20, 2 + 2 * bench.MOST_CALLS, 2 + 2]
    for timing, took_s in zip(timings.values(), (0.001, 1e-6, 1.0), strict=True):
        assert timing.wall_s == pytest.approx([took_s] * 2, rel=1e-3)
        assert timing.cpu_s == pytest.approx([2 * took_s] * 2, rel=1e-3)


@pytest.mark.parametrize("as_json", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["json", "lines"])
def test_the_report_of_tiny_shapes(as_json):
    said = []
    bench.main(
        ops=["gathered_lora", "attention"],
        models=[],
        dtype="bfloat16",
        sizes=SIZES,
        rounds=1,
        as_json=as_json,
        say=said.append,
    )
    if not as_json:
        assert sum("gathered_lora" in line for line in said) == 4
        assert any("ragged_dot" in line for line in said)
        return
    rows = [json.loads(line) for line in said]
    assert [row["op"] for row in rows] == ["gathered_lora"] * 4 + ["attention"]
    assert set(rows[0]["ratio"]) == {"base", *GATHERED_ALTERNATIVES}
    for row in rows:
        assert row["backend"] == jax.default_backend()
        assert row["bytes_share"] == pytest.approx(row["bytes_s"] / 1e9)
        assert row["seconds"] > 0


@pytest.mark.parametrize(("ops", "models"), [(["x"], []), ([], ["x"])], ids=["op", "model"])
def test_an_unknown_name_is_refused_with_those_known(ops, models):
    with pytest.raises(ValueError, match=r"unknown (op|model) x; known: (gathered_lora|tiny)"):
        bench.main(ops=ops, models=models, dtype="float32", sizes=SIZES, rounds=1, as_json=True, say=print)


def test_more_adapters_than_rows_or_slots_are_refused():
    with pytest.raises(ValueError, match="7 adapters are not between 1 and 6 rows and 9 slots"):
        Sizes(rows=6, adapters=7, slots=9, rank=2, lanes=2, tokens=4, context=5)


def test_the_ceilings_are_of_this_device(monkeypatch):
    monkeypatch.undo()
    got = bench.ceilings("float32", rounds=1, megabytes=1, side=64)
    assert 1e7 < got.read_bytes_s < 1e13
    assert 1e7 < got.flops_s < 1e16
    assert list(MODELS) == ["smollm2-135m", "llama-3.2-1b", "qwen3-4b", "llama-3.1-8b"]


@pytest.mark.parametrize(("native", "product_s"), [("avx2", 0.5), (None, 2.0)])
def test_the_rate_is_that_of_the_faster_product(monkeypatch, native, product_s):
    monkeypatch.undo()
    seconds = {"read": 1.0, "copy": 4.0, "gemm": 2.0, "packed": 0.5}
    square = []

    def measure(runs, rounds):
        square.extend(np.asarray(jax.tree.leaves(run())[0]) for name, run in runs.items() if name in ("gemm", "packed"))
        return {name: bench.Timing(np.array([seconds[name]]), np.array([seconds[name]])) for name in runs}

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "instruction_set", lambda: native)
    got = bench.ceilings("float32", rounds=1, megabytes=1, side=64)
    assert got == bench.Ceilings(read_bytes_s=2**20, flops_s=2 * 64**3 / product_s)
    assert [(x.shape, set(x.ravel().tolist())) for x in square] == [((64, 64), {64.0})] * (1 if native is None else 2)
