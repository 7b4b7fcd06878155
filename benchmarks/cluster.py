"""Many replicas behind the router, simulated: a million adapters over a thousand replicas, failures, rollouts, a hot adapter.

    uv run python benchmarks/cluster.py [--parts cluster small hot] [--replicas 1000] [--adapters 1000000] [--slots 16]
            [--rows 8] [--requests 100000] [--load 0.6] [--mean-tokens 96] [--fronts 1] [--trace FILE] [--seed 0]

cluster  Requests for adapters by Zipf's law (exponents 1.0 and 0.8); then, with 1.0, while one replica in a hundred
         dies and comes back, and while they restart, a quarter at a time.  In place of these laws --trace takes a CSV
         file: a head, and lines of tenant,adapter,time,tokens with the time in seconds.
small    64 adapters (Zipf 1.0) over 3 replicas of 4 slots: how much of what lies in slots lies there twice.
hot      4 replicas, one adapter with the load of 2.2 for 40 s: how many serve it before, meanwhile and after.

The router is serve.cluster.router, which fronts use.  Beside it: round robin; the less busy of two drawn at random; the
hash of the adapter modulo the replicas.  The router knows of a replica what it said last, up to a second ago, and what
its front has sent since; the others know what their front has sent that has not ended.

A replica is rows, slots and who waits for them.  A token takes a row 25 ms, whatever other rows do.  A request runs
when it has a row and its adapter a slot; the one that waits longest goes first.  An adapter enters a free slot, or that
of the idle one used least recently; if none is idle, the one longest in its slot, past a quantum of 0.2 s, lets nobody
in and leaves once it is idle.  Loading takes 5 ms from host memory (256 adapters), 150 ms from the store.  A replica
that dies loses slots, host memory and running requests (*cut*); those that waited are sent again (*re-routed*).  It is
back after 3 s.

The first third of the requests fills slots and is not counted.  hits: the adapter lay in a slot, or was on its way,
when the request came.  twice: (adapters in slots - different ones) / adapters in slots, each second.  wait: from a
request's arrival until it has a row, or until the end.  busiest: tokens of the busiest replica over the mean.  us: wall
time of a decision, median.

Three minutes on one core.  Exit code 1 when a bound is missed: small 10 % twice; hot from 1 to at least 3 and back.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import itertools
import random
import sys
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxlora.config.cluster import RouterSection
from serve.cluster.rendezvous import stable_hash
from serve.cluster.replica_view import AdapterKey, Ask, Report, Sent
from serve.cluster.router import Router

STEP_S, QUANTUM_S = 0.025, 0.2
HOST_LOAD_S, STORE_LOAD_S, HOST_ADAPTERS = 0.005, 0.15, 256
REPORT_S, RESTART_S, IDLE_POLL_S = 1.0, 3.0, 0.25
TENANTS, PREFIXES = 1000, 4
WARM_SHARE, FAIL_SHARE, ROLLOUT_SHARE = 1 / 3, 0.01, 0.25
MOST_TWICE, HOT_COPIES = 0.1, 3
SMALL_LOAD = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """A cluster and the load on it."""

    replicas: int
    slots: int
    rows: int
    adapters: int
    requests: int
    load: float  # of what all rows can do
    mean_tokens: int
    fronts: int
    seed: int

    @property
    def per_second(self) -> float:
        """Requests."""
        return self.load * self.replicas * self.rows / (self.mean_tokens * STEP_S)

    @property
    def router(self) -> RouterSection:
        """A copy for half of what a replica's rows hold; overloaded is a replica where half a request a row waits."""
        mean = self.mean_tokens
        return RouterSection(copy_tokens=mean / 2, margin_tokens=mean / 4, spill_tokens=mean / 2, fronts=self.fronts)


@dataclass(slots=True, eq=False)
class Job:
    """A request."""

    key: AdapterKey
    tokens: int
    prefix: str
    arrived_s: float
    counted: bool
    front: int
    sent: Sent | None = None


