"""A load of requests: a closed loop of clients that each wait for their answer, or an open loop at a rate."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Mapping, Sequence

from serve.bench.client import Answer, Server, ask

WORDS = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "number",
    "night",
    "point",
    "home",
    "water",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
    "lot",
    "right",
    "study",
    "book",
    "eye",
    "job",
    "word",
    "business",
    "issue",
    "side",
    "kind",
    "head",
    "house",
    "service",
    "friend",
    "father",
    "power",
    "hour",
    "game",
    "line",
]


def text_of(tokens: int, source: random.Random) -> str:
    """Returns as many random short words, each about a token of most vocabularies."""
    return " ".join(source.choices(WORDS, k=tokens))


def bodies(
    models: Iterator[str], count: int, *, chat: bool, prompt_tokens: int, max_tokens: int, early_stop: bool, seed: int
) -> list[dict[str, object]]:
    """Returns the bodies of `count` greedy requests, each with a prompt of its own.

    early_stop: whether an answer may end before max_tokens; else the body says ignore_eos, which is no word of OpenAI's.
    """
    source = random.Random(seed)
    found: list[dict[str, object]] = []
    for _ in range(count):
        text = text_of(prompt_tokens, source)
        prompt = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        ends = {} if early_stop else {"ignore_eos": True}
        found.append({"model": next(models), "max_tokens": max_tokens, "temperature": 0, **prompt, **ends})
    return found


async def closed_loop(
    server: Server, path: str, asked: Sequence[Mapping[str, object]], clients: int, timeout_s: float
) -> list[Answer]:
    """Has so many clients ask one request after another until all are answered; returns the answers in the order asked."""
    left, answers = iter(enumerate(asked)), {}

    async def client() -> None:
        for place, body in left:
            answers[place] = await ask(server, path, body, timeout_s)

    await asyncio.gather(*[client() for _ in range(clients)])
    return [answers[place] for place in range(len(asked))]


async def open_loop(
    server: Server, path: str, asked: Sequence[Mapping[str, object]], rate: float, timeout_s: float, seed: int
) -> list[Answer]:
    """Sends so many requests a second, at random (exponential) distances, whether or not others are answered."""
    source, tasks = random.Random(seed), []
    loop = asyncio.get_running_loop()
    due_s = loop.time()
    for body in asked:
        await asyncio.sleep(due_s - loop.time())
        tasks.append(asyncio.create_task(ask(server, path, body, timeout_s)))
        due_s += source.expovariate(rate)
    return await asyncio.gather(*tasks)
