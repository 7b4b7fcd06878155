"""What ten thousand adapters cost: 2,000 of them over 64 slots against 64 that are always there; start-up; host memory.

    uv run python -m benchmarks.many [--rounds 10] [--steps 10] [--quantum-ms 120000] [--dtype auto] [--store DIR]

store   10,000 rank-8 adapters on disk: 2,000 random ones that the store's own writer wrote, 8,000 hard links of them.
        With --store it is made in DIR once and stays there; else in a temporary folder that is removed (20 GB).
start   `jaxlora serve` over them, twice: seconds until it answers, and until /v1/models is there; the second start has a warm
        compile cache (limit 20 s).
traces  Zipf (exponent 1) and uniform over the 2,000, and the same traces with adapter i taken to be adapter i mod 64, which
        fit the slots.  Two engines on one base run them in turn, --steps steps at a time, 96 requests under way: prompts of
        32 tokens, answers of 24 to 40, within a quantum even where others use the cores.  Loads that are under way
        at the end of a turn are waited for, on its account.  The ratio of tokens a second (prompts and answers) must be 0.9,
        of wall time and of the process's CPU time; host memory of the adapters must keep within its budget (1 GB).

Exit code 1 when a bound is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks.serving import SIZES, adapter, request
from jaxlora.checkpoints.load import Opened, load_found
from jaxlora.config.base import DEMO_MODEL, ModelSection
from jaxlora.config.serving import ServeConfig, SizedConfig, Tuning
from jaxlora.core.lora import AdapterRef
from jaxlora.model import compile_cache
from jaxlora.peft.ingest import find_base
from jaxlora.storage.adapter_files import save_version
from jaxlora.storage.adapter_store import AdapterStore
from serve.engine.engine import Engine
from serve.server.build import make_runner, open_store, planned

REGISTERED, DISTINCT, FEW = 10_000, 2_000, 64
RANK, PROMPT, ANSWER = 8, 32, (24, 41)
UNDER_WAY = 96
WARM_STEPS = 40  # until requests end at different times
RATIO, START_S = 0.9, 20.0
TENANTS = 100


def ref_of(number: int) -> AdapterRef:
    """An adapter of the store; those from DISTINCT on are links."""
    return AdapterRef(f"team{number % TENANTS}", f"a{number}", 1)


def folder_of(store: Path, number: int) -> Path:
    """Where it lies."""
    ref = ref_of(number)
    return store / "adapters" / ref.tenant / ref.name


def write(store: Path, numbers: range, rank: int) -> None:
    """Writes adapters; in a process of its own."""
    base = find_base(DEMO_MODEL)
    trash = store / "trash"
    trash.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        made = adapter(base.source.config, base.hash, ref_of(number), rank)
        save_version(folder_of(store, number), made, time.time(), trash)


def write_all(store: Path, count: int, rank: int) -> None:
    """Writes the first so many adapters, in two processes."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for part in [pool.submit(write, store, range(start, count, 2), rank) for start in range(2)]:
            part.result()


def link(store: Path, distinct: int, into: Path, numbers: range) -> None:
    """Gives a store these adapters: hard links, over and over, of the first so many of `store`."""
    for number in numbers:
        shutil.copytree(folder_of(store, number % distinct), folder_of(into, number), copy_function=os.link)


def make_store(store: Path) -> None:
    """All REGISTERED adapters on disk; does nothing where they are."""
    done = store / "whole"
    if done.exists():
        return
    started = time.perf_counter()
    write_all(store, DISTINCT, RANK)
    written = time.perf_counter()
    link(store, DISTINCT, store, range(DISTINCT, REGISTERED))
    link(store, DISTINCT, store / "few", range(FEW))
    done.touch()
    linked = time.perf_counter()
    print(
        f"{DISTINCT} adapters written in {written - started:.0f} s, {REGISTERED} are there after {linked - started:.0f} s"
    )


def settings(store: Path, dtype: str, quantum_ms: float) -> ServeConfig:
    """The server of this benchmark."""
    sizes = {"slots": FEW, "rows": 64, "kv_pages": FEW * 2 + UNDER_WAY, "prefill_tokens": PROMPT}
    return ServeConfig(
        model=ModelSection(path=DEMO_MODEL, dtype=dtype),
        adapters=store,
        port=0,
        max_rank=RANK,
        tuning=Tuning(quantum_ms=quantum_ms),
        host_adapters_gb=1.0,
        **(SIZES | sizes),
    )