# ---- who is asked


def by_zipf(sizes: Sizes, exponent: float) -> Iterator[Job]:
    """Requests at random distances for the k-th adapter in proportion to 1 / k**exponent."""
    rng = np.random.default_rng(sizes.seed)
    bounds = np.cumsum(np.arange(1, sizes.adapters + 1) ** -exponent)
    numbers = np.searchsorted(bounds, rng.random(sizes.requests) * bounds[-1])
    arrivals = np.cumsum(rng.exponential(1 / sizes.per_second, sizes.requests))
    tokens = np.minimum(rng.geometric(1 / sizes.mean_tokens, sizes.requests), 10 * sizes.mean_tokens)
    prefixes = rng.integers(PREFIXES, size=sizes.requests)
    columns = zip(numbers.tolist(), arrivals.tolist(), tokens.tolist(), prefixes.tolist(), strict=True)
    for i, (number, arrived_s, many, prefix) in enumerate(columns):
        key = (f"t{number % TENANTS}", f"a{number}")
        yield Job(key, many, f"prefix {prefix}", arrived_s, i >= WARM_SHARE * sizes.requests, i % sizes.fronts)


def by_trace(file: Path, sizes: Sizes) -> Iterator[Job]:
    """The requests of a CSV file, in the order of their times."""
    with file.open(newline="") as lines:
        rows = sorted(csv.DictReader(lines), key=lambda row: float(row["time"]))
    for i, row in enumerate(rows):
        key = (row["tenant"], row["adapter"])
        counted = i >= WARM_SHARE * len(rows)
        yield Job(key, int(row["tokens"]), "", float(row["time"]), counted, i % sizes.fronts)


# ---- who answers


class Routing(Protocol):
    """What a front asks."""

    def join(self, name: str, weight: float, report: Report, now_s: float) -> None: ...
    def drain(self, name: str) -> None: ...
    def leave(self, name: str, now_s: float) -> None: ...
    def report(self, name: str, report: Report, now_s: float) -> None: ...
    def send(self, ask: Ask, now_s: float) -> Sent: ...
    def end(self, sent: Sent, now_s: float) -> None: ...


@dataclass(slots=True)
class Simple:
    """Round robin, two choices or a hash, over the replicas that are there."""

    pick: Callable[[Simple, Ask], str]
    names: list[str] = field(default_factory=list)
    open: Counter[str] = field(default_factory=Counter)
    turn: Iterator[int] = field(default_factory=itertools.count)
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def join(self, name: str, weight: float, report: Report, now_s: float) -> None:
        self.names = sorted([*self.names, name])

    def drain(self, name: str) -> None:
        if len(self.names) > 1 and name in self.names:
            self.names.remove(name)

    def leave(self, name: str, now_s: float) -> None:
        self.names = [other for other in self.names if other != name]
        self.open[name] = 0

    def report(self, name: str, report: Report, now_s: float) -> None:
        """It has no use for one."""

    def send(self, ask: Ask, now_s: float) -> Sent:
        name = self.pick(self, ask)
        self.open[name] += 1
        return Sent(0, name, ask, now_s)

    def end(self, sent: Sent, now_s: float) -> None:
        self.open[sent.replica] -= 1


def in_turn(simple: Simple, ask: Ask) -> str:
    """Round robin."""
    return simple.names[next(simple.turn) % len(simple.names)]


def less_busy_of_two(simple: Simple, ask: Ask) -> str:
    """Power of two choices."""
    return min(simple.rng.choices(simple.names, k=2), key=lambda name: simple.open[name])


def by_hash(simple: Simple, ask: Ask) -> str:
    """The hash of the adapter, modulo the replicas."""
    return simple.names[stable_hash(ask.tenant, ask.adapter or "") % len(simple.names)]


