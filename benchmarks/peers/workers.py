"""Peers that are libraries: a process of each reads what to do from stdin, a JSON object a line, and answers likewise.

transformers and PEFT, whose `generate` takes all requests of a case as one batch; SkyRL's JAX backend; jaxlora's trainer.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Generator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from benchmarks.peers.cases import TRAIN_TOKENS, Case, Serving, Training, Work
from benchmarks.peers.environments import Unavailable, python_with
from benchmarks.peers.peer import Running, Size
from benchmarks.peers.processes import Tree, running
from benchmarks.peers.world import World, adapter_names

TORCH = ("torch==2.13.0", "transformers==5.24.0", "peft==0.21.2", "accelerate==1.15.0")
SKYRL = ("skyrl[jax]==0.4.0",)
MOST_SKYRL = 31
HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Worker:
    """A process that waits for the next line."""

    tree: Tree
    process: subprocess.Popen[str]
    log: Path

    def say(self, line: dict[str, object]) -> dict:
        """Returns the answer to a line.  Raises Unavailable when the process ends instead."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(line) + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise Unavailable(f"the worker ended: {' '.join(self.log.read_text()[-600:].split())}")
        return json.loads(answer)

    def work(self, case: Case, world: World, round: int) -> Work:
        """Has the process do a case."""
        if isinstance(case, Serving):
            line = {"do": "serve", "prompts": world.prompts(case, round), "adapters": world.asked(case)}
            return Work(**self.say({**line, "answer": case.answer}), failed=[])
        line = {"do": "train", "tenants": case.tenants, "lanes": case.lanes, "tokens": TRAIN_TOKENS}
        done = self.say({**line, "steps": case.steps, "seed": round})
        return Work(**done, first_s=[], between_s=[], texts=[], failed=[])


@contextlib.contextmanager
def _worker(name: str, python: Path, script: str, setup: dict[str, object], logs: Path) -> Generator[Running]:
    """Has a script of this folder run; `setup` is its first line."""
    log = logs / f"{name}-{len(list(logs.glob('*.log')))}.log"
    environment = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(HERE.parents[1])}
    command = [python, HERE / script]
    with running(command, log, environment=environment, pipes=True) as process:
        worker = Worker(Tree(process.pid), process, log)
        worker.say(setup)
        yield worker


@dataclass(slots=True)
class Peft:
    """transformers with PEFT, in PyTorch's environment."""

    name: str
    dtype: str
    python: str  # version or path
    program: Path = field(default=Path(), init=False)

    def takes(self, case: Case) -> bool:
        """All but several tenants in one step, which PEFT refuses."""
        return isinstance(case, Serving) or case.tenants == 1

    def prepare(self, cache: Path, world: World) -> str:
        """Installs it."""
        self.program = python_with(cache, "peft", TORCH, self.python)
        return ", ".join(TORCH[:3]).replace("==", " ")

    def start(self, size: Size, world: World, logs: Path) -> contextlib.AbstractContextManager[Running]:
        """Loads the base and adapters."""
        adapters = {name: str(world.peft(name)) for name in adapter_names(size.adapters)}
        setup = {"base": str(world.base), "adapters": adapters, "dtype": self.dtype, "threads": size.threads}
        return _worker(self.name, self.program, "torch_worker.py", setup, logs)


@dataclass(slots=True)
class Skyrl:
    """SkyRL's JAX backend."""

    python: str  # version or path
    name: str = "skyrl"
    program: Path = field(default=Path(), init=False)

    def takes(self, case: Case) -> bool:
        """At most 31 adapters; one tenant in a step, as its engine no longer mixes them."""
        return case.adapters <= MOST_SKYRL if isinstance(case, Serving) else case.tenants == 1

    def prepare(self, cache: Path, world: World) -> str:
        """Installs it."""
        self.program = python_with(cache, "skyrl", SKYRL, self.python)
        return SKYRL[0].replace("==", " ")

    def start(self, size: Size, world: World, logs: Path) -> contextlib.AbstractContextManager[Running]:
        """Loads the base and adapters."""
        adapters = {name: str(world.peft(name)) for name in adapter_names(min(size.adapters, MOST_SKYRL))}
        return _worker(
            self.name, self.program, "skyrl_worker.py", {"base": str(world.base), "adapters": adapters}, logs
        )


@dataclass(frozen=True, slots=True)
class JaxloraTrainer:
    """This checkout's trainer in a process of its own, without a server."""

    name: str
    dtype: str

    def takes(self, case: Case) -> bool:
        """All training."""
        return isinstance(case, Training)

    def prepare(self, cache: Path, world: World) -> str:
        """Returns the version; this environment holds it."""
        return f"{version('jaxlora')}, jax {version('jax')}"

    def start(self, size: Size, world: World, logs: Path) -> contextlib.AbstractContextManager[Running]:
        """Loads the base; a case's trainer is made when it is first asked for."""
        setup: dict[str, object] = {"base": str(world.base), "dtype": self.dtype}
        return _worker(self.name, Path(sys.executable), "jaxlora_worker.py", setup, logs)
