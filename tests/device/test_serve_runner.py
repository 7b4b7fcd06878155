"""The device thread: many threads and loops ask, one answers, and nobody waits for a thread that is gone."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from serve_world import BASE, Answer, World, ask, check_idle, settle, with_resident

from jaxlora.core.errors import AdapterNotFound, ContextLengthExceeded, Unavailable
from jaxlora.core.lora import AdapterRef
from serve.engine.engine import Engine
from serve.engine.request import FinishReason
from serve.runtime.budget import Budget
from serve.runtime.device_thread import DeviceThread

pytest_plugins = ["serve_fixtures"]


async def read(stream) -> Answer:
    answer = Answer()
    async for delta in stream:
        answer.take(delta)
    return answer


async def submit_all(runner, requests) -> list[Answer]:
    streams = [runner.submit(r) for r in requests]
    return await asyncio.wait_for(asyncio.gather(*map(read, streams)), 20)


class Failing(Engine):
    """An engine whose step fails when it is told to, after it has said so and was let go on."""

    def prepare(self) -> None:
        self.fail, self.entered, self.go_on = False, threading.Event(), threading.Event()

    def step(self, deliver=None):
        if self.fail:
            self.entered.set()
            assert self.go_on.wait(10)
            raise RuntimeError("the device is gone")
        return super().step(deliver)


def failing_runner(world: World) -> DeviceThread:
    engine = world.engine()
    engine.__class__ = Failing
    engine.prepare()
    runner = DeviceThread(engine, base_name=BASE)
    runner.start()
    return runner


# --- answers


def test_streams_of_one_loop(world, runner):
    requests = [ask(f"r{i}", [None, *world.adapters][i % 6], 3 + i, 4 + i) for i in range(12)]
    answers = asyncio.run(submit_all(runner, requests))
    for r, answer in zip(requests, answers, strict=True):
        assert answer.tokens == world.greedy(r), r.id
        assert answer.finish is FinishReason.LENGTH


def test_streams_of_many_loops_and_completions_of_many_threads(world, runner):
    def one_loop(n):
        requests = [ask(f"loop{n}/{i}", world.adapters[(n + i) % 5], 4 + i, 6) for i in range(4)]
        if n % 2:
            return requests, [c.tokens for c in runner.complete(requests)]
        return requests, [a.tokens for a in asyncio.run(submit_all(runner, requests))]

    with ThreadPoolExecutor(4) as pool:
        for requests, tokens in pool.map(one_loop, range(4)):
            assert tokens == [world.greedy(r) for r in requests]


def test_complete_answers_in_order(world, runner):
    requests = [ask(f"c{i}", world.adapters[i % 5], 5, 12 - i) for i in range(6)]
    completions = runner.complete(requests)
    assert [c.request_id for c in completions] == [r.id for r in requests]
    assert [c.tokens for c in completions] == [world.greedy(r) for r in requests]
    assert [c.text for c in completions] == [world.tokenizer.decode(c.tokens) for c in completions]
    assert runner.complete([]) == []


def test_complete_raises_what_a_request_failed_with(world, runner):
    with pytest.raises(ContextLengthExceeded):
        runner.complete([ask("good"), ask("long", None, 60, 60)])
    with pytest.raises(AdapterNotFound):
        runner.complete([ask("lost", AdapterRef("acme", "nobody", 1)), ask("good")])


def test_what_is_not_admitted_is_the_only_news(runner):
    (answer,) = asyncio.run(submit_all(runner, [ask("long", None, 60, 60)]))
    assert (answer.deltas, answer.tokens) == (1, [])
    assert isinstance(answer.error, ContextLengthExceeded)


def test_cancel_frees_a_running_and_a_waiting_request(world, runner):
    async def scenario():
        requests = [ask(f"r{i}", world.adapters[i % 2], 4, 60) for i in range(10)]
        streams = [runner.submit(r) for r in requests]
        first = await anext(streams[0])
        assert first.tokens == tuple(world.greedy(requests[0])[:1])
        for s in streams[:9]:
            s.cancel()
            s.cancel()
        return await read(streams[9]), requests[9]

    answer, request = asyncio.run(asyncio.wait_for(scenario(), 20))
    assert answer.tokens == world.greedy(request)
    settle(runner)
    runner.call(lambda: check_idle(runner.engine))
    assert runner._listeners == {}


def test_a_closed_loop_frees_its_requests(world, runner):
    async def leave():
        stream = runner.submit(ask("left", world.adapters[0], 4, 60))
        await anext(stream)

    asyncio.run(leave())
    settle(runner)
    assert runner._listeners == {}


# --- the thread


def test_call_runs_on_the_device_thread_and_raises_what_it_raises(runner):
    def fail():
        raise KeyError("mine")

    assert runner.call(lambda: threading.current_thread().name) == "jaxlora-device"
    assert runner.call(lambda: runner.call(lambda: 7)) == 7  # from the thread itself
    with pytest.raises(KeyError, match="mine"):
        runner.call(fail)
    assert runner.health() == "ok"


def test_call_comes_between_two_steps_of_a_running_request(world, runner):
    request = ask("long", world.adapters[0], 4, 60)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(runner.complete, [request])
        while not answer.done():
            runner.call(lambda: runner.engine.scheduler.check())
    assert answer.result()[0].tokens == world.greedy(request)


def test_before_the_start_and_after_the_end_nobody_waits(world):
    runner = DeviceThread(world.engine(), base_name=BASE)
    runner.stop()

    async def submit():
        return runner.submit(ask("x"))

    def nobody_waits():
        for use in (lambda: runner.call(int), lambda: runner.complete([ask("x")]), lambda: asyncio.run(submit())):
            with pytest.raises(Unavailable, match="has stopped"):
                use()
        assert runner.health() != "ok"
        runner.cancel("x")

    nobody_waits()
    runner.start()
    assert runner.health() == "ok"
    runner.stop()
    nobody_waits()
    runner.stop()


def test_stop_ends_open_requests_with_an_error(world):
    runner = DeviceThread(world.engine(), base_name=BASE)
    runner.start()

    async def scenario():
        streams = [runner.submit(ask(f"r{i}", None, 4, 60)) for i in range(12)]
        await anext(streams[0])
        runner.call(runner._stop_now)
        return await asyncio.wait_for(asyncio.gather(*map(read, streams)), 10)

    answers = asyncio.run(scenario())
    assert all(isinstance(a.error, Unavailable) for a in answers)
    runner.stop()


def test_a_failure_at_the_start_is_raised_there(world, caplog):
    runner = DeviceThread(world.engine(), base_name=BASE)
    runner.engine.warm_up = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        runner.start()
    assert runner.health() != "ok"
    assert "the device thread has ended" in caplog.text


def test_an_end_while_programs_are_compiled_waits_for_one_of_them_alone(world, caplog):
    runner = DeviceThread(world.engine(), base_name=BASE)
    under_way, go_on, begun = threading.Event(), threading.Event(), []

    def warm_up(compiling):
        for number in (1, 2, 3):
            compiling(number, 3)
            under_way.set()
            assert go_on.wait(10)

    runner.engine.warm_up = warm_up
    with ThreadPoolExecutor(2) as pool:
        starting = pool.submit(runner.start, lambda *told: begun.append(told))
        assert under_way.wait(10)
        ending = pool.submit(runner.end, None)
        while not runner._stopping:
            time.sleep(0.001)
        go_on.set()
        ending.result(10)
        assert isinstance(starting.exception(10), Unavailable)
    assert begun == [(1, 3)]
    assert caplog.text == ""


def test_a_dead_thread_gives_errors_to_all_who_wait_and_all_who_come(world, caplog):
    runner = failing_runner(world)

    async def scenario():
        early = [runner.submit(ask(f"r{i}", None, 4, 60)) for i in range(10)]
        await anext(early[0])
        runner.engine.fail = True
        await asyncio.to_thread(runner.engine.entered.wait, 10)
        late = runner.submit(ask("late", None, 4, 4))  # the thread is in its last step
        with ThreadPoolExecutor(1) as pool:
            completion = pool.submit(runner.complete, [ask("latest", None, 4, 4)])
            while runner._inbox.qsize() < 2:
                await asyncio.sleep(0.001)
            runner.engine.go_on.set()
            answers = await asyncio.wait_for(asyncio.gather(*map(read, [*early, late])), 10)
        assert isinstance(completion.exception(), Unavailable)
        return answers

    answers = asyncio.run(scenario())
    assert all(isinstance(a.error, Unavailable) for a in answers)
    assert all("device is gone" not in str(a.error) for a in answers)
    assert "the device is gone" in caplog.text
    runner._thread.join(10)
    assert runner.health() != "ok"
    with pytest.raises(Unavailable):
        runner.call(int)
    runner.stop()


# --- training between the steps


class FakeTrainer:
    """Takes so many steps, and writes down what the device thread did meanwhile."""

    def __init__(self, engine, steps):
        self.log, self.left = [], steps
        step = engine.step
        engine.step = lambda deliver: self.log.append("s") or step(deliver)

    @property
    def has_work(self):
        return self.left > 0

    part = "part"

    def advance(self):
        assert threading.current_thread().name == "jaxlora-device"
        self.left -= 1
        self.log.append("t")


class Turns(Budget):
    """Trains after every so many serving steps."""

    def __init__(self, serve_steps):
        super().__init__()
        self.serve_steps, self.since, self.heard = serve_steps, 0, []

    def trains(self, now, part, *, urgent):
        self.heard.append((part, urgent))
        return self.since >= self.serve_steps

    def trained(self, start, end, part, *, beside):
        self.since = 0
        super().trained(start, end, part, beside=beside)

    def served(self, start, end, *, decoded, beside):
        self.since += 1
        super().served(start, end, decoded=decoded, beside=beside)


@pytest.mark.parametrize("serve_steps", [1, 3])
def test_the_budget_is_asked_before_every_step_and_has_the_say(world, serve_steps):
    runner = DeviceThread(with_resident(world.engine(), world.adapters[0]), base_name=BASE)
    budget = runner.budget = Turns(serve_steps)
    trainer = runner.trainer = FakeTrainer(runner.engine, 8)
    request = ask("r", world.adapters[0], 4, 40)
    runner._inbox.put(lambda: runner.admit(request, lambda _delta: None))  # both have work from the first turn
    runner.start()
    settle(runner)
    runner.stop()
    assert "".join(trainer.log) == ("s" * serve_steps + "t") * 8 + "s" * (40 - 8 * serve_steps)
    asked = 8 * serve_steps + 8
    assert budget.heard == [("part", True)] + [("part", False)] * (asked - 1)  # until the first token it was urgent
    assert len(budget.steps) > len(budget.alone) > 0
    assert len(budget.parts["part"]) == 8


def test_a_request_that_comes_while_others_train_waits_for_one_part_alone(world, runner):
    """Its prompt and first token come before anything else is trained."""
    runner.complete([ask("load", world.adapters[1], 1, 1)])
    trainer = FakeTrainer(runner.engine, 10**9)
    runner.call(lambda: setattr(runner, "trainer", trainer))

    def admit():
        trainer.log.append("r")
        runner.admit(ask("r", world.adapters[1], 4, 20), lambda _delta: trainer.log.append("d"))

    runner.call(admit)
    settle(runner)
    trainer.left = 0
    settle(runner)
    came = "".join(trainer.log)
    assert came[came.index("r") :].startswith("rsd")
    assert came.count("d") == 20


def test_training_goes_on_alone_and_a_request_joins(world, runner):
    runner.complete([ask("load", world.adapters[1], 1, 1)])
    trainer = FakeTrainer(runner.engine, 10**9)
    runner.call(lambda: setattr(runner, "trainer", trainer))
    request = ask("r", world.adapters[1], 4, 20)
    while len(trainer.log) < 5:
        time.sleep(0.001)
    assert set(trainer.log) == {"t"}
    assert runner.complete([request])[0].tokens == world.greedy(request)
    trainer.left = 0
    settle(runner)
    assert trainer.log.count("s") == 20


def test_a_trainer_publishes_between_the_steps_of_a_request(world, runner):
    """The request keeps its version; one that comes later gets the new one; no publish stops anybody."""
    old = world.add("trained", seed=70)
    new = [world.add("unused", seed=71 + i) for i in range(3)]
    rows = [world.device_rows(a) for a in new]
    published = []

    class Publisher(FakeTrainer):
        def advance(self):
            super().advance()
            if self.left < 3:
                published.append(runner.publisher.publish("acme", "trained", new[self.left].spec, rows[self.left]))

    trainer = Publisher(runner.engine, 6)
    request = ask("keeps", runner.resolve(None, "trained"), 4, 60)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(runner.complete, [request])
        while not trainer.log:
            time.sleep(0.001)
        runner.call(lambda: setattr(runner, "trainer", trainer))
        assert answer.result()[0].tokens == world.greedy(request)
    while trainer.has_work:
        time.sleep(0.001)
    assert [r.version for r in published] == [2, 3, 4]
    later = ask("later", runner.resolve(None, "trained"), 4, 12)
    assert later.adapter == published[-1]
    (got,) = runner.complete([later])
    assert got.tokens == world.plain.greedy(later.prompt, 12, new[0])
    assert got.tokens != world.plain.greedy(later.prompt, 12, old)
    assert runner.engine.slots.find(published[-1]) is not None
