"""Two adapters that train together on a tiny checkpoint in a few steps: the source of fixtures/trained, and of its test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import peft_world
from model_world import base_of

from jaxlora.checkpoints.hf import HfSource
from jaxlora.checkpoints.load import base_hash
from jaxlora.core.lora import ALL_TARGETS, ATTENTION_TARGETS, Adapter, AdapterRef, LoraSpec
from jaxlora.model.decoder import Base
from jaxlora.model.lora_pool import PoolSpec
from jaxlora.model.mesh import make_mesh
from train.data.examples import Example
from train.step.optimizer import Optimizer
from train.trainer import Trainer

FOLDER = peft_world.FIXTURES.parent / "trained"
BASE, STEPS, MAX_RANK = "qwen3", 12, 6  # a base whose heads * head_dim is not its width, with a head of its own
SPECS = {
    "everything": LoraSpec(rank=3, alpha=5.5, targets=ALL_TARGETS, rslora=True),
    "attention": LoraSpec(rank=6, alpha=12.0, targets=ATTENTION_TARGETS),
}
SEQUENCES = [[5, 17, 99, 3, 64, 127, 0, 42], [1, 4, 7, 10, 13, 16], [88, 88, 7, 31, 120, 11, 11, 90, 56, 4, 73, 29]]


@dataclass(frozen=True)
class Trained:
    """What came out of training."""

    base: Base
    base_hash: str
    adapters: dict[str, Adapter]
    losses: dict[str, list[float]]


def train() -> Trained:
    """Both tenants learn to count, one in steps of 3 and one in steps of 5, with decay, clipping and warm-up."""
    folder = peft_world.base_folder(BASE)
    base, hash_ = base_of(HfSource(folder)), base_hash(folder)
    spec = PoolSpec(slots=len(SPECS), rank=MAX_RANK, dtype="float32", targets=ALL_TARGETS)
    trainer = Trainer(base, make_mesh(), [spec], lanes=4, lane_tokens=32, base_hash=hash_)
    optimizer = Optimizer(lr=0.02, warmup_steps=2, total_steps=STEPS, weight_decay=0.01, clip=1.0)
    for seed, (name, lora) in enumerate(SPECS.items()):
        trainer.add(name, lora, optimizer, counting(3 + 2 * seed), batch_size=4, seed=seed)
    while trainer.has_work:
        trainer.step()
    return Trained(
        base,
        hash_,
        {name: trainer.adapter(name).named(AdapterRef("acme", name, 1)) for name in SPECS},
        {name: tenant.losses for name, tenant in trainer.tenants.items()},
    )


def counting(by: int) -> list[Example]:
    """Sixteen sequences of twelve numbers below 128, each larger than the last by `by`."""
    return [
        Example(((start + by * np.arange(12)) % 128).astype(np.int32), np.r_[0, np.ones(11)].astype(np.float32))
        for start in range(0, 128, 8)
    ]
