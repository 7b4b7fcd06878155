"""What is charged before it is done: bytes of bodies by tenant, and turns on threads; clocks and threads stand in for load."""

from __future__ import annotations

import asyncio
import threading

import pytest
from starlette.exceptions import HTTPException

from jaxlora.core.errors import Overloaded, RateLimited
from serve.access.body_rate import BURST_S, VALUE_BYTES, BodyRate
from serve.access.caller import Caller
from serve.access.worker_pool import WorkerPool
from serve.http.json_bodies import JsonBodies

RATE = 1000


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class TestBodyRate:
    def test_a_tenant_that_sends_faster_is_told_when_to_come_again_and_the_others_are_not_asked(self):
        clock = Clock()
        rate = BodyRate(RATE, clock=clock)
        for _ in range(int(BURST_S) + 1):
            rate.charge("flood", RATE)
        with pytest.raises(RateLimited) as caught:
            rate.charge("flood", 1)
        rate.charge("quiet", RATE)
        clock.now += caught.value.retry_after_s
        rate.charge("flood", RATE)

    def test_in_the_long_run_no_more_than_the_rate_passes(self):
        clock, passed = Clock(), 0
        rate = BodyRate(RATE, clock=clock)
        while clock.now < 100:
            try:
                rate.charge("flood", 700)
                passed += 700
            except RateLimited:
                clock.now += 0.1
        assert passed <= RATE * (100 + BURST_S) + 700

    def test_of_bodies_that_come_together_the_first_is_parsed_and_those_after_it_are_not(self):
        """Each was let in by its bytes; what it holds is known when it is there."""
        rate, values = BodyRate(RATE, clock=Clock()), int(BURST_S * RATE / VALUE_BYTES) + 1
        for _ in range(3):
            rate.charge("flood", 100)
        rate.settle("flood", charged=100, size_bytes=100, values=values)
        for _ in range(2):
            with pytest.raises(RateLimited):
                rate.settle("flood", charged=100, size_bytes=100, values=values)
        with pytest.raises(RateLimited):
            rate.charge("flood", 0)
        rate.charge("quiet", 100)
        rate.settle("quiet", charged=100, size_bytes=100, values=values)

    def test_a_length_that_was_not_announced_is_charged(self):
        rate = BodyRate(RATE, clock=Clock())
        rate.charge("flood", 0)
        rate.settle("flood", charged=0, size_bytes=int(BURST_S * RATE) + 1, values=0)
        with pytest.raises(RateLimited):
            rate.charge("flood", 0)


class TestJsonBodies:
    """The middleware alone, with an app that reads the whole body."""

    def send(self, bodies: list[bytes], rate: BodyRate, *, most_values: int = 100, path: str = "/v1/x") -> None:
        """Keeps in `read` how many parts of the body were read, and in `given` what the app got."""
        self.read, self.given = 0, b""

        async def receive() -> dict:
            self.read += 1
            return {"type": "http.request", "body": bodies[self.read - 1], "more_body": self.read < len(bodies)}

        async def app(scope, receive, send) -> None:
            more = True
            while more:
                message = await receive()
                self.given, more = self.given + message["body"], message["more_body"]

        headers = [(b"content-length", str(sum(map(len, bodies))).encode())]
        scope = {"type": "http", "path": path, "headers": headers, "state": {"caller": Caller(owner="a", admin=False)}}
        middleware = JsonBodies(app, rate, uploads={"/upload"}, most_values=most_values, pause_s=0.0)
        asyncio.run(middleware(scope, receive, None))

    def test_a_body_over_the_rate_is_refused_before_a_byte_of_it_is_read(self):
        rate = BodyRate(RATE, clock=Clock())
        self.send([b"x" * 3000, b"y" * 3000], rate)
        assert self.given == b"x" * 3000 + b"y" * 3000
        with pytest.raises(RateLimited):
            self.send([b"x"], rate)
        assert self.read == 0
        self.send([b"x"], rate, path="/upload")
        assert self.given == b"x"

    def test_a_body_of_too_many_values_never_reaches_the_parser(self):
        with pytest.raises(HTTPException, match="at most 100 values") as caught:
            self.send([b"[1" + b",1" * 60, b",1" * 60], BodyRate(10**6, clock=Clock()))
        assert (caught.value.status_code, self.given) == (413, b"")

    def test_values_cost_more_than_text(self):
        text, ids = BodyRate(RATE, clock=Clock()), BodyRate(RATE, clock=Clock())
        for _ in range(int(BURST_S * RATE / 90)):
            self.send([b"x" * 90], text)
        few = 1 + int(BURST_S * RATE / 90 / VALUE_BYTES)
        for _ in range(few):
            self.send([b"," * 90], ids)
        with pytest.raises(RateLimited):
            self.send([b"," * 90], ids)


