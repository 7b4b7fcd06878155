"""Times the training step of this device: many tenants together, one of them alone, and the floor below both.

    together   one step of all tenants, AdamW included
    alone      a step of one of them, in a trainer with one slot and the lanes of one tenant
    floor      loss, forward and backward pass of the base alone, down to its first norm, on the lanes of `together`

All tokens are random, and every position of a lane is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from jaxlora.checkpoints.load import Opened, open_base
from jaxlora.config.base import ONE_DEVICE, ModelSection
from jaxlora.config.training import CROSS_ENTROPY, Optimizer
from jaxlora.core.lora import LoraSpec
from jaxlora.model import compile_cache
from jaxlora.model.decoder import Base
from jaxlora.model.lora_pool import LaneLora, PoolSpec
from pallas_kernels import NO_ADAPTER
from pallas_kernels.bench.run import Timing, device_name, measure
from train.data.examples import Example, fill_lane
from train.step.batch import TrainBatch, idle_batch, put_lane
from train.step.step import lane_losses
from train.trainer import Trainer

HOW = Optimizer(lr=1e-3, schedule="constant", total_steps=10**6)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSizes:
    """How much work a step is."""

    tenants: int  # in the step of all
    lanes: int  # of each tenant
    tokens: int  # of a lane
    rank: int  # of every adapter, on all seven projections

    @property
    def spec(self) -> LoraSpec:
        """Returns the specification of every adapter."""
        return LoraSpec(rank=self.rank, alpha=2.0 * self.rank)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """The least time of a step over all rounds."""

    tokens: int  # of the step
    wall_s: float
    cpu_s: float | None  # of all the process's threads; None on an accelerator
    tokens_s: float
    tokens_cpu_s: float | None  # tokens a CPU second

    @classmethod
    def of(cls, tokens: int, timing: Timing) -> StepTime:
        """Returns the least of these timings."""
        wall_s = float(timing.wall_s.min())
        cpu_s = float(timing.cpu_s.min()) if jax.default_backend() == "cpu" else None
        tokens_cpu_s = None if cpu_s is None else tokens / cpu_s
        return cls(tokens=tokens, wall_s=wall_s, cpu_s=cpu_s, tokens_s=tokens / wall_s, tokens_cpu_s=tokens_cpu_s)

    @property
    def seconds(self) -> float:
        """Returns the time that counts: of the CPU, on an accelerator of the wall."""
        return self.wall_s if self.cpu_s is None else self.cpu_s

    def __str__(self) -> str:
        said = f"{self.wall_s * 1e3:9.1f} ms wall {self.tokens_s:10.1f} tokens/s"
        if self.cpu_s is None:
            return said
        return f"{said} {self.cpu_s * 1e3:9.1f} ms CPU {self.tokens_cpu_s:10.1f} tokens per CPU second"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingReport:
    """What a training step takes on this device."""

    device: str
    model: str
    dtype: str
    sizes: TrainingSizes
    rounds: int
    alone: StepTime
    together: StepTime
    floor: StepTime
    gain: float  # alone x tenants / together: how many times as long one after another takes
    efficiency: float  # floor / together
    compiles: int  # programs compiled after the warm-up, which must be none

    def lines(self) -> list[str]:
        """Returns the report as a table for people."""
        n = self.sizes
        return [
            f"{self.device}, {self.model}, {self.dtype}: {n.tenants} tenants, lanes of {n.tokens} tokens, {n.lanes} each, "
            f"rank {n.rank}; least of {self.rounds}",
            f"{'alone':9}{self.alone}",
            f"{'together':9}{self.together}",
            f"{'floor':9}{self.floor}",
            f"gain {self.gain:.2f} (alone x {n.tenants} / together), efficiency {self.efficiency:.2f} (floor / together)",
            f"compiles after the warm-up: {self.compiles}",
        ]


def examples_of(tenant: int, sizes: TrainingSizes, vocab: int) -> list[Example]:
    """Returns a step's examples of one tenant, each of which fills a lane with trained predictions."""
    ids_GJ = np.random.default_rng(tenant).integers(0, vocab, (sizes.lanes, sizes.tokens + 1)).astype(np.int32)
    weights = np.ones(sizes.tokens + 1, np.float32)
    weights[0] = 0
    return [Example(ids, weights) for ids in ids_GJ]


