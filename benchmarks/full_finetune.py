"""What LoRA loses: adapters of several ranks against full fine-tuning in PyTorch, on the same examples of real tasks.

    uv run python benchmarks/full_finetune.py DATA [--only NAME ...] [--ranks 4 16 64] [--steps 30] [--lr 5e-5 1.5e-4]

DATA holds NAME.train.jsonl and NAME.heldout.jsonl (OpenAI chat lines).  Every task at every rank is a tenant of one session,
with our defaults: alpha 32, all seven projections, the learning rate of `default_lr`.  Full fine-tuning trains all weights of
the same base in float32 with PyTorch and transformers, one task after another, in an environment of its own (`--python`,
UV_FIND_LINKS as in `peft_alone.py`).  Both take the same examples in the same order: batches of 8, AdamW without decay, norms
clipped at 1, a warm-up of 3 % and a linear decay.

Full fine-tuning tries each learning rate of `--lr` on the first task and takes the one with the least held-out loss for all:
its figure of that task is the best of its tries, ours is of one.

Said of each: nats per answer token of the first 32 held-out examples, how many of the first 16 greedy answers are the
example's own, the share of weights that train, and the most memory that each process took.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from peft_recipe import Alone, Asked, train_alone
from tenants import ANSWER, ASKED, BATCH, HELDOUT, exact

from jaxlora.checkpoints.load import Opened
from jaxlora.config.base import DEMO_MODEL
from jaxlora.config.training import WARMUP, Optimizer, Recipe, default_lr
from jaxlora.core.adapter_size import adapter_size
from serve.session import Session
from train.data.examples import ExampleStream
from train.data.load import LengthLimit, load_file

TASKS = ("banking77-intent", "number-to-words", "verb-forms", "snips-weather-slots")
LANE_TOKENS = 192  # three or four examples of these tasks


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task: its files, and the seed of the order of its examples."""

    name: str
    train: Path
    heldout: Path
    seed: int

    def lines(self, count: int) -> list[dict]:
        """The first held-out lines."""
        return [json.loads(line) for line in self.heldout.read_text().splitlines()[:count]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one task became."""

    nll: float  # nats per answer token of held-out examples
    hits: int | None  # greedy answers that are the example's own; None: not asked

    def __str__(self) -> str:
        return f"{self.nll:.3f}" if self.hits is None else f"{self.nll:.3f}, {self.hits}"


def adapters(session: Session, tasks: list[Task], ranks: list[int], steps: int) -> dict[int | None, dict[str, Outcome]]:
    """Trains every task at every rank together: rank → task → outcome; those of None are the base's."""
    tenants = {f"{task.name}-r{rank}": (task, rank) for task in tasks for rank in ranks}
    for name, (task, rank) in tenants.items():
        held = task.lines(HELDOUT)
        session.add_tenant(name, task.train, heldout=held, rank=rank, batch=BATCH, steps=steps, seed=task.seed)
    found: dict[int | None, dict[str, Outcome]] = {None: {}} | {rank: {} for rank in ranks}
    for task in tasks:
        found[None][task.name] = Outcome(nll=session.evaluate(f"{task.name}-r{ranks[0]}", tuned=False).nll, hits=None)
    while session.has_work:
        losses = "  ".join(f"{r.tenant} {r.loss:.3f}" for r in session.step() if r.step % 10 == 0)
        if losses:
            print(losses, flush=True)
    with ThreadPoolExecutor(len(tenants)) as threads:  # their answers share decode steps
        hits = threads.map(lambda name: exact(session, name, tenants[name][0].lines(ASKED)), tenants)
        for (name, (task, rank)), count in zip(tenants.items(), hits, strict=True):
            found[rank][task.name] = Outcome(nll=session.evaluate(name).nll, hits=count)
    return found


def all_weights(opened: Opened, task: Task, how: Optimizer, python: str | None) -> tuple[Outcome, Alone]:
    """Trains all weights on one task in PyTorch."""
    limit = LengthLimit(lane_tokens=LANE_TOKENS)
    train, heldout = (load_file(path, opened.tokenizer, limit=limit).units for path in (task.train, task.heldout))
    lines = task.lines(ASKED)
    asked = Asked(
        prompts=[opened.tokenizer.chat(line["messages"][:-1]) for line in lines],
        ends=opened.tokenizer.eos_ids,
        answer=ANSWER,
    )
    alone = train_alone(
        None,
        opened.base.config,
        how,
        ExampleStream(train, task.seed),
        batch=BATCH,
        heldout=heldout[:HELDOUT],
        asked=asked,
        python=python,
    )
    assert alone.heldout is not None
    wanted = [line["messages"][-1]["content"].strip() for line in lines]
    said = [opened.tokenizer.decode(tokens).strip() for tokens in alone.answers]
    return Outcome(nll=alone.heldout, hits=sum(a == b for a, b in zip(said, wanted, strict=True))), alone


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=TASKS, help="these tasks")
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 16, 64])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", nargs="+", type=float, default=[5e-5, 1.5e-4], help="tries of full fine-tuning")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of our base")
    parser.add_argument("--python", help="version or path of the Python on the torch side")
    args = parser.parse_args()
    tasks = [
        Task(name=n, train=args.data / f"{n}.train.jsonl", heldout=args.data / f"{n}.heldout.jsonl", seed=seed)
        for seed, n in enumerate(args.only)
    ]
    count, began_s = len(tasks) * len(args.ranks), time.perf_counter()
    shape = {"slots": count, "max_rank": max(args.ranks), "lanes": 3 * count, "lane_tokens": LANE_TOKENS}
    with Session.open(DEMO_MODEL, dtype=args.dtype, **shape, publish_every=args.steps + 1) as session:
        opened, opened_s = session.opened, time.perf_counter()
        rows = adapters(session, tasks, args.ranks, args.steps)
    ended_s = time.perf_counter()
    ours_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    config, dtype = opened.base.config, opened.base.dtype.name

    how = Optimizer(lr=args.lr[0], total_steps=args.steps, warmup_steps=math.ceil(WARMUP * args.steps))
    tries = {lr: all_weights(opened, tasks[0], replace(how, lr=lr), args.python) for lr in args.lr}
    for lr, (outcome, _) in tries.items():
        print(f"all weights, {tasks[0].name}, lr {lr:g}: {outcome}", flush=True)
    best = min(tries, key=lambda lr: tries[lr][0].nll)
    full = {tasks[0].name: tries[best]}
    for task in tasks[1:]:
        full[task.name] = all_weights(opened, task, replace(how, lr=best), args.python)

    print(
        f"\n| trained | share of weights | {' | '.join(t.name for t in tasks)} |\n| --- {'| --: ' * (len(tasks) + 1)}|"
    )
    table = {"nothing": (0.0, rows[None])}
    table |= {
        f"rank {n}": (adapter_size(config, Recipe(rank=n).spec).trainable_percent / 100, rows[n]) for n in args.ranks
    }
    table["all weights"] = (1.0, {name: outcome for name, (outcome, _) in full.items()})
    for what, (part, outcomes) in table.items():
        print(f"| {what} | {part:.2%} | {' | '.join(str(outcomes[t.name]) for t in tasks)} |")
    print(
        f"\nheld-out nats per answer token, greedy answers of {ASKED} that are the example's own; {args.steps} steps of {BATCH}"
        f"\nadapters: {dtype} base, lr {default_lr(config):.2g}, {count} tenants together, opened in {opened_s - began_s:.0f} s, "
        f"trained and asked in {ended_s - opened_s:.0f} s, peak memory {ours_bytes / 2**20:.0f} MiB"
        f"\nall weights: float32, lr {best:g} of {', '.join(f'{lr:g}' for lr in args.lr)}, "
        f"{sum(a.cpu_s for _, a in full.values()):.0f} CPU s for the steps of {len(full)} tasks, "
        f"peak memory {max(a.peak_bytes for _, a in full.values()) / 2**20:.0f} MiB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
