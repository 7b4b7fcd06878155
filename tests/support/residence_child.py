"""python residence_child.py FOLDER: where adapters lie on three replicas that are processes, by our router and by round robin.

FOLDER has serve.toml.  Prints a JSON object: `twice` by routing, for each look (adapters in slots - different ones) /
adapters in slots; `asked` by routing, how many requests were answered; `hot`, in each five seconds how many replicas
served the adapter that is asked for more than two replicas can do and then hardly at all.  Ray ends with the process.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import httpx2

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
from serve.cluster.ray_environment import set_environment  # noqa: E402

set_environment(None)

from adapters_world import seeded, upload, zip_of  # noqa: E402

from jaxlora.config.serving import ServeConfig  # noqa: E402
from jaxlora.config.toml import load  # noqa: E402
from serve.cluster import front  # noqa: E402
from serve.cluster.peer import KEEPER, REPLICA  # noqa: E402
from serve.cluster.ray_servers import CALLS, RayCluster, RayProcess, RayServers  # noqa: E402
from serve.cluster.replica import Replica  # noqa: E402
from serve.cluster.router import Router  # noqa: E402

ADAPTERS, REPLICAS = 64, 3
RATE, SPAN_S, WARM_S = (
    8.0,
    24.0,
    6.0,
)  # requests a second, and for how long; the first seconds fill slots and do not count
TOKENS = 16
HOT_S, CALM_S, CROWD = 10.0, 40.0, 24
SCOPE = {
    "type": "http",
    "http_version": "1.1",
    "method": "GET",
    "scheme": "http",
    "path": "/v1/models",
    "root_path": "",
}
SCOPE |= {"raw_path": b"/v1/models", "query_string": b"limit=100", "headers": [], "client": ("127.0.0.1", 1)}


class Ours(Router):
    """The router, which keeps what it sent where: (time, adapter, replica)."""

    def __init__(self, config):
        super().__init__(config)
        self.told = []
        routers.append(self)

    def send(self, ask, now_s, tried=()):
        sent = super().send(ask, now_s, tried)
        self.told.append((now_s, ask.adapter, sent.replica))
        return sent


class RoundRobin(Ours):
    """Each replica in turn."""

    def send(self, ask, now_s, tried=()):
        names = sorted(set(self._replicas) - {*tried})
        own = names[len(self.told) % len(names)] if names else None
        return super().send(ask, now_s, {*self._replicas} - {own})


routers: list[Ours] = []
numbers = itertools.count(100)


@contextmanager
def fronted(config: ServeConfig, folder: Path, about, routing: type[Ours]) -> Iterator[str]:
    """The URL of a front that routes so."""
    front.Router = routing
    one = front.Front(config, folder, about, RayServers())
    try:
        url = one.url()
        while len(routers[-1]._replicas) < REPLICAS:
            time.sleep(0.1)
        yield url
    finally:
        one.stop()


async def ask(client: httpx2.AsyncClient, name: str, tokens: int) -> None:
    """One request; no two begin alike, so that no prefix decides."""
    body = {"model": name, "prompt": f"{next(numbers)} say", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text


async def resident(peer) -> list[str]:
    """The adapters in slots of one replica."""
    messages = [m async for part in peer.answer(SCOPE | {"state": {}, "server": ("127.0.0.1", 1)}, [b""]) for m in part]
    cards = json.loads(b"".join(m.get("body", b"") for m in messages))["data"]
    return [card["id"] for card in cards if card["state"] == "device"]


async def spread(url: str, peers: list) -> tuple[list[float], int]:
    """(how much lies twice, by look; requests) under Zipf's law."""
    draw, twice = random.Random(3), []
    weights = [1 / (rank + 1) for rank in range(ADAPTERS)]
    async with httpx2.AsyncClient(base_url=url, timeout=60) as client, asyncio.TaskGroup() as group:
        began, number, look_s = time.monotonic(), 0, WARM_S
        at_s = 0.0
        while at_s < SPAN_S:
            at_s += draw.expovariate(RATE)
            await asyncio.sleep(max(0.0, began + at_s - time.monotonic()))
            (chosen,) = draw.choices(range(ADAPTERS), weights)
            group.create_task(ask(client, f"bot{chosen}", TOKENS))
            number += 1
            if at_s > look_s:
                look_s += 1.0
                lying = Counter(itertools.chain(*await asyncio.gather(*map(resident, peers))))
                twice.append(1 - len(lying) / lying.total())
    return twice, number


async def hot(url: str) -> list[int]:
    """In each five seconds, how many replicas one adapter was sent to: a crowd comes, and then one at a time."""
    async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
        began = time.monotonic()

        async def crowd() -> None:
            while time.monotonic() < began + HOT_S:
                await ask(client, "bot0", 100)

        await asyncio.gather(*(crowd() for _ in range(CROWD)))
        while time.monotonic() < began + HOT_S + CALM_S:
            await ask(client, "bot0", 4)
            await asyncio.sleep(0.2)
    where: list[set[str]] = [set() for _ in range(math.ceil((HOT_S + CALM_S) / 5))]
    for at_s, adapter, replica in routers[-1].told:
        if adapter == "bot0" and 0 <= (place := int((at_s - began) // 5)) < len(where):
            where[place].add(replica)
    return [len(names) for names in where]


def main(folder: Path) -> None:
    os.chdir(folder)
    config = load(folder / "serve.toml", ServeConfig)
    cluster = config.cluster
    config = replace(config, memory_share=config.memory_share / (REPLICAS + 1))

    ray = RayCluster(None, cpus=REPLICAS + 2)

    def server(name: str, *, reads: bool) -> RayProcess:
        arguments = (config, folder, reads, RayServers().names)
        return ray.start(name, Replica, *arguments, cpus=cluster.cpus, gpus=cluster.gpus, calls=CALLS)

    with ExitStack() as stack:
        stack.enter_context(closing(ray))
        ray.open()
        keeper = server(KEEPER, reads=False)  # Ray ends what nobody has a handle of
        about = keeper.call("about")
        replicas = [server(f"{REPLICA}{number}", reads=True) for number in range(REPLICAS)]
        for replica in replicas:
            replica.call("about")
        peers = [RayServers().peer(f"{REPLICA}{number}.1") for number in range(REPLICAS)]
        said = {"twice": {}, "asked": {}}
        for routing in (Ours, RoundRobin):
            with fronted(config, folder, about, routing) as url:
                if routing is Ours:
                    with httpx2.Client(base_url=url, timeout=60) as client:
                        for number in range(ADAPTERS):
                            made = upload(client, f"bot{number}", zip_of(seeded(number, rank=1 + number % 4)))
                            assert made.status_code == 200, made.text
                name = routing.__name__
                said["twice"][name], said["asked"][name] = asyncio.run(spread(url, peers))
        with fronted(config, folder, about, Ours) as url:
            said["hot"] = asyncio.run(hot(url))
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
