"""Jobs over the small model: what they are asked, where their adapters go, and a trainer of as many slots as wanted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from train_world import BASE_HASH, examples, lora, make_trainer, optimizer, small_base

from jaxlora.core.lora import LAYER_TARGETS, Adapter, AdapterRef, AdapterWeights
from jaxlora.model.lora_pool import PoolSpec
from jaxlora.model.mesh import make_mesh
from train.data.examples import Example
from train.data.load import Loaded
from train.jobs.job import JobRequest, JobsConfig
from train.jobs.runner import Jobs
from train.jobs.states import Parking
from train.trainer import Trainer


class DictShelf:
    """Finished adapters in memory."""

    def __init__(self) -> None:
        self.adapters: dict[AdapterRef, Adapter] = {}

    def add(self, tenant: str, name: str, weights: AdapterWeights) -> AdapterRef:
        weights.check_finite()
        version = 1 + sum((ref.tenant, ref.name) == (tenant, name) for ref in self.adapters)
        ref = AdapterRef(tenant, name, version)
        self.adapters[ref] = weights.named(ref)
        return ref


def no_files(path: Path) -> Sequence[Example]:
    raise AssertionError(f"{path} is read, but this test has its examples in memory")


def trainer_of(slots: int, *, lanes: int, lane_tokens: int, rank: int = 4) -> Trainer:
    """An empty trainer without a head target."""
    spec = PoolSpec(slots=slots, rank=rank, dtype="float32", targets=LAYER_TARGETS)
    return Trainer(small_base(), make_mesh(), [spec], lanes=lanes, lane_tokens=lane_tokens, base_hash=BASE_HASH)


def make_jobs(
    folder: Path,
    trainer: Trainer | None = None,
    *,
    load=no_files,
    host_bytes=2**30,
    shelf=None,
    owner_weight=lambda owner: 1.0,
    may_save=lambda job_id: True,
    **config,
):
    """(jobs, shelf): without checkpoints unless `states` is given."""
    shelf = DictShelf() if shelf is None else shelf
    jobs = Jobs(
        make_trainer() if trainer is None else trainer,
        JobsConfig(**{"states": None} | config),
        shelf=shelf,
        parking=Parking(folder / "parked", host_bytes=host_bytes),
        load=lambda path, too_long: Loaded(load(path)),
        owner_weight=owner_weight,
        may_save=may_save,
    )
    return jobs, shelf


def request(seed: int = 0, *, owner: str = "acme", name: str | None = None, steps: int = 3, **changes) -> JobRequest:
    """A job of a few steps on examples of its own."""
    settings = {
        "owner": owner,
        "name": f"bot{seed}" if name is None else name,
        "data": changes["data"] if "data" in changes else examples(seed, 5),
        "spec": lora(3, LAYER_TARGETS),
        "optimizer": optimizer(total_steps=steps, weight_decay=0.1),
        "batch_size": 2,
        "seed": seed,
    }
    return JobRequest(**settings | changes)


def weights(adapter: AdapterWeights) -> dict[str, bytes]:
    """Its weights as bytes, by target."""
    return {target: np.concatenate([x.ravel() for x in pair]).tobytes() for target, pair in adapter.weights.items()}


def kinds(jobs: Jobs, job_id: str, owner: str = "acme") -> list[str]:
    return [event.kind for event in jobs.events(owner, job_id)]
