"""Jobs and calls beside a small engine, in parts, without a device thread: the test runs each part."""

from __future__ import annotations

import queue
from pathlib import Path

import numpy as np
from serve_world import RANK, World

from jaxlora.config.training import CROSS_ENTROPY, Optimizer
from jaxlora.core.lora import LoraSpec
from jaxlora.model.lora_pool import PoolSpec
from serve.jobs.live_jobs import GuestCall, JobNews, LiveJobs, Published
from serve.runtime.device_thread import DeviceThread
from train.data.examples import Example
from train.data.load import Loaded
from train.jobs.job import JobRequest, JobsConfig
from train.jobs.runner import Jobs
from train.jobs.states import Parking
from train.step.microsteps import MicrostepSizes
from train.trainer import Trainer

TARGETS = ("q_proj", "down_proj")
SPEC = LoraSpec(rank=2, alpha=4.0, targets=TARGETS)
NUMBERS = Optimizer(lr=0.01, total_steps=1000, schedule="constant", weight_decay=0.1)


def examples(seed: int, count: int = 6) -> list[Example]:
    """Short ones of random tokens."""
    draw = np.random.default_rng(seed)
    return [
        Example(draw.integers(4, 300, n).astype(np.int32), np.float32([0] + [1] * (n - 1)))
        for n in draw.integers(4, 9, count)
    ]


def job(seed: int, *, owner: str = "acme", steps: int = 6, **changes) -> JobRequest:
    """A job of a few steps."""
    settings = {
        "owner": owner,
        "name": f"job-{seed}",
        "data": examples(seed),
        "spec": SPEC,
        "optimizer": Optimizer(lr=0.02, total_steps=steps, weight_decay=0.1),
        "batch_size": 2,
        "seed": seed,
    }
    return JobRequest(**settings | changes)


class Heard:
    """What the listener was told."""

    def __init__(self):
        self.news: list[JobNews] = []
        self.published: list[Published] = []
        self.told: list[str] = []  # all of it for people, in the order it was told

    def job_changed(self, news: JobNews) -> None:
        self.news.append(news)
        self.told += [event.message for event in news.events]

    def job_published(self, published: Published) -> None:
        self.published.append(published)
        self.told.append(f"version of step {published.step}{', the result' if published.final else ''}")

    def states(self, id: str) -> list[str]:
        """The states of a job, each once."""
        return list(dict.fromkeys(n.job.state for n in self.news if n.job.id == id))

    def steps(self, id: str) -> list[tuple[int, bool, bool]]:
        """(step, checkpoint, final) of its versions."""
        return [(p.step, p.checkpoint, p.final) for p in self.published if p.job_id == id]


class Call:
    """A guest's caller."""

    def __init__(self):
        self.done: queue.SimpleQueue[tuple | Exception] = queue.SimpleQueue()

    def updated(self, report, rows, state) -> None:
        self.done.put((report, rows, state))

    def failed(self, error) -> None:
        self.done.put(error)


class LiveWorld:
    """One trainer of few slots beside an engine."""

    def __init__(self, world: World, folder: Path, *, slots: int = 1, publish_every: int = 2, states: bool = False):
        self.world, self.heard = world, Heard()
        self.runner = DeviceThread(world.engine(), base_name="owner/tiny")
        pool = PoolSpec(slots=slots, rank=RANK, dtype="float32", targets=TARGETS)
        sizes = MicrostepSizes(lanes=1, layers=1, targets=16)
        self.trainer = Trainer(
            world.base, world.mesh, [pool], lanes=2, lane_tokens=16, base_hash=world.base_hash, parts=sizes
        )

        def make(wake) -> Jobs:
            return Jobs(
                self.trainer,
                JobsConfig(states=folder / "states" if states else None, quantum_steps=3),
                shelf=self.runner.publisher,
                parking=Parking(folder / "parked", host_bytes=2**30),
                load=lambda path, too_long: Loaded(examples(int(path.read_text()))),
                wake=wake,
            )

        self.full: set[str] = set()  # tenants without room for another version
        self.live = LiveJobs(
            self.runner.publisher,
            make,
            wake=self.runner.wake,
            publish_every=publish_every,
            listener=self.heard,
            had_room=lambda tenant, name: tenant not in self.full,
        )

    def run(self) -> int:
        """Until nothing is left to do; the parts it took."""
        parts = 0
        while self.live.has_work:
            self.live.advance()
            parts += 1
            assert parts < 20_000
        return parts

    def call(
        self, seed: int, *, owner: str = "caller", state=None, step: int = 0, bad: bool = False, count: int = 3
    ) -> tuple[Call, GuestCall]:
        """A guest waits: of a fresh adapter, or of a state."""
        caller = Call()
        given = examples(seed, count)
        if bad:
            given = [Example(e.tokens, np.where(e.weights > 0, np.float32(3e38), 0)) for e in given]
        call = GuestCall(
            name=f"call-{seed}-{step}",
            owner=owner,
            spec=SPEC,
            optimizer=Optimizer(lr=0.05, total_steps=step + 1, schedule="constant"),
            examples=self.trainer.check(SPEC, given, count, CROSS_ENTROPY),
            state=self.trainer.fresh(SPEC, seed) if state is None else state,
            step=step,
            caller=caller,
        )
        self.live.train_once(call)
        return caller, call
