"""Which body each op has: at a server's default sizes on TPUs that are not here, and as a server and `doctor` say it."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from base_shapes import SMOLLM2
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxlora.config.base import ModelSection
from jaxlora.config.serving import ServeConfig
from jaxlora.core.host_memory import MemoryLimit
from jaxlora.model.memory_plan import BaseShape, Machine, plan_server
from jaxlora.model.mesh import MESH_AXES, RULES
from pallas_kernels import dispatch
from pallas_kernels.rows.op import logsumexp
from pallas_kernels.segmented_lora.op import segmented_lora
from serve.runtime.bodies import expected, fallbacks, listed, told
from serve.runtime.device_thread import DeviceThread

pytest_plugins = ["serve_fixtures"]

LLAMA_8B = replace(
    SMOLLM2,
    layers=32,
    d_model=4096,
    d_ff=14336,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocab=128256,
    context=131072,
    tied=False,
)
MODELS = {  # and how many devices it is split over
    "Qwen3-4B": (replace(LLAMA_8B, layers=36, d_model=2560, d_ff=9728, vocab=151936, context=40960, tied=True), 1),
    "Llama-3.1-8B": (LLAMA_8B, 1),
    "Llama-3.1-70B": (replace(LLAMA_8B, layers=80, d_model=8192, d_ff=28672, heads=64), 8),
}
KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}


@pytest.fixture
def only_choices(monkeypatch):
    """Ops are traced in their general form, whichever body they have: tracing all takes ten times as long."""

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
    """The largest sizes of the ladder, rank 64 among them; gathered LoRA's rows of the head aside."""
    choices = choices_at(model, kind)
    assert {c.op for c in choices} == set(dispatch.TABLE)
    missed = fallbacks([c for c in choices if c.op != "gathered_lora"], "tpu")
    assert missed == []
