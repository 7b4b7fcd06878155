"""One hostile tenant beside a quiet one, surface by surface: what is left to the quiet one, and what the server takes.

    uv run python benchmarks/hostile.py [--model smollm2] [--span 10] [SURFACE ...]

`jaxlora serve` in a process of its own, with a key for each tenant.  The quiet one asks for one short stream after the other,
first alone, then beside each attack.  Printed for each: the quiet tenant's tokens a second and time to the first token over
those alone, the slowest answer of /health, the server's memory over that alone, its descriptors and threads.  Exit code 1
when a bound is missed: half of a fair share of the tokens, three times the first token's time, /health within a second, 1.5 times
the memory.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
from streams import address, write_settings

TOKENS = 24  # of one stream of the quiet tenant
SETTLE_S = 2.0  # from the start of an attack until it is measured
# A fair share beside one other is half of what there is; half of that is the bound.
LEAST_TOKENS, MOST_FIRST, MOST_HEALTH_S, MOST_MEMORY = 0.25, 3.0, 1.0, 1.5


@dataclass(slots=True)
class Seen:
    """What the quiet tenant and the machine saw in one span."""

    tokens_s: float = 0.0
    first_s: list[float] = field(default_factory=list)
    health_s: float = 0.0
    health_failed: int = 0
    memory: int = 0  # bytes, the most
    descriptors: int = 0
    threads: int = 0

    @property
    def first(self) -> float:
        """The median time to the first token."""
        return statistics.median(self.first_s) if self.first_s else float("inf")


@dataclass(frozen=True, slots=True)
class Place:
    """A running server, and a tenant's client of it."""

    host: str
    port: int
    model: str
    http: httpx2.AsyncClient


type Attack = Callable[[Place], Awaitable[None]]


async def loops(count: int, work: Callable[[], Awaitable[object]]) -> None:
    """So many loops of the work; what refuses it is asked again at once."""

    async def one() -> None:
        while True:
            with contextlib.suppress(httpx2.HTTPError):
                await work()

    await asyncio.gather(*[one() for _ in range(count)])


async def completions(place: Place) -> None:
    """Three hundred long requests at once."""
    body = {"model": place.model, "prompt": "x " * 60, "max_tokens": 200, "ignore_eos": True}
    await loops(300, lambda: place.http.post("/v1/completions", json=body))


async def bodies(place: Place) -> None:
    """Loops of bodies of 4 MB, for a model that is not there."""
    content = json.dumps({"model": "none", "prompt": [1] * 200_000, "user": "x" * 3_300_000}).encode()
    headers = {"content-type": "application/json"}
    await loops(8, lambda: place.http.post("/v1/completions", content=content, headers=headers))


async def texts(place: Place) -> None:
    """Loops of texts of 4 MB to tokenise."""
    content = json.dumps({"prompt": "word " * 800_000}).encode()
    headers = {"content-type": "application/json"}
    await loops(8, lambda: place.http.post("/tokenize", content=content, headers=headers))


async def heads(place: Place) -> None:
    """Half-sent heads, more than there are descriptors."""
    writers = []
    try:
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(place.host, place.port)
                writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Wait: ")
                writers.append(writer)
            await asyncio.sleep(0.001 if len(writers) < 400 else 0.05)
            if len(writers) > 600:
                writers.pop(0).close()
    finally:
        for writer in writers:
            writer.close()


async def uploads(place: Place) -> None:
    """Sixteen uploads at a byte a second."""

    async def drip() -> AsyncGenerator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--b\r\n'
        while True:
            yield b"x"
            await asyncio.sleep(1.0)

    headers = {"content-type": "multipart/form-data; boundary=b"}
    await loops(16, lambda: place.http.post("/v1/files", content=drip(), headers=headers))


async def upload(place: Place, content: bytes) -> str:
    """The id of a file of the hostile tenant."""
    form = {"data": {"purpose": "fine-tune"}, "files": {"file": ("a.jsonl", content)}}
    answer = await place.http.post("/v1/files", **form)
    return answer.json()["id"]


