"""Trains real tasks together and compares their held-out loss with single-tenant PEFT.

    uv run python benchmarks/tenants.py DATA [--dtype bfloat16] [--steps 80]

DATA holds NAME.train.jsonl and NAME.heldout.jsonl (OpenAI chat lines) for the names of REFERENCE.  The reference is
PyTorch with PEFT, one tenant at a time: rank 8, alpha 16, all seven projections, 80 steps of batch 8, AdamW with lr 2e-3,
5 warm-up steps and a linear decay; nats per answer token of the first 32 held-out examples.
A tenant passes at most max(5 %, 0.05 nat) above its reference.  Exit code 1 when one does not.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from jaxlora import compile_cache
from jaxlora.config import DEMO_MODEL, ONE_DEVICE, ModelSection
from jaxlora.lora import LoraSpec
from jaxlora.opened import open_base
from jaxlora.pool import PoolSpec
from train.jsonl import load_jsonl
from train.optimizer import Optimizer
from train.trainer import Trainer

REFERENCE = {
    "active-to-passive": 0.000,
    "number-to-words": 0.021,
    "verb-forms": 0.116,
    "snips-weather-slots": 0.085,
    "banking77-intent": 0.652,
    "django-ui-de": 2.182,
}
LANES, LANE_TOKENS = 12, 256
HELDOUT = 32


def limit(reference: float) -> float:
    """The largest held-out loss that passes."""
    return reference + max(0.05 * reference, 0.05)


def main() -> int:
    """0 when every tenant passes, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=80)
    args = parser.parse_args()
    compile_cache.enable(None)
    opened = open_base(ModelSection(path=DEMO_MODEL, dtype=args.dtype), ONE_DEVICE)
    trainer = Trainer(
        opened.base,
        opened.mesh,
        [PoolSpec(slots=len(REFERENCE), rank=8, dtype="float32")],
        lanes=LANES,
        lane_tokens=LANE_TOKENS,
        base_hash=opened.base_hash,
    )
    trainer.warm_up()
    heldout = {}
    for i, name in enumerate(REFERENCE):
        examples = load_jsonl(args.data / f"{name}.train.jsonl", opened.tokenizer, max_tokens=LANE_TOKENS)
        heldout[name] = load_jsonl(args.data / f"{name}.heldout.jsonl", opened.tokenizer, max_tokens=LANE_TOKENS)[
            :HELDOUT
        ]
        optimizer = Optimizer(lr=2e-3, total_steps=args.steps, warmup_steps=min(5, args.steps), clip=None)
        trainer.add(name, LoraSpec(rank=8, alpha=16.0), optimizer, examples, batch_size=8, seed=i)
    base = trainer.evaluate_all([(examples, None) for examples in heldout.values()])
    start_s = time.perf_counter()
    with compile_cache.CompileCounter() as compiles:
        while trainer.has_work:
            reports = trainer.step()
            if reports[0].step % 10 == 0:
                losses = "  ".join(f"{r.tenant} {r.loss:.3f}" for r in reports)
                print(f"{time.perf_counter() - start_s:5.0f} s  step {reports[0].step}: {losses}", flush=True)
    took_s = time.perf_counter() - start_s
    failed = 0
    tuned = trainer.evaluate_all([(examples, name) for name, examples in heldout.items()])
    for (name, reference), before, after in zip(REFERENCE.items(), base, tuned, strict=True):
        nll = after.nll
        failed += nll > limit(reference)
        word = "ok" if nll <= limit(reference) else "TOO HIGH"
        print(
            f"{name:20} {before.nll:6.3f} → {nll:6.3f}   reference {reference:.3f}, limit {limit(reference):.3f}  {word}"
        )
    print(
        f"{opened.base.dtype.name}: {trainer.trained_tokens} tokens in {took_s:.0f} s, "
        f"{trainer.trained_tokens / took_s:.0f} tokens/s; compiles while training: {compiles.compiles}"
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
