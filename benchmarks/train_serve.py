"""Training beside serving on SmolLM2: what a stream feels of it, and what training keeps.

    uv run python benchmarks/train_serve.py --rounds 5 --tokens 60

One stream decodes greedily and follows its adapter, while two tenants train in parts and are published as they learn.  Rounds without and with
training alternate in one process, and the rounds with a lower target come after each; training alone is timed between.
Printed: the time between tokens (median and p99 over all rounds, and the ratio on : off), training's tokens/s beside the
stream over those alone, the parts, the freshness histogram and the compiles.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from serving import SIZES

from jaxlora.checkpoints.load import load_found
from jaxlora.config.base import DEMO_MODEL, ModelSection
from jaxlora.config.serving import ServeConfig
from jaxlora.config.training import Optimizer
from jaxlora.core.lora import LoraSpec
from jaxlora.model import compile_cache
from jaxlora.model.lora_pool import PoolSpec
from serve.engine.request import Delta, Request, SamplingParams
from serve.runtime.device_thread import DeviceThread
from serve.runtime.live_training import LiveTraining
from serve.server.build import make_runner, open_store, planned, stop
from train.data.examples import Example
from train.step.microsteps import small_parts
from train.trainer import Trainer

TENANTS, RANK = ("ant", "bee"), 8


@dataclass(slots=True)
class Microsteps:
    """A trainer that counts what it does: seconds by part, lane tokens of the passes that were done."""

    live: LiveTraining
    seconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def has_work(self) -> bool:
        return self.live.has_work

    @property
    def part(self) -> str:
        return self.live.part

    def advance(self) -> None:
        part, start = self.part, time.perf_counter()
        self.live.advance()
        self.seconds.setdefault(part, []).append(time.perf_counter() - start)


class Bench:
    """A server, a trainer beside it, and one stream at a time."""

    def __init__(self, runner: DeviceThread, parts: Microsteps, prompt: tuple[int, ...], tokens: int):
        self.runner, self.parts, self.prompt, self.tokens = runner, parts, prompt, tokens
        self._ids = itertools.count()

    def parts_done(self) -> dict[str, int]:
        """Microsteps run so far, by name."""
        return self.runner.call(lambda: {part: len(s) for part, s in self.parts.seconds.items()})

    def work_since(self, before: dict[str, int]) -> float:
        """How far training has come: every part at what those of its name take in the middle, in seconds.

        A step is always the same parts, so this is its tokens, but for a factor; and a step that is half done counts.
        """
        middle = self.runner.call(lambda: {part: statistics.median(s) for part, s in self.parts.seconds.items()})
        return sum((n - before.get(part, 0)) * middle[part] for part, n in self.parts_done().items() if part in middle)

    def trains(self, on: bool) -> None:
        self.runner.call(lambda: setattr(self.runner, "trainer", self.parts if on else None))

    def stream(self) -> tuple[list[float], float]:
        """(seconds between the tokens of one stream, training's work a second meanwhile)."""
        times: list[float] = []

        def listen(delta: Delta) -> None:
            times.append(time.perf_counter())
            ended.append(delta.finish is not None or delta.error is not None)

        ended: list[bool] = []
        request = Request(
            id=f"bench-{next(self._ids)}",
            tenant=TENANTS[0],
            adapter=self.runner.resolve(TENANTS[0], TENANTS[0]),
            prompt=self.prompt,
            params=SamplingParams(max_tokens=self.tokens, temperature=0.0, ignore_eos=True),
            follow=True,
        )
        self.runner.call(lambda: self.runner.admit(request, listen))
        while not times:
            time.sleep(0.005)
        before, start = self.parts_done(), times[0]
        while not ended[-1]:
            time.sleep(0.01)
        gaps = [b - a for a, b in itertools.pairwise(times)]
        return gaps, self.work_since(before) / (times[-1] - start)

    def alone(self, seconds: float) -> float:
        """Training's work a second, without requests."""
        before, start = self.parts_done(), time.perf_counter()
        time.sleep(seconds)
        return self.work_since(before) / (time.perf_counter() - start)


def quantile(values: list[float], share: float) -> float:
    """The value that this share of them is at most."""
    ranked = sorted(values)
    return ranked[min(int(share * len(ranked)), len(ranked) - 1)]


def told(name: str, gaps: list[float]) -> str:
    """One line of times between tokens, in ms."""
    p50, p99 = 1e3 * quantile(gaps, 0.5), 1e3 * quantile(gaps, 0.99)
    return f"{name:<22} {len(gaps):>5} gaps   p50 {p50:7.1f} ms   p99 {p99:7.1f} ms   most {1e3 * max(gaps):7.1f} ms"


def measure(bench: Bench, rounds: int, lower: float, say: Callable[[str], None]) -> None:
    """Alternates stream alone, stream with training, stream with a lower target, training alone; says what came of it."""
    gaps: dict[str, list[float]] = {"off": [], "on": [], "on, lower target": []}
    shares, lower_shares, p99_ratios = [], [], []
    settings = bench.runner.budget.settings
    floor = settings.training_floor
    for number in range(rounds):
        bench.trains(False)
        off, _ = bench.stream()
        bench.trains(True)
        on, beside = bench.stream()
        target_s = lower * bench.runner.budget.alone.quantile(0.5)
        settings.set(target_s=target_s, training_floor=0.0)
        low, low_beside = bench.stream()
        settings.set(target_s=None, training_floor=floor)
        alone = bench.alone(sum(on) / 2)
        for name, new in zip(gaps, (off, on, low), strict=True):
            gaps[name] += new
        shares.append(beside / alone)
        lower_shares.append(low_beside / alone)
        p99_ratios.append(quantile(on, 0.99) / quantile(off, 0.99))
        over, over_off = (statistics.mean(gap > target_s for gap in some) for some in (low, off))
        say(
            f"round {number}: p99 on : off {p99_ratios[-1]:.2f}, training keeps {shares[-1]:.0%}; "
            f"target {1e3 * target_s:.0f} ms: p50 {1e3 * quantile(low, 0.5):.0f}, p95 {1e3 * quantile(low, 0.95):.0f} ms, "
            f"{over:.0%} above it (off {over_off:.0%}), training keeps {lower_shares[-1]:.0%}; load {os.getloadavg()[0]:.1f}"
        )
    for name, all_gaps in gaps.items():
        say(told(name, all_gaps))
    ratio = {q: quantile(gaps["on"], q) / quantile(gaps["off"], q) for q in (0.5, 0.99)}
    say(f"on : off  p50 {ratio[0.5]:.2f}  p99 {ratio[0.99]:.2f} (median of rounds {statistics.median(p99_ratios):.2f})")
    say(
        f"training beside the stream over alone: {statistics.median(shares):.0%} (median of rounds); "
        f"with the lower target {statistics.median(lower_shares):.0%}"
    )


def seat(trainer: Trainer, lane_tokens: int) -> None:
    """Every tenant with lanes that are full, the second half of each trained on."""
    rng, half = np.random.default_rng(0), lane_tokens // 2
    weights = np.float32([0] * (lane_tokens - half) + [1] * half)
    for seed, name in enumerate(TENANTS):
        trainer.add(
            name,
            LoraSpec(rank=RANK, alpha=2.0 * RANK),
            Optimizer(lr=1e-4, total_steps=100_000, warmup_steps=0),
            [Example(rng.integers(5, 49000, lane_tokens).astype(np.int32), weights) for _ in range(8)],
            batch_size=1,
            seed=seed,
        )


@contextlib.contextmanager
def opened_bench(lane_tokens: int, publish_every: int, tokens: int) -> Generator[Bench]:
    """A warm server and a warm trainer, with everything published once."""
    with tempfile.TemporaryDirectory() as folder:
        model = ModelSection(path=DEMO_MODEL, dtype="bfloat16")
        asked = ServeConfig(model=model, adapters=Path(folder), max_rank=RANK, **SIZES)
        found, config = planned(asked, say=lambda line: None)
        opened = load_found(found, config.model, config.mesh)
        store = open_store(config)
        runner = make_runner(opened, config, store)
        trainer = Trainer(
            opened.base,
            opened.mesh,
            [PoolSpec(slots=len(TENANTS), rank=RANK, dtype="float32")],
            lanes=len(TENANTS),
            lane_tokens=lane_tokens,
            base_hash=opened.base_hash,
            parts=small_parts(opened.mesh),
        )
        live = LiveTraining(
            trainer,
            runner.publisher,
            publish_every=publish_every,
            on_step=lambda _reports: None,
            on_publish=lambda _ref, _step: None,
        )
        runner.start()
        runner.call(trainer.warm_up)
        runner.call(lambda: seat(trainer, lane_tokens))
        parts, first = Microsteps(live), runner.call(lambda: trainer.tenants[TENANTS[0]])
        while first.step < max(2, publish_every):
            runner.call(parts.advance)
        runner.call(live.step)
        prompt = tuple(opened.tokenizer.chat([{"role": "user", "content": "Tell me about the sea."}]))
        bench = Bench(runner, parts, prompt, tokens)
        bench.stream()
        yield bench
        stop(runner, store)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=60, help="of each stream")
    parser.add_argument("--lane-tokens", type=int, default=128)
    parser.add_argument("--publish-every", type=int, default=1, help="steps")
    parser.add_argument("--lower", type=float, default=2.5, help="the lower target, over a decode step alone")
    args = parser.parse_args()
    compile_cache.enable(None)
    with opened_bench(args.lane_tokens, args.publish_every, args.tokens) as bench:
        with compile_cache.CompileCounter() as compiles:
            measure(bench, args.rounds, args.lower, lambda line: print(line, flush=True))
        for part, seconds in bench.parts.seconds.items():
            p50, p99 = 1e3 * quantile(seconds, 0.5), 1e3 * quantile(seconds, 0.99)
            print(f"{part:<10} {len(seconds):>6} parts   p50 {p50:6.1f} ms   p99 {p99:6.1f} ms")
        print("learned → first token under the new version:")
        print("\n".join(bench.runner.publisher.freshness.lines()))
        print(f"compiles after warm-up: {compiles.compiles} (traces {compiles.traces})")


if __name__ == "__main__":
    main()