ROUTINGS: dict[str, Callable[[Sizes], Routing]] = {
    "round robin": lambda sizes: Simple(in_turn),
    "two choices": lambda sizes: Simple(less_busy_of_two),
    "hash modulo": lambda sizes: Simple(by_hash),
    "router": lambda sizes: Router(sizes.router),
}


# ---- a replica


@dataclass(slots=True)
class Slot:
    """An adapter's place."""

    since_s: float  # when it came
    used_s: float  # when it last had work
    ready: bool = False  # it has been loaded
    running: int = 0


@dataclass(eq=False, slots=True)
class Machine:
    """A replica: rows, slots, and who waits for them."""

    name: str
    sizes: Sizes
    world: World
    life: int = 0  # how often it has started again
    tokens_done: int = 0  # of requests that count
    waiting_tokens: int = 0
    running: dict[Job, float] = field(default_factory=dict)  # when each ends
    slots: dict[AdapterKey, Slot] = field(default_factory=dict)
    host: OrderedDict[AdapterKey, None] = field(default_factory=OrderedDict)
    queues: dict[AdapterKey, deque[Job]] = field(default_factory=dict)
    outside: dict[AdapterKey, None] = field(default_factory=dict)  # with a queue and no slot, longest waiting first
    leaving: AdapterKey | None = None  # lets nobody in, as it is longest in its slot and others wait

    def take(self, job: Job) -> None:
        """Queues a request."""
        if job.counted:
            self.world.result.arrivals += 1
            self.world.result.hits += job.key in self.slots
        self.waiting_tokens += job.tokens
        self.queues.setdefault(job.key, deque()).append(job)
        if job.key not in self.slots:
            self.outside.setdefault(job.key)
        self.go_on()

    def go_on(self) -> None:
        """Fills slots and rows."""
        while self.outside and self.make_room():
            key = next(iter(self.outside))
            del self.outside[key]
            self.slots[key] = Slot(self.world.now_s, self.world.now_s)
            self.world.after(self.load_s(key), self.loaded, key, self.life)
        if not self.outside:
            self.leaving = None
        while len(self.running) < self.sizes.rows:
            heads = [
                (queue[0].arrived_s, key)
                for key, slot in self.slots.items()
                if slot.ready and key != self.leaving and (queue := self.queues.get(key))
            ]
            if not heads:
                return
            self.start(min(heads)[1])

    def make_room(self) -> bool:
        """Whether a slot is free, perhaps only now."""
        if len(self.slots) < self.sizes.slots:
            return True
        now_s, ready = self.world.now_s, {key: slot for key, slot in self.slots.items() if slot.ready}
        idle = [k for k, slot in ready.items() if not slot.running and (k == self.leaving or k not in self.queues)]
        if idle:
            key = min(idle, key=lambda k: ready[k].used_s)
            del self.slots[key]
            if key == self.leaving:
                self.leaving = None
            if key in self.queues:
                self.outside[key] = None
            return True
        ripe = [k for k, slot in ready.items() if now_s - slot.since_s >= QUANTUM_S]
        if ripe and self.leaving is None:
            self.leaving = min(ripe, key=lambda k: ready[k].since_s)
        return False

    def load_s(self, key: AdapterKey) -> float:
        """How long it takes to bring an adapter into a slot."""
        self.world.result.loads += self.world.counts
        known = key in self.host
        self.host[key] = None
        self.host.move_to_end(key)
        if len(self.host) > HOST_ADAPTERS:
            self.host.popitem(last=False)
        return HOST_LOAD_S if known else STORE_LOAD_S

    def loaded(self, key: AdapterKey, life: int) -> None:
        """An adapter has come into its slot."""
        if life == self.life:
            self.slots[key].ready = True
            self.go_on()

    def start(self, key: AdapterKey) -> None:
        """Gives an adapter's first request a row."""
        now_s, slot = self.world.now_s, self.slots[key]
        job = self.queues[key].popleft()
        if not self.queues[key]:
            del self.queues[key]
        self.waiting_tokens -= job.tokens
        slot.running += 1
        self.running[job] = now_s + job.tokens * STEP_S
        if job.counted:
            self.world.result.waits_s.append(now_s - job.arrived_s)
        self.world.after(job.tokens * STEP_S, self.finish, job, self.life)

    def finish(self, job: Job, life: int) -> None:
        """A request has ended."""
        if life == self.life:
            del self.running[job]
            slot = self.slots[job.key]
            slot.running -= 1
            slot.used_s = self.world.now_s
            self.tokens_done += job.tokens * job.counted
            self.world.end(job)
            self.go_on()

    def die(self) -> list[Job]:
        """Loses everything and returns the requests that waited."""
        lost = [job for queue in self.queues.values() for job in queue]
        self.life += 1
        self.waiting_tokens, self.leaving = 0, None
        for held in (self.running, self.slots, self.host, self.queues, self.outside):
            held.clear()
        return lost

    def report(self) -> Report:
        """What it says of itself."""
        now_s = self.world.now_s
        adapters = dict.fromkeys(self.slots, 0)
        left = {job: round((end_s - now_s) / STEP_S) for job, end_s in self.running.items()}
        for job, tokens in left.items():
            adapters[job.key] += tokens
        for key, queue in self.queues.items():
            adapters[key] = adapters.get(key, 0) + sum(job.tokens for job in queue)
        return Report(
            asked_s=now_s,
            slots=self.sizes.slots,
            rows=self.sizes.rows,
            running_rows=len(left),
            running_tokens=sum(left.values()),
            waiting_tokens=self.waiting_tokens,
            adapters=adapters,
        )


