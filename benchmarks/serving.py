"""What the serving benchmarks share: a warm server over the demo model, and adapters to ask."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxlora.checkpoints.load import Opened, load_found
from jaxlora.config.base import DEMO_MODEL, Dtype, ModelSection
from jaxlora.config.serving import ServeConfig
from jaxlora.core.lora import LAYER_TARGETS, Adapter, AdapterRef, LoraSpec
from jaxlora.core.model_config import ModelConfig, layer_count, target_features
from jaxlora.model import compile_cache
from serve.engine.request import Request, SamplingParams
from serve.runtime.device_thread import DeviceThread
from serve.server.build import make_runner, open_store, planned

IDS = itertools.count()
# Of a server that takes no jobs; the same on every machine.
SIZES = {"slots": 8, "rows": 8, "kv_pages": 128, "prefill_lanes": 8, "prefill_tokens": 32, "training": None}


@dataclass(frozen=True, slots=True)
class Server:
    """A runner that is not started, its adapters, and what it was made of."""

    opened: Opened
    runner: DeviceThread
    adapters: list[AdapterRef]


def adapter(
    config: ModelConfig, base_hash: str, ref: AdapterRef, rank: int, targets: tuple[str, ...] = LAYER_TARGETS
) -> Adapter:
    """Small random weights, as a rule on all seven projections; equal for equal refs."""
    spec = LoraSpec(rank=rank, alpha=2.0 * rank, targets=targets)
    random = np.random.default_rng([ref.version, *ref.name.encode()])
    weights = {}
    for target in targets:
        x, y = target_features(config, target)
        layers = layer_count(config, target)
        a, b = (random.standard_normal((layers, rank, n), np.float32) * 0.01 for n in (x, y))
        weights[target] = (a, b)
    return Adapter(ref=ref, spec=spec, base_hash=base_hash, weights=weights)


@contextlib.contextmanager
def server(adapters: int, *, rank: int = 8, dtype: Dtype = "auto", **settings: object) -> Generator[Server]:
    """A server with so many random adapters in a store of its own, of one tenant each.  settings: of ServeConfig."""
    compile_cache.enable(None)
    with tempfile.TemporaryDirectory() as folder:
        model = ModelSection(path=DEMO_MODEL, dtype=dtype)
        asked = ServeConfig(model=model, adapters=Path(folder), max_rank=rank, **(SIZES | settings))
        found, config = planned(asked, say=lambda line: None)
        opened = load_found(found, config.model, config.mesh)
        store = open_store(config)
        runner = make_runner(opened, config, store)
        named = [AdapterRef(f"team{n}", "a", 1) for n in range(adapters)]
        refs = [
            store.add(ref.tenant, ref.name, adapter(opened.base.config, opened.base_hash, ref, rank)) for ref in named
        ]
        store.flush()
        try:
            yield Server(opened, runner, refs)
        finally:
            store.close()


def request(ref: AdapterRef | None, prompt: int, answer: int, vocab: int) -> Request:
    """Random tokens for an adapter, greedy, that does not end early.  prompt, answer: tokens."""
    number = next(IDS)
    tokens = np.random.default_rng(number).integers(1000, vocab, prompt).tolist()
    params = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
    tenant = "nobody" if ref is None else ref.tenant
    return Request(id=f"r{number}", tenant=tenant, adapter=ref, prompt=tuple(tokens), params=params)
