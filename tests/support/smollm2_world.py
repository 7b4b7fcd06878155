"""The demo model, eight random adapters, and the shapes of an engine over both.  Fixtures are in smollm2_fixtures.py.

All float32, as the fixtures of small_world.py are.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxlora.checkpoints.load import Opened
from jaxlora.core.lora import ALL_TARGETS, ATTENTION_TARGETS, LAYER_TARGETS, Adapter, AdapterRef, LoraSpec
from jaxlora.storage.adapter_store import AdapterStore
from serve.engine.engine import EngineConfig
from train.step.state import fresh_adapter

SLOTS, RANK = 8, 16
CONFIG = EngineConfig(
    rows=20,
    prefill_lanes=20,
    prefill_tokens=32,
    pages=48,
    page_tokens=64,
    max_tokens=192,
    max_waiting=64,
    max_waiting_tokens=16384,
    host_bytes=10**8,
    quantum_s=0.2,
)
# Of the eight adapters: rank and targets.
SHAPES = [
    (1, LAYER_TARGETS),
    (2, ATTENTION_TARGETS),
    (3, ("q_proj", "v_proj")),
    (4, ALL_TARGETS),
    (5, ("lm_head",)),
    (8, ("gate_proj", "up_proj", "down_proj")),
    (12, ("lm_head", "o_proj")),
    (16, LAYER_TARGETS),
]


@dataclasses.dataclass(frozen=True)
class Smol:
    """The demo model, and eight adapters in a store."""

    opened: Opened
    store: AdapterStore
    adapters: list[Adapter]


def random_adapter(opened: Opened, name: str, rank: int, targets: tuple[str, ...], seed: int) -> Adapter:
    """An adapter as training starts it, with a random B that is strong enough to change every answer."""
    spec = LoraSpec(rank=rank, alpha=2.0 * rank, targets=targets)
    start = fresh_adapter(opened.base.config, spec, seed, opened.base_hash)
    draw = np.random.default_rng(seed)
    weights = {
        t: (a, (draw.normal(size=b.shape) * 0.3 / rank**0.5).astype(np.float32)) for t, (a, b) in start.weights.items()
    }
    return dataclasses.replace(start, weights=weights).named(AdapterRef("local", name, 1))