# ---- all of them, and what befalls them


class Trouble(StrEnum):
    """What happens while requests are counted."""

    NONE = "none"
    FAILURES = "1 % die"
    ROLLOUT = "rollout"


SCENARIOS = ((1.0, Trouble.NONE), (0.8, Trouble.NONE), (1.0, Trouble.FAILURES), (1.0, Trouble.ROLLOUT))


@dataclass(slots=True)
class Result:
    """What was counted."""

    arrivals: int = 0
    hits: int = 0
    loads: int = 0
    rerouted: int = 0
    cut: int = 0
    failed: int = 0
    restarted: int = 0
    span_s: float = 0.0
    decide_s: list[float] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    twice: list[float] = field(default_factory=list)
    busiest: float = 0.0

    def row(self) -> list[str]:
        """The cells of a table's row."""
        p50, p99 = np.percentile(self.waits_s, (50, 99))
        return [
            f"{100 * self.hits / self.arrivals:.1f} %",
            f"{self.loads / self.span_s:.1f}",
            f"{100 * np.mean(self.twice):.1f} %",
            f"{p50:.2f} s",
            f"{p99:.2f} s",
            f"{self.busiest:.2f}",
            str(self.rerouted),
            str(self.cut),
            f"{1e6 * np.median(self.decide_s):.0f}",
        ]


COLUMNS = ["hits", "loads/s", "twice", "wait p50", "wait p99", "busiest", "re-routed", "cut", "us"]


