"""What bases of known sizes look like, and the sizes of servers and runs over them.  Pure: no jax."""

from __future__ import annotations

from jaxlora.config.serving import ServeConfig, SizedConfig
from jaxlora.config.training import SizedTrainConfig, TrainConfig
from jaxlora.core.host_memory import MemoryLimit
from jaxlora.core.lora import LAYER_TARGETS
from jaxlora.core.model_config import ModelConfig
from jaxlora.model.memory_needs import BaseShape, Machine
from jaxlora.model.memory_plan import plan_server, plan_training

SMOLLM2 = ModelConfig(
    family="llama",
    layers=30,
    d_model=576,
    d_ff=1536,
    heads=9,
    kv_heads=3,
    head_dim=64,
    vocab=49152,
    context=8192,
    norm_eps=1e-5,
    rope_theta=1e5,
    rope_scaling=None,
    window=None,
    qkv_bias=False,
    qk_norm=False,
    tied=True,
)

LLAMA_8B = ModelConfig(
    family="llama",
    layers=32,
    d_model=4096,
    d_ff=14336,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocab=128256,
    context=131072,
    norm_eps=1e-5,
    rope_theta=5e5,
    rope_scaling=None,
    window=None,
    qkv_bias=False,
    qk_norm=False,
    tied=False,
)

SHAPE = BaseShape(config=SMOLLM2, dtype="float32", kv_dtype="float32", name="base")
LARGE = Machine(
    platform="cpu",
    cores=2,
    device=MemoryLimit(nbytes=128 * 10**9, origin="a test's", own=False),
    host=None,
    devices=1,
    parts={},
    rows=1,
)


def sized(config: ServeConfig) -> SizedConfig:
    """The settings with the sizes that a machine with memory for all of it would choose."""
    return plan_server(config, SHAPE, LARGE).config


def sized_run(config: TrainConfig) -> SizedTrainConfig:
    """The same of a training run."""
    return plan_training(config, LAYER_TARGETS, SHAPE, LARGE).config
