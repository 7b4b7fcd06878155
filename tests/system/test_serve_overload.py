"""Three times the load that a server can take, over real HTTP: it goes on at its pace, and tells the others when to come again.

Clients lose patience, so a line that grows with the load would fill with requests that nobody waits for by the time they
are answered: then half the work is for nothing, and that is what the bounds are for.  The load is counted in requests a
step, not in time: a step comes when everything that was sent before it has arrived.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace

import httpx2
import pytest
from fake_backend import serving
from serve_world import BASE, CONFIG, check_idle, settle, with_resident

from jaxlora.config.serving import LimitsSection, NamedLimits
from serve.access.caller import Caller
from serve.access.rate_limit import Limiter
from serve.engine.engine import Engine
from serve.runtime.device_thread import DeviceThread
from serve.server.app import create_app
from serve.server.gate import AppConfig

pytest_plugins = ["serve_fixtures"]
PROMPT, TOKENS = 5, 8  # of a request; it takes TOKENS steps
CAPACITY = CONFIG.rows / TOKENS  # requests a step
STEPS = 60
PLACES = 8  # in the waiting line
PATIENCE = 2 * TOKENS + 4  # steps after which a client leaves: more than the line takes, and the answer
QUOTA = 5  # requests a minute of the tenant `small`


class PacedEngine(Engine):
    """An engine that takes a step when it may."""

    def prepare(self) -> None:
        self.granted, self.taken, self.asked = 0, 0, 0

    def submit(self, request) -> None:
        self.asked += 1
        super().submit(request)

    @property
    def answers(self) -> int:
        """HTTP requests that it works for."""
        return len({id.rpartition("-")[0] for id in list(self._sequences)})

    def step(self, deliver=None):
        if self.granted == 0:
            time.sleep(0.001)  # messages are read in between
            return []
        self.granted = 0
        deltas = super().step(deliver)
        self.taken += 1
        return deltas


@dataclass
class Seen:
    """What clients and the line have come to."""

    statuses: Counter[int] = field(default_factory=Counter)
    refusals: list[httpx2.Response] = field(default_factory=list)
    over_quota: int = 0  # refused by the limiter, before the line
    tokens: int = 0  # of whole answers
    left: int = 0  # clients, before their answers were whole
    waiting: int = 0  # at most
    waiting_tokens: int = 0


@contextlib.contextmanager
def server(world, **bounds: int) -> Iterator[tuple[PacedEngine, str]]:
    """A server whose line has these bounds, with three adapters in its slots."""
    engine = with_resident(world.engine(replace(CONFIG, **bounds)), *world.adapters[:3])
    engine.__class__ = PacedEngine
    engine.prepare()
    runner = DeviceThread(engine, base_name=BASE)
    runner.start()
    limits = LimitsSection(tenant=(NamedLimits(name="small", requests_per_minute=QUOTA),))

    def caller_of(connection) -> Caller:
        return Caller(owner=connection.headers["x-tenant"], admin=True)

    app = create_app(runner, AppConfig(default_max_tokens=TOKENS, caller_of=caller_of, limiter=Limiter(limits)))
    try:
        with serving(app) as url:
            yield engine, url
        engine.__class__ = Engine
        settle(runner)
        check_idle(engine)
    finally:
        runner.stop()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.002)


async def offer(world, engine: PacedEngine, url: str, *, times: int, choices: int) -> Seen:
    """Offers so many times the capacity for STEPS steps; at three times also what the tenant `small` may not ask for."""
    seen, models = Seen(), [BASE, *(a.ref.name for a in world.adapters[:3])]
    async with httpx2.AsyncClient(base_url=url, timeout=60, limits=httpx2.Limits(max_connections=None)) as client:

        async def post(number: int, tenant: str) -> None:
            body = {"model": models[number % 4], "prompt": [4 + (number + i) % 300 for i in range(PROMPT)]}
            body |= {"max_tokens": TOKENS, "n": choices, "temperature": 0, "ignore_eos": True}
            answer = await client.post("/v1/completions", json=body, headers={"x-tenant": tenant})
            seen.statuses[answer.status_code] += 1
            if answer.status_code == 200:
                seen.tokens += answer.json()["usage"]["completion_tokens"]
            else:
                seen.refusals.append(answer)
                seen.over_quota += "requests a minute" in answer.text

        tasks: list[asyncio.Task] = []
        began: list[int] = []  # at which step each was sent
        owed, number = 0.0, 0

        def settled() -> bool:
            """All that was sent is in line or refused, and all that has ended has been read."""
            asked = choices * (len(tasks) - seen.over_quota)
            return engine.asked == asked and engine.answers == sum(not task.done() for task in tasks)

        async def leave(now: int) -> None:
            late = [
                task for task, since in zip(tasks, began, strict=True) if now - since > PATIENCE and not task.done()
            ]
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
            seen.left += len(late)

        for now in range(STEPS):
            owed += times * CAPACITY / choices
            while owed >= 1:
                owed, number = owed - 1, number + 1
                tasks.append(asyncio.create_task(post(number, f"tenant{number % 3}")))
            if times > 1:
                tasks.append(asyncio.create_task(post(number, "small")))
            began += [now] * (len(tasks) - len(began))
            await leave(now)
            await until(settled)
            line = engine.scheduler.line
            seen.waiting = max(seen.waiting, line.requests)
            seen.waiting_tokens = max(seen.waiting_tokens, line.tokens)
            await step(engine)
            await until(settled)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return seen


def step(engine: PacedEngine) -> Awaitable[None]:
    taken, engine.granted = engine.taken, 1
    return until(lambda: engine.taken > taken or not engine.has_work)


@pytest.mark.fault("R4")
@pytest.mark.parametrize("choices", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("bound", ["requests", "tokens"])
def test_three_times_the_load_completes_as_much_as_the_load_itself(world, bound, choices):
    tokens = PLACES * (PROMPT + TOKENS)
    bounds = {"max_waiting": PLACES} if bound == "requests" else {"max_waiting_tokens": tokens}
    with server(world, **bounds) as (engine, url):
        once = asyncio.run(offer(world, engine, url, times=1, choices=choices))
    with server(world, **bounds) as (engine, url):
        thrice = asyncio.run(offer(world, engine, url, times=3, choices=choices))

    assert (once.statuses.keys(), once.left) == ({200}, 0)
    assert once.tokens >= 0.8 * STEPS * CONFIG.rows  # the load is one that the server can just take
    assert thrice.tokens >= 0.9 * once.tokens
    assert thrice.statuses.keys() == {200, 429, 503}
    assert thrice.statuses[503] > thrice.statuses[200]
    assert (thrice.waiting, thrice.waiting_tokens) == (PLACES, tokens)
    for answer in thrice.refusals:
        assert answer.json()["error"]["code"] == ("overloaded" if answer.status_code == 503 else "rate_limit_exceeded")
        assert 1 <= int(answer.headers["retry-after"]) <= 120  # a sliding minute