class World:
    """Replicas, fronts and the clock."""

    def __init__(self, sizes: Sizes, routing: Callable[[Sizes], Routing]):
        self.sizes, self.result = sizes, Result()
        self.now_s, self.counts = 0.0, False
        self.events: list[tuple[float, int, Callable[..., None], tuple]] = []
        self.order = itertools.count()
        self.fronts = [routing(sizes) for _ in range(sizes.fronts)]
        self.machines = {name: Machine(name, sizes, self) for name in (f"replica-{i}" for i in range(sizes.replicas))}
        for i, machine in enumerate(self.machines.values()):
            self.join(machine)
            if isinstance(self.fronts[0], Router):  # others would not listen
                self.after(REPORT_S * i / sizes.replicas, self.ask, machine)

    def after(self, delay_s: float, function: Callable[..., None], *args: object) -> None:
        """Calls a function later."""
        heapq.heappush(self.events, (self.now_s + delay_s, next(self.order), function, args))

    def until(self, at_s: float) -> None:
        """Lets time pass."""
        while self.events and self.events[0][0] <= at_s:
            self.now_s, _, function, args = heapq.heappop(self.events)
            function(*args)
        self.now_s = at_s

    def send(self, job: Job) -> None:
        """A front sends a request to a replica."""
        ask = Ask(tenant=job.key[0], adapter=job.key[1], tokens=job.tokens, beginning=job.prefix)
        begun = time.perf_counter()
        job.sent = self.fronts[job.front].send(ask, self.now_s)
        self.result.decide_s.append(time.perf_counter() - begun)
        self.machines[job.sent.replica].take(job)

    def end(self, job: Job) -> None:
        """A front has the whole answer."""
        if job.sent is not None:
            self.fronts[job.front].end(job.sent, self.now_s)

    def ask(self, machine: Machine) -> None:
        """All fronts ask a replica how it is, again and again."""
        report = machine.report()
        for front in self.fronts:
            front.report(machine.name, report, self.now_s)
        self.after(REPORT_S, self.ask, machine)

    def join(self, machine: Machine) -> None:
        """A replica has started."""
        for front in self.fronts:
            front.join(machine.name, 1.0, machine.report(), self.now_s)

    def leave(self, machine: Machine) -> list[Job]:
        """A replica ends and starts again; returns the requests that waited there."""
        for front in self.fronts:
            front.leave(machine.name, self.now_s)
        self.result.cut += len(machine.running)
        return machine.die()

    def fail(self, machine: Machine) -> None:
        """A replica dies."""
        self.result.failed += 1
        for job in self.leave(machine):
            self.result.rerouted += 1
            self.send(job)
        self.after(RESTART_S, self.join, machine)

    def restart(self, machine: Machine, later: Iterator[Machine]) -> None:
        """A replica gets nothing more and restarts when it has ended what it has; then comes the next."""
        for front in self.fronts:
            front.drain(machine.name)
        if machine.running or machine.queues:
            self.after(IDLE_POLL_S, self.restart, machine, later)
            return
        self.leave(machine)
        self.after(RESTART_S, self.join, machine)
        self.result.restarted += 1
        if (following := next(later, None)) is not None:
            self.after(RESTART_S, self.restart, following, later)

    def look(self) -> None:
        """Counts, each second, what lies in slots more than once."""
        lying = Counter(key for machine in self.machines.values() for key in machine.slots)
        if lying:
            self.result.twice.append(1 - len(lying) / lying.total())
        self.after(1.0, self.look)

    def trouble(self, trouble: Trouble, span_s: float) -> None:
        """Brings the trouble over those that are counted."""
        rng = random.Random(self.sizes.seed)
        machines = list(self.machines.values())
        if trouble is Trouble.FAILURES:
            for machine in rng.sample(machines, max(1, round(FAIL_SHARE * len(machines)))):
                self.after(rng.uniform(0, 0.8 * span_s), self.fail, machine)
        elif trouble is Trouble.ROLLOUT:
            later = iter(machines)
            for machine in list(itertools.islice(later, max(1, round(ROLLOUT_SHARE * len(machines))))):
                self.restart(machine, later)

    def run(self, jobs: Sequence[Job], trouble: Trouble) -> Result:
        """Sends all requests at their times."""
        for job in jobs:
            self.until(job.arrived_s)
            if job.counted and not self.counts:
                self.counts, begun_s = True, self.now_s
                self.result.span_s = jobs[-1].arrived_s - begun_s
                self.look()
                self.trouble(trouble, self.result.span_s)
            self.send(job)
        waiting = [job for m in self.machines.values() for queue in m.queues.values() for job in queue if job.counted]
        self.result.waits_s += [self.now_s - job.arrived_s for job in waiting]  # so far
        done = [machine.tokens_done for machine in self.machines.values()]
        self.result.busiest = max(done) / (sum(done) / len(done))
        return self.result


