"""Settings of training as frozen dataclasses, each validated once; `jaxlora.config.toml.load` reads them.  No jax.

Nothing that a checkpoint decides has a default; the defaults of the hyper-parameters are those of `Recipe`; an optional
feature (a held-out file) is None by default.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from jaxlora.config.base import ONE_DEVICE, Checks, MeshSection, ModelSection
from jaxlora.config.toml import TomlPath, TomlPathByDefault, load
from jaxlora.core.errors import ConfigInvalid
from jaxlora.core.lora import LAYER_TARGETS, LoraSpec, check_name
from jaxlora.core.model_config import ModelConfig

__all__ = [
    "Loss",
    "MeshSection",
    "ModelSection",
    "Optimizer",
    "Recipe",
    "TenantSection",
    "TrainConfig",
    "default_lr",
    "load",
]


Schedule = Literal["constant", "linear", "cosine"]  # of the learning rate after the warm-up; the last two end at 0
LossName = Literal["cross_entropy", "dpo", "importance_sampling", "ppo", "cispo", "dro", "gspo"]
TooLong = Literal["error", "skip", "truncate"]  # what becomes of examples that a lane does not hold
TOO_LONG: tuple[TooLong, ...] = get_args(TooLong)

# What a training step saves of a layer for its gradient and need not recompute: the outputs of GEMMs and attention, the
# layer's input alone (the least memory), or all.
Remat = Literal["products", "nothing", "everything"]
# Dtype of the optimizer's moments: bfloat16 takes half the bytes, uint8 (codes in blocks, like bitsandbytes) a quarter.
MomentsDtype = Literal["float32", "bfloat16", "uint8"]

LANE_BLOCK = 32  # tokens of a training lane that attention and loss process at once
NO_CLIP = math.inf
FLOAT32 = np.finfo(np.float32)


def check_lane_tokens(lane_tokens: int) -> None:
    """Raises ConfigInvalid for a training lane that is not whole blocks; a shorter lane is a block of its own."""
    rest = lane_tokens % LANE_BLOCK
    if lane_tokens < 1 or (lane_tokens > LANE_BLOCK and rest):
        below = max(lane_tokens - rest, 0)
        raise ConfigInvalid(
            f"lane_tokens must be a multiple of {LANE_BLOCK} or smaller than that, such as {max(below, 1)} or "
            f"{below + LANE_BLOCK}; got {lane_tokens}",
            param="lane_tokens",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimizer:
    """Optimizer settings of one tenant, on the host.  Raises ConfigInvalid for an impossible value."""

    lr: float
    schedule: str = "linear"  # constant, linear (to 0) or cosine (to 0)
    warmup_steps: int = 0
    total_steps: int  # where the schedule ends
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip: float | None = 1.0  # None: no clipping
    loraplus_ratio: float = 1.0  # lr of B over lr of A (LoRA+, arXiv 2402.12354); weight decay follows each

    def __post_init__(self) -> None:
        """Validates what the device sees: these numbers in float32, where a tiny eps is 0 and a beta near 1 is 1."""
        top, tiny = float(FLOAT32.max), float(FLOAT32.tiny)
        checks = {
            "lr": (0 <= self.lr <= top, "finite and not negative"),
            "schedule": (self.schedule in ("constant", "linear", "cosine"), "constant, linear or cosine"),
            "total_steps": (self.total_steps >= 1, "at least 1"),
            "warmup_steps": (
                0 <= self.warmup_steps <= self.total_steps,
                f"in [0, {self.total_steps}], the total_steps",
            ),
            "weight_decay": (0 <= self.weight_decay <= top, "finite and not negative"),
            "b1": (0 <= np.float32(self.b1) < 1, "in [0, 1)"),
            "b2": (0 <= np.float32(self.b2) < 1, "in [0, 1)"),
            "eps": (tiny <= self.eps <= top, f"finite and at least {tiny:.3g}"),
            "loraplus_ratio": (tiny <= self.loraplus_ratio <= top, "positive and finite"),
            "clip": (self.clip is None or tiny <= self.clip <= top, "positive or absent"),
        }
        with Checks() as check:
            for name, (fine, wanted) in checks.items():
                if not fine:
                    check.refuse(name, f"{name} must be {wanted}, got {getattr(self, name)}")

    def lr_at(self, step: int) -> float:
        """Returns the learning rate of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        rest = max(self.total_steps - self.warmup_steps, 1)
        done = min((step - self.warmup_steps) / rest, 1.0)
        if self.schedule == "constant":
            return self.lr
        return self.lr * (1 - done) if self.schedule == "linear" else self.lr * 0.5 * (1 + math.cos(math.pi * done))

    def row(self, step: int, divisor: float) -> dict[str, float]:
        """Returns this tenant's row of Hyper for that step."""
        return {
            "lr": self.lr_at(step),
            "decay": self.weight_decay,
            "b1": self.b1,
            "b2": self.b2,
            "eps": self.eps,
            "clip": NO_CLIP if self.clip is None else self.clip,
            "b_ratio": self.loraplus_ratio,
            "divisor": divisor,
        }