async def job(place: Place, **asked: object) -> str:
    """The path of a job of the hostile tenant."""
    answer = await place.http.post("/v1/fine_tuning/jobs", json={"model": place.model, **asked})
    if answer.status_code != 200:
        raise ValueError(answer.text)
    return f"/v1/fine_tuning/jobs/{answer.json()['id']}"


async def lines(place: Place) -> None:
    """Loops of uploads whose one line is 16 MB."""
    content = json.dumps({"text": "word " * 3_200_000}).encode()
    await loops(4, lambda: upload(place, content))


async def heldout(place: Place) -> None:
    """A job with 40,000 held-out lines and a loss after each step."""
    few = "\n".join(json.dumps({"prompt": f"say {i}", "completion": "a"}) for i in range(8)).encode()
    many = "\n".join(json.dumps({"prompt": f"say {i} or more", "completion": "a b c"}) for i in range(40_000)).encode()
    ids = [await upload(place, few), await upload(place, many)]
    path = await job(place, training_file=ids[0], validation_file=ids[1], eval_every=1, max_steps=500, priority=100)
    try:
        await asyncio.sleep(3600)
    finally:
        await asyncio.shield(place.http.post(f"{path}/cancel"))


async def followers(place: Place) -> None:
    """Three hundred followers of one paused job."""
    few = "\n".join(json.dumps({"prompt": f"say {i}", "completion": "a"}) for i in range(8)).encode()
    path = await job(place, training_file=await upload(place, few), max_steps=500)
    while (await place.http.get(path)).json()["status"] != "running":
        await asyncio.sleep(0.2)
    await place.http.post(f"{path}/pause")

    async def follow() -> None:
        async with place.http.stream("GET", f"{path}/events?stream=true") as answer:
            async for _ in answer.aiter_bytes():
                pass

    try:
        await loops(300, follow)
    finally:
        await asyncio.shield(place.http.post(f"{path}/cancel"))


async def grammars(place: Place) -> None:
    """Loops of a grammar of 600 ambiguous rules, each time a new one."""
    number = 0

    async def ask() -> None:
        nonlocal number
        number += 1
        rules = "\n".join(f'r{i}: "a" r{(i + 1) % 600} | "a" r{(i + 7) % 600} | "a{number}"' for i in range(600))
        body = {"model": place.model, "prompt": "x", "max_tokens": 64}
        await place.http.post(
            "/v1/completions", json=body | {"structured_outputs": {"grammar": f"start: r0 | r1 | r2\n{rules}"}}
        )

    await loops(8, ask)


ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (completions, bodies, texts, heads, uploads, lines, heldout, followers, grammars)
}


async def stream(place: Place, seen: Seen) -> int:
    """One stream of the quiet tenant; returns its tokens."""
    body = {
        "model": place.model,
        "prompt": "Once upon a time",
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "stream": True,
    }
    began, count = time.monotonic(), 0
    async with place.http.stream("POST", "/v1/completions", json=body | {"temperature": 0}) as answer:
        if answer.status_code != 200:
            await answer.aread()
            raise httpx2.HTTPError(f"{answer.status_code} {answer.text[:200]}")
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                if count == 0:
                    seen.first_s.append(time.monotonic() - began)
                count += 1
    return count


async def watch(place: Place, pid: int, seen: Seen) -> None:
    """Asks /health and looks at the process, five times a second."""
    async with httpx2.AsyncClient(base_url=f"http://{place.host}:{place.port}", timeout=10) as client:
        while True:
            began = time.monotonic()
            try:
                seen.health_failed += (await client.get("/health")).status_code != 200
            except httpx2.HTTPError:
                seen.health_failed += 1
            seen.health_s = max(seen.health_s, time.monotonic() - began)
            status = Path(f"/proc/{pid}/status").read_text()
            seen.memory = max(seen.memory, int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) * 1024)
            seen.threads = max(seen.threads, int(re.findall(r"Threads:\s+(\d+)", status)[0]))
            seen.descriptors = max(seen.descriptors, len(os.listdir(f"/proc/{pid}/fd")))
            await asyncio.sleep(0.2)