def start(config: ServeConfig) -> tuple[float, float, float]:
    """Seconds until `jaxlora serve` answers, seconds that its first list of the models takes, CPU seconds until its end."""
    sections = ("model", "mesh", "tuning", "load", "limits", "training", "lora_roots", "data")
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in sections}
    lines = [f"{k} = {json.dumps(v, default=str)}" for k, v in values.items() if v is not None]
    lines += ["[tuning]", f"quantum_ms = {config.tuning.quantum_ms}"]
    lines += ["[model]", f"path = {json.dumps(config.model.path)}", f"dtype = {json.dumps(config.model.dtype)}"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "serve.toml"
        path.write_text("\n".join(['data = "data"', *lines]))
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "serve.cli.main", "serve", str(path)]
        with subprocess.Popen(command, text=True, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            url = next(line for line in server.stdout if line.startswith("serving ")).split()[-1]
            up = time.perf_counter()
            with urllib.request.urlopen(f"{url}/models?limit=100", timeout=120) as answer:
                assert len(json.load(answer)["data"]) == 100
            listed = time.perf_counter()
            server.terminate()
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return up - started, listed - up, cpu


@dataclass(slots=True)
class Side:
    """An engine, what it is asked, and what that took."""

    engine: Engine
    store: AdapterStore
    numbers: Iterator[int]
    vocab: int
    under_way: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    tokens: int = 0
    steps: int = 0
    loads: int = 0
    answers: int = 0

    def turn(self, steps: int, *, counted: bool) -> None:
        """So many steps, and the loads they began."""
        engine, before = self.engine, self._tokens()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            while self.under_way < UNDER_WAY:
                answer = int(np.random.default_rng(self.under_way + engine.decoded_tokens).integers(*ANSWER))
                engine.submit(request(ref_of(next(self.numbers)), PROMPT, answer, self.vocab))
                self.under_way += 1
            for delta in engine.step():
                if delta.error is not None:
                    raise delta.error
                self.under_way -= delta.finish is not None
                self.answers += delta.finish is not None
        while self.store.host_memory().loading:
            time.sleep(0.001)
        if counted:
            self.wall_s += time.perf_counter() - wall
            self.cpu_s += time.process_time() - cpu
            self.tokens += self._tokens() - before
            self.steps += steps

    def _tokens(self) -> int:
        return self.engine.decoded_tokens + self.engine.prefilled_tokens

    def count_loads(self) -> None:
        """Counts copies into slots from now on."""
        load = self.engine._load

        def counted(ref: AdapterRef, slot: int) -> None:
            self.loads += 1
            load(ref, slot)

        self.engine._load = counted


def trace(kind: str) -> Iterator[int]:
    """Adapters without end; equal for equal kinds."""
    random = np.random.default_rng(1)
    weight = 1.0 / np.arange(1, DISTINCT + 1) if kind == "zipf" else np.ones(DISTINCT)
    places = random.permutation(DISTINCT)  # the popular ones lie anywhere
    while True:
        yield from places[random.choice(DISTINCT, 4096, p=weight / weight.sum())].tolist()


def compare(
    kind: str, opened: Opened, config: SizedConfig, stores: list[AdapterStore], options: argparse.Namespace
) -> bool:
    """Runs a trace over many and over few; whether the ratio holds."""
    sides = []
    for store in stores:
        engine = make_runner(opened, config, store).engine
        engine.warm_up()
        numbers = trace(kind) if store is stores[0] else (n % FEW for n in trace(kind))
        sides.append(Side(engine, store, numbers, opened.base.config.vocab))
        sides[-1].count_loads()
    for side in sides:
        side.turn(WARM_STEPS, counted=False)
        side.loads = side.answers = 0
    for _ in range(options.rounds):
        for side in sides:
            side.turn(options.steps, counted=True)
    many, few = sides
    for name, s in (("2,000", many), ("64", few)):
        print(
            f"{kind:8} {name:>5} adapters: {s.tokens / s.wall_s:6.1f} tokens/s, {s.tokens / s.cpu_s:6.1f} a CPU s; "
            f"{s.steps} steps, {s.answers} answers, {s.loads} loads, {s.engine.scheduler.active.swaps} swaps"
        )
    wall = (many.tokens / many.wall_s) / (few.tokens / few.wall_s)
    cpu = (many.tokens / many.cpu_s) / (few.tokens / few.cpu_s)
    print(f"{kind:8} ratio {wall:.3f} of wall time, {cpu:.3f} of CPU time (at least {RATIO})", flush=True)
    for side in sides:
        side.store.set_aside(-side.engine.ahead_bytes)
    return min(wall, cpu) >= RATIO


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--quantum-ms", type=float, default=120_000)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--store", type=Path)
    options = parser.parse_args()
    with contextlib.ExitStack() as end:
        root = options.store or Path(end.enter_context(tempfile.TemporaryDirectory()))
        make_store(root)
        config = settings(root, options.dtype, options.quantum_ms)
        starts = [start(config) for _ in range(2)]
        print(
            f"starts: {starts[0][0]:.1f} s, {starts[1][0]:.1f} s ({starts[1][2]:.1f} CPU s with its end); /v1/models "
            f"{starts[1][1]:.2f} s; load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        compile_cache.enable(None)
        found, sized = planned(config, say=lambda line: None)
        opened = load_found(found, sized.model, sized.mesh)
        print(f"in {opened.base.dtype.name}", flush=True)
        configs = [sized, dataclasses.replace(sized, adapters=root / "few")]
        stores = [end.enter_context(contextlib.closing(open_store(c))) for c in configs]
        right = [compare(kind, opened, sized, stores, options) for kind in ("zipf", "uniform")]
        memory = stores[0].host_memory()
        peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"host memory of adapters: at most {memory.peak / 1e9:.3f} of {memory.limit / 1e9} GB; process {peak_rss:.1f} GiB"
        )
        right += [starts[1][0] <= START_S, memory.peak <= memory.limit]
    sys.exit(not all(right))


if __name__ == "__main__":
    main()
