"""Streams of one base with and without training beside them: the time between tokens, in this process."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxlora.checkpoints.load import Opened
from jaxlora.model.compile_cache import CompileCounter
from jaxlora.model.lora_pool import PoolSpec
from jaxlora.storage.adapter_store import AdapterStore
from serve.bench.roofline import PAGE
from serve.engine.engine import Engine, EngineConfig
from serve.engine.request import Delta, Request, SamplingParams
from serve.runtime.device_thread import DeviceThread
from serve.runtime.live_training import LiveTraining, small_trainer, warm_up
from train.bench import HOW, TrainingSizes, examples_of

MOST_ROUNDS = 50  # of streams with training on, until a step has ended beside them


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamSizes:
    """How many stream and train at once."""

    streams: int  # greedy, at once; one adapter after another, of those in training
    prompt: int  # tokens
    tokens: int  # of each answer
    tenants: int  # in training, a lane each
    lane_tokens: int
    rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Gaps:
    """Times between the tokens of a stream, over all streams."""

    count: int
    p50_s: float
    p99_s: float

    @classmethod
    def of(cls, seconds: list[float]) -> Gaps:
        """Returns the quantiles of these times."""
        p50, p99 = np.quantile(seconds, [0.5, 0.99])
        return cls(count=len(seconds), p50_s=float(p50), p99_s=float(p99))

    def __str__(self) -> str:
        return f"p50 {self.p50_s * 1e3:8.2f} ms   p99 {self.p99_s * 1e3:8.2f} ms   ({self.count} gaps)"


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamReport:
    """What streams feel of training on this device."""

    sizes: StreamSizes
    training_off: Gaps
    training_on: Gaps
    trained_steps: int  # of all tenants together, beside the streams
    compiles: int  # after the warm-up, which must be none

    def lines(self) -> list[str]:
        """Returns the report for people."""
        n = self.sizes
        return [
            f"between tokens, {n.streams} streams; {n.tenants} tenants x {n.lane_tokens} in training",
            f"training off  {self.training_off}",
            f"training on   {self.training_on}   {self.trained_steps} steps of a tenant beside them",
            f"compiles after the warm-up: {self.compiles}",
        ]


def report(opened: Opened, sizes: StreamSizes) -> StreamReport:
    """Serves and trains on this base in this process, and measures its streams twice."""
    with _server(opened, sizes) as (runner, live):
        _stream(runner, sizes, "warm")
        with CompileCounter() as counter:
            off = _stream(runner, sizes, "off")
            before = _steps(runner, live)
            runner.call(lambda: setattr(runner, "trainer", live))
            on, steps = _stream(runner, sizes, "on"), _steps(runner, live) - before
            for again in range(1, MOST_ROUNDS):  # where a step takes longer than the streams
                if steps:
                    break
                on += _stream(runner, sizes, f"on-{again}")
                steps = _steps(runner, live) - before
            runner.call(lambda: setattr(runner, "trainer", None))
    return StreamReport(
        sizes=sizes, training_off=Gaps.of(off), training_on=Gaps.of(on), trained_steps=steps, compiles=counter.compiles
    )


@contextlib.contextmanager
def _server(opened: Opened, n: StreamSizes) -> Generator[tuple[DeviceThread, LiveTraining]]:
    """Yields a warm server and the training of tenants who have all published once."""
    columns = -(-(n.prompt + n.tokens) // PAGE)
    config = EngineConfig(
        rows=n.streams,
        prefill_lanes=min(8, n.streams),
        prefill_tokens=n.prompt,
        pages=2 * n.streams * columns,
        page_tokens=PAGE,
        max_tokens=columns * PAGE,
        max_waiting=2 * n.streams,
        max_waiting_tokens=2 * n.streams * columns * PAGE,
        host_bytes=0,
        quantum_s=1.0,
    )
    pool = PoolSpec(slots=n.tenants, rank=n.rank, dtype=opened.base.dtype.name)
    training = TrainingSizes(tenants=n.tenants, lanes=1, tokens=n.lane_tokens, rank=n.rank)
    with contextlib.ExitStack() as end:
        store = AdapterStore(Path(end.enter_context(tempfile.TemporaryDirectory())), host_bytes=2**30)
        end.callback(store.close)
        engine = Engine(opened.base, opened.mesh, config, pool, store, opened.tokenizer, opened.base_hash)
        runner = DeviceThread(engine, base_name=opened.name)
        trained = PoolSpec(slots=n.tenants, rank=n.rank, dtype="float32")
        trainer = small_trainer(opened, trained, lanes=n.tenants, lane_tokens=n.lane_tokens)
        live = LiveTraining(
            trainer, runner.publisher, publish_every=1, on_step=lambda _: None, on_publish=lambda _ref, _step: None
        )
        runner.start()
        end.callback(runner.stop)
        runner.call(lambda: warm_up(trainer, runner.publisher))
        vocab = opened.base.config.vocab
        for i in range(n.tenants):
            data = examples_of(i, training, vocab)
            runner.call(lambda i=i, data=data: trainer.add(_name(i), training.spec, HOW, data, batch_size=1, seed=i))
        runner.call(live.step)
        yield runner, live


def _name(tenant: int) -> str:
    return f"t{tenant}"


def _steps(runner: DeviceThread, live: LiveTraining) -> int:
    return runner.call(lambda: sum(tenant.step for tenant in live.trainer.tenants.values()))


def _stream(runner: DeviceThread, n: StreamSizes, round_name: str) -> list[float]:
    """Returns the seconds between tokens of all streams, which begin at once."""
    vocab = runner.engine.base.config.vocab
    ids = [f"{round_name}-{i}" for i in range(n.streams)]
    times: dict[str, list[float]] = {request_id: [] for request_id in ids}
    ended: set[str] = set()

    def listen(delta: Delta) -> None:
        times[delta.request_id] += [time.perf_counter()] * bool(delta.tokens)
        if delta.error is not None:
            failed.append(delta.error)
        if delta.finish is not None or delta.error is not None:
            ended.add(delta.request_id)

    failed: list[Exception] = []
    rng = np.random.default_rng(len(round_name))
    params = SamplingParams(max_tokens=n.tokens, temperature=0.0, ignore_eos=True)
    requests = [
        Request(
            id=request_id,
            tenant=_name(i % n.tenants),
            adapter=runner.resolve(_name(i % n.tenants), _name(i % n.tenants)),
            prompt=tuple(map(int, rng.integers(0, vocab, n.prompt))),
            params=params,
            follow=True,
        )
        for i, request_id in enumerate(ids)
    ]
    runner.call(lambda: [runner.admit(request, listen) for request in requests])
    while len(ended) < n.streams:
        time.sleep(0.01)
    if failed:
        raise failed[0]
    return [b - a for of in times.values() for a, b in itertools.pairwise(of)]
