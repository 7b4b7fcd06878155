"""jaxlora's trainer, for workers.py."""

from __future__ import annotations

import time

import numpy as np

from benchmarks.peers.lines import answer_lines
from benchmarks.peers.world import ALPHA, RANK
from jaxlora.checkpoints.load import open_base
from jaxlora.config.base import ONE_DEVICE, Dtype, ModelSection
from jaxlora.config.training import Optimizer
from jaxlora.core.lora import LoraSpec
from jaxlora.model import compile_cache
from jaxlora.model.lora_pool import PoolSpec
from train.data.examples import Example
from train.trainer import Trainer

HOW = Optimizer(lr=1e-4, schedule="constant", total_steps=10**6)


class Worker:
    """A base, and a warm trainer for each shape that was asked for."""

    def __init__(self, base: str, dtype: Dtype) -> None:
        compile_cache.enable(None)
        self.opened = open_base(ModelSection(path=base, dtype=dtype), ONE_DEVICE)
        self.trainers: dict[tuple[int, int, int], Trainer] = {}

    def _trainer(self, tenants: int, lanes: int, tokens: int) -> Trainer:
        """A trainer in which so many tenants sit, each with as many rows a step as it has lanes."""
        buckets = [PoolSpec(slots=tenants, rank=RANK, dtype="float32")]
        trainer = Trainer(
            self.opened.base,
            self.opened.mesh,
            buckets,
            lanes=tenants * lanes,
            lane_tokens=tokens,
            base_hash=self.opened.base_hash,
        )
        trainer.warm_up()
        random = np.random.default_rng(tokens)
        weights = np.ones(tokens + 1, np.float32)
        weights[0] = 0
        for n in range(tenants):
            ids = random.integers(1000, self.opened.base.config.vocab, (lanes, tokens + 1)).astype(np.int32)
            rows = [Example(row, weights) for row in ids]
            trainer.add(f"t{n}", LoraSpec(rank=RANK, alpha=ALPHA), HOW, rows, batch_size=lanes, seed=n)
        return trainer

    def train(self, tenants: int, lanes: int, tokens: int, steps: int, seed: int) -> dict:
        """Trains every tenant for some steps."""
        shape = (tenants, lanes, tokens)
        if shape not in self.trainers:
            self.trainers[shape] = self._trainer(*shape)
        trainer = self.trainers[shape]
        before = [tenant.step for tenant in trainer.tenants.values()]
        began_s = time.perf_counter()
        for _ in range(steps):
            trainer.step()
        wall_s = time.perf_counter() - began_s
        assert [tenant.step - b for tenant, b in zip(trainer.tenants.values(), before, strict=True)] == [
            steps
        ] * tenants
        return {"wall_s": wall_s, "tokens": steps * tenants * lanes * tokens}


if __name__ == "__main__":
    answer_lines(Worker)