def warm_trainer(opened: Opened, sizes: TrainingSizes) -> Trainer:
    """Returns a warm trainer in which all tenants sit.  Raises ConfigInvalid for lanes that are not whole blocks."""
    trainer = Trainer(
        opened.base,
        opened.mesh,
        [PoolSpec(slots=sizes.tenants, rank=sizes.rank, dtype="float32")],
        lanes=sizes.tenants * sizes.lanes,
        lane_tokens=sizes.tokens,
        base_hash=opened.base_hash,
    )
    trainer.warm_up()
    for n in range(sizes.tenants):
        data = examples_of(n, sizes, opened.base.config.vocab)
        trainer.add(f"t{n}", sizes.spec, HOW, data, batch_size=sizes.lanes, seed=n)
    return trainer


def full_lanes(examples: Sequence[Example], slots: Sequence[int]) -> TrainBatch:
    """Returns a batch on the device: a lane for each example, which fills it, of these slots."""
    batch = idle_batch(len(examples), examples[0].predictions)
    for g, (example, slot) in enumerate(zip(examples, slots, strict=True)):
        lane = fill_lane([example], example.predictions)
        put_lane(batch, g, lane, slot, CROSS_ENTROPY, lane.reference_J)
    return jax.device_put(batch)


def base_pass(base: Base, batch: TrainBatch) -> Callable[[], jax.Array]:
    """Returns a compiled call of the base's loss, forward and backward pass on these lanes: the first norms' gradient."""
    step = jax.jit(_first_norms_gradient)
    jax.block_until_ready(step(base, batch))
    return lambda: step(base, batch)


def _first_norms_gradient(base: Base, batch: TrainBatch) -> jax.Array:
    layers = base.layers
    first = layers if isinstance(layers, dict) else layers[0]

    def loss(norm: jax.Array) -> jax.Array:
        changed = first | {"attn_norm": norm}
        of = replace(base, layers=changed if isinstance(layers, dict) else (changed, *layers[1:]))
        return lane_losses(of, LaneLora({}), batch, dropout=False)[0]

    return jax.grad(loss)(first["attn_norm"])


def time_training(opened: Opened, sizes: TrainingSizes, rounds: int) -> TrainingReport:
    """Times the three in turn; the least of so many rounds counts.  Raises ConfigInvalid as `warm_trainer` does."""
    base, one = opened.base, replace(sizes, tenants=1)
    together, alone = warm_trainer(opened, sizes), warm_trainer(opened, one)
    lanes = [e for n in range(sizes.tenants) for e in examples_of(n, sizes, base.config.vocab)]
    runs = {
        "together": together.step,
        "alone": alone.step,
        "floor": base_pass(base, full_lanes(lanes, [NO_ADAPTER] * len(lanes))),
    }
    with compile_cache.CompileCounter() as counter:
        timings = measure(runs, rounds)
    tokens = {"together": len(lanes) * sizes.tokens, "alone": sizes.lanes * sizes.tokens}
    tokens["floor"] = tokens["together"]
    took = {name: StepTime.of(tokens[name], timing) for name, timing in timings.items()}
    return TrainingReport(
        device=device_name(),
        model=opened.name,
        dtype=base.dtype.name,
        sizes=sizes,
        rounds=rounds,
        **took,
        gain=sizes.tenants * took["alone"].seconds / took["together"].seconds,
        efficiency=took["floor"].seconds / took["together"].seconds,
        compiles=counter.compiles,
    )


def report(model: ModelSection, sizes: TrainingSizes, rounds: int) -> TrainingReport:
    """Opens the base on one device and times it.  Raises as `open_base` and `time_training` do."""
    compile_cache.enable(None)
    return time_training(open_base(model, ONE_DEVICE), sizes, rounds)
