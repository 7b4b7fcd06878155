"""Interleaved rounds: in each, every peer does every case once, in a new order; the first round warms all up."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.cases import Case, Sample, Serving
from benchmarks.peers.environments import Unavailable
from benchmarks.peers.peer import Peer, Running, Size
from benchmarks.peers.processes import machine_cpu_s, wait_quiet
from benchmarks.peers.world import World

QUIET = 0.1  # of one core, by everybody

type Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Peers that can be had, with their versions, and why the others cannot."""

    peers: list[Peer]
    versions: dict[str, str]
    skipped: dict[str, str]


def prepare(peers: Sequence[Peer], cache: Path, world: World, say: Say) -> Prepared:
    """Installs every peer that can be installed."""
    found = Prepared([], {}, {})
    for peer in peers:
        try:
            found.versions[peer.name] = peer.prepare(cache, world)
            found.peers.append(peer)
        except Unavailable as error:
            found.skipped[peer.name] = str(error)
            say(f"skipped {peer.name}: {error}")
    return found


def measure(running: Sequence[Running], peer: str, case: Case, world: World, round: int, wait_s: float) -> Sample:
    """Has processes of a peer do a case, all at once; first waits for a quiet machine, as long as `wait_s` at most.

    Raises Unavailable when a request failed.
    """
    wait_quiet(QUIET, wait_s)
    for one in running:
        one.tree.reset_peak()
    before = _clocks(running)
    pool = ThreadPoolExecutor(len(running))
    try:
        works = list(pool.map(lambda one: one.work(case, world, round), running))
    finally:
        pool.shutdown(wait=False)  # after an interruption threads end when their peers are ended
    cpu_s, own_s, all_s = (after - b for after, b in zip(_clocks(running), before, strict=True))
    if failed := [why for work in works for why in work.failed]:
        raise Unavailable(f"{len(failed)} requests of {case.name} failed: {failed[0]}")
    memory = [one.tree.memory() for one in running]
    wall_s, tokens = max(work.wall_s for work in works), sum(work.tokens for work in works)
    return Sample(
        peer=peer,
        case=case.name,
        round=round,
        wall_s=wall_s,
        cpu_s=cpu_s,
        client_cpu_s=own_s,
        others_cpu_s=max(0.0, all_s - cpu_s - own_s),
        tokens=tokens,
        tokens_s=tokens / wall_s,
        tokens_cpu_s=tokens / max(cpu_s, 0.01),  # what the kernel counts in
        peak_bytes=sum(m.peak for m in memory),
        private_bytes=sum(m.private for m in memory),
        shared_bytes=sum(m.shared for m in memory),
        first_s=[t for work in works for t in work.first_s],
        between_s=[t for work in works for t in work.between_s],
        texts=[text for work in works for text in work.texts],
    )


def _clocks(running: Sequence[Running]) -> tuple[float, float, float]:
    """CPU seconds of these processes, of this one, of the machine."""
    return sum(one.tree.cpu_s() for one in running), time.process_time(), machine_cpu_s()


def size_of(cases: Sequence[Case]) -> Size:
    """Returns for what a peer is started that does these cases."""
    serving = [case for case in cases if isinstance(case, Serving)]
    most = max((case.adapters for case in serving), default=1)
    cores = len(os.sched_getaffinity(0))
    return Size(adapters=max(1, most), rows=max((case.clients for case in serving), default=1), threads=cores)


def rounds(
    prepared: Prepared, cases: Sequence[Case], world: World, logs: Path, count: int, wait_s: float, say: Say
) -> Generator[Sample]:
    """Yields the samples of so many rounds after the first, which is not counted.  A peer that fails leaves."""
    size = size_of(cases)
    with contextlib.ExitStack() as stack:
        up: dict[str, tuple[Peer, Running]] = {}
        for peer in prepared.peers:
            if not any(peer.takes(case) for case in cases):
                continue
            say(f"starting {peer.name} {prepared.versions[peer.name]}")
            try:
                up[peer.name] = peer, stack.enter_context(peer.start(size, world, logs))
            except Unavailable as error:
                prepared.skipped[peer.name] = str(error)
                say(f"skipped {peer.name}: {error}")
        source = random.Random(0)
        for round in range(count + 1):
            for case in cases:
                for name, (peer, running) in source.sample(sorted(up.items()), len(up)):
                    if not peer.takes(case):
                        continue
                    try:
                        sample = measure([running], name, case, world, round, wait_s)
                    except Unavailable as error:
                        del up[name]
                        prepared.skipped[name] = str(error)
                        say(f"{name} leaves: {error}")
                        continue
                    what = f"{sample.tokens_s:8.1f} tokens/s, {sample.tokens_cpu_s:8.1f} per CPU second"
                    say(f"{'warm-up' if round == 0 else f'round {round}'} {case.name:11} {name:16} {what}")
                    if round:
                        yield sample


def team_rounds(
    peer: Peer, case: Serving, processes: int, world: World, logs: Path, count: int, wait_s: float, say: Say
) -> Generator[Sample]:
    """Yields samples of so many processes of one peer, each with one adapter and one request at a time, all at once."""
    with contextlib.ExitStack() as stack:
        # More threads than cores wait for each other, and those of llama.cpp and PyTorch spin while they do.
        size = Size(adapters=1, rows=1, threads=max(1, len(os.sched_getaffinity(0)) // processes))
        running = [stack.enter_context(peer.start(size, world, logs)) for _ in range(processes)]
        for round in range(count + 1):
            sample = measure(running, f"{peer.name} x {processes}", case, world, round, wait_s)
            say(f"teams {sample.peer:20} {sample.tokens_cpu_s:8.1f} tokens per CPU second")
            if round:
                yield sample