class TestWorkerPool:
    def test_one_piece_of_each_tenant_at_a_time_and_tenants_take_turns(self):
        order: list[str] = []
        running: set[str] = set()
        gate = threading.Event()

        def work(tenant: str) -> None:
            assert tenant not in running
            running.add(tenant)
            gate.wait(5)
            order.append(tenant)
            running.discard(tenant)

        async def main() -> None:
            pool = WorkerPool("test", threads=1, waiting=50, timeout_s=5)
            calls = [asyncio.create_task(pool.run("flood", lambda: work("flood"))) for _ in range(20)]
            await asyncio.sleep(0)
            calls += [asyncio.create_task(pool.run("quiet", lambda: work("quiet"))) for _ in range(2)]
            await asyncio.sleep(0)
            gate.set()
            await asyncio.gather(*calls)

        asyncio.run(main())
        assert order[:4] == ["flood", "quiet", "flood", "quiet"]
        assert order.count("flood") == 20

    def test_too_many_calls_of_one_tenant_are_refused_and_anothers_are_not(self):
        gate = threading.Event()

        async def main() -> None:
            pool = WorkerPool("test", threads=4, waiting=3, timeout_s=5)
            calls = [asyncio.create_task(pool.run("flood", gate.wait)) for _ in range(3)]
            await asyncio.sleep(0)
            with pytest.raises(RateLimited, match="3 of your requests"):
                await pool.run("flood", gate.wait)
            assert await pool.run("quiet", lambda: 7) == 7
            gate.set()
            await asyncio.gather(*calls)
            assert await pool.run("flood", lambda: 8) == 8

        asyncio.run(main())

    def test_work_that_takes_too_long_is_given_up_and_keeps_the_turn_of_its_tenant_alone(self):
        gate, ran = threading.Event(), []

        async def main() -> None:
            pool = WorkerPool("test", threads=2, waiting=9, timeout_s=0.05)
            for _ in range(3):  # the second and third never begin
                with pytest.raises(Overloaded, match=r"0\.05 s"):
                    await pool.run("flood", lambda: (ran.append(1), gate.wait(5)))
            assert await pool.run("quiet", lambda: 7) == 7
            gate.set()
            await asyncio.sleep(0.02)
            assert await pool.run("flood", lambda: 8) == 8

        asyncio.run(main())
        assert ran == [1]

    def test_admission_is_asked_when_the_turn_comes(self):
        left = 2

        def admit() -> None:
            if left == 0:
                raise RateLimited("none left", retry_after_s=1)

        async def one(pool: WorkerPool) -> int:
            nonlocal left
            await pool.run("a", lambda: None, admit=admit)
            left -= 1
            return 1

        async def main() -> list:
            pool = WorkerPool("test", threads=2, waiting=99, timeout_s=5)
            return await asyncio.gather(*[one(pool) for _ in range(9)], return_exceptions=True)

        answers = asyncio.run(main())
        assert [a for a in answers if a == 1] == [1, 1]
        assert sum(isinstance(a, RateLimited) for a in answers) == 7
