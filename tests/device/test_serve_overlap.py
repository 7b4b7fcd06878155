"""Steps that are launched ahead of the host: the same answers, and the device never waits for one to be read."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from serve_world import (
    CONFIG,
    ONE_SHAPE,
    SLOTS,
    Answer,
    Ran,
    World,
    ask,
    check_idle,
    read_all,
    run_all,
    step,
    watch_programs,
)

from jaxlora.config.serving import SlotSize
from jaxlora.model.compile_cache import CompileCounter
from serve.engine.engine import Engine
from serve.engine.grammar import Grammars, GrammarSource
from serve.engine.request import FinishReason, Request
from serve.engine.sampling import StepOutput
from serve.engine.step import NEWEST, NO_PLACE, StepBatch

pytest_plugins = ["serve_fixtures"]
VOCAB, END = 320, 3


def ahead(engine: Engine) -> Engine:
    """The engine, which runs ahead as on an accelerator."""
    engine.runs_ahead = True
    return engine


# --- a device that writes down when it is asked


def follows(token_T: np.ndarray) -> int:
    """The token that the fake device chooses after these.  One in 40 ends an answer."""
    chosen = int(token_T @ (1 + np.arange(len(token_T)) * 7919 % 997)) % 997
    return END if chosen % 40 == 0 else 4 + chosen % (VOCAB - 4)


@dataclass
class Unread:
    """An array on the fake device."""

    log: list[tuple[str, int]]
    step: int
    value: np.ndarray

    def copy_to_host_async(self) -> None:
        self.log.append(("copy", self.step))

    def block_until_ready(self) -> Unread:
        self.log.append(("wait", self.step))
        return self

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        self.log.append(("read", self.step))
        return self.value


class FakeDevice:
    """Stands for the step's program, and for the copies of pages: a token follows from all before it, as its pages hold them."""

    def __init__(self, engine: Engine):
        self.log: list[tuple[str, int]] = []
        self.launches = 0
        self.unseen = 0  # tokens that the host had not read when the next one was computed from them
        self._newest_B = np.zeros(engine.config.rows, np.int32)
        self._page_PZ = np.zeros((engine.config.pages, engine.config.page_tokens), np.int32)
        engine._programs.launch = self
        engine._mover = self

    def save(self, kv, pages):
        return self._page_PZ[pages]

    def restore(self, kv, pages, saved):
        self._page_PZ[pages] = saved
        return kv

    def __call__(self, base, pool, kv, newest_B, packed, edits, needs):
        self.launches += 1
        self.log.append(("launch", self.launches))
        return kv, newest_B, self.output(np.concatenate([self._chosen(batch.fields) for batch in packed]))

    def _chosen(self, batch: StepBatch) -> np.ndarray:
        """Writes the batch's tokens to its pages and returns what its lanes choose, 0 where they do not."""
        Z = self._page_PZ.shape[1]
        unseen_G = batch.token_GJ[:, 0] == NEWEST
        self.unseen += int(unseen_G.sum())
        batch.token_GJ[unseen_G, 0] = self._newest_B[batch.place_G[unseen_G]]
        for lane, j in zip(*np.nonzero(batch.position_GJ >= 0), strict=True):
            position = batch.position_GJ[lane, j]
            self._page_PZ[batch.page_GC[lane, position // Z], position % Z] = batch.token_GJ[lane, j]
        token_G = np.zeros(len(batch.token_GJ), np.int32)
        for lane in np.nonzero(batch.place_G != NO_PLACE)[0]:
            length = batch.position_GJ[lane, batch.last_G[lane]] + 1
            token_G[lane] = follows(self._page_PZ[batch.page_GC[lane]].reshape(-1)[:length])
            self._newest_B[batch.place_G[lane]] = token_G[lane]
        return token_G

    def output(self, token_G: np.ndarray) -> StepOutput:
        zero_G, top_GM = np.zeros(len(token_G), np.float32), np.zeros((len(token_G), 20), np.int32)
        names = ("token_B", "logprob_B", "finite_B", "top_token_BM", "top_logprob_BM")
        values = (token_G, zero_G, zero_G == 0, top_GM, top_GM.astype(np.float32))
        return StepOutput(**{n: Unread(self.log, self.launches, x) for n, x in zip(names, values, strict=True)})


def expected(request: Request) -> tuple[list[int], FinishReason]:
    """The answer of the fake device."""
    tokens, answer = list(request.prompt), []
    while len(answer) < request.params.max_tokens:
        answer.append(follows(np.array(tokens)))
        tokens.append(answer[-1])
        if answer[-1] == END:
            return answer, FinishReason.STOP
    return answer, FinishReason.LENGTH


@pytest.mark.parametrize(
    ("steps", "mixes"),
    [(150, True), (150, False), *(pytest.param(1000, mixes, marks=pytest.mark.slow) for mixes in (True, False))],
)
def test_the_next_step_is_launched_before_a_step_is_read(world, steps, mixes):
    """Joins, ends, cancels, parks, publications, other numbers of slots and pages; every answer is what the device said."""
    rng = np.random.default_rng(0)
    sizes = (SlotSize(slots=SLOTS, pages=40), SlotSize(slots=SLOTS + 1, pages=32))
    engine = ahead(world.engine(replace(CONFIG, quantum_s=20.0, host_bytes=6_000, pages=40, sizes=sizes)))
    engine.tune(replace(engine._tuning, slots=SLOTS), ())  # the engine itself changes to no other
    engine.mixes = mixes
    engine.clock = iter(np.arange(0.0, 1e6)).__next__
    device, requests, answers = FakeDevice(engine), {}, defaultdict(Answer)
    cancelled, overlapped, alone = set(), 0, 0
    followed = world.add("followed", seed=70)
    rows = world.device_rows(followed)

    def submit() -> None:
        follows, number = rng.random() < 0.2, len(requests)
        how = {"stop_token_ids": (END,)} | ({"presence_penalty": 1.0} if rng.random() < 0.1 else {})
        adapter = followed if follows else [None, *world.adapters][rng.integers(6)]
        request = ask(f"r{number}", adapter, int(rng.integers(1, 20)), int(rng.integers(0, 24)), **how)
        requests[request.id] = request = replace(request, follow=bool(follows))
        engine.submit(request)

    for count in range(steps):
        while len(engine._sequences) < 6 or (len(engine._sequences) < 14 and rng.random() < 0.3):
            submit()
        if count % 20 == 10:
            cancelled.add(id := str(rng.choice(sorted(engine._sequences))))
            engine.cancel(id)
        if rng.random() < 0.03:
            followed = world.add("followed", seed=count)
            engine.install(followed.ref, rows)
        if count % 50 == 25:
            engine.resize(sizes[count // 50 % 2 == 0])
        before, loading = len(device.log), bool(engine._loads)
        step(engine, answers)
        kinds = [kind for kind, _ in device.log[before:]]
        launched, read = (sorted({n for k, n in device.log[before:] if k == kind}) for kind in ("launch", "read"))
        if launched and read:
            assert kinds.index("read") > max(i for i, kind in enumerate(kinds) if kind == "launch")
            assert max(read) < min(launched)
            assert set(launched) <= {n for kind, n in device.log[before:] if kind == "copy"}  # on their way already
        assert len(launched) <= (1 if mixes else 2)
        overlapped += bool(launched and read)
        alone += bool(read and not launched and not loading)
    while engine.has_work:
        step(engine, answers)
    check_idle(engine)
    assert overlapped > 0.7 * steps  # a busy machine reads adapters later
    assert alone < 0.05 * steps  # everybody had to be read first
    for id, request in requests.items():
        tokens, finish = expected(request)
        if id in cancelled:
            assert answers[id].tokens == tokens[: len(answers[id].tokens)]
        else:
            assert (answers[id].tokens, answers[id].finish) == (tokens, finish), id
    scheduler = engine.scheduler
    assert min(scheduler.preemptions, scheduler.recomputed_tokens, scheduler.pages.lookups) > 20
    assert scheduler.active.swaps > 5  # a busy machine reads adapters later
    assert engine.resizes >= steps // 50
    assert device.unseen > steps
    assert len(cancelled) >= steps // 20


def test_a_row_that_needs_its_last_token_does_not_slow_the_others(world):
    engine = ahead(world.engine())
    device, answers = FakeDevice(engine), defaultdict(Answer)
    engine.submit(ask("waits", None, 4, 40, presence_penalty=1.0))
    for i in range(3):
        engine.submit(ask(f"r{i}", None, 4, 40))
    for _ in range(21):
        step(engine, answers)
    assert [len(answers[f"r{i}"].tokens) for i in range(3)] == [20] * 3
    assert len(answers["waits"].tokens) == 10
    for i in range(3):
        engine.cancel(f"r{i}")
    for _ in range(12):  # alone, one launches and the next one reads
        step(engine, answers)
    assert len(answers["waits"].tokens) == 16
    engine.cancel("waits")
    check_idle(engine)
    assert device.unseen > 50


def test_a_step_in_flight_is_of_the_version_it_was_launched_with(world):
    """A publication takes effect with the next launch, and each token names the version that made it."""
    old = world.add("fresh", seed=71)
    rows = world.device_rows(old)
    engine = ahead(world.engine())
    FakeDevice(engine)
    run_all(engine, [ask("load", old, 1, 1)])
    engine.submit(replace(ask("r", old, 4, 12), follow=True))
    said = []
    while engine.has_work:
        if len(said) == 4:
            new = world.add("fresh", seed=72)
            engine.install(new.ref, rows)
        said += [d.adapter for d in engine.step()]
    assert said == [old.ref] * 5 + [new.ref] * 7  # the fifth was launched before


# --- the same answers


PARKING = replace(ONE_SHAPE, quantum_s=12.0)


def trace(world: World, engine: Engine) -> tuple[dict[str, Answer], dict[str, list[Ran]]]:
    """Greedy and drawn answers, with grammars, penalties and stop strings, of more requests than rows and adapters than slots."""
    engine.clock = iter(np.arange(0.0, 1e6)).__next__
    ran = watch_programs(engine)
    letters = Grammars(engine.tokenizer).compile_now(GrammarSource(kind="regex", text="[a-z ]{30}", param="x"))
    ways = [
        {},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 7, "stop": ("e",)},
        {"grammar": letters, "temperature": 1.0, "seed": 9},
        {"presence_penalty": 0.5, "repetition_penalty": 1.3, "min_tokens": 3},
        {"ignore_eos": False, "temperature": 1.5, "seed": 11, "prompt_logprobs": 2},
    ]
    some = [
        ask(f"r{i}", [None, *world.adapters][i % 5], 3 + 5 * i % 17, 4 + 7 * i % 20, logprobs=3, **ways[i % len(ways)])
        for i in range(16)
    ]

    def between(count: int) -> None:
        read_all(engine)
        if count % 3 == 0 and later:
            engine.submit(later.pop(0))
        if count == 9:
            engine.cancel("r1")

    now, later = some[:6], some[6:]
    return run_all(engine, now, between), ran


def test_answers_are_the_same_bits_and_nothing_compiles(world):
    waiting, running_ahead = world.engine(PARKING), ahead(world.engine(PARKING))
    running_ahead.warm_up()
    trace(world, running_ahead)  # grammars, the copies of edits
    want, want_ran = trace(world, waiting)
    with CompileCounter() as counter:
        got, got_ran = trace(world, running_ahead)
    assert not counter.retraced
    assert running_ahead.scheduler.preemptions > 3
    assert running_ahead.scheduler.active.swaps > 0
    assert running_ahead.scheduler.recomputed_tokens == 0  # it would be computed by another program
    for id, answer in want.items():
        if id != "r1":
            assert got_ran[id][: len(want_ran[id])] == want_ran[id]
            assert (answer.tokens, answer.logprobs, answer.prompt_logprobs) == (
                got[id].tokens,
                got[id].logprobs,
                got[id].prompt_logprobs,
            )
            assert (answer.text, answer.finish) == (got[id].text, got[id].finish)
    assert len({a.finish for a in want.values()}) > 1


# --- the device thread


def test_streams_of_a_loop_are_woken_once_a_step(world, runner, monkeypatch):
    runner.engine.runs_ahead = True
    loads = [ask("load", world.adapters[0], 1, 1)]
    runner.complete(loads)

    async def scenario() -> tuple[list[Answer], int]:
        loop, calls = asyncio.get_running_loop(), 0
        real = loop.call_soon_threadsafe

        def counted(*args):
            nonlocal calls
            calls += 1
            return real(*args)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        requests = [ask(f"r{i}", world.adapters[0], 4, 30) for i in range(6)]
        streams = runner.call(lambda: None) or [runner.submit(r) for r in requests]
        answers = await asyncio.gather(*map(read, streams))
        return answers, calls

    answers, calls = asyncio.run(scenario())
    assert all(len(a.tokens) == 30 for a in answers)
    assert calls < 2 * 30 + 10  # of 180 deltas


async def read(stream) -> Answer:
    answer = Answer()
    async for delta in stream:
        answer.take(delta)
    return answer


def test_beside_training_each_step_is_read_before_the_next_part(world, runner, monkeypatch):
    runner.complete([ask("load", world.adapters[0], 1, 1)])
    runner.engine.runs_ahead = True
    unread: dict[bool, set[int]] = {True: set(), False: set()}
    step = runner.engine.step

    def watched(deliver):
        beside = trainer.has_work
        deltas = step(deliver)
        trainer.trained = False
        unread[beside].add(len(runner.engine._launched))
        return deltas

    class Trainer:
        left, part, trained = 10, "part", False

        @property
        def has_work(self):
            return self.left > 0 and bool(runner.engine.decoded_tokens > 10)

        def advance(self):
            self.left, self.trained = self.left - 1, True

    trainer = Trainer()
    monkeypatch.setattr(runner.budget, "trains", lambda *_, **__: not trainer.trained)
    runner.engine.step = watched
    runner.call(lambda: setattr(runner, "trainer", trainer))
    answer = runner.complete([ask("r", world.adapters[0], 4, 50)])[0]
    assert len(answer.tokens) == 50
    assert unread[True] == {0}
    assert 1 in unread[False]


# --- what the host does


class QuickDevice(FakeDevice):
    """One that costs the host nothing to stand for: what it answers says nothing."""

    def __call__(self, base, pool, kv, newest_B, packed, edits, needs):
        return kv, newest_B, self.output(np.concatenate([4 + b.fields.position_GJ[:, -1] % 300 for b in packed]))


@pytest.fixture
def full_house(world) -> Iterator[Engine]:
    """An engine with 64 rows, all of them decoding."""
    engine = ahead(world.engine(replace(CONFIG, rows=64, pages=1024, max_waiting=200, max_waiting_tokens=20_000)))
    QuickDevice(engine)
    for i in range(64):
        engine.submit(ask(f"r{i}", None, 4, 60, stop=("</s>",) if i % 2 else ()))
    while engine.scheduler.counts()[0] < 64 or any(s.prompt_left for s in engine.scheduler.running):
        engine.step()
    yield engine
    for i in range(64):
        engine.cancel(f"r{i}")
    check_idle(engine)


def test_the_calls_of_a_step_are_a_few_for_each_row(full_house):
    """At 64 rows the host has less than a millisecond: each pass over them, and each object made for one, is seen here."""
    calls: Counter[str] = Counter()

    def count(frame, event, _):
        if event == "call":
            calls[frame.f_code.co_qualname] += 1

    sys.setprofile(count)
    try:
        for _ in range(10):
            full_house.step()
    finally:
        sys.setprofile(None)
    each = {name: count / 640 for name, count in calls.items()}
    assert sum(each.values()) < 21, sorted(each.items(), key=lambda x: -x[1])[:30]


@pytest.mark.slow
def test_the_host_takes_about_a_millisecond_for_64_rows(full_house):
    """`benchmarks/host.py` has the exact number; here it may be eight times as slow, of the thread's own time."""
    took_s = []
    for _ in range(30):
        start = time.thread_time()
        full_house.step()
        took_s.append(time.thread_time() - start)
    assert np.median(took_s) < 0.008
