"""A server under a memory limit and full load: does it choose sizes that use the limit, and stay within it?

    uv run python benchmarks/memory.py [smollm2] [qwen3-0.6b] [--limits 2 4 8] [--seconds 40]

`jaxlora serve --model MODEL` in a control group of so many GB where this process may make one, else with --memory-gb; no other
setting, nothing compiled before.  qwen3-0.6b is random weights of that shape.  The load is what the plan has room for: two clients
a row, half of whose prompts fill it, logprobs of prompts, adapters of the largest rank for all slots and the host's cache, a
job more than there are training slots, of the longest examples and with held-out losses.

Memory is without pages of files, which the kernel takes back.  Exit code 1 when a server used less than 70 % or more than 95 %
of its limit, one of its processes was killed, a request failed, or a limit was refused otherwise than in one line with exit code 2.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import httpx2
import numpy as np

from jaxlora.checkpoints.load import find_base
from jaxlora.config.base import ModelSection
from jaxlora.core.lora import ALL_TARGETS, Adapter, AdapterRef, LoraSpec
from jaxlora.core.model_config import ModelConfig, layer_count, target_features
from jaxlora.peft.folder import export_peft

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from random_model import QWEN3_06B, write_random

MODELS = ("smollm2", "qwen3-0.6b")
LEAST, MOST = 0.70, 0.95
ANSWER = 64  # tokens, and those of a short prompt
IDS = (100, 300)  # of prompts; both tokenizers have them
ENDED_S, SAMPLE_S = 60.0, 0.05
PLAN = re.compile(
    r"^sizes: (?P<rows>\d+) rows x (?P<tokens>[\d,]+) tokens.*; (?P<slots>\d+) slots of rank (?P<rank>\d+) .*"
    r"; training (?P<jobs>\d+) slots of rank (?P<job_rank>\d+), .* examples of (?P<longest>\d+) at most .*"
    r"; caches (?P<cache_gb>[\d.]+) ",
    re.MULTILINE,
)
OWN = re.compile(r"^Rss(?:Anon|Shmem):\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Group:
    """A control group, and its files: the limit, what its processes hold, how many of them the kernel has killed."""

    folder: Path
    limit: str
    current: str
    kills: str

    def used_bytes(self) -> int:
        """Returns what its processes hold, the kernel's part included, without pages of files."""
        stat = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        files = int(stat["inactive_file"]) + int(stat["active_file"])
        return int((self.folder / self.current).read_text()) - files

    def killed(self) -> int:
        """Returns how many processes the kernel has killed."""
        return int(re.findall(r"^oom_kill (\d+)$", (self.folder / self.kills).read_text(), re.MULTILINE)[0])


@contextlib.contextmanager
def group_of(nbytes: int) -> Generator[Group | None]:
    """A new control group inside this process's; None where that is not allowed."""
    made, top, name = None, Path("/sys/fs/cgroup"), f"jaxlora-{os.getpid()}"
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own = PurePosixPath(path).relative_to("/")
        if "memory" in controllers.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.oom_control")
            group = Group(top / "memory" / own / name, *files)
        elif not controllers:  # version 2, where it lies beside: a group of processes has no groups with limits
            group = Group(top / own.parent / name, "memory.max", "memory.current", "memory.events")
        else:
            continue
        with contextlib.suppress(OSError):
            group.folder.mkdir()
            try:
                (group.folder / group.limit).write_text(str(nbytes))
                made = group
                break
            finally:
                if made is None:
                    group.folder.rmdir()
    try:
        yield made
    finally:
        if made is not None:
            while (made.folder / "cgroup.procs").read_text():
                time.sleep(SAMPLE_S)
            made.folder.rmdir()


