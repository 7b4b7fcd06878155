"""Compares jaxlora with what people would use instead.

    uv run python -m benchmarks.peers [--peers jaxlora llama.cpp peft ...] [--cases base-32 ...] [--rounds 7] [--out DIR]
    uv run python -m benchmarks.peers --teams 3        32 teams: one jaxlora against a process each (3 measured)
    uv run python -m benchmarks.peers --rounds 1 --answer 4 --peers jaxlora     a smoke run

Every peer is up at once; in each round each does each case once, in a new order, after a round that warms up.  Environments
are made in --cache on demand ($XDG_CACHE_HOME/jaxlora-peers); a peer that cannot be installed is skipped with the reason.
DIR gets samples.json and table.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path

from benchmarks.peers.cases import CASES, TEAM, TEAMS, Sample, shortened
from benchmarks.peers.environments import Unavailable, default_cache
from benchmarks.peers.measure import Prepared, prepare, rounds, size_of, team_rounds
from benchmarks.peers.peer import Peer
from benchmarks.peers.report import OURS, TRAINER, Run, machine
from benchmarks.peers.servers import Jaxlora, LlamaCpp, Vllm
from benchmarks.peers.workers import JaxloraTrainer, Peft, Skyrl
from benchmarks.peers.world import World, make_world


def every_peer(python: str) -> list[Peer]:
    """Returns all peers.  python: of those that are Python packages, version or path."""
    return [
        Jaxlora(OURS, "bfloat16"),
        Jaxlora("jaxlora-int8", "bfloat16", "int8"),
        JaxloraTrainer(TRAINER, "bfloat16"),
        JaxloraTrainer("jaxlora-trainer-float32", "float32"),
        LlamaCpp("llama.cpp", "BF16"),
        LlamaCpp("llama.cpp-q8_0", "Q8_0"),
        Peft("peft", "bfloat16", python),
        Peft("peft-float32", "float32", python),
        Vllm(python),
        Skyrl(sys.executable),
    ]


def say(text: str) -> None:
    """Tells a person what goes on."""
    print(text, file=sys.stderr, flush=True)


def teams(prepared: Prepared, args: argparse.Namespace, world: World, logs: Path) -> Generator[Sample]:
    """Yields samples of ours with all teams, and of each other peer with `args.teams` processes of one team each."""
    for peer in prepared.peers:
        if not peer.takes(TEAMS):
            continue
        try:
            if peer.name == OURS:
                ours = Prepared([peer], prepared.versions, prepared.skipped)
                yield from rounds(ours, [shortened(TEAMS, args.answer)], world, logs, args.rounds, args.wait_s, say)
            else:
                case = shortened(TEAM, args.answer)
                yield from team_rounds(peer, case, args.teams, world, logs, args.rounds, args.wait_s, say)
        except Unavailable as error:
            prepared.skipped[peer.name] = str(error)
            say(f"skipped {peer.name}: {error}")


def main() -> int:
    """Runs it; 1 when ours failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [peer.name for peer in every_peer(sys.executable)]
    parser.add_argument("--peers", nargs="+", choices=names, default=names, metavar="PEER", help=", ".join(names))
    cases = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases, metavar="CASE", help=", ".join(cases))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--teams", type=int, metavar="PROCESSES", help="measure teams, not the cases")
    parser.add_argument("--python", default=sys.executable, help="version or path of the Python of PyTorch's peers")
    parser.add_argument("--cores", type=int, help="have all, the asking process too, on so many cores only")
    parser.add_argument("--wait-s", type=float, default=60, help="longest wait before each sample for a quiet machine")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that the peers end too
    chosen = [shortened(case, args.answer) for case in CASES if case.name in args.cases]
    world = make_world(args.cache.absolute(), size_of([TEAMS] if args.teams else chosen).adapters)
    peers = [peer for peer in every_peer(args.python) if peer.name in args.peers]
    prepared = prepare(peers, args.cache.absolute(), world, say)
    about = machine() | {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": shlex.join(["uv", "run", "python", "-m", "benchmarks.peers", *sys.argv[1:]]),
        "load before": round(os.getloadavg()[0], 1),
    }
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as logs:
        if args.teams:
            measured = teams(prepared, args, world, Path(logs))
        else:
            measured = rounds(prepared, chosen, world, Path(logs), args.rounds, args.wait_s, say)
        with contextlib.closing(measured), contextlib.suppress(KeyboardInterrupt):  # what there is then is shown
            for sample in measured:
                samples.append(sample)
    about["load after"] = round(os.getloadavg()[0], 1)
    done = Run(about=about, versions=prepared.versions, skipped=prepared.skipped, samples=samples)
    text = done.teams_markdown(args.teams) if args.teams else done.markdown()
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "samples.json").write_text(json.dumps(asdict(done)))
        (args.out / "table.md").write_text(text)
    return int(OURS in prepared.skipped)


if __name__ == "__main__":
    sys.exit(main())