# ---- tables


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compared(name: str, jobs: Callable[[], Iterator[Job]], sizes: Sizes, trouble: Trouble) -> list[list[str]]:
    """A row for each routing."""
    rows = []
    for routing, make in ROUTINGS.items():
        result = World(sizes, make).run(list(jobs()), trouble)
        rows.append([name, routing, *result.row()])
        print(f"  {name}, {routing}", file=sys.stderr)
    return rows


def cluster(sizes: Sizes, trace: Path | None) -> str:
    """The large table."""
    if trace is not None:
        rows = compared(trace.name, lambda: by_trace(trace, sizes), sizes, Trouble.NONE)
    else:
        rows = []
        for exponent, trouble in SCENARIOS:
            name = f"Zipf {exponent}" + ("" if trouble is Trouble.NONE else f", {trouble}")
            rows += compared(name, lambda exponent=exponent: by_zipf(sizes, exponent), sizes, trouble)
    return table(["requests", "routing", *COLUMNS], rows)


def small(sizes: Sizes) -> tuple[str, bool]:
    """The table of few slots, and whether the router keeps within the bound."""
    sizes = replace(sizes, replicas=3, slots=4, rows=8, adapters=64, requests=6000, load=SMALL_LOAD)
    rows = compared("64 over 3 x 4 slots", lambda: by_zipf(sizes, 1.0), sizes, Trouble.NONE)
    twice = float(rows[-1][2 + COLUMNS.index("twice")].split()[0])
    return table(["requests", "routing", *COLUMNS], rows), twice <= 100 * MOST_TWICE


def hot(sizes: Sizes) -> tuple[str, bool]:
    """The table of replicas that serve one adapter, and whether they become more and few again."""
    sizes = replace(sizes, replicas=4, slots=8, rows=8, adapters=64, load=0.3, requests=700)
    rng, at_s, jobs = random.Random(sizes.seed), 0.0, list(by_zipf(sizes, 1.0))
    burst = 2.2 * sizes.rows / (sizes.mean_tokens * STEP_S)
    asked: list[Job] = []
    while (at_s := at_s + rng.expovariate(burst if 20 <= at_s < 60 else 0.5)) < jobs[-1].arrived_s:
        asked.append(Job(("t", "hot"), sizes.mean_tokens, f"prefix {len(asked) % PREFIXES}", at_s, True, 0))
    World(sizes, ROUTINGS["router"]).run(sorted([*jobs, *asked], key=lambda job: job.arrived_s), Trouble.NONE)
    windows: dict[int, Counter[str]] = {}
    for job in asked:
        if job.sent is not None:
            windows.setdefault(int(job.arrived_s // 10), Counter())[job.sent.replica] += 1
    rows = [[f"{10 * i} to {10 * i + 10}", str(w.total()), str(len(w))] for i, w in windows.items()]
    served = [len(w) for w in windows.values()]
    good = max(served[:2]) == 1 and max(served[2:6]) >= HOT_COPIES and served[-1] == 1
    return table(["seconds", "requests for the hot adapter", "replicas that served it"], rows), good


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("cluster", "small", "hot"), default=("cluster", "small", "hot"))
    counts = {"replicas": 1000, "slots": 16, "rows": 8, "adapters": 1_000_000, "requests": 100_000}
    for name, default in {**counts, "mean-tokens": 96, "fronts": 1, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--load", type=float, default=0.6)
    parser.add_argument("--trace", type=Path)
    options = vars(parser.parse_args(argv))
    parts, trace = options.pop("parts"), options.pop("trace")
    sizes = Sizes(**options)
    good = True
    if "cluster" in parts:
        print(cluster(sizes, trace), end="\n\n")
    for name, part in {"small": small, "hot": hot}.items():
        if name in parts:
            text, kept = part(sizes)
            print(text, end="\n\n")
            if not kept:
                print(f"{name}: a bound is missed", file=sys.stderr)
            good = good and kept
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
