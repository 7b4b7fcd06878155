"""What a base of 8 bits loses beside floats: perplexity of the base, and held-out losses of adapters trained on each.

    uv run python benchmarks/quantized.py DATA --text FILE ... [--only NAME ...] [--steps 40] [--dtype bfloat16]

DATA holds NAME.train.jsonl and NAME.heldout.jsonl, as of tenants.py, whose recipe each task gets, in one session.  The texts are
cut into examples that fill a row.  Said: bytes of the weights, perplexity of all tokens of the texts, and
of each task the nats per answer token of the first 32 held-out examples, of the base and of the adapter.

Exit code 1 when the perplexity is more than 1 % or a trained loss more than 2 % above that of floats.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
from tenants import ALPHA, BATCH, HELDOUT, LANE_TOKENS, LR, RANK, WARMUP

from jaxlora.checkpoints.tokenizer import Tokenizer
from jaxlora.config.base import Quantization
from serve.session import Session

MOST = {"perplexity": 0.01, "loss": 0.02}


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What one form of the base comes to."""

    nbytes: int
    perplexity: float
    base: dict[str, float]  # task → nats
    trained: dict[str, float]


def chunks(tokenizer: Tokenizer, texts: list[Path]) -> list[dict[str, list[int]]]:
    """Returns the texts in pieces that fill a row."""
    tokens = tokenizer.encode("\n".join(path.read_text() for path in texts), parse_special=False)
    pieces = [tokens[i : i + LANE_TOKENS] for i in range(0, len(tokens) - 1, LANE_TOKENS)]
    return [{"input_ids": piece, "weights": [0] + [1] * (len(piece) - 1)} for piece in pieces]


def measure(args: argparse.Namespace, names: list[str], quantization: Quantization) -> Found:
    """Opens the base, trains all tasks, and evaluates."""
    shape = {"slots": len(names), "max_rank": RANK, "lanes": 2 * len(names), "lane_tokens": LANE_TOKENS}
    how = {"dtype": args.dtype, "quantization": quantization, "publish_every": args.steps + 1}
    with Session.open(**shape, **how) as session:
        for seed, name in enumerate(names):
            held = [json.loads(x) for x in (args.data / f"{name}.heldout.jsonl").read_text().splitlines()][:HELDOUT]
            recipe = {"rank": RANK, "alpha": ALPHA, "lr": LR, "clip": float("inf"), "batch": BATCH, "seed": seed}
            recipe |= {"steps": args.steps, "warmup_steps": min(WARMUP, args.steps)}
            session.add_tenant(name, args.data / f"{name}.train.jsonl", heldout=held, **recipe)
        text = session.evaluate(names[0], chunks(session.opened.tokenizer, args.text), tuned=False).nll
        base = {name: session.evaluate(name, tuned=False).nll for name in names}
        while session.has_work:
            session.step()
        return Found(
            nbytes=sum(x.nbytes for x in jax.tree.leaves(session.opened.base)),
            perplexity=math.exp(text),
            base=base,
            trained={name: session.evaluate(name).nll for name in names},
        )


def main() -> int:
    """0 when all hold, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="plain text that nothing is trained on")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these tasks")
    args = parser.parse_args()
    names = args.only or sorted(p.name.removesuffix(".train.jsonl") for p in args.data.glob("*.train.jsonl"))
    exact, small = (measure(args, names, quantization) for quantization in ("none", "int8"))
    print(f"weights: {exact.nbytes / 1e6:.0f} MB in {args.dtype}, {small.nbytes / 1e6:.0f} MB with 8 bits")
    rows = [("perplexity", exact.perplexity, small.perplexity, MOST["perplexity"])]
    rows += [(f"{n}, base", exact.base[n], small.base[n], math.inf) for n in names]
    rows += [(f"{n}, trained", exact.trained[n], small.trained[n], MOST["loss"]) for n in names]
    missed = 0
    print(f"\n| | {args.dtype} | 8 bits | change | |\n| --- | --: | --: | --: | --- |")
    for what, before, after, most in rows:
        change = after / before - 1
        missed += change > most
        print(f"| {what} | {before:.4f} | {after:.4f} | {change:+.2%} | {'MISSED' if change > most else ''} |")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
