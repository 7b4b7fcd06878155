"""Trains real tasks together and compares each with PyTorch and PEFT, which trains it alone.

    uv run python benchmarks/tenants.py DATA [--dtype bfloat16] [--steps 80] [--peft] [--only NAME ...]

DATA holds NAME.train.jsonl and NAME.heldout.jsonl (OpenAI chat lines); all of its tasks train in one session, a tenant each.
Recipe: rank 8, alpha 16, all seven projections, 80 steps of batch 8, AdamW with lr 2e-3, 5 warm-up steps and a linear
decay.  Said of each: nats per answer token of the first 32 held-out examples, and how many of the first 16 greedy answers are
the example's own; of the base, of the adapter, and of PEFT's.

PEFT's numbers are those of REFERENCE, measured once in float32; `--peft` measures them anew, with the same first weights
and batches, in an environment with torch (about 10 minutes a task on two cores).
A tenant passes at most max(3 %, 0.05 nat) above PEFT.  Exit code 1 when one does not, or nothing is known to compare with.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from peft_recipe import train_alone

from jaxlora.checkpoints.load import Opened
from jaxlora.config.training import Optimizer
from jaxlora.core.lora import LoraSpec
from jaxlora.model.compile_cache import CompileCounter
from serve.session import Session
from train.data.examples import ExampleStream
from train.data.load import LengthLimit, load_file
from train.step.state import fresh_adapter

REFERENCE = {
    "active-to-passive": 0.000,
    "number-to-words": 0.021,
    "verb-forms": 0.116,
    "snips-weather-slots": 0.085,
    "banking77-intent": 0.652,
    "django-ui-de": 2.182,
    "emoji-name": 3.684,
    "devils-dictionary": 3.527,
    "django-ui-fr": 1.554,
    "pick-animals": 0.184,
    "py-doc-oneliner": 2.540,
    "snips-music-slots": 0.111,
}
RANK, ALPHA, BATCH, LR, WARMUP = 8, 16.0, 8, 2e-3, 5
LANE_TOKENS, HELDOUT, ASKED, ANSWER = 256, 32, 16, 48


def limit(reference: float) -> float:
    """The largest held-out loss that passes."""
    return reference + max(0.03 * reference, 0.05)


def exact(session: Session, model: str, lines: list[dict]) -> int:
    """How many greedy answers are the example's own."""
    count = 0
    for line in lines:
        *prompt, answer = line["messages"]
        said = session.sample(model, prompt, max_tokens=ANSWER, temperature=0.0)
        count += said.strip() == answer["content"].strip()
    return count


def peft_nll(opened: Opened, path: Path, seed: int, steps: int) -> float:
    """Held-out loss of PEFT, trained alone from our first weights on our batches."""
    train, heldout = (
        load_file(
            path.with_suffix(f".{part}.jsonl"), opened.tokenizer, limit=LengthLimit(lane_tokens=LANE_TOKENS)
        ).units
        for part in ("train", "heldout")
    )
    spec = LoraSpec(rank=RANK, alpha=ALPHA)
    adapter = fresh_adapter(opened.base.config, spec, seed, opened.base_hash)
    how = Optimizer(lr=LR, total_steps=steps, warmup_steps=min(WARMUP, steps), clip=None)
    stream = ExampleStream(train, seed)
    found = train_alone(adapter, opened.base.config, how, stream, batch=BATCH, heldout=heldout[:HELDOUT])
    assert found.heldout is not None
    return found.heldout


def main() -> int:
    """0 when every tenant passes, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--peft", action="store_true", help="measure PyTorch with PEFT too")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these tasks")
    args = parser.parse_args()
    every = sorted(p.name.removesuffix(".train.jsonl") for p in args.data.glob("*.train.jsonl"))
    names, seeds = args.only or every, {name: seed for seed, name in enumerate(every)}  # also alone, a task has its own
    shape = {"slots": len(names), "max_rank": RANK, "lanes": 2 * len(names), "lane_tokens": LANE_TOKENS}
    with Session.open(dtype=args.dtype, **shape, publish_every=args.steps + 1) as session:
        lines = {}
        for name in names:
            held = [json.loads(x) for x in (args.data / f"{name}.heldout.jsonl").read_text().splitlines()][:HELDOUT]
            lines[name] = held[:ASKED]
            session.add_tenant(
                name,
                args.data / f"{name}.train.jsonl",
                heldout=held,
                rank=RANK,
                alpha=ALPHA,
                lr=LR,
                warmup_steps=min(WARMUP, args.steps),
                clip=float("inf"),
                batch=BATCH,
                steps=args.steps,
                seed=seeds[name],
            )
        before = {n: (session.evaluate(n, tuned=False).nll, exact(session, session.base_name, lines[n])) for n in names}
        start_s, tokens = time.perf_counter(), 0
        with CompileCounter() as compiles:
            while reports := session.step() if session.has_work else []:
                tokens += sum(r.tokens for r in reports)
                if reports[0].step % 10 == 0:
                    losses = "  ".join(f"{r.tenant} {r.loss:.3f}" for r in reports)
                    print(f"{time.perf_counter() - start_s:5.0f} s  step {reports[0].step}: {losses}", flush=True)
        took_s = time.perf_counter() - start_s
        after = {n: (session.evaluate(n).nll, exact(session, n, lines[n])) for n in names}
        failed = 0
        for name in names:
            measured = peft_nll(session.opened, args.data / name, seeds[name], args.steps) if args.peft else None
            reference = REFERENCE.get(name) if measured is None else measured
            (nll, hits), (nll_base, hits_base) = after[name], before[name]
            good = reference is not None and nll <= limit(reference)
            failed += not good
            against = (
                "PEFT not measured" if reference is None else f"PEFT {reference:.3f}, limit {limit(reference):.3f}"
            )
            print(
                f"{name:20} {nll_base:6.3f} → {nll:6.3f}   {against}   exact {hits_base} → {hits} of {ASKED}  "
                f"{'ok' if good else 'MISSED'}",
                flush=True,
            )
        print(
            f"{session.opened.base.dtype.name}: {tokens} tokens in {took_s:.0f} s, {tokens / took_s:.0f} tokens/s; "
            f"compiles while training: {compiles.compiles}"
        )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
