"""All that a day with an accelerator should measure, in one run that is as long as it may be.

First whether every body computes what its definition says, then what the device can do, then how near ops and whole steps
of random bases come to it, and what streams feel of training.  What there is no time or no memory for is named.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax

from jaxlora.checkpoints.load import Opened
from jaxlora.core.errors import ConfigInvalid
from jaxlora.core.lora import LoraSpec
from jaxlora.model import compile_cache
from jaxlora.model.machine import memory_errors
from pallas_kernels.bench import cases
from pallas_kernels.bench.checks import CHECKED, Check, check
from pallas_kernels.bench.run import Ceilings, as_line, ceilings, device_name, time_case
from serve.bench import streams
from serve.bench.random_base import SHAPES, open_random
from serve.bench.roofline import HEAD, ServingBatch, ServingStep, StepReport, time_serving
from serve.bench.streams import StreamReport, StreamSizes
from train.bench import TrainingReport, TrainingSizes, time_training

LOG = logging.getLogger("serve")
PACKAGES = ("jaxlora", "jax", "jaxlib", "jax-triton", "triton", "libtpu", "jax-cuda13-plugin")
TESTS = "test_pallas_kernels_*.py"
TESTS_S = 300.0  # at most


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How much of everything one run measures."""

    shapes: tuple[str, ...]  # of random bases
    op_shapes: tuple[str, ...]  # whose layers ops are timed in
    dtype: str
    rows: tuple[int, ...]  # of decode steps
    adapters: tuple[int, ...]  # distinct ones in them; 0 is the base alone
    context: int  # tokens of a decoding sequence
    prefill: tuple[int, int]  # lanes and their tokens
    rank: int
    tenants: int  # in a training step, a lane each
    lane_tokens: tuple[int, ...]
    streams: StreamSizes
    rounds: int

    @property
    def steps(self) -> dict[str, ServingStep]:
        """Returns the serving steps by name."""
        lanes, tokens = self.prefill
        decodes = {
            (n, u): ServingBatch(lanes=n, tokens=1, filled=self.context - 1, adapters=u)
            for n in self.rows
            for u in self.adapters
            if u <= n
        }
        most = min(lanes, max(self.adapters))
        chunks = ServingBatch(lanes=lanes, tokens=tokens, filled=0, adapters=most)
        n, u = max(of for of in decodes if of[0] == self.rows[0])
        return {
            **{f"decode, rows {n}, adapters {u}": (rows,) for (n, u), rows in decodes.items()},
            f"prefill, {lanes} x {tokens}, adapters {most}": (chunks,),
            f"mixed, {lanes} x {tokens} and rows {n}, adapters {u}": (chunks, decodes[n, u]),
        }


FULL = Sizes(
    shapes=("8b", "4b", "1b"),
    op_shapes=("llama-3.1-8b", "qwen3-4b", "llama-3.2-1b"),
    dtype="bfloat16",
    rows=(64, 256),
    adapters=(0, 1, 16, 64),
    context=1024,
    prefill=(8, 256),
    rank=16,
    tenants=16,
    lane_tokens=(64, 512),
    streams=StreamSizes(streams=16, prompt=128, tokens=256, tenants=4, lane_tokens=512, rank=16),
    rounds=5,
)
SHORT = Sizes(
    shapes=("tiny",),
    op_shapes=("smollm2-135m",),
    dtype="float32",
    rows=(4,),
    adapters=(0, 2),
    context=64,
    prefill=(2, 64),
    rank=4,
    tenants=2,
    lane_tokens=(64,),
    streams=StreamSizes(streams=2, prompt=16, tokens=200, tenants=2, lane_tokens=64, rank=4),
    rounds=1,
)


