"""Does an answer depend on its company?  The same requests over HTTP, alone and beside others, compared bit by bit.

    uv run python benchmarks/invariance.py [--repeats 50] [--weights float32 bfloat16 int8] [--seed 0]

20 requests to the demo model and six adapters over four slots: greedy and sampled, some with a common beginning, which is found
in the cache.  Each is asked alone first.  Then they are asked again and again, so many at once as a draw says, in any order, with
other requests between them; rows, pages and slots are few, so that requests are parked, computed again and moved.  Tokens,
log-probabilities and the five likeliest alternatives must be those of the first answer, bit for bit.

Exit code 1 when one differs.  Only the native bodies promise that (`jaxlora doctor` says which run).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx2
import numpy as np
from memory import archive

from jaxlora.checkpoints.load import find_base
from jaxlora.config.base import DEMO_MODEL, ModelSection
from pallas_kernels.native.library import instruction_set

SETTINGS = """slots = 4
max_rank = 8
rows = 8
kv_pages = 40
page_tokens = 16
prefill_tokens = 32
[model]
path = "{model}"
dtype = "{dtype}"
quantization = "{quantization}"
[tuning]
quantum_ms = 100.0
"""
WEIGHTS = {"float32": ("float32", "none"), "bfloat16": ("bfloat16", "none"), "int8": ("bfloat16", "int8")}
REQUESTS, ADAPTERS, RANK, IDS = 20, 6, 8, (100, 20_000)


def requests(draw: np.random.Generator, base: str) -> list[dict]:
    """Returns the bodies."""
    shared, found = draw.integers(*IDS, 64).tolist(), []
    for n in range(REQUESTS):
        own = draw.integers(*IDS, int(draw.integers(3, 90))).tolist()
        model = base if n % (ADAPTERS + 1) == 0 else f"a{n % (ADAPTERS + 1) - 1}"
        body = {"model": model, "prompt": [*shared, *own] if n % 3 == 0 else own, "logprobs": 5, "seed": n}
        found.append(body | {"max_tokens": int(draw.integers(4, 32)), "temperature": 0.9 * (n % 2), "ignore_eos": True})
    return found


async def ask(http: httpx2.AsyncClient, body: dict) -> str:
    """Returns what must not change of an answer."""
    answer = await http.post("/v1/completions", json=body)
    answer.raise_for_status()
    choice = answer.json()["choices"][0]
    return json.dumps([choice["text"], choice["logprobs"]])


async def run(url: str, repeats: int, seed: int) -> tuple[int, int]:
    """Returns how many answers there were after the first ones, and how many of them differ."""
    draw, asked, wrong = np.random.default_rng(seed), 0, 0
    config = find_base(ModelSection(path=DEMO_MODEL)).source.config
    async with httpx2.AsyncClient(base_url=url, timeout=None) as http:
        for n in range(ADAPTERS):
            with tempfile.TemporaryDirectory() as folder:
                content = archive(Path(folder), config, RANK, np.random.default_rng(n))
            form = {"data": {"name": f"a{n}", "allow_base_mismatch": "true"}, "files": {"file": ("a.tar", content)}}
            (await http.post("/v1/adapters", **form)).raise_for_status()
        bodies = requests(draw, (await http.get("/v1/models")).json()["data"][0]["id"])
        first = [await ask(http, body) for body in bodies]
        order = np.concatenate([draw.permutation(REQUESTS) for _ in range(repeats)])
        while asked < len(order):
            some = order[asked : asked + int(draw.integers(1, 25))]
            others = [bodies[n] | {"prompt": draw.integers(*IDS, 50).tolist()} for n in draw.integers(0, REQUESTS, 3)]
            answers = await asyncio.gather(*(ask(http, bodies[n]) for n in some), *(ask(http, b) for b in others))
            asked += len(some)
            wrong += sum(answer != first[n] for n, answer in zip(some, answers, strict=False))
    return asked, wrong


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=50, help="of each request")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    failed = False
    for weights in args.weights:
        dtype, quantization = WEIGHTS[weights]
        with tempfile.TemporaryDirectory(prefix="invariance-") as folder:
            settings = Path(folder) / "serve.toml"
            settings.write_text(SETTINGS.format(model=DEMO_MODEL, dtype=dtype, quantization=quantization))
            command = [sys.executable, "-m", "serve.cli.main", "serve", str(settings), "--port", "0"]
            with subprocess.Popen(command, cwd=folder, env=os.environ, stdout=subprocess.PIPE, text=True) as process:
                try:
                    assert process.stdout is not None
                    url = next(line for line in process.stdout if line.startswith("serving ")).split()[-1]
                    asked, wrong = asyncio.run(run(url.removesuffix("/v1"), args.repeats, args.seed))
                finally:
                    process.send_signal(signal.SIGINT)
        print(f"{weights}, bodies {instruction_set() or 'XLA'}: {wrong} of {asked} answers differ", flush=True)
        failed |= wrong > 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
