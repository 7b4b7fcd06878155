"""Settings as frozen dataclasses, each checked once.  Reading them from TOML is `jaxlora.toml_loader.load`.  No jax here.

Nothing that a user or a checkpoint decides has a default; what is off unless asked for (a schedule's end, clipping, a
held-out file) is None.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from jaxlora.lora import LAYER_TARGETS, LoraSpec, check_name
from jaxlora.toml_loader import PathOrName, load

__all__ = [
    "AdapterSection",
    "MeshSection",
    "ModelSection",
    "ServeConfig",
    "TenantSection",
    "TrainConfig",
    "load",
    "serve_defaults",
]

DEMO_MODEL = "smollm2"  # the installed demo model

Dtype = Literal["float32", "bfloat16", "auto"]  # auto: the faster one on this device (see opened.py)
Schedule = Literal["constant", "linear", "cosine"]


def _need(ok: bool, name: str, wanted: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{name} must be {wanted}, got {got!r}")


def _need_counts(section: object, *names: str) -> None:
    for name in names:
        _need(getattr(section, name) >= 1, name, "at least 1", getattr(section, name))


def _need_distinct(names: list[str], what: str) -> None:
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"{what} must be distinct; more than one is called {', '.join(twice)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """Which frozen base, and in which precision it is held."""

    path: Annotated[str, PathOrName]  # "smollm2", a directory, a .gguf file or a hub id
    dtype: Dtype

    def __post_init__(self) -> None:
        _need(bool(self.path.strip()), "path", '"smollm2", a directory, a .gguf file or a hub id', self.path)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshSection:
    """Devices along each axis of the mesh; their product is the number of devices used."""

    data: int  # batch rows or lanes are split
    fsdp: int  # weights are split and gathered when used
    tensor: int  # heads and features are split

    def __post_init__(self) -> None:
        _need_counts(self, "data", "fsdp", "tensor")


ONE_DEVICE = MeshSection(data=1, fsdp=1, tensor=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantSection:
    """One tenant's training job: whose data, which adapter, how it learns."""

    name: str  # 1 to 64 letters, digits, '.', '_', '-'
    train: Path  # JSONL, one example a line
    heldout: Path | None = None  # JSONL; None: no held-out loss is reported
    rank: int
    alpha: float  # the adapter's output is scaled by alpha / rank
    targets: tuple[str, ...] = LAYER_TARGETS
    rslora: bool = False  # scale by alpha / sqrt(rank) instead
    lr: float  # highest learning rate, reached after the warm-up
    schedule: Schedule  # of the learning rate after the warm-up; linear and cosine end at 0
    warmup_steps: int  # steps of this tenant in which lr rises from 0; 0 is none
    weight_decay: float  # AdamW, per step, multiplied by lr
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip: float | None = None  # largest global norm of this tenant's gradient; None: no clipping
    batch: int  # examples per step
    steps: int | None = None  # optimizer steps of this tenant; None: as many as the run has
    seed: int  # of the adapter's first weights and of the order of its examples

    def __post_init__(self) -> None:
        check_name(self.name, "name")
        _ = self.spec  # LoraSpec checks rank, alpha and targets
        _need_counts(self, "batch")
        _need(self.steps is None or self.steps >= 1, "steps", "at least 1, or left out", self.steps)
        _need(self.warmup_steps >= 0, "warmup_steps", "0 or more", self.warmup_steps)
        _need(math.isfinite(self.lr) and self.lr > 0, "lr", "positive and finite", self.lr)
        _need(
            math.isfinite(self.weight_decay) and self.weight_decay >= 0,
            "weight_decay",
            "0 or more and finite",
            self.weight_decay,
        )
        _need(0 <= self.b1 < 1, "b1", "in [0, 1)", self.b1)
        _need(0 <= self.b2 < 1, "b2", "in [0, 1)", self.b2)
        _need(math.isfinite(self.eps) and self.eps > 0, "eps", "positive and finite", self.eps)
        clip = self.clip
        _need(clip is None or (math.isfinite(clip) and clip > 0), "clip", "positive and finite, or left out", clip)
        _need(0 <= self.seed < 2**32, "seed", "in [0, 2^32)", self.seed)

    @property
    def spec(self) -> LoraSpec:
        """The adapter this tenant trains."""
        return LoraSpec(rank=self.rank, alpha=self.alpha, targets=self.targets, rslora=self.rslora)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run: several tenants over one base."""

    model: ModelSection
    mesh: MeshSection = ONE_DEVICE
    out: Path  # folder of runs: checkpoints, metrics, adapters
    lanes: int  # packed rows in one batch, each of one tenant
    lane_tokens: int  # tokens in a lane; the longest example that fits
    slots: int  # adapters on the device at once
    max_rank: int  # largest rank a slot holds
    steps: int  # steps of the run
    save_every: int  # steps between checkpoints
    tenant: tuple[TenantSection, ...]

    def __post_init__(self) -> None:
        _need_counts(self, "lanes", "lane_tokens", "slots", "max_rank", "steps", "save_every")
        _need(bool(self.tenant), "tenant", "at least one [[tenant]] table", self.tenant)
        _need_distinct([t.name for t in self.tenant], "tenant names")
        for t in self.tenant:
            if t.rank > self.max_rank:
                raise ValueError(
                    f"tenant {t.name} has rank {t.rank}, more than max_rank = {self.max_rank}; raise max_rank or lower it"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSection:
    """A PEFT folder to load when the server starts, and the model name it answers to."""

    name: str
    path: Path

    def __post_init__(self) -> None:
        check_name(self.name, "name")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """One server: one base, many adapters, one compiled decode step."""

    model: ModelSection
    mesh: MeshSection = ONE_DEVICE
    host: str  # address to listen on; 127.0.0.1 is this machine only
    port: int  # 0: any free port
    slots: int  # adapters on the device at once
    max_rank: int  # largest rank a slot holds
    rows: int  # sequences decoded in one step
    kv_pages: int  # pages of the key/value cache, all sequences together
    page_tokens: int  # tokens in a page
    prefill_lanes: int  # prompt chunks in one prefill step
    prefill_tokens: int  # tokens in a prompt chunk
    default_max_tokens: int  # of a request that names none
    max_waiting: int  # requests in the queue before new ones get 503
    adapters: Path  # root of the adapter store
    load: tuple[AdapterSection, ...] = field(default=())

    def __post_init__(self) -> None:
        _need_counts(self, "slots", "max_rank", "rows", "kv_pages", "page_tokens", "prefill_lanes", "prefill_tokens")
        _need_counts(self, "default_max_tokens", "max_waiting")
        _need(bool(self.host.strip()), "host", "an address such as 127.0.0.1", self.host)
        _need(0 <= self.port < 2**16, "port", "in [0, 65535]", self.port)
        _need_distinct([a.name for a in self.load], "names under [[load]]")


def serve_defaults(model: str, adapters: Path) -> ServeConfig:
    """What `jaxlora serve --model` uses: the one place of the server's defaults.  It listens on this machine only.

    Sized for the demo model on a laptop: with SmolLM2-135M in float32, 8 slots of rank 32 are about 0.3 GB (all seven
    projections) and 128 pages of 64 tokens about 0.4 GB.  A larger machine is worth a TOML file.
    """
    return ServeConfig(
        model=ModelSection(path=model, dtype="auto"),
        host="127.0.0.1",
        port=8000,
        slots=8,
        max_rank=32,
        rows=8,
        kv_pages=128,
        page_tokens=64,
        prefill_lanes=8,
        prefill_tokens=32,
        default_max_tokens=256,
        max_waiting=256,
        adapters=adapters,
    )
