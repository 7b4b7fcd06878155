"""Which body each op has: at a server's default sizes on TPUs that are not here, and as a server and `doctor` say it."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from base_shapes import LLAMA_8B
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxlora.config.base import ModelSection
from jaxlora.config.serving import ServeConfig
from jaxlora.core.host_memory import MemoryLimit
from jaxlora.model.memory_needs import BaseShape, Machine
from jaxlora.model.memory_plan import plan_server
from jaxlora.model.mesh import MESH_AXES, RULES
from pallas_kernels import dispatch
from pallas_kernels.rows.op import logsumexp
from pallas_kernels.segmented_lora.op import segmented_lora
from serve.runtime.bodies import expected, fallbacks, listed, told
from serve.runtime.device_thread import DeviceThread

pytest_plugins = ["serve_fixtures"]

MODELS = {  # and how many devices it is split over
    "Qwen3-4B": (replace(LLAMA_8B, layers=36, d_model=2560, d_ff=9728, vocab=151936, context=40960, tied=True), 1),
    "Llama-3.1-8B": (LLAMA_8B, 1),
    "Llama-3.1-70B": (replace(LLAMA_8B, layers=80, d_model=8192, d_ff=28672, heads=64), 8),
}
KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}


@pytest.fixture
def only_choices(monkeypatch):
    """Ops are traced in their general form, whichever body they have."""

    def general(*args, cpu, **_):
        return cpu(*args)

    monkeypatch.setattr(dispatch, "lax", SimpleNamespace(platform_dependent=general))
    monkeypatch.setattr("pallas_kernels.native.library.instruction_set", lambda: None)


def choices_at(model: str, kind: str, **settings) -> list[dispatch.Choice]:
    """Of a server of the default sizes, but for `settings`, on so many TPUs as the model needs, with memory for it."""
    config, devices = MODELS[model]
    base = BaseShape(config=config, dtype="bfloat16", kv_dtype="bfloat16", name=model)
    device = AbstractDevice(device_kind=KINDS[kind], num_cores=1, platform="tpu")
    mesh = AbstractMesh((1, 1, devices), MESH_AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device)
    machine = Machine(
        platform="tpu",
        cores=8,
        device=MemoryLimit(nbytes=95 * 10**9, origin="a test's", own=True),
        host=MemoryLimit(nbytes=400 * 10**9, origin="a test's", own=True),
        devices=devices,
        parts={name: devices if axes == "tensor" else 1 for name, axes in RULES.items()},
        rows=1,
    )
    sized = plan_server(ServeConfig(model=ModelSection(path=model), **settings), base, machine).config
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return expected(base, sized, mesh, "tpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_at_default_settings_no_op_falls_back_on_a_tpu(model, kind, only_choices):
    """The largest sizes of the ladder, of rank 64."""
    choices = choices_at(model, kind)
    assert {c.op for c in choices} == set(dispatch.TABLE)
    assert fallbacks(choices, "tpu") == []


def test_a_fall_back_would_be_seen(only_choices):
    decode, prompt = fallbacks(choices_at("Llama-3.1-8B", "v5e", page_tokens=2**14), "tpu")
    assert prompt.startswith("paged_attention")
    assert decode.startswith("paged_attention has the general form, xla's: no kernel takes bfloat16[64, 1, 32, 128], ")


@pytest.mark.parametrize(("platform", "rank"), [("cpu", 3), ("tpu", 5)])
def test_an_op_in_its_general_form_is_a_warning_on_an_accelerator_alone(platform, rank, caplog):
    """The ranks differ, as what was traced before is not noted again."""
    caplog.set_level(logging.INFO, "serve")
    x, half = jax.ShapeDtypeStruct((2, 8, 16), jnp.float16), jax.ShapeDtypeStruct((2, rank, 16), jnp.float32)
    with told("serving", platform):
        jax.eval_shape(segmented_lora, x, [(half, half, jax.ShapeDtypeStruct((2,), jnp.float32))])
        jax.eval_shape(logsumexp, jax.ShapeDtypeStruct((rank, 5), jnp.float32))
    said = [(r.levelname, r.getMessage()) for r in caplog.records]
    if platform == "cpu":
        assert [level for level, _ in said] == ["INFO"]
        return
    reason = "its kernels take bfloat16 and float32, not float16"
    assert said == [
        ("INFO", "bodies of serving: xla: segmented_lora, logsumexp"),
        ("WARNING", f"serving: segmented_lora has the general form, xla's: {reason}"),
    ]


def test_a_server_says_at_its_start_which_bodies_it_has(world, monkeypatch, caplog):
    """Its device thread notes what is traced while it warms up: here one op in place of its programs."""
    caplog.set_level(logging.INFO, "serve")
    runner = DeviceThread(world.engine(), base_name="tiny")
    rows = jax.ShapeDtypeStruct((7, 5), jnp.float32)
    monkeypatch.setattr(runner.engine, "warm_up", lambda _: jax.eval_shape(logsumexp, rows))
    runner.start()
    runner.stop()
    body = dispatch.usual("logsumexp", "cpu").body
    assert [r.getMessage() for r in caplog.records] == [f"bodies of serving: {body}: logsumexp"]


def test_choices_are_listed_by_body():
    chosen = [dispatch.Choice(*of) for of in (("b", "xla", None), ("a", "pallas", None), ("a", "xla", "why"))]
    assert listed(chosen) == "pallas: a; xla: b, a"
    assert fallbacks(chosen, "gpu") == ["a has the general form, xla's: why"]
    assert fallbacks(chosen, "cpu") == []
