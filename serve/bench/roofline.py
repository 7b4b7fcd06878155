"""What this device can do, and how near the steps of serving and training come to it.

The floor of a step is the longer of two times: its least memory traffic at the measured bandwidth, and its least
computation at the measured rate of a product.  Beside it stands the program that the engine or the trainer runs.

Shape letters: G lanes (rows of a decode step), J tokens of a lane, T tokens, B lanes of all batches, C KV pages of a sequence.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.checkpoints.load import Opened, open_base
from jaxlora.config.base import ONE_DEVICE, ModelSection
from jaxlora.core.adapter_size import adapter_size
from jaxlora.core.errors import ConfigInvalid
from jaxlora.core.lora import LoraSpec
from jaxlora.core.model_config import LINEARS, parameters
from jaxlora.model import compile_cache
from jaxlora.model.decoder import Base
from jaxlora.model.kv_cache import KVPages, empty_pages
from jaxlora.model.lora_pool import PoolSpec
from jaxlora.model.mesh import place_rows
from jaxlora.model.serving_pool import ServingPool, empty_serving_pool
from pallas_kernels.bench.run import Ceilings, Timing, ceilings, device_name, measure
from serve.engine.engine import BASE_ALONE, MIN_ROWS
from serve.engine.logit_edits import EditArrays
from serve.engine.step import Needs, PackedBatch, StepBatch, StepPrograms, no_tokens
from train.bench import TrainingSizes, warm_trainer

PAGE = 64  # tokens of a KV page
HEAD = f"{'step':40} {'moved':>12} {'computed':>15} {'floor, ms':>17} {'measured':>9} {'ratio':>7} {'wall, ms':>9}"
STATE = 4  # arrays of a tenant that an update reads and writes: weights, gradient, two moments


@dataclass(frozen=True, kw_only=True, slots=True)
class RooflineSizes:
    """Which steps are looked at."""

    rows: tuple[int, ...]  # of the decode steps
    adapters: int  # distinct ones in a decode step of the most rows
    rank: int  # of every adapter, on all seven projections
    context: int  # tokens of a decoding sequence
    lanes: int  # of a prefill step and of a training step, each of its own adapter
    tokens: int  # of such a lane

    def __post_init__(self) -> None:
        if not 1 <= self.adapters <= max(self.rows):
            raise ConfigInvalid(f"{self.adapters} adapters are not between 1 and {max(self.rows)}, the most rows")

    @property
    def spec(self) -> LoraSpec:
        """Returns the specification of every adapter."""
        return LoraSpec(rank=self.rank, alpha=2.0 * self.rank)

    @property
    def serving(self) -> dict[str, ServingStep]:
        """Returns the serving steps by their names."""
        filled, most = self.context - 1, max(self.rows)
        steps: dict[str, ServingStep] = {
            f"decode, rows {n}": (ServingBatch(lanes=n, tokens=1, filled=filled, adapters=0),)
            for n in sorted(set(self.rows))
        }
        steps[f"decode, rows {most}, adapters {self.adapters}"] = (
            ServingBatch(lanes=most, tokens=1, filled=filled, adapters=self.adapters),
        )
        steps[f"prefill, lanes {self.lanes} x {self.tokens}, adapters {self.lanes}"] = (
            ServingBatch(lanes=self.lanes, tokens=self.tokens, filled=0, adapters=self.lanes),
        )
        return steps

    @property
    def training(self) -> TrainingSizes:
        """Returns the sizes of the training step, a tenant a lane."""
        return TrainingSizes(tenants=self.lanes, lanes=1, tokens=self.tokens, rank=self.rank)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingBatch:
    """Prompt chunks, or decode rows, of a serving step."""

    lanes: int
    tokens: int  # of a lane; 1 decodes
    filled: int  # tokens of each sequence whose KV is in its pages already
    adapters: int  # distinct ones, from the first slot on, lanes take turns; 0: the base alone

    def pages_of_lane(self) -> int:
        """Returns the KV pages of each sequence."""
        return -(-(self.filled + self.tokens) // PAGE)


ServingStep = tuple[ServingBatch, ...]  # one program: prompt chunks, decode rows, or these after those


def step_adapters(step: ServingStep) -> int:
    """Returns the distinct adapters of a step."""
    return max(batch.adapters for batch in step)


def step_pages(step: ServingStep) -> int:
    """Returns the KV pages of a step, each of one sequence."""
    return sum(batch.lanes * batch.pages_of_lane() for batch in step)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The least that a step must move and compute."""

    bytes: int
    flops: int

    def floor_s(self, device: Ceilings) -> float:
        """Returns the least time on a device that can do so much."""
        return max(self.bytes / device.read_bytes_s, self.flops / device.flops_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """One step beside its floor."""

    step: str
    bytes: int  # the least traffic
    flops: int  # the least computation
    bound: str  # bytes or flops: which of them is the floor
    floor_s: float
    measured_s: float  # CPU time on a CPU, else wall time
    wall_s: float
    ratio: float  # measured / floor

    @classmethod
    def of(cls, step: str, work: Work, device: Ceilings, timing: Timing) -> StepReport:
        """Compares the least time of all rounds with the floor."""
        floor_s = work.floor_s(device)
        return cls(
            step=step,
            bytes=work.bytes,
            flops=work.flops,
            bound="bytes" if floor_s == work.bytes / device.read_bytes_s else "flops",
            floor_s=floor_s,
            measured_s=timing.best_s,
            wall_s=float(timing.wall_s.min()),
            ratio=timing.best_s / floor_s,
        )

    def __str__(self) -> str:
        return (
            f"{self.step:40} {self.bytes / 1e6:9.1f} MB {self.flops / 1e9:9.2f} GFLOP"
            f" {self.floor_s * 1e3:9.2f} ({self.bound}) {self.measured_s * 1e3:9.2f} {self.ratio:7.2f}"
            f" {self.wall_s * 1e3:9.2f}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RooflineReport:
    """What this device can do, and the steps of one base on it."""

    device: str
    clock: str  # CPU or wall: of the ceilings and of what is measured
    model: str
    dtype: str
    sizes: RooflineSizes
    rounds: int
    read_bytes_s: float
    flops_s: float
    steps: list[StepReport]

    def lines(self) -> list[str]:
        """Returns the report as a table for people."""
        return [
            f"{self.device}, {self.model}, {self.dtype}: {self.clock} time, least of {self.rounds}; rank "
            f"{self.sizes.rank}, contexts of {self.sizes.context} tokens",
            f"this device: {self.read_bytes_s / 1e9:.1f} GB/s, {self.flops_s / 1e9:.1f} GFLOP/s",
            HEAD,
            *map(str, self.steps),
        ]


# ---- floors -----------------------------------------------------------------------------------------------------------


def weights_bytes(base: Base) -> int:
    """Returns the bytes of the base that every step reads, as they lie in memory; of an embedding beside a head, few rows."""
    is_head = not base.packed and "head" not in base.arrays
    read = [x.nbytes for name, x in base.arrays.items() if name != "embed" or is_head]
    return sum(read) + sum(x.nbytes for x in jax.tree.leaves((base.layers, base.packed)))


def products(base: Base) -> tuple[int, int]:
    """Returns the weights that a token is multiplied by: (in all layers, in the head)."""
    table = parameters(base.config)
    layers = sum(math.prod(table[name].shape) for name in LINEARS if name in table and name != "head")
    return layers, base.config.d_model * base.config.vocab


def pairs(base: Base, tokens: int, filled: int) -> int:
    """Returns how many (query, key) pairs attention computes of a lane, in each layer and head."""
    window = base.config.window or filled + tokens
    return sum(min(place + 1, window) for place in range(filled, filled + tokens))


def serving_work(base: Base, step: ServingStep, spec: LoraSpec) -> Work:
    """Returns what a serving step must do: each weight, adapter, key and value once; the head for one token of a lane."""
    c = base.config
    layers, head = products(base)
    token_bytes = 2 * c.layers * c.kv_heads * c.head_dim * base.dtype.itemsize
    adapter = adapter_size(c, spec).trainable_parameters
    moved = weights_bytes(base) + step_adapters(step) * adapter * base.dtype.itemsize
    computed = 0
    for batch in step:
        T = batch.lanes * batch.tokens
        kept = min(batch.filled, c.window or batch.filled)
        moved += token_bytes * batch.lanes * (kept + batch.tokens)
        attention = 4 * c.layers * c.heads * c.head_dim * batch.lanes * pairs(base, batch.tokens, batch.filled)
        computed += 2 * T * layers + 2 * batch.lanes * head + attention + 2 * T * adapter * (batch.adapters > 0)
    return Work(bytes=moved, flops=computed)


def training_work(base: Base, sizes: TrainingSizes) -> Work:
    """Returns what a training step must do: weights read forward and backward; no gradient of them; AdamW in place."""
    c, G = base.config, sizes.tenants * sizes.lanes
    layers, head = products(base)
    adapter = adapter_size(c, sizes.spec).nbytes
    attention = 4 * c.layers * c.heads * c.head_dim * G * pairs(base, sizes.tokens, 0)
    return Work(
        bytes=2 * weights_bytes(base) + 2 * STATE * sizes.tenants * adapter,
        flops=4 * G * sizes.tokens * (layers + head) + 3 * attention + 6 * G * sizes.tokens * adapter // 4,
    )


# ---- what is measured -------------------------------------------------------------------------------------------------


def serving_call(opened: Opened, step: ServingStep, pool: ServingPool, kv: list[KVPages]) -> Callable[[], jax.Array]:
    """Returns a call of the engine's program for this step, which gives the tokens of all lanes, int32 [B].

    kv: the pages, which each call takes and puts back.  Each batch of the program has MIN_ROWS lanes at least, as an engine's.
    """
    base, mesh, vocab = opened.base, opened.mesh, opened.base.config.vocab
    batches, first_page = [], 0
    for part in step:
        J, C, G = part.tokens, part.pages_of_lane(), slice(part.lanes)
        batches.append(batch := StepBatch.idle(max(part.lanes, MIN_ROWS), J, C))
        batch.token_GJ[G] = np.arange(part.lanes * J).reshape(-1, J) * 37 % vocab
        batch.position_GJ[G] = part.filled + np.arange(J)
        batch.page_GC[G] = first_page + np.arange(part.lanes * C).reshape(-1, C)
        batch.last_G[G] = J - 1
        if part.adapters:
            batch.slot_G[G] = np.arange(part.lanes) % part.adapters
        first_page += part.lanes * C
    lanes = sum(len(batch.slot_G) for batch in batches)
    longest = max(part.filled + part.tokens for part in step)
    edits = EditArrays(mesh, max_tokens=longest, vocab=vocab, ends=len(opened.tokenizer.eos_ids))
    idle = edits.make(lanes, tokens=False, allowed=False)
    # A CPU's engine has no program of two batches; it can run one all the same, as a device does.
    programs = StepPrograms(mesh, one=False if len(step) > 1 else None)
    needs = Needs.of(*batches, edited=False)
    packed = tuple(place_rows(mesh, PackedBatch.of(batch)) for batch in batches)
    newest_B = no_tokens(mesh, lanes)
    alone = mesh.devices.flat[0].platform in BASE_ALONE and not step_adapters(step)

    def run() -> jax.Array:
        kv[0], _, out = programs.launch(base, {} if alone else pool, kv[0], newest_B, packed, idle, needs)
        return out.token_B

    return run


def time_serving(
    opened: Opened, steps: Mapping[str, ServingStep], spec: LoraSpec, device: Ceilings, rounds: int
) -> list[StepReport]:
    """Times these serving steps in turn, beside their floors on a device that can do so much."""
    with serving_calls(opened, steps, spec) as runs:
        timings = measure(runs, rounds)
    return [
        StepReport.of(name, serving_work(opened.base, step, spec), device, timings[name])
        for name, step in steps.items()
    ]


@contextlib.contextmanager
def serving_calls(
    opened: Opened, steps: Mapping[str, ServingStep], spec: LoraSpec
) -> Generator[dict[str, Callable[[], object]]]:
    """Yields calls of these steps over one pool and the same pages, which are freed at the end."""
    base = opened.base
    slots = max(1, *map(step_adapters, steps.values()))
    pool_spec = PoolSpec(slots=slots, rank=spec.max_rank, dtype=base.dtype.name)
    pool = {
        target: replace(
            jax.tree.map(lambda x: jnp.full_like(x, 0.01), rows), rank_S=jnp.full_like(rows.rank_S, spec.max_rank)
        )
        for target, rows in empty_serving_pool(base.config, pool_spec, opened.mesh).items()
    }
    pages = max(map(step_pages, steps.values()))
    kv = [empty_pages(base.config, opened.mesh, pages=pages, page_tokens=PAGE, dtype=base.dtype)]
    try:
        yield {name: serving_call(opened, step, pool, kv) for name, step in steps.items()}
    finally:
        for x in jax.tree.leaves((pool, kv)):
            x.delete()


def time_steps(opened: Opened, sizes: RooflineSizes, rounds: int) -> RooflineReport:
    """Times all steps in turn.  Raises ConfigInvalid for training lanes that are not whole blocks."""
    base, serving = opened.base, sizes.serving
    training = f"training, tenants {sizes.lanes} x {sizes.tokens}"
    works = {name: serving_work(base, step, sizes.spec) for name, step in serving.items()}
    works[training] = training_work(base, sizes.training)
    device = ceilings(base.dtype.name, rounds=rounds)
    with serving_calls(opened, serving, sizes.spec) as runs:
        runs[training] = warm_trainer(opened, sizes.training).step
        timings = measure(runs, rounds)
    return RooflineReport(
        device=device_name(),
        clock="CPU" if jax.default_backend() == "cpu" else "wall",
        model=opened.name,
        dtype=base.dtype.name,
        sizes=sizes,
        rounds=rounds,
        read_bytes_s=device.read_bytes_s,
        flops_s=device.flops_s,
        steps=[StepReport.of(name, work, device, timings[name]) for name, work in works.items()],
    )


def report(model: ModelSection, sizes: RooflineSizes, rounds: int) -> RooflineReport:
    """Opens the base on one device and times its steps.  Raises as `open_base` and `time_steps` do."""
    compile_cache.enable(None)
    return time_steps(open_base(model, ONE_DEVICE), sizes, rounds)
