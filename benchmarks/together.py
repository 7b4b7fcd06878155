"""What training together saves: 16 tenants in one step against one after another, and both against the floor.

    uv run python benchmarks/together.py [16 64 512 ...] [--dtype bfloat16] [--rounds 5] [--peft]

For so many tokens a tenant and step (16, 64 and 512 if none are named): rank 16 on all seven projections, AdamW included.

together    one step of 16 tenants, a lane each
alone       16 steps of one tenant, in a trainer with one slot and one lane of that length
floor       loss, forward and backward pass of the base alone, down to its first norm, on the same tokens and lanes

gain = tokens per CPU second together / alone; efficiency = floor / together.  The runs take turns; the least CPU time of
all rounds counts.  Exit code 1 when a bound is missed.  `--peft` adds PyTorch with PEFT, float32, one tenant: CPU seconds
of its steps of as many tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np
from peft_recipe import train_alone

from jaxlora.checkpoints.load import Opened, open_base
from jaxlora.config.base import DEMO_MODEL, ONE_DEVICE, ModelSection
from jaxlora.config.training import Optimizer
from jaxlora.core.lora import LoraSpec
from jaxlora.model import compile_cache
from jaxlora.model.decoder import Base
from jaxlora.model.lora_pool import LaneLora, PoolSpec
from pallas_kernels.bench import run as bench
from train.data.examples import Example, ExampleStream, fill_lane
from train.step.batch import TrainBatch, idle_batch, put_lane
from train.step.step import lane_losses
from train.trainer import Trainer

TENANTS, RANK = 16, 16
GAIN = {16: 2.5, 64: 1.4, 512: 1.0}  # by tokens a tenant and step: the least
EFFICIENCY = {16: 0.6, 64: 0.8, 512: 0.8}
PEFT_LIMIT = 1.2  # of PEFT's CPU time, alone
SPEC = LoraSpec(rank=RANK, alpha=32.0)
HOW = Optimizer(lr=1e-3, schedule="constant", total_steps=10**6)


def example(seed: int, tokens: int, vocab: int) -> Example:
    """A sequence of `tokens` predictions, all of them trained."""
    ids = np.random.default_rng(seed).integers(0, vocab, tokens + 1).astype(np.int32)
    weights = np.ones(tokens + 1, np.float32)
    weights[0] = 0
    return Example(ids, weights)


def trainer_of(opened: Opened, tenants: int, tokens: int) -> Trainer:
    """A warm trainer in which so many tenants sit, one lane each."""
    buckets = [PoolSpec(slots=tenants, rank=RANK, dtype="float32")]
    shape = {"lanes": tenants, "lane_tokens": tokens}
    trainer = Trainer(opened.base, opened.mesh, buckets, **shape, base_hash=opened.base_hash)
    trainer.warm_up()
    for n in range(tenants):
        data = [example(n, tokens, opened.base.config.vocab)]
        trainer.add(f"t{n}", SPEC, HOW, data, batch_size=1, seed=n)
    return trainer


def floor_of(base: Base, batch: TrainBatch) -> Callable[[], jax.Array]:
    """A call of the base's forward and backward pass on these lanes."""

    def loss(norm: jax.Array) -> jax.Array:
        return lane_losses(
            replace(base, arrays={**base.arrays, "attn_norm": norm}), LaneLora({}), batch, dropout=False
        )[0]

    step = jax.jit(jax.grad(loss))
    return lambda: step(base.arrays["attn_norm"])


def peft_s(opened: Opened, alone: Trainer, tokens: int, steps: int) -> float:
    """CPU seconds of a step of PyTorch with PEFT."""
    adapter = alone.adapter("t0")
    stream = ExampleStream([example(0, tokens, opened.base.config.vocab)], 0)
    how = replace(HOW, total_steps=steps)
    return train_alone(adapter, opened.base.config, how, stream, batch=1).cpu_s / steps


def main() -> int:
    """0 when every bound holds, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", nargs="*", type=int, default=list(GAIN))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peft", action="store_true", help="PyTorch and PEFT too, in an environment of their own")
    args = parser.parse_args()
    compile_cache.enable(None)
    opened = open_base(ModelSection(path=DEMO_MODEL, dtype=args.dtype), ONE_DEVICE)
    failed = False
    for tokens in args.tokens:
        together, alone = trainer_of(opened, TENANTS, tokens), trainer_of(opened, 1, tokens)
        batch = idle_batch(TENANTS, tokens)
        for g, tenant in enumerate(together.tenants.values()):
            lane = fill_lane(tenant.stream.peek(1), tokens)
            put_lane(batch, g, lane, tenant.slot, tenant.loss, lane.reference_J)
        runs = {"together": together.step, "alone": alone.step, "floor": floor_of(opened.base, jax.device_put(batch))}
        took = {name: t.cpu_s.min() for name, t in bench.measure(runs, args.rounds).items()}
        gain, efficiency = TENANTS * took["alone"] / took["together"], took["floor"] / took["together"]
        good = gain >= GAIN.get(tokens, 0) and efficiency >= EFFICIENCY.get(tokens, 0)
        line = (
            f"{tokens:4} tokens: together {took['together'] * 1e3:.0f} ms, alone {TENANTS} x {took['alone'] * 1e3:.0f}, "
            f"floor {took['floor'] * 1e3:.0f}; gain {gain:.2f} (bound {GAIN.get(tokens, '-')}), "
            f"efficiency {efficiency:.2f} (bound {EFFICIENCY.get(tokens, '-')})"
        )
        if args.peft:
            torch_s = peft_s(opened, alone, tokens, 2 * args.rounds)
            good &= took["alone"] <= PEFT_LIMIT * torch_s
            line += f", alone {took['alone'] / torch_s:.2f} of PEFT's {torch_s * 1e3:.0f} (bound {PEFT_LIMIT})"
        failed |= not good
        print(line, "ok" if good else "MISSED", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
