"""A server under everything at once, for as long as it takes: does it forget, leak, compile or say anything wrong?

    uv run python benchmarks/soak.py [--minutes 30] [--seed 0]

SmolLM2 in float32 over real HTTP, 4 slots, 24 adapters, two tenants that train beside it and publish.  Twelve clients draw
what they do: stream or wait, sample or be greedy, ask several choices, give up before the first token or in the midst of
an answer, ask what is wrong.  An operator deletes adapters and puts them again with other weights, and turns the quantum.
Faults are injected: adapters whose file is damaged, that make the model overflow, that the disk refuses or is slow to
give; publications that are not finite.

Wrong is: an error that was not injected, a greedy answer of an adapter that differs from its first one, a compile, a
counter that does not come back to zero, memory (or files, or threads) that grow after the first third of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import openai
from serving import adapter

from jaxlora.config.serving import Tuning
from jaxlora.core.errors import AdapterNotFinite, AdapterNotFound, StorageFailed
from jaxlora.core.lora import Adapter, AdapterRef, LoraSpec
from jaxlora.model.compile_cache import CompileCounter
from serve.access.caller import LOCAL_TENANT
from serve.server.app import make_http
from serve.server.gate import AppConfig
from serve.server.uvicorn import bound
from serve.session import Session

CLIENTS, ADAPTERS, RANK, SLOTS = 12, 24, 8, 4
HOST_BYTES = 300_000_000  # of adapters in host memory
SAMPLE_S = 5.0  # between two looks at memory
GROWTH = 1.02  # of memory, from the second third of the time to the last
QUESTIONS = ["The capital of France is", "def add(a, b):", "Once upon a time", "Water boils at", "Dear Sir or Madam,"]
LINES = [
    {"messages": [{"role": "user", "content": f"{n} plus one"}, {"role": "assistant", "content": str(n + 1)}]}
    for n in range(24)
]


class Soak:
    """The server, its faults, and what went wrong."""

    def __init__(self, session: Session, seed: int):
        self.session, self.runner, self.store = session, session._runner, session._runner.engine.store
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.first: dict[tuple[str, str], str] = {}  # greedy answers by adapter version and question
        self.open_adapters = [f"a{n}" for n in range(ADAPTERS)]
        self.memory: list[tuple[float, int]] = []
        self.deadline = 0.0
        self._seeds = itertools.count()
        rows = self.runner.call(lambda: session._trainer.rows("counts"))
        nan = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), rows)
        self.not_finite = jax.device_put(nan, jax.tree.map(lambda x: x.sharding, rows))

    # ---- adapters and faults --------------------------------------------------------------------------------------

    def put(self, name: str, *, scale: float = 1.0) -> AdapterRef:
        """A new version of the adapter."""
        opened = self.session.opened
        made = adapter(opened.base.config, opened.base_hash, AdapterRef(name, f"seed{next(self._seeds)}", 1), RANK)
        weights = {t: (a * np.float32(scale), b * np.float32(scale)) for t, (a, b) in made.weights.items()}
        return self.store.add(LOCAL_TENANT, name, replace(made, weights=weights))

    def inject(self) -> None:
        """Damages a file, makes an adapter that overflows, and has the store fail or dawdle now and then."""
        ref = self.put("damaged")
        self.put("overflows", scale=1e18)
        self.store.flush()
        load, dice = self.store._load, random.Random(1)

        def shaky(which: AdapterRef) -> Adapter:
            if which == ref:
                raise StorageFailed(f"{which}: damaged, on purpose")
            if which.name == "a0" and dice.random() < 0.3:
                raise StorageFailed(f"{which}: the disk refused, on purpose")
            if dice.random() < 0.1:
                time.sleep(0.5)
            return load(which)

        self.store._load = shaky
        with self.store._state:
            self.store._ram.forget(ref)
            self.store._ram._limit = HOST_BYTES  # full soon

    def operate(self) -> None:
        """One act of the operator, from a thread of its own."""
        match self.random.randrange(4):
            case 0:
                name = self.random.choice(self.open_adapters[1:])
                try:
                    self.store.delete(LOCAL_TENANT, name)
                except AdapterNotFound:
                    return
                self.counts["deleted"] += 1
                self.put(name)
            case 1:
                self.put(self.random.choice(self.open_adapters))
                self.counts["put"] += 1
            case 2:
                quantum = self.random.choice([50.0, 200.0, 1000.0])
                self.runner.call(lambda: self.runner.tune(Tuning(quantum_ms=quantum)))
                self.counts["tuned"] += 1
            case 3:
                self.runner.call(self.publish_nan)

    def publish_nan(self) -> None:
        """A publication that must be refused.  On the device thread."""
        try:
            self.runner.publisher.publish(LOCAL_TENANT, "counts", LoraSpec(rank=RANK, alpha=16.0), self.not_finite)
        except AdapterNotFinite:
            self.counts["not finite, refused"] += 1
        else:
            self.wrong.append("weights that are not finite were published")

    # ---- clients --------------------------------------------------------------------------------------------------

    async def client(self, url: str) -> None:
        """Asks until the time is over."""
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:
            while time.monotonic() < self.deadline:
                faulty = self.random.choice(["damaged", "overflows"]) if self.random.random() < 0.12 else None
                model = faulty or self.random.choice([*self.open_adapters, "counts", "rhymes", self.session.base_name])
                try:
                    if await self.act(client, model) and faulty is not None:
                        self.wrong.append(f"{faulty} has answered")
                except openai.APIError as error:
                    self.judge(error, model)

    def judge(self, error: openai.APIError, model: str) -> None:
        """Whether the error was asked for."""
        text = str(error)
        asked = ("does not exist", "max_tokens", "temperature", "no adapter")  # wrong requests, deleted adapters
        injected = {"damaged": "internal error", "a0": "internal error", "overflows": "non-finite"}.get(model)
        if any(word in text for word in asked) or (injected is not None and injected in text):
            self.counts[f"error: {text[:40]}"] += 1
        else:
            self.wrong.append(f"an error that nobody injected: {type(error).__name__}: {text[:300]}")

    async def act(self, client: openai.AsyncOpenAI, model: str) -> bool:
        """One thing a client may do; whether it got a whole answer."""
        prompt = self.random.choice(QUESTIONS)
        tokens = self.random.choice([1, 4, 16, 48])
        match self.random.randrange(7):
            case 0 | 1:
                answer = await client.completions.create(model=model, prompt=prompt, max_tokens=12, temperature=0)
                self.compare(model, prompt, answer)
            case 2:
                await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": prompt}],
                    max_tokens=tokens,
                    n=self.random.choice([1, 2, 4]),
                    temperature=self.random.uniform(0.1, 2),
                    top_p=self.random.uniform(0.2, 1),
                    presence_penalty=self.random.choice([0, 0.5]),
                    stop=self.random.choice([None, ["a", "."]]),
                )
            case 3 | 4:
                stream = await client.completions.create(model=model, prompt=prompt * 8, max_tokens=64, stream=True)
                stop_after = self.random.choice([0, 1, 5, 99])
                seen = 0
                async for _ in stream:
                    seen += 1
                    if seen > stop_after:
                        break
                await stream.close()
                if seen > stop_after:
                    self.counts["given up"] += 1
                    return False
            case 5:
                try:  # gives up while it waits, is read from the disk, or runs
                    async with asyncio.timeout(self.random.uniform(0.0, 2.0)):
                        await client.completions.create(model=model, prompt=prompt, max_tokens=64)
                except TimeoutError:
                    self.counts["given up"] += 1
                    return False
            case 6:
                wrong = self.random.choice([{"max_tokens": 10**6}, {"temperature": 9}, {"model": "nobody"}])
                await client.completions.create(**{"model": model, "prompt": prompt, "max_tokens": 4} | wrong)
                self.wrong.append(f"{wrong} was taken")
        self.counts["answered"] += 1
        return True

    def compare(self, model: str, prompt: str, answer: openai.types.Completion) -> None:
        """A version says the same as ever."""
        version = (answer.model_extra or {}).get("adapter_version")
        if version is None and model != self.session.base_name:
            self.wrong.append(f"an answer of {model} names no version")
        key = f"{model}@{version}"
        text = answer.choices[0].text
        if self.first.setdefault((key, prompt), text) != text:
            self.wrong.append(f"{key} said {text!r} and had said {self.first[key, prompt]!r}")
        self.counts["compared"] += 1

    # ---- the run --------------------------------------------------------------------------------------------------

    async def run(self, url: str, seconds: float) -> None:
        """All clients and the operator, until the time is over."""
        start = time.monotonic()
        self.deadline = start + seconds
        clients = [asyncio.create_task(self.client(url)) for _ in range(CLIENTS)]
        while time.monotonic() < self.deadline:
            await asyncio.sleep(SAMPLE_S)
            self.memory.append((time.monotonic() - start, resident_bytes()))
            await asyncio.to_thread(self.operate)
        await asyncio.gather(*clients)

    def check_rest(self) -> None:
        """Everything must be given back."""
        self.runner.call(lambda: setattr(self.runner, "trainer", None))
        wait_until = time.monotonic() + 60
        while self.runner.call(lambda: self.runner.engine.has_work) and time.monotonic() < wait_until:
            time.sleep(0.2)
        self.runner.call(self._check_engine)

    def _check_engine(self) -> None:
        engine = self.runner.engine
        scheduler = engine.scheduler
        scheduler.settle()
        scheduler.check()
        rest = {
            "requests": sum(scheduler.counts()),
            "answers": len(engine._processors),
            "KV on the host": len(engine._saved) + scheduler.host_pages,
            "pages": scheduler.pages.pages - scheduler.pages.free,
            "pins": len(engine.slots.pinned()),
            "listeners": len(self.runner._listeners),
            "adapters being read": self.store.host_memory().loading,
        }
        self.wrong += [f"{count} {what} are left" for what, count in rest.items() if count]


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    """Files and sockets that are open."""
    return len(os.listdir("/proc/self/fd"))


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        Session.open(dtype="float32", slots=SLOTS, max_rank=RANK, lanes=2, lane_tokens=64, store=folder) as session,
    ):
        for name in ("counts", "rhymes"):
            session.add_tenant(name, LINES, rank=RANK, steps=10**6)
            session.publish(name)
        soak = Soak(session, args.seed)
        for name in soak.open_adapters:
            soak.put(name)
        soak.inject()
        http = make_http(
            soak.runner, AppConfig(default_max_tokens=16, max_request_s=600), listening=bound("127.0.0.1", 0), grace_s=5
        )
        http.start()
        session.start()
        files, threads = open_files(), threading.active_count()
        with CompileCounter() as compiles:
            asyncio.run(soak.run(http.url + "/v1", args.minutes * 60))
        soak.check_rest()
        http.stop()
        steps = {name: tenant.step for name, tenant in session.tenants.items()}
        more = {"files": open_files() - files, "threads": threading.active_count() - threads}
    soak.wrong += [f"{count} more {what} than at the start" for what, count in more.items() if count > 8]
    if compiles.retraced:
        soak.wrong.append(f"compiled after warm-up: {compiles}")
    third = len(soak.memory) // 3
    middle, last = (
        np.median([m for _, m in part]) for part in (soak.memory[third : 2 * third], soak.memory[2 * third :])
    )
    if last > middle * GROWTH:
        soak.wrong.append(f"memory grew from {middle / 1e6:.0f} to {last / 1e6:.0f} MB")
    for what, count in sorted(soak.counts.items()):
        print(f"{count:7} {what}")
    print(f"training steps {steps}; memory {middle / 1e6:.0f} MB in the second third, {last / 1e6:.0f} in the last")
    for line in soak.wrong[:200]:
        print("WRONG:", line)
    print(f"{len(soak.wrong)} things went wrong")
    return int(bool(soak.wrong))


if __name__ == "__main__":
    sys.exit(main())
