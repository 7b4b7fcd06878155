"""500 streams at once over real HTTP, more than the server takes: is any lost, mixed or cut, and what does it cost?

    uv run python benchmarks/streams.py [--model smollm2] [--streams 500] [--tokens 16]

`jaxlora serve` in a process of its own, whose queue is shorter than the crowd.  Each stream must say one token of its own,
again and again, so that nobody's could pass for another's.  Who is refused waits as long as Retry-After says and comes
again.  The crowd comes twice, for memory; a third one, with longer answers, is under way when SIGTERM comes: each answer is
then whole, or ends with an error event and [DONE], and the exit code is 0.  Exit code 1 when anything is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

TOKENS_FROM, TOKENS_TO = 100, 200  # ids that streams are told apart by; every vocabulary has them
MIB = 2**20
GROWTH = 1.05  # of the second crowd's peak memory over the first one's
SERVER = """
port = 0
slots = 4
max_rank = 16
page_tokens = 32
prefill_lanes = 8
prefill_tokens = 32
default_max_tokens = 64
max_request_s = 600.0
host_adapters_gb = 0.5
host_kv_gb = 0.1
adapters = "{folder}/adapters"
data = "{folder}/data"
{own}
[model]
path = "{model}"
dtype = "float32"
[training]
slots = 2
lanes = 2
lane_tokens = 64
"""


@dataclass(slots=True)
class Outcome:
    """How one stream went."""

    number: int
    refused: int = 0  # times
    silent: int = 0  # refusals without Retry-After
    ids: set[str] = field(default_factory=set)
    tokens: list[int] = field(default_factory=list)
    end: str = "cut"  # "length", "error" with [DONE], "refused"; else it is lost
    first_s: float = 0.0  # from the last asking to the first byte

    def mixed(self) -> bool:
        """Whether it holds anything that is not its own."""
        return len(self.ids) > 1 or set(self.tokens) > {own_token(self.number)}


def own_token(number: int) -> int:
    """The token that this stream says."""
    return TOKENS_FROM + number % (TOKENS_TO - TOKENS_FROM)


async def ask(host: str, port: int, model: str, number: int, tokens: int, *, again: bool) -> Outcome:
    """One stream to its end.  again: comes back when it is refused."""
    own, out = own_token(number), Outcome(number)
    asked = {
        "model": model,
        "prompt": [own] * (8 + number % 16),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logit_bias": {str(own): 100},
        "return_token_ids": True,
        "stream": True,
    }
    body = json.dumps(asked).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    while True:
        began = time.monotonic()
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(head.encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            out.first_s = time.monotonic() - began
            rest = await reader.read()
        finally:
            writer.close()
        if not answer.startswith((b"HTTP/1.1 429", b"HTTP/1.1 503")):  # its share of the queue is full, or all of it
            read_stream(answer, rest, out)
            return out
        out.refused += 1
        wait = re.search(rb"\r\nretry-after: (\d+)\r\n", answer, re.IGNORECASE)
        out.silent += wait is None
        if not again:
            out.end = "refused"
            return out
        await asyncio.sleep(1 if wait is None else int(wait[1]))


def read_stream(head: bytes, body: bytes, out: Outcome) -> None:
    """Puts what a stream said into its outcome."""
    if not head.startswith(b"HTTP/1.1 200"):
        out.end = head.split(b"\r\n")[0].decode()
        return
    text = b""
    while body:  # of a chunked body
        size, _, body = body.partition(b"\r\n")
        text, body = text + body[: int(size, 16)], body[int(size, 16) + 2 :]
    events = [line[6:] for line in text.decode().split("\n") if line.startswith("data: ")]
    last = "cut"
    for event in map(json.loads, events[:-1]):
        if "error" in event:
            last = "error"
            continue
        out.ids.add(event["id"])
        for choice in event["choices"]:
            out.tokens += choice["token_ids"]
            last = choice["finish_reason"] or last
    if events and events[-1] == "[DONE]":
        out.end = last


async def crowd(host: str, port: int, model: str, streams: int, tokens: int, *, again: bool) -> list[Outcome]:
    """All of them at once."""
    return await asyncio.gather(*[ask(host, port, model, n, tokens, again=again) for n in range(streams)])


def told(outcomes: list[Outcome], tokens: int) -> dict[str, int]:
    """What went how often: what is not "length", "error" or "refused" is wrong."""
    counts = Counter(o.end for o in outcomes)
    counts["mixed"] = sum(o.mixed() for o in outcomes)
    counts["short"] = sum(o.end == "length" and len(o.tokens) != tokens for o in outcomes)
    counts["refusals"] = sum(o.refused for o in outcomes)
    counts["without Retry-After"] = sum(o.silent for o in outcomes)
    return dict(counts)


def memory_mib(pid: int, field: str) -> float:
    """VmRSS or VmHWM (the peak) of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(rf"{field}:\s+(\d+)", status)[0]) * 1024 / MIB