@dataclass(kw_only=True, slots=True)
class DeviceReport:
    """What was measured."""

    device: str
    runtime: str  # what JAX says of it: driver, CUDA or libtpu
    versions: dict[str, str]
    checks: list[Check] = field(default_factory=list)
    tests: str | None = None  # the last line of the kernels' own tests on this device
    tests_passed: bool | None = None
    ceilings: Ceilings | None = None
    ops: list[dict] = field(default_factory=list)
    steps: dict[str, list[StepReport]] = field(default_factory=dict)  # by shape, as all below
    training: dict[str, list[TrainingReport]] = field(default_factory=dict)
    streams: dict[str, StreamReport] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # what was not measured for want of time or memory, and why
    failed: dict[str, str] = field(default_factory=dict)  # what raised an error, and which
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether all ran, every body computes what it must, its tests pass, and nothing compiled after a warm-up."""
        reports = [*self.streams.values(), *(report for of in self.training.values() for report in of)]
        wrong = self.failed or not all(check.passed for check in self.checks) or self.tests_passed is False
        return not wrong and not any(report.compiles for report in reports)


class _Run:
    """One run: parts one after the other, each begun only while there is time."""

    def __init__(self, sizes: Sizes, limit_s: float, say: Callable[[str], None]):
        self.sizes, self.limit_s, self.say = sizes, limit_s, say
        self.start = time.monotonic()
        device = jax.devices()[0]
        if device.platform == "cpu" and sizes != SHORT:
            raise ConfigInvalid("these sizes are for an accelerator, and JAX finds a CPU; add --short", param="short")
        self.report = DeviceReport(device=device_name(), runtime=device.client.platform_version, versions=_versions())
        say(f"{self.report.device}; {' '.join(self.report.runtime.split())}")
        say(", ".join(f"{name} {version}" for name, version in self.report.versions.items()))

    @property
    def took_s(self) -> float:
        return time.monotonic() - self.start

    @property
    def ceiling(self) -> Ceilings:
        """What this device can do.  Raises ConfigInvalid when it was not measured."""
        if self.report.ceilings is None:
            raise ConfigInvalid("what this device can do is not known")
        return self.report.ceilings

    def part(self, name: str, work: Callable[[], None]) -> None:
        """Does the work, or notes why not: no time is left, or no memory, or an error, after which the next part begins."""
        if self.took_s > self.limit_s:
            self.report.left_out[name] = "no time was left"
            return
        self.say(f"-- {name} ({self.took_s:.0f} s)")
        try:
            with memory_errors("measuring", "the sizes"):
                work()
        except ConfigInvalid as error:
            self.report.left_out[name] = error.message
            self.say(error.message)
        except Exception as error:  # of a compiler or a kernel that no device has run yet: the rest is worth knowing
            LOG.exception("%s failed", name)
            self.report.failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            self.say(f"FAILED {self.report.failed[name]}")

    def check(self, op: str) -> None:
        for found in check(op):
            self.report.checks.append(found)
            self.say(str(found))

    def ceil(self) -> None:
        self.report.ceilings = found = ceilings(self.sizes.dtype, rounds=self.sizes.rounds)
        self.say(f"{found.read_bytes_s / 1e9:.1f} GB/s, {found.flops_s / 1e9:.1f} GFLOP/s")

    def time_ops(self, shape: str) -> None:
        n, (lanes, tokens) = self.sizes, self.sizes.prefill
        adapters = min(max(n.adapters), n.rows[0])
        work = cases.Sizes(
            rows=n.rows[0],
            adapters=adapters,
            slots=adapters,
            rank=n.rank,
            lanes=lanes,
            tokens=tokens,
            context=n.context,
        )
        for op, cases_of in cases.OPS.items():
            for case in cases_of(cases.MODELS[shape], n.dtype, work):
                ours = cases.Case(
                    shape=case.shape,
                    bytes=case.bytes,
                    flops=case.flops,
                    forms={name: case.forms[name] for name in ("ours", "base")},
                )
                self.report.ops.append(
                    row := {"op": op, "model": shape} | time_case(ours, self.ceiling, self.sizes.rounds)
                )
                self.say(as_line(row))

    def time_base(self, shape: str) -> None:
        """Measures whole steps of one base, which is freed at the end."""
        n, opened = self.sizes, open_random(shape, self.sizes.dtype)
        try:
            self.part(f"{shape}: serving steps", lambda: self.time_steps(opened, shape))
            for tokens in n.lane_tokens:
                sizes = TrainingSizes(tenants=n.tenants, lanes=1, tokens=tokens, rank=n.rank)
                self.part(
                    f"{shape}: training, {n.tenants} x {tokens}", lambda sizes=sizes: self.train(opened, shape, sizes)
                )
            self.part(f"{shape}: streams beside training", lambda: self.stream(opened, shape))
        finally:
            for x in jax.tree.leaves(opened.base):
                x.delete()

    def time_steps(self, opened: Opened, shape: str) -> None:
        n = self.sizes
        spec = LoraSpec(rank=n.rank, alpha=2.0 * n.rank)
        self.report.steps[shape] = found = time_serving(opened, n.steps, spec, self.ceiling, n.rounds)
        for line in (HEAD, *map(str, found)):
            self.say(line)

    def train(self, opened: Opened, shape: str, sizes: TrainingSizes) -> None:
        found = time_training(opened, sizes, self.sizes.rounds)
        self.report.training.setdefault(shape, []).append(found)
        for line in found.lines():
            self.say(line)

    def stream(self, opened: Opened, shape: str) -> None:
        self.report.streams[shape] = found = streams.report(opened, self.sizes.streams)
        for line in found.lines():
            self.say(line)


def measure_device(sizes: Sizes, *, minutes: float, tests: Path | None, say: Callable[[str], None]) -> DeviceReport:
    """Measures this device.  A part is begun only within so many minutes; what is left out is named in the report.

    tests: the folder of the kernels' tests, which run on this device too; they come first, as they want it for themselves.
    Raises ConfigInvalid for an unknown shape, and for other sizes than SHORT on a CPU.
    """
    if unknown := [shape for shape in sizes.shapes if shape not in SHAPES]:
        raise ConfigInvalid(f"unknown shape {', '.join(unknown)}; known: {', '.join(SHAPES)}", param="shape")
    start, tested = time.monotonic(), None
    if tests is not None:
        say(f"-- tests of the kernels: {tests / TESTS}")
        tested = _run_tests(tests)
        say(tested[1])
    compile_cache.enable(None)
    run = _Run(sizes, 60 * minutes - (time.monotonic() - start), say)
    if tested is not None:
        run.report.tests_passed, run.report.tests = tested
    for op in CHECKED:
        run.part(f"{op}: its body against its definition", lambda op=op: run.check(op))
    run.part("what this device can do", run.ceil)
    for shape in sizes.op_shapes:
        run.part(f"ops in a layer of {shape}", lambda shape=shape: run.time_ops(shape))
    for shape in sizes.shapes:
        run.part(f"a random base of {shape}", lambda shape=shape: run.time_base(shape))
    run.report.seconds = time.monotonic() - start
    for name, why in run.report.left_out.items():
        say(f"not measured: {name}: {why}")
    return run.report


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _run_tests(folder: Path) -> tuple[bool, str]:
    """Returns whether the kernels' tests pass on this device, and their last line.  This process must not hold it yet."""
    environment = os.environ | {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        *map(str, sorted(folder.glob(TESTS))),
    ]
    try:
        done = subprocess.run(
            command, cwd=folder.parents[1], env=environment, capture_output=True, text=True, timeout=TESTS_S
        )
    except subprocess.TimeoutExpired:
        return False, f"the tests did not end within {TESTS_S:.0f} s"
    lines = (done.stdout + done.stderr).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"exit code {done.returncode}"
