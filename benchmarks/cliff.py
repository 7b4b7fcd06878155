"""What more adapters than slots cost: 16 adapters over 8 slots against 8 over 8, and how long 64 over 8 wait.

    uv run python benchmarks/cliff.py [--rows 8] [--rounds 4] [--quantum-ms 1000]

cliff   16 clients, each asks again as soon as it has its answer (32 to 96 tokens after a prompt of 24).  First they ask
        for 8 adapters, two clients each, then for 16, one each; the two take turns on one server.  The ratio of the
        median times to the first token may be 3 (limit), that of tokens a second must be 0.85.
wait    64 clients of 64 adapters, one tenant each, long answers (400 tokens), for 20 seconds.  Of every adapter that
        gets a slot: how long it waited, since its request came or since it last gave up a slot.  The longest must be
        within ceil((64 - 8) / 8) * (quantum + swap) + one step.  A quantum ends with the step under way, so swap is the
        longest step and the longest copy of adapters.

Exit code 1 when a bound is missed.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from serving import Server, request, server

from jaxlora.config.serving import Tuning
from jaxlora.core.lora import AdapterRef
from serve.engine.engine import Engine
from serve.engine.request import Request

SLOTS, CLIENTS, PROMPT = 8, 16, 24
WAITING, LONG_ANSWER, WAIT_S = 64, 400, 20.0
ROUND_S = 12.0
TTFT_LIMIT, THROUGHPUT_LIMIT = 3.0, 0.85


@dataclass(slots=True)
class Load:
    """What clients in a closed loop saw."""

    ttft_s: list[float] = field(default_factory=list)
    tokens: int = 0
    wall_s: float = 0.0


def closed_loop(s: Server, refs: Sequence[AdapterRef], seconds: float, seed: int, load: Load) -> None:
    """CLIENTS clients ask for the adapters in turn until the time is over; who is under way then is cancelled."""
    engine, random = s.runner.engine, np.random.default_rng(seed)
    client_of: dict[str, int] = {}
    sent: dict[str, float] = {}

    def ask(client: int) -> None:
        one = request(refs[client % len(refs)], PROMPT, int(random.integers(32, 97)), s.opened.base.config.vocab)
        engine.submit(one)
        client_of[one.id], sent[one.id] = client, time.perf_counter()

    for client in range(CLIENTS):
        ask(client)
    start = time.perf_counter()
    while (now := time.perf_counter()) - start < seconds:
        deltas = engine.step()
        now = time.perf_counter()
        for delta in deltas:
            load.tokens += len(delta.tokens)
            if delta.request_id in sent:
                load.ttft_s.append(now - sent.pop(delta.request_id))
            if delta.finish is not None:
                ask(client_of.pop(delta.request_id))
    load.wall_s += now - start
    for left in client_of:
        engine.cancel(left)


def cliff(s: Server, rounds: int) -> bool:
    """Prints the figures of both loads; whether they are within the limits."""
    loads = {SLOTS: Load(), 2 * SLOTS: Load()}
    for n in range(rounds):
        for adapters, load in loads.items() if n % 2 == 0 else reversed(loads.items()):
            closed_loop(s, s.adapters[:adapters], ROUND_S, n, load)
    for adapters, load in loads.items():
        print(
            f"{adapters:3} adapters over {SLOTS} slots: first token {np.median(load.ttft_s) * 1000:7.0f} ms (median), "
            f"{np.percentile(load.ttft_s, 99) * 1000:7.0f} ms (99th percentile), {load.tokens / load.wall_s:6.1f} tokens/s, "
            f"{len(load.ttft_s)} requests"
        )
    few, many = loads.values()
    ttft = float(np.median(many.ttft_s) / np.median(few.ttft_s))
    throughput = many.tokens / many.wall_s / (few.tokens / few.wall_s)
    print(
        f"first token {ttft:.2f} times (limit {TTFT_LIMIT}), throughput {throughput:.2f} (at least {THROUGHPUT_LIMIT})"
    )
    return ttft <= TTFT_LIMIT and throughput >= THROUGHPUT_LIMIT


class Watch:
    """Waits of adapters, and how long steps and copies take, read off an engine's exchanges."""

    def __init__(self, engine: Engine):
        self.waits_s: list[float] = []
        self.steps_s: list[float] = []
        self.copies_s: list[float] = [0.0]
        self.engine, self._moved = engine, engine._move
        self._exchange = engine.scheduler.active.exchange
        engine.scheduler.active.exchange = self.exchange
        engine._move = self.move

    def exchange(self, now, work, *rest):
        """As the active set's; notes who waited how long."""
        active = self.engine.scheduler.active
        since = {ref: w.since for ref, w in work.items() if ref not in active.entered}
        result = self._exchange(now, work, *rest)
        self.waits_s += [now - since[ref] for ref, _ in result.enter]
        return result

    def move(self, plan):
        """As the engine's; notes how long the copies of adapters take."""
        start = time.perf_counter()
        self._moved(plan)
        if plan.load:
            self.copies_s.append(time.perf_counter() - start)

    def step(self):
        """One step."""
        start = time.perf_counter()
        self.engine.step()
        self.steps_s.append(time.perf_counter() - start)


def wait(s: Server) -> bool:
    """Prints the longest wait and its bound; whether it is within."""
    engine, requests = s.runner.engine, []
    watch = Watch(engine)
    for ref in s.adapters:
        requests.append(long_one(s, ref))
        engine.submit(requests[-1])
    start = time.perf_counter()
    while time.perf_counter() - start < WAIT_S:
        watch.step()
        for n, one in enumerate(requests):
            if one.id not in engine._sequences:
                requests[n] = long_one(s, one.adapter)
                engine.submit(requests[n])
    step, copy = max(watch.steps_s), max(watch.copies_s)
    quantum = engine.scheduler.active.quantum_s
    bound = math.ceil((WAITING - SLOTS) / SLOTS) * (quantum + step + copy) + step
    print(
        f"{WAITING} adapters over {SLOTS} slots: {engine.scheduler.active.swaps} exchanges, longest wait "
        f"{max(watch.waits_s):.2f} s, bound {bound:.2f} s (quantum {quantum:.2f} s, step at most {step * 1000:.0f} ms, "
        f"copies at most {copy * 1000:.0f} ms)"
    )
    for one in requests:
        engine.cancel(one.id)
    return max(watch.waits_s) <= bound


def long_one(s: Server, ref: AdapterRef | None) -> Request:
    return request(ref, PROMPT, LONG_ANSWER, s.opened.base.config.vocab)


def main() -> int:
    """Runs both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--quantum-ms", type=float, default=1000.0)
    args = parser.parse_args()
    settings = {"slots": SLOTS, "rows": args.rows, "kv_pages": 512, "tuning": Tuning(quantum_ms=args.quantum_ms)}
    with server(WAITING, **settings) as s:
        s.runner.engine.warm_up()
        ok = cliff(s, args.rounds)
        ok &= wait(s)
    return int(not ok)


if __name__ == "__main__":
    sys.exit(main())