def wrong(what: dict[str, int], allowed: set[str]) -> bool:
    """Whether anything happened beyond what is allowed."""
    return any(n for name, n in what.items() if name not in allowed | {"refusals"})


def run(process: subprocess.Popen, host: str, port: int, model: str, args: argparse.Namespace) -> bool:
    """Whether all went well; prints what went."""
    bad, peaks = False, []
    for n in (1, 2):
        began = time.monotonic()
        outcomes = asyncio.run(crowd(host, port, model, args.streams, args.tokens, again=True))
        wall_s, what = time.monotonic() - began, told(outcomes, args.tokens)
        peaks.append(memory_mib(process.pid, "VmHWM"))
        print(f"crowd {n}: {what}; {wall_s:.1f} s, {args.streams * args.tokens / wall_s:.0f} tokens/s in all")
        print(f"         memory {memory_mib(process.pid, 'VmRSS'):.0f} MiB, peak {peaks[-1]:.0f} MiB", flush=True)
        bad |= wrong(what, {"length"}) or what["length"] != args.streams
    bad |= peaks[1] > GROWTH * peaks[0]

    async def ended() -> list[Outcome]:
        asking = asyncio.create_task(crowd(host, port, model, args.streams, 8 * args.tokens, again=False))
        await asyncio.sleep(args.signal_s)
        process.send_signal(signal.SIGTERM)
        return await asking

    what = told(asyncio.run(ended()), 8 * args.tokens)
    code = process.wait(timeout=60)
    print(f"SIGTERM: {what}; exit code {code}")
    return not (bad or wrong(what, {"length", "error", "refused"}) or code)


def write_settings(folder: str, model: str, **own: float) -> str:
    """Writes the settings of a server whose files are in the folder, and returns their path.  own: what is this one's."""
    path = Path(folder) / "serve.toml"
    lines = "\n".join(f"{key} = {value}" for key, value in own.items())
    path.write_text(SERVER.format(folder=folder, model=model, own=lines))
    return str(path)


def address(line: str) -> tuple[str, int, str]:
    """Returns (host, port, name of the base) from the line that a server prints when it is ready."""
    found = re.match(r"serving (\S+) .* on http://([^:]+):(\d+)/v1$", line)
    assert found is not None, line
    return found[2], int(found[3]), found[1]


def main(arguments: list[str] | None = None) -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--waiting", type=int, default=300, help="the server's queue")
    parser.add_argument("--grace-s", type=float, default=5.0, help="from SIGTERM until open answers are ended")
    parser.add_argument("--signal-s", type=float, default=3.0, help="from the third crowd's start to SIGTERM")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        queue = {"max_waiting": args.waiting, "max_waiting_tokens": 1_000_000, "grace_s": args.grace_s}
        config = write_settings(folder, args.model, rows=args.rows, kv_pages=8 * args.rows, **queue)
        command = [sys.executable, "-m", "serve.cli.main", "serve", config]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                line = next(line for line in process.stdout if line.startswith("serving "))
                return int(not run(process, *address(line), args))
            finally:
                process.kill()


if __name__ == "__main__":
    sys.exit(main())
