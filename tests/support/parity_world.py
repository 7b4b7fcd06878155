"""Two tenants on the real model whose every loss is compared with PyTorch and PEFT: their recipes and our side of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from small_world import FIXTURES

from jaxlora.checkpoints.load import Opened, open_base
from jaxlora.config.base import DEMO_MODEL, ONE_DEVICE, ModelSection
from jaxlora.config.training import Optimizer
from jaxlora.core.lora import ATTENTION_TARGETS, LoraSpec
from jaxlora.model.lora_pool import PoolSpec
from train.data.examples import Unit
from train.data.load import LengthLimit, load_file
from train.trainer import Trainer

FIXTURE = FIXTURES / "parity.json"  # tenant → the losses of PyTorch and PEFT
DATA = Path(__file__).parents[2] / "configs" / "data"
STEPS, BATCH, LANE_TOKENS = 50, 4, 192


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a tenant trains and how."""

    data: str
    spec: LoraSpec
    optimizer: Optimizer
    seed: int


RECIPES = {
    "roman": Recipe(
        data="roman.train.jsonl",
        spec=LoraSpec(rank=8, alpha=16.0),
        optimizer=Optimizer(lr=1e-3, warmup_steps=5, total_steps=STEPS, weight_decay=0.1, clip=0.5),
        seed=3,
    ),
    "plural": Recipe(
        data="plural.train.jsonl",
        spec=LoraSpec(rank=4, alpha=16.0, targets=ATTENTION_TARGETS, rslora=True),
        optimizer=Optimizer(lr=3e-4, schedule="cosine", total_steps=STEPS, b2=0.99, clip=None, loraplus_ratio=8.0),
        seed=4,
    ),
}


def opened() -> Opened:
    """The base in float32."""
    return open_base(ModelSection(path=DEMO_MODEL, dtype="float32"), ONE_DEVICE)


def examples(recipe: Recipe, base: Opened) -> list[Unit]:
    """The tenant's data."""
    return load_file(DATA / recipe.data, base.tokenizer, limit=LengthLimit(lane_tokens=LANE_TOKENS)).units


def trainer_of(base: Opened) -> Trainer:
    """Both tenants seated, untrained, in buckets of their own."""
    buckets = [PoolSpec(slots=1, rank=r, dtype="float32") for r in (4, 8)]
    trainer = Trainer(base.base, base.mesh, buckets, lanes=4, lane_tokens=LANE_TOKENS, base_hash=base.base_hash)
    for name, r in RECIPES.items():
        trainer.add(name, r.spec, r.optimizer, examples(r, base), batch_size=BATCH, seed=r.seed)
    return trainer
