"""What training together saves: 16 tenants in one step against one after another, and both against the floor.

    uv run python benchmarks/together.py [16 64 512 ...] [--dtype bfloat16] [--rounds 5] [--peft]

For so many tokens a tenant and step (16, 64 and 512 if none are named): rank 16 on all seven projections, AdamW included.

What is timed, and what gain and efficiency are, stands in `train.bench`, which `jaxlora bench train` runs too: 16 tenants,
a lane each.  Exit code 1 when a bound is missed.  `--peft` adds PyTorch with PEFT, float32, one tenant: CPU seconds
of its steps of as many tokens.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from peft_recipe import train_alone

from jaxlora.checkpoints.load import Opened, open_base
from jaxlora.config.base import DEMO_MODEL, ONE_DEVICE, ModelSection
from jaxlora.model import compile_cache
from train.bench import HOW, TrainingSizes, examples_of, time_training
from train.data.examples import ExampleStream
from train.step.state import fresh_adapter

TENANTS, RANK = 16, 16
GAIN = {16: 2.5, 64: 1.4, 512: 1.0}  # by tokens a tenant and step: the least
EFFICIENCY = {16: 0.6, 64: 0.8, 512: 0.8}
PEFT_LIMIT = 1.2  # of PEFT's CPU time, alone


def peft_s(opened: Opened, sizes: TrainingSizes, steps: int) -> float:
    """CPU seconds of a step of PyTorch with PEFT."""
    config = opened.base.config
    adapter = fresh_adapter(config, sizes.spec, 0, opened.base_hash)
    stream = ExampleStream(examples_of(0, sizes, config.vocab), 0)
    return train_alone(adapter, config, replace(HOW, total_steps=steps), stream, batch=1).cpu_s / steps


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
        sizes = TrainingSizes(tenants=TENANTS, lanes=1, tokens=tokens, rank=RANK)
        found = time_training(opened, sizes, args.rounds)
        together, alone, floor = (of.seconds for of in (found.together, found.alone, found.floor))
        good = found.gain >= GAIN.get(tokens, 0) and found.efficiency >= EFFICIENCY.get(tokens, 0)
        line = (
            f"{tokens:4} tokens: together {together * 1e3:.0f} ms, alone {TENANTS} x {alone * 1e3:.0f}, "
            f"floor {floor * 1e3:.0f}; gain {found.gain:.2f} (bound {GAIN.get(tokens, '-')}), "
            f"efficiency {found.efficiency:.2f} (bound {EFFICIENCY.get(tokens, '-')})"
        )
        if args.peft:
            torch_s = peft_s(opened, sizes, 2 * args.rounds)
            good &= alone <= PEFT_LIMIT * torch_s
            line += f", alone {alone / torch_s:.2f} of PEFT's {torch_s * 1e3:.0f} (bound {PEFT_LIMIT})"
        failed |= not good
        print(line, "ok" if good else "MISSED", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
