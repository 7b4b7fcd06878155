"""What one adapter more costs: bytes in a slot, in RAM and on disk; its share of the parameters; the speed of a server.

    uv run python -m benchmarks.cost [--parts bytes ranks speed] [--dtype bfloat16] [--rounds 5] [--out DIR]

bytes   Adapters of the demo model by rank and targets.  Each is stored by the server's store and its folder counted,
        its arrays in RAM, and pools are made: of its own targets and rank, and of a server of its rank, whose slots
        hold every target and the head whatever lies in them.  Share: trainable / all parameters, as PEFT counts.
ranks   Arithmetic on public shapes: the largest rank of which less than 0.1 % of the parameters train.
speed   One `jaxlora serve` without training per case: the base alone beside one slot, 16 adapters in 16 slots, 64 in
        64, 2,000 over 64.  All run; in each round each gets the load once, in a new order; the first round fills the
        slots and is not counted.  Closed loop of 32 clients, prompts of about 32 tokens, answers of 16, every adapter
        as likely as another.  --distinct files are written and hard-linked under the other names, so what is read of
        them comes from the system's cache.

Five minutes on two cores; --rounds 1 --requests 16 takes two, --parts bytes ranks a few seconds.  DIR gets cost.md and
cost.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.many import link, ref_of, write_all
from benchmarks.peers.cases import Sample, Serving, Work
from benchmarks.peers.measure import measure
from benchmarks.peers.processes import Tree, free_port, running, wait_ready
from benchmarks.peers.report import OURS, Run, machine, table
from benchmarks.peers.servers import ANSWER_S, JAXLORA, work_of
from benchmarks.serving import adapter
from jaxlora.config.base import DEMO_MODEL
from jaxlora.core.adapter_size import adapter_size
from jaxlora.core.lora import ALL_TARGETS, LAYER_TARGETS, AdapterRef, LoraSpec
from jaxlora.core.model_config import Llama3Rope, ModelConfig, parameter_count
from jaxlora.model.lora_pool import PoolSpec
from jaxlora.model.mesh import make_mesh
from jaxlora.model.serving_pool import empty_serving_pool, slot_bytes
from jaxlora.peft.ingest import find_base
from jaxlora.storage.adapter_store import AdapterStore
from serve.bench.client import Server
from serve.bench.load import bodies, closed_loop
from serve.bench.popularity import draw

RANKS = (4, 16, 64)
TARGETS = {"q, v": ("q_proj", "v_proj"), "all seven": LAYER_TARGETS}
SMALL_PERCENT = 0.1
CLIENTS, PROMPT, ANSWER, RANK = 32, 32, 16, 16
PAGES = 2 * CLIENTS  # of 64 tokens: two a request
MB = 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Bytes:
    """One adapter, measured."""

    targets: str
    rank: int
    trainable_parameters: int
    trainable_percent: float
    disk: int  # blocks of its version's folder
    ram: int  # arrays on the host
    slot: int  # of a pool of its targets and rank
    server_slot: int  # of a server's pool of its rank


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """How few parameters of a base train."""

    base: str
    parameters: int
    targets: str
    largest_rank: int  # with a share below SMALL_PERCENT
    percent_of_16: float
    bytes_of_16: int  # of a version, in float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """A server and whom its clients ask."""

    name: str
    slots: int
    adapters: int  # 0: the base


SETUPS = (
    Setup(name="base, 1 slot", slots=1, adapters=0),
    Setup(name="16 over 16 slots", slots=16, adapters=16),
    Setup(name="64 over 64 slots", slots=64, adapters=64),
    Setup(name="2,000 over 64 slots", slots=64, adapters=2000),
)


def llama(layers: int, d_model: int, d_ff: int, heads: int, head_dim: int, *, factor: float, tied: bool) -> ModelConfig:
    """A Llama 3.1 or 3.2 of these sizes."""
    rope = Llama3Rope(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    return ModelConfig(
        family="llama",
        layers=layers,
        d_model=d_model,
        d_ff=d_ff,
        heads=heads,
        kv_heads=8,
        head_dim=head_dim,
        vocab=128256,
        context=131072,
        norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=rope,
        window=None,
        qkv_bias=False,
        qk_norm=False,
        tied=tied,
    )


BASES = {
    "Llama-3.2-1B": llama(16, 2048, 8192, 32, 64, factor=32.0, tied=True),
    "Llama-3.1-8B": llama(32, 4096, 14336, 32, 128, factor=8.0, tied=False),
    "Llama-3.1-70B": llama(80, 8192, 28672, 64, 128, factor=8.0, tied=False),
}


def measured(config: ModelConfig, base_hash: str, targets: str, rank: int, dtype: str) -> Bytes:
    """Stores an adapter and makes its pools, and counts."""
    made = adapter(config, base_hash, AdapterRef("cost", "a", 1), rank, TARGETS[targets])
    size = adapter_size(config, made.spec)
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.closing(AdapterStore(Path(folder), host_bytes=2 * made.nbytes)) as store:
            store.add("cost", "a", made)
            store.flush()
            ram = store.host_memory().held
        blocks = [path.stat().st_blocks for path in (Path(folder) / "adapters/cost/a/1").rglob("*")]
    mesh = make_mesh()
    pools = [
        empty_serving_pool(config, PoolSpec(slots=2, rank=rank, dtype=dtype, targets=held), mesh)
        for held in (made.spec.targets, ALL_TARGETS)
    ]
    return Bytes(
        targets=targets,
        rank=rank,
        trainable_parameters=size.trainable_parameters,
        trainable_percent=size.trainable_percent,
        disk=512 * sum(blocks),
        ram=ram,
        slot=slot_bytes(pools[0], rank),
        server_slot=slot_bytes(pools[1], rank),
    )


def largest_rank(config: ModelConfig, targets: tuple[str, ...]) -> int:
    """Returns the largest rank of which less than SMALL_PERCENT of the parameters train; 0: there is none."""
    rank = 0
    while adapter_size(config, LoraSpec(rank=rank + 1, alpha=1.0, targets=targets)).trainable_percent < SMALL_PERCENT:
        rank += 1
    return rank


def ranks() -> list[Rank]:
    """Returns what the shapes of the bases give."""
    found = []
    for base, config in BASES.items():
        for name, targets in TARGETS.items():
            of_16 = adapter_size(config, LoraSpec(rank=16, alpha=1.0, targets=targets))
            found.append(
                Rank(
                    base=base,
                    parameters=parameter_count(config),
                    targets=name,
                    largest_rank=largest_rank(config, targets),
                    percent_of_16=of_16.trainable_percent,
                    bytes_of_16=of_16.nbytes,
                )
            )
    return found


@dataclass(frozen=True, slots=True)
class Loaded:
    """A server that runs, as `measure` wants it."""

    setup: Setup
    tree: Tree
    server: Server

    def work(self, case: Serving, world: None, round: int) -> Work:
        """Has clients ask; in round 0 as many adapters as have slots, one after another."""
        names = [ref_of(number).name for number in range(self.setup.adapters)] or [DEMO_MODEL]
        asked = bodies(
            draw("uniform", names, round) if round else itertools.cycle(names),
            case.requests if round else max(case.requests, self.setup.slots),
            chat=False,
            prompt_tokens=PROMPT,
            max_tokens=case.answer,
            early_stop=False,
            seed=round,
        )
        return work_of(asyncio.run(closed_loop(self.server, "completions", asked, case.clients, ANSWER_S)))


@contextlib.contextmanager
def started(setup: Setup, dtype: str, files: Path, distinct: int, folder: Path) -> Generator[Loaded]:
    """Has a server run in a folder of its own, over links of the adapters in `files`."""
    link(files, distinct, folder / "adapters", range(setup.adapters))
    (folder / "adapters").mkdir(parents=True, exist_ok=True)
    port = free_port()
    sizes = {"rows": CLIENTS, "slots": setup.slots, "rank": RANK, "pages": PAGES}
    how = {"dtype": dtype, "quantization": "none"}
    (folder / "serve.toml").write_text(JAXLORA.format(port=port, folder=folder, base=DEMO_MODEL, **how, **sizes))
    command = [sys.executable, "-m", "serve.cli.main", "serve", folder / "serve.toml"]
    with running(command, folder / "log") as process:
        wait_ready(process, f"http://127.0.0.1:{port}/ready", folder / "log")
        say(f"{setup.name} is up")
        yield Loaded(setup, Tree(process.pid), Server.at(f"http://127.0.0.1:{port}"))


def speeds(dtype: str, rounds: int, requests: int, distinct: int, wait_s: float) -> list[Sample]:
    """Starts a server for each setup and loads them in turn; the first round is not counted."""
    samples, source = [], random.Random(0)
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_all(root / "files", distinct, RANK)
        up = [
            stack.enter_context(started(setup, dtype, root / "files", distinct, root / str(place)))
            for place, setup in enumerate(SETUPS)
        ]
        for round in range(rounds + 1):
            for one in source.sample(up, len(up)):
                name = one.setup.name
                case = Serving(
                    name=name, clients=CLIENTS, adapters=one.setup.adapters, requests=requests, answer=ANSWER
                )
                sample = measure([one], OURS, case, None, round, wait_s)
                say(f"round {round}: {name}: {sample.tokens_s:.1f} tokens/s, {sample.tokens_cpu_s:.1f} a CPU s")
                samples += [sample] if round else []
    return sorted(samples, key=lambda s: [setup.name for setup in SETUPS].index(s.case))


def say(text: str) -> None:
    """Tells a person what goes on."""
    print(text, file=sys.stderr, flush=True)


def bytes_table(found: Sequence[Bytes], dtype: str) -> str:
    """The adapters of the demo model, as Markdown."""
    head = [
        "targets",
        "rank",
        "parameters",
        "% of all",
        "disk MB",
        "RAM MB",
        f"slot MB, {dtype}",
        "slot of a server MB",
    ]
    rows = [
        [
            b.targets,
            str(b.rank),
            f"{b.trainable_parameters:,}",
            f"{b.trainable_percent:.3f}",
            *(f"{n / MB:.2f}" for n in (b.disk, b.ram, b.slot, b.server_slot)),
        ]
        for b in found
    ]
    return table(head, rows)


def ranks_table(found: Sequence[Rank]) -> str:
    """The public shapes, as Markdown."""
    head = ["base", "parameters", "targets", f"largest rank below {SMALL_PERCENT} %", "rank 16: %", "MB, float32"]
    rows = [
        [
            r.base,
            f"{r.parameters:,}",
            r.targets,
            str(r.largest_rank),
            f"{r.percent_of_16:.3f}",
            f"{r.bytes_of_16 / MB:.1f}",
        ]
        for r in found
    ]
    return table(head, rows)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("bytes", "ranks", "speed")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--distinct", type=int, default=64)
    parser.add_argument("--wait-s", type=float, default=3, help="longest wait before each load for a quiet machine")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that the servers end too
    about = machine() | {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": shlex.join(["uv", "run", "python", "-m", "benchmarks.cost", *sys.argv[1:]]),
        "load before": round(os.getloadavg()[0], 1),
    }
    found: dict[str, object] = {"about": about}
    text = ["\n".join(f"- {key}: {value}" for key, value in about.items())]
    if "bytes" in options.parts:
        base = find_base(DEMO_MODEL)
        held = [
            measured(base.source.config, base.hash, targets, rank, options.dtype)
            for targets in TARGETS
            for rank in RANKS
        ]
        found["bytes"] = [asdict(one) for one in held]
        text.append(f"### Bytes of one adapter of {base.name}\n\n{bytes_table(held, options.dtype)}")
    if "ranks" in options.parts:
        small = ranks()
        found["ranks"] = [asdict(one) for one in small]
        text.append(f"### Share of larger bases\n\n{ranks_table(small)}")
    if "speed" in options.parts:
        samples = speeds(options.dtype, options.rounds, options.requests, options.distinct, options.wait_s)
        found["speed"] = [asdict(one) for one in samples]
        text.append(Run(about={}, versions={OURS: version("jaxlora")}, skipped={}, samples=samples).markdown().strip())
    whole = "\n\n".join(text) + "\n"
    print(whole, end="")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "cost.md").write_text(whole)
        (options.out / "cost.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