OPTIMIZER = Optimizer(lr=1.0, total_steps=1)  # the defaults of a config file are its defaults

# The numbers of each loss and their defaults; a loss's index is its number on the device.
LOSSES: dict[str, dict[str, float]] = {
    "cross_entropy": {},
    "dpo": {"beta": 0.1},
    "importance_sampling": {},
    "ppo": {"clip_low": 0.8, "clip_high": 1.2},
    "cispo": {"clip_low": 0.0, "clip_high": 4.0},
    "dro": {"beta": 0.05},
    "gspo": {"clip_low": 0.8, "clip_high": 1.2},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """The loss that one tenant's training minimises.  Raises ConfigInvalid for a number the loss does not take."""

    name: str = "cross_entropy"  # one of LOSSES
    beta: float | None = None  # dpo, dro: strength of the reference; None: the default in LOSSES, here and below
    clip_low: float | None = None  # ppo, cispo, gspo: the bounds of the ratio itself, such as 0.8 and 1.2
    clip_high: float | None = None

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise ConfigInvalid(f"loss must be one of {', '.join(LOSSES)}; got {self.name!r}", param="loss")
        with Checks() as check:
            for knob in ("beta", "clip_low", "clip_high"):
                if getattr(self, knob) is not None and knob not in LOSSES[self.name]:
                    takes = " and ".join(LOSSES[self.name]) or "no numbers"
                    check.refuse(knob, f"loss {self.name} has no {knob}; it takes {takes}")
            row = self.row()
            if "beta" in LOSSES[self.name] and not FLOAT32.tiny <= row["beta"] <= FLOAT32.max:
                check.refuse("beta", f"beta must be positive and finite, got {row['beta']}")
            if "clip_low" in LOSSES[self.name] and not 0 <= row["clip_low"] <= row["clip_high"] <= FLOAT32.max:
                check.refuse(
                    "clip_low",
                    f"clip_low and clip_high must be finite and 0 <= clip_low <= clip_high, got {row['clip_low']} and "
                    f"{row['clip_high']}",
                )

    def row(self) -> dict[str, float]:
        """Returns its numbers with defaults filled in; 0 for those it does not take."""
        given = {"beta": self.beta, "clip_low": self.clip_low, "clip_high": self.clip_high}
        return {k: LOSSES[self.name].get(k, 0.0) if v is None else float(v) for k, v in given.items()}


CROSS_ENTROPY = Loss()


WARMUP = 0.03  # default share of a tenant's steps in which lr rises
PASSES = 3  # passes over the examples of a tenant without a number of steps


def default_lr(model: ModelConfig) -> float:
    """Returns the default lr of a tenant: 5e-5 for all weights, ten times that for LoRA, less for a wider base.

    5e-4 * (2000 / d_model) ** p with p = 0.781 for Llama (and Mistral, as similar) and 0.0775 for Qwen; for alpha 32 on
    all linear layers, of any rank.
    Source: Schulman et al., LoRA Without Regret (2025); the exponents are the fit to its sweeps that was published as
    `get_lr` of tinker-cookbook, before a table of single models replaced it.
    """
    power = 0.0775 if model.family.startswith("qwen") else 0.781
    return 5e-5 * 10 * (2000 / model.d_model) ** power


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Hyper-parameters of one tenant, and the one place of the defaults of `jaxlora train` and `Session`, published.

    Source: all linear layers, alpha 32 whatever the rank, small batches, no decay: LoRA Without Regret (see `default_lr`);
    rank 16: between PEFT's 8 and the 64 of QLoRA (arXiv 2305.14314); warm-up of 3 %: Alpaca and QLoRA; linear decay, batch,
    three passes, betas, eps and clip: the Trainer of transformers.
    """

    # Else dpo, which takes preference lines, or importance_sampling, ppo, cispo, dro or gspo, which take rollouts.
    loss: LossName = "cross_entropy"
    beta: float | None = None  # of dpo (default 0.1) and dro (0.05)
    clip_low: float | None = None  # bounds of the ratio in ppo and gspo (default 0.8 and 1.2) and cispo (0 and 4)
    clip_high: float | None = None
    rank: int = 16
    alpha: float = 32.0  # the adapter's output is scaled by alpha / rank
    targets: tuple[str, ...] = LAYER_TARGETS
    rslora: bool = False  # scale by alpha / sqrt(rank) instead
    lr: float | None = None  # peak learning rate, after the warm-up; None: by the width of the base
    schedule: Schedule = "linear"  # of lr after the warm-up: constant, linear or cosine
    warmup_steps: int | None = None  # steps of this tenant in which lr rises from 0; 0 is none; None: 3 % of its steps
    weight_decay: float = OPTIMIZER.weight_decay  # AdamW, per step, multiplied by lr
    b1: float = OPTIMIZER.b1
    b2: float = OPTIMIZER.b2
    eps: float = OPTIMIZER.eps
    clip: float = OPTIMIZER.clip or NO_CLIP  # largest global norm of this tenant's gradient; inf: no clipping
    loraplus_ratio: float = OPTIMIZER.loraplus_ratio  # lr of B over lr of A; LoRA+ suggests 16
    dropout: float = 0.0  # dropout rate of the inputs of A in training; never applied to lm_head
    batch: int = 8  # examples per step; a batch that does not fit a step is accumulated over several
    steps: int | None = None  # optimizer steps of this tenant; None: those of the file, or 3 passes over its data
    too_long: TooLong = "error"  # of examples that a lane does not hold: refuse the file, leave them out, or cut them
    seed: int = 0  # seed of the adapter's initial weights and of the order of its examples

    def __post_init__(self) -> None:
        with Checks() as check:
            for name in ("rank", "alpha", "targets", "dropout"):
                check.call(name, functools.partial(replace, LoraSpec(rank=1, alpha=1.0), **{name: getattr(self, name)}))
            check.call("loss", lambda: self.objective)
            check.counts(self, "batch")
            check.need(self.steps is None or self.steps >= 1, "steps", "at least 1, or left out", self.steps)
            # without steps the warm-up is checked where they are known
            steps = max(self.warmup_steps or 0, 1) if self.steps is None or self.steps < 1 else self.steps
            check.call("lr", lambda: self._optimizer(steps, OPTIMIZER.lr))
            check.need(0 <= self.seed < 2**32, "seed", "in [0, 2^32)", self.seed)
            check.need(self.too_long in TOO_LONG, "too_long", "error, skip or truncate", self.too_long)

    @property
    def spec(self) -> LoraSpec:
        """Returns the specification of the adapter this tenant trains."""
        return LoraSpec(
            rank=self.rank, alpha=self.alpha, targets=self.targets, rslora=self.rslora, dropout=self.dropout
        )

    @property
    def objective(self) -> Loss:
        """Returns the loss to minimise.  Raises ConfigInvalid for a number that the loss does not take."""
        return Loss(name=self.loss, beta=self.beta, clip_low=self.clip_low, clip_high=self.clip_high)

    def optimizer(self, *, default_steps: int, default_lr: float) -> Optimizer:
        """Returns its optimizer settings, with these defaults.  Raises ConfigInvalid for an impossible value."""
        return self._optimizer(default_steps if self.steps is None else self.steps, default_lr)

    def _optimizer(self, steps: int, default_lr: float) -> Optimizer:
        return Optimizer(
            lr=default_lr if self.lr is None else self.lr,
            schedule=self.schedule,
            warmup_steps=math.ceil(WARMUP * steps) if self.warmup_steps is None else self.warmup_steps,
            total_steps=steps,
            weight_decay=self.weight_decay,
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            clip=None if self.clip == NO_CLIP else self.clip,
            loraplus_ratio=self.loraplus_ratio,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantSection(Recipe):
    """Training job of one tenant: its data and its hyper-parameters."""

    name: str  # 1 to 64 letters, digits, '.', '_', '-'
    train: TomlPath  # examples of the kind that the loss takes: JSONL, a JSON array, CSV, TSV or Parquet
    heldout: TomlPath | None = None  # likewise; None: no held-out loss is reported

    def __post_init__(self) -> None:
        with Checks() as check:
            check.call("name", lambda: check_name(self.name, "name"))
            check.call("", lambda: Recipe.__post_init__(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketSection:
    """Training slots for adapters of a smaller rank, which then use less device memory."""

    rank: int  # largest rank of such a slot
    slots: int

    def __post_init__(self) -> None:
        with Checks() as check:
            check.counts(self, "rank", "slots")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Settings of one training run: several tenants over one base."""

    model: ModelSection
    mesh: MeshSection = ONE_DEVICE
    out: TomlPathByDefault = Path("runs")  # folder of runs: checkpoints, metrics, adapters
    memory_gb: float | None = None  # most memory of the device that the run may take; None: what is available
    memory_share: float = 0.9  # of that memory, what is planned with
    # Left out, these five are chosen from that memory, the base and the tenants.
    lanes: int | None = None  # packed rows in one batch, each of one tenant
    # Predictions in a lane: whole blocks of 32, or less than one; an example has at most one token more.
    lane_tokens: int | None = None
    passes: int | None = None  # groups of a step's lanes, one after the other: a gradient keeps one group's activations
    slots: int | None = None  # adapters of up to max_rank on the device at once
    max_rank: int | None = None  # largest rank a slot holds
    # More slots, for smaller ranks; a tenant gets one of the first bucket that its rank fits.
    bucket: tuple[BucketSection, ...] = ()
    steps: int | None = None  # optimizer steps of each tenant that does not set its own; None: 3 passes over its data
    moments: MomentsDtype = "float32"  # dtype of the optimizer's moments
    remat: Remat = "products"  # what is saved of a layer for the gradient
    save_every: int = 50  # optimizer steps of a tenant between its checkpoints
    tenant: tuple[TenantSection, ...]

    def __post_init__(self) -> None:
        with Checks() as check:
            check.counts(self, "lanes", "lane_tokens", "passes", "slots", "max_rank", "steps", "save_every")
            check.positive(self, "memory_gb")
            check.need(0 < self.memory_share <= 1, "memory_share", "in (0, 1]", self.memory_share)
            if self.lane_tokens is not None and self.lane_tokens >= 1:
                lane_tokens = self.lane_tokens
                check.call("lane_tokens", lambda: check_lane_tokens(lane_tokens))
            lanes, passes = self.lanes or 0, max(self.passes or 1, 1)
            check.need(lanes % passes == 0, "passes", f"a number that divides the {lanes} lanes", passes)
            check.need(bool(self.tenant), "tenant", "at least one [[tenant]] table", self.tenant)
            check.distinct([t.name for t in self.tenant], "tenant names", "tenant[{}].name")
            self.check_ranks(check)
            self.check_warmups(check)

    def check_ranks(self, check: Checks) -> None:
        """Notes buckets and tenants that do not go with max_rank, and more tenants than slots whose number is known."""
        ranks, most = [b.rank for b in self.bucket], math.inf if self.max_rank is None else self.max_rank
        for i, rank in enumerate(ranks):
            if rank >= most or rank in ranks[:i]:
                wanted = f"must be its own and less than max_rank = {self.max_rank}, got {ranks}"
                others = [f"bucket[{j}].rank" for j in range(len(ranks))]
                check.refuse(f"bucket[{i}].rank", f"the rank of each [[bucket]] {wanted}", *others)
        for i, t in enumerate(self.tenant):
            if t.rank > most:
                wanted = f"more than max_rank = {self.max_rank}; raise max_rank or lower it"
                check.refuse(f"tenant[{i}].rank", f"tenant {t.name} has rank {t.rank}, {wanted}")
        if any(t.rank > most for t in self.tenant):
            return
        below = 0
        for rank, slots in [*sorted((b.rank, b.slots) for b in self.bucket), (most, self.slots)]:
            sitting = [t.name for t in self.tenant if below < t.rank <= rank]
            if slots is not None and len(sitting) > slots:
                where = f"of rank {below + 1} to {rank}" if self.bucket else "in the file"
                wanted = f"need as many slots, but there are {slots}; raise `slots`"
                ranks_of_all = [f"tenant[{i}].rank" for i in range(len(self.tenant))]
                check.refuse("slots", f"{len(sitting)} tenants {where} {wanted}", *ranks_of_all)
            below = rank

    def check_warmups(self, check: Checks) -> None:
        """Notes tenants whose warm-up is longer than the steps of the file."""
        for i, t in enumerate(self.tenant):
            if self.steps is not None and self.steps >= 1 and t.steps is None:
                try:
                    t.optimizer(default_steps=self.steps, default_lr=OPTIMIZER.lr)
                except ConfigInvalid as e:
                    key = f"tenant[{i}].warmup_steps"
                    check.refuse(key, f"tenant {t.name}: {e.message}", "steps", f"tenant[{i}].steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class SizedTrainConfig(TrainConfig):
    """Settings of a training run whose sizes are known: what a trainer is built from."""

    lanes: int
    lane_tokens: int
    passes: int
    slots: int
    max_rank: int

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """Returns (largest rank, slots) of all slots, from the smallest rank on."""
        return sorted([(b.rank, b.slots) for b in self.bucket] + [(self.max_rank, self.slots)])