def session_bytes(session: int) -> int:
    """Returns what the processes of a session hold of their own."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getsid(int(folder.name)) == session:
                total += 1024 * sum(map(int, OWN.findall((folder / "status").read_text())))
    return total


@dataclass(slots=True)
class Seen:
    """What was seen of one server."""

    session: int
    group: Group | None
    peak: int = 0  # bytes, until now
    kv_used: float = 0.0  # of the pages, at most
    tokens: float = 0.0  # of prompts and answers
    failures: Counter[str] = field(default_factory=Counter)

    def watch(self, end: threading.Event) -> None:
        """Notes the most memory."""
        while not end.wait(SAMPLE_S):
            now = session_bytes(self.session) if self.group is None else self.group.used_bytes()
            self.peak = max(self.peak, now)

    def judge(self, what: str, answer: httpx2.Response) -> bool:
        """Returns whether it was answered; counts it as a failure otherwise."""
        if answer.status_code != 200:
            self.failures[f"{what}: {answer.status_code} {answer.text[:200]}"] += 1
        return answer.status_code == 200


def archive(folder: Path, config: ModelConfig, rank: int, draw: np.random.Generator) -> bytes:
    """Returns an adapter for all targets as a client uploads it: a tar of a PEFT folder."""

    def half(*shape: int) -> np.ndarray:
        return 0.02 * draw.standard_normal(shape, np.float32)

    spec, weights = LoraSpec(rank=rank, alpha=float(rank), targets=ALL_TARGETS), {}
    for target in ALL_TARGETS:
        x, y = target_features(config, target)
        layers = layer_count(config, target)
        weights[target] = half(layers, rank, x), half(layers, rank, y)
    adapter = Adapter(ref=AdapterRef("any", "any", 1), spec=spec, base_hash="", weights=weights)
    export_peft(adapter, folder / "peft", config, base_name="any")
    return Path(shutil.make_archive(str(folder / "peft"), "tar", folder / "peft")).read_bytes()


async def ask(http: httpx2.AsyncClient, number: int, model: str, tokens: int, seen: Seen) -> None:
    """One client's requests, one after the other, without end."""
    draw = np.random.default_rng(number)
    count = tokens - ANSWER if number % 2 == 0 else ANSWER
    body = {"model": model, "max_tokens": ANSWER, "ignore_eos": True, "logprobs": 5, "echo": number % 4 < 2}
    while True:
        asked = body | {"prompt": draw.integers(*IDS, count).tolist()}
        if not seen.judge("completion", await http.post("/v1/completions", json=asked)):
            await asyncio.sleep(1)


async def train(http: httpx2.AsyncClient, model: str, plan: dict[str, int], seen: Seen) -> None:
    """Begins a job more than there are slots, of short and of the longest examples."""
    counted = await http.post("/tokenize", json={"prompt": "word " * 100})
    words = int(100 * 0.9 * plan["longest"] / counted.json()["count"])
    rows = [{"text": f"{i} " + "word " * (words if i % 2 else 8)} for i in range(16)]
    content = "\n".join(map(json.dumps, rows)).encode()
    form = {"data": {"purpose": "fine-tune"}, "files": {"file": ("a.jsonl", content)}}
    ids = [(await http.post("/v1/files", **form)).json()["id"] for _ in range(2)]
    asked = {"model": model, "training_file": ids[0], "validation_file": ids[1], "eval_every": 2, "max_steps": 10_000}
    for n in range(plan["jobs"] + 1):
        body = asked | {"suffix": f"job{n}", "lora": {"r": plan["job_rank"]}}
        seen.judge("job", await http.post("/v1/fine_tuning/jobs", json=body))


async def poll(http: httpx2.AsyncClient, seen: Seen) -> None:
    """Reads the server's own counts, without end."""
    name = re.compile(r"^vllm:(kv_cache_usage_perc|\w+_tokens_total)\{[^}]*\} (\S+)$", re.MULTILINE)
    while True:
        found = dict(name.findall((await http.get("/metrics")).text))
        seen.kv_used = max(seen.kv_used, float(found["kv_cache_usage_perc"]))
        seen.tokens = float(found["prompt_tokens_total"]) + float(found["generation_tokens_total"])
        await asyncio.sleep(1)


async def load(url: str, model: str, said: str, seconds: float, folder: Path, seen: Seen) -> None:
    """All that the printed plan has room for, for so long."""
    found = PLAN.search(said)
    assert found is not None, said
    plan = {key: int(found[key].replace(",", "")) for key in PLAN.groupindex if key != "cache_gb"}
    config = find_base(ModelSection(path=model)).source.config
    tokens, adapter = (
        min(plan["tokens"], config.context),
        archive(folder, config, plan["rank"], np.random.default_rng(0)),
    )
    names = [f"a{n}" for n in range(plan["slots"] + round((float(found["cache_gb"]) + 0.05) * 1e9 / len(adapter)))]
    async with httpx2.AsyncClient(base_url=url, timeout=None, limits=httpx2.Limits(max_connections=None)) as http:
        for name in names:
            form = {"data": {"name": name, "allow_base_mismatch": "true"}, "files": {"file": ("a.tar", adapter)}}
            seen.judge("adapter", await http.post("/v1/adapters", **form))
        await train(http, (await http.get("/v1/models")).json()["data"][0]["id"], plan, seen)
        clients = range(max(2 * plan["rows"], len(names)))
        asking = [ask(http, n, names[n % len(names)], tokens, seen) for n in clients]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(poll(http, seen), *asking)
        for job in (await http.get("/v1/fine_tuning/jobs")).json()["data"]:
            if job["status"] == "failed":
                seen.failures[f"job: {job['error']}"] += 1


def run(model: str, limit_gb: float, seconds: float, folder: Path) -> bool:
    """Starts a server under a limit and loads it; prints what was seen, and returns whether it is as it should be."""
    nbytes, url, said, end = round(limit_gb * 1e9), None, "", threading.Event()
    command = [sys.executable, "-m", "serve.cli.main", "serve", "--model", model, "--port", "0"]
    env = os.environ | {"JAXLORA_CACHE": str(folder / "programs")}
    with group_of(nbytes) as group, (folder / "log").open("w+") as log:
        if group is None:
            command += ["--memory-gb", str(limit_gb)]
        else:
            command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group.folder / "cgroup.procs"), *command]
        began, out = time.monotonic(), subprocess.PIPE
        with subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=log, start_new_session=True) as process:
            seen = Seen(process.pid, group)
            watch = threading.Thread(target=seen.watch, args=[end])
            watch.start()
            try:
                assert process.stdout is not None
                while url is None and (line := process.stdout.readline().decode()):
                    said += line
                    url = line.split()[-1].removesuffix("/v1") if line.startswith("serving ") else None
                start_s, start_peak = time.monotonic() - began, seen.peak
                if url is not None:
                    try:
                        asyncio.run(load(url, model, said, seconds, folder, seen))
                    except httpx2.HTTPError as error:  # no longer there
                        seen.failures[repr(error)] += 1
                    process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(ENDED_S)
            finally:
                end.set()
                watch.join()
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # what is left of it
        killed, code = 0 if group is None else group.killed(), process.returncode
        log.seek(0)
        lines = (said + log.read()).splitlines()
    kept = f"{'--memory-gb' if group is None else 'control group'} {limit_gb:g} GB"
    if url is None:
        good = code == 2 and len(lines) == 1 and not killed
        what = f"refused, exit code {code}, {killed} killed"
    else:
        good = LEAST <= seen.peak / nbytes <= MOST and code == 130 and not killed and not seen.failures
        what = (
            f"started in {start_s:.0f} s, peak {start_peak / nbytes:.0%}; under load {seen.peak / nbytes:.0%} "
            f"({seen.peak / 1e9:.2f} GB), {seen.tokens:.0f} tokens, KV in use {seen.kv_used:.0%} at most; "
            f"{killed} killed, exit code {code}, failures {dict(seen.failures)}"
        )
        lines = [line for line in lines if line.startswith(("memory: ", "sizes: "))]
    print(f"{Path(model).name}, {kept}: {what}{'' if good else '  MISSED'}", *lines, "", sep="\n", flush=True)
    return good


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", choices=[[], *MODELS], default=[])
    parser.add_argument("--limits", type=float, nargs="+", default=[2.0, 4.0, 8.0], help="GB")
    parser.add_argument("--seconds", type=float, default=40.0, help="of load")
    args = parser.parse_args()
    good = True
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that its servers end as well
    with tempfile.TemporaryDirectory(prefix="memory-") as root:
        for model in args.model or MODELS:
            path = model if model == "smollm2" else str(write_random(Path(root) / model, QWEN3_06B))
            for limit_gb in args.limits:
                with tempfile.TemporaryDirectory(dir=root) as folder:
                    good &= run(path, limit_gb, args.seconds, Path(folder))
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