async def measured(place: Place, pid: int, span_s: float) -> Seen:
    """The quiet tenant's streams, one after the other, for about so long.  pid: the server's."""
    seen, tokens, began = Seen(), 0, time.monotonic()
    watching = asyncio.create_task(watch(place, pid, seen))
    try:
        while time.monotonic() - began < span_s:
            try:
                tokens += await stream(place, seen)
            except httpx2.HTTPError as error:
                print(f"  the quiet tenant: {type(error).__name__} {error}", flush=True)
                await asyncio.sleep(0.5)
    finally:
        watching.cancel()
    seen.tokens_s = tokens / (time.monotonic() - began)
    return seen


def told(name: str, seen: Seen, alone: Seen) -> bool:
    """Prints a row; returns whether every bound holds."""
    tokens, first, memory = seen.tokens_s / alone.tokens_s, seen.first / alone.first, seen.memory / alone.memory
    good = (
        tokens >= LEAST_TOKENS
        and first <= MOST_FIRST
        and seen.health_s <= MOST_HEALTH_S
        and not seen.health_failed
        and memory <= MOST_MEMORY
    )
    print(
        f"{name:12} tokens {tokens:5.2f}  first token {first:5.2f}  /health {seen.health_s:5.2f} s"
        f" ({seen.health_failed} failed)  memory {memory:4.2f}  descriptors {seen.descriptors}  threads {seen.threads}"
        f"{'' if good else '  MISSED'}",
        flush=True,
    )
    return good


@contextlib.asynccontextmanager
async def client(host: str, port: int, model: str, key: str) -> AsyncGenerator[Place]:
    """A tenant's."""
    limits, headers = httpx2.Limits(max_connections=None), {"authorization": f"Bearer {key}"}
    url = f"http://{host}:{port}"
    async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=120, limits=limits) as http:
        yield Place(host, port, model, http)


async def attack(name: str, host: str, port: int, model: str, key: str) -> None:
    """Attacks until SIGTERM, politely scheduled: on a real network this machine's processors would not be shared."""
    os.nice(10)
    async with client(host, port, model, key) as place:
        attacking = asyncio.create_task(ATTACKS[name](place))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, attacking.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await attacking


async def run(place: Place, pid: int, names: list[str], span_s: float, hostile_key: str) -> bool:
    """Whether every bound of every attack holds."""
    await measured(place, pid, span_s / 2)
    alone = await measured(place, pid, span_s)
    print(
        f"alone: {alone.tokens_s:.1f} tokens/s, first token {alone.first * 1000:.0f} ms, {alone.memory / 2**20:.0f} MiB"
    )
    good = True
    for name in names:
        command = [sys.executable, __file__, "--attack", name, place.host, str(place.port), place.model, hostile_key]
        with subprocess.Popen(command) as attacker:
            await asyncio.sleep(SETTLE_S)
            seen = await measured(place, pid, span_s)
            attacker.terminate()
        good &= told(name, seen, alone)
        await asyncio.sleep(SETTLE_S)
    return good


def main() -> int:
    """Runs it."""
    if sys.argv[1:2] == ["--attack"]:
        name, host, port, model, key = sys.argv[2:]
        asyncio.run(attack(name, host, int(port), model, key))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("surface", nargs="*", choices=[[], *ATTACKS], default=[])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--span", type=float, default=10.0, help="seconds that each is measured for")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        queue = {"max_waiting": 64, "max_waiting_tokens": 65536, "grace_s": 1.0}
        config = write_settings(folder, args.model, rows=8, kv_pages=128, **queue)
        command = [sys.executable, "-m", "serve.cli.main"]
        quiet, hostile = (
            subprocess.run(
                [*command, "keys", "create", name, "--config", config], capture_output=True, text=True, check=True
            ).stdout.split()[-1]
            for name in ("quiet", "hostile")
        )
        with (
            (Path(folder) / "log").open("w") as log,
            subprocess.Popen([*command, "serve", config], stdout=subprocess.PIPE, stderr=log, text=True) as server,
        ):
            try:
                assert server.stdout is not None
                found = address(next(line for line in server.stdout if line.startswith("serving ")))

                async def measure() -> bool:
                    async with client(*found, quiet) as place:
                        return await run(place, server.pid, args.surface or list(ATTACKS), args.span, hostile)

                return int(not asyncio.run(measure()))
            finally:
                server.kill()


if __name__ == "__main__":
    sys.exit(main())
