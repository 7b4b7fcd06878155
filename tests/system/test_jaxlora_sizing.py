"""What a plan counts is what is allocated; a base is loaded once; what does not fit is one line before it is loaded."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_shapes
from base_shapes import sized_run
from random_model import QWEN3_06B, SCALED, write_random
from small_world import tiny_path
from typer.testing import CliRunner

from jaxlora.checkpoints import load
from jaxlora.checkpoints.hf import HfSource
from jaxlora.config.base import ONE_DEVICE, MeshSection, ModelSection
from jaxlora.config.serving import ServeConfig
from jaxlora.config.training import TenantSection, TrainConfig
from jaxlora.core.errors import ConfigInvalid
from jaxlora.core.host_memory import MemoryLimit
from jaxlora.core.lora import ALL_TARGETS, LAYER_TARGETS
from jaxlora.model import multihost
from jaxlora.model.decoder import load_base
from jaxlora.model.kv_cache import empty_pages
from jaxlora.model.lora_pool import PoolSpec
from jaxlora.model.machine import machine_of, memory_errors
from jaxlora.model.memory_needs import BaseShape, decode_bytes, pool_bytes, prefill_bytes, slot_bytes, training_needs
from jaxlora.model.mesh import make_mesh
from jaxlora.model.serving_pool import empty_serving_pool, pool_shapes
from serve.cli.main import app
from serve.engine.logit_edits import LogitEdits
from serve.engine.step import PackedBatch, StepBatch, StepPrograms
from serve.server.build import planned
from train.step.state import empty_state

CHILD = Path(__file__).parents[1] / "support" / "load_child.py"
TINY = [tiny_path(name) for name in ("tiny-llama-tied", "tiny-qwen2", "tiny-qwen3")]


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("path", TINY, ids=lambda path: path.name)
def test_what_a_plan_counts_is_what_is_allocated(path, dtype, quantization):
    mesh = make_mesh()
    base = load_base(HfSource(path), mesh, dtype=dtype, quantization=quantization)
    quantized = quantization == "int8"
    shape = BaseShape(config=base.config, dtype=dtype, kv_dtype=dtype, quantized=quantized, name="tiny")
    machine = machine_of(ONE_DEVICE, 2.0)
    assert shape.weights_bytes(machine) == sum(x.nbytes for x in jax.tree.leaves(base))
    classes = (1, 32), (8, 4)
    for slots, rank, of in ((1, 32, ()), (9, 32, classes)):
        spec = PoolSpec(slots=slots, rank=rank, dtype=dtype, targets=ALL_TARGETS, classes=of)
        pool = empty_serving_pool(base.config, spec, mesh)
        assert pool_bytes(spec.rank_classes, shape, machine) == sum(x.nbytes for x in jax.tree.leaves(pool))
        rows = sum(r.a_LNRX.nbytes + r.b_LNRY.nbytes for r in pool.values())
        # Eight slots of rank 4 take as much as one of rank 32.
        assert rows == (1 + bool(of)) * 32 * shape.rank_bytes(machine, itemsize=jnp.dtype(dtype).itemsize)
    pages = empty_pages(base.config, mesh, pages=5, page_tokens=8, dtype=jnp.dtype(dtype))
    assert 40 * shape.token_bytes(machine) == pages.k_LPZF.nbytes + pages.v_LPZF.nbytes
    spec = PoolSpec(slots=3, rank=4, dtype="float32", targets=ALL_TARGETS)
    state = empty_state(base, spec, mesh)
    scales = sum(r.scale_LS.nbytes for r in state.pool.values()) + state.moments.count.nbytes
    whole = sum(x.nbytes for x in jax.tree.leaves(state))
    assert 3 * slot_bytes(shape, machine, 4, ALL_TARGETS, 4) == whole - scales


def test_a_machine_knows_its_devices_and_its_limit():
    machine = machine_of(MeshSection(data=1, fsdp=2, tensor=3), 1.5)
    assert (machine.device.nbytes, machine.device.own, machine.devices, machine.rows) == (1.5e9, True, 6, 2)
    assert (machine.parts["embed"], machine.parts["kv_heads"], machine.parts["layers"]) == (2, 3, 1)
    assert 0 < machine_of(ONE_DEVICE, None).device.nbytes < 2**50


@pytest.mark.parametrize(("own", "gb"), [(True, 1.0), (False, 2.0)], ids=["a limit", "what is available"])
def test_memory_gb_yields_to_a_limit_alone(monkeypatch, own, gb):
    limit = MemoryLimit(nbytes=10**9, origin="the limit of the control group", own=own)
    monkeypatch.setattr("jaxlora.model.machine.host_limit", lambda: limit)
    assert machine_of(ONE_DEVICE, 2.0).device.nbytes == gb * 1e9
    assert machine_of(ONE_DEVICE, 0.5).device.nbytes == 0.5e9


def test_a_dtype_that_nobody_gave_gives_way(monkeypatch):
    monkeypatch.setattr(load, "fastest_dtype", lambda: "float32")
    model = ModelSection(path=str(tiny_path("tiny-llama-tied")))
    seen = []

    def plan(base: BaseShape) -> str:
        seen.append((base.dtype, base.kv_dtype))
        if base.dtype == "float32":
            raise ConfigInvalid("it does not fit")
        return "fits"

    found, made = load.fitted(load.find_base(model), model, "auto", plan)
    assert (found.dtype, made) == ("bfloat16", "fits")
    assert seen == [("float32", "float32"), ("bfloat16", "bfloat16")]
    given = dataclasses.replace(model, dtype="float32")
    with pytest.raises(ConfigInvalid):
        load.fitted(load.find_base(given), given, "auto", plan)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--memory-gb", "0.5"], "does not fit: process"),
        (["--memory-gb", "4", "--slots", "1000000"], "lower slots to at most "),
        (["--memory-gb", "4", "--rows", "100000000"], "lower rows to at most "),
    ],
    ids=["all", "slots", "rows"],
)
def test_what_does_not_fit_is_one_line_before_anything_is_loaded(tmp_path, monkeypatch, options, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jaxlora.checkpoints.load.load_base", lambda *_, **__: pytest.fail("weights were loaded"))
    result = CliRunner().invoke(app, ["serve", "--model", str(tiny_path("tiny-llama-tied")), "--port", "0", *options])
    assert result.exit_code == 2, result.output
    assert line in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_start_prints_the_plan(capsys):
    config = ServeConfig(model=ModelSection(path=str(tiny_path("tiny-llama-tied"))), memory_gb=2.0)
    found, sized = planned(config, print)
    memory, sizes = capsys.readouterr().out.splitlines()
    assert memory.endswith("of 2.0 GB, memory_gb (memory_gb, memory_share)")
    assert f"{sized.slots} slots of rank {sized.max_rank} (slots, max_rank)" in sizes
    assert found.name == "tiny-llama-tied"


def test_an_allocation_that_fails_is_one_line():
    told = r"memory ran out while starting .*; lower kv_pages"
    with pytest.raises(ConfigInvalid, match=told), memory_errors("starting", "kv_pages"):
        jax.block_until_ready(jax.jit(lambda: jnp.zeros((2**50,), jnp.int8))())
    with pytest.raises(ConfigInvalid, match="memory ran out"), memory_errors("starting", "kv_pages"):
        raise MemoryError
    with pytest.raises(ConfigInvalid, match="Out of memory allocating"), memory_errors("starting", "kv_pages"):
        raise ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 271319040 bytes.")
    with pytest.raises(jax.errors.JaxRuntimeError), memory_errors("starting", "kv_pages"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        pytest.param(SCALED, "bfloat16", id="scaled"),
        pytest.param(QWEN3_06B, "bfloat16", id="qwen3-0.6b-bfloat16", marks=pytest.mark.slow),
        pytest.param(QWEN3_06B, "float32", id="qwen3-0.6b-float32", marks=pytest.mark.slow),
    ],
)
def test_loading_holds_the_weights_once(tmp_path, size, dtype):
    path = write_random(tmp_path / "base", size)
    run = subprocess.run(
        [sys.executable, str(CHILD), str(path), dtype],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    told = json.loads(run.stdout)
    assert told["stays"] > 100e6
    assert told["peak"] <= 1.3 * told["stays"]


def test_several_processes_plan_with_the_least_memory_that_one_of_them_has(monkeypatch):
    alone = machine_of(ONE_DEVICE, 8.0)
    monkeypatch.setattr(multihost.jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost.multihost_utils, "process_allgather", lambda own: np.array([own, 3 << 10], own.dtype))
    assert machine_of(ONE_DEVICE, 8.0) == dataclasses.replace(
        alone, device=dataclasses.replace(alone.device, nbytes=3 << 30)
    )
    assert machine_of(ONE_DEVICE, 2.0).device.nbytes == 2_000_000_000 >> 20 << 20


@pytest.mark.slow
def test_the_arrays_of_a_step_are_about_what_the_plan_says(monkeypatch):
    """Programs of SmolLM2, compiled on shapes alone; a plan may say more, and hardly less."""
    mesh, machine = make_mesh(), machine_of(ONE_DEVICE, 8.0)
    bare, size = step_shapes.base(mesh), (step_shapes.SMOLLM2.d_model, step_shapes.SMOLLM2.vocab)
    head = step_shapes.placed(mesh, ("embed", "vocab"), size, jnp.bfloat16)  # which a CPU keeps of a tied base
    whole = dataclasses.replace(bare, arrays=bare.arrays | {"head": head})
    monkeypatch.setattr(step_shapes, "base", lambda *_: whole)
    shape = BaseShape(config=step_shapes.SMOLLM2, dtype="bfloat16", kv_dtype="bfloat16", name="smollm2")
    decode, _, kv = step_shapes.decode(mesh)
    # Natively, a draw holds no logits of its own, and rows of adapters are read in place: less than the plan, which holds for both.
    assert 0.3 < _temporary(decode) / decode_bytes(step_shapes.ROWS, shape, machine) < 1.1
    spec = PoolSpec(slots=8, rank=step_shapes.RANK, dtype="bfloat16", targets=ALL_TARGETS)
    rows, batch = pool_shapes(step_shapes.SMOLLM2, spec, mesh), StepBatch.idle(8, 32, 4)
    edits = step_shapes.lanes(mesh, LogitEdits.idle(8, 512, step_shapes.SMOLLM2.vocab))
    packed = (step_shapes.lanes(mesh, PackedBatch.of(batch)),)
    newest = step_shapes.newest(mesh, 8)
    prefill = StepPrograms(mesh).step.lower(step_shapes.base(mesh), rows, kv, newest, packed, edits).compile()
    # The best tokens of scored rows are found without two further copies of the tile, which the plan has for other platforms.
    assert 0.4 < _temporary(prefill) / prefill_bytes(8, 32, shape, machine) < 1.1
    tenant = TenantSection(name="a", train=Path("a.jsonl"), rank=step_shapes.RANK)
    run = TrainConfig(
        model=ModelSection(path="base"), tenant=(tenant,), lanes=step_shapes.LANES, lane_tokens=step_shapes.TOKENS
    )
    lanes = training_needs(sized_run(run), LAYER_TARGETS, shape, machine)["lanes"]
    assert 0.7 < _temporary(step_shapes.train(mesh)) / lanes < 1.1


def _temporary(compiled: jax.stages.Compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes
