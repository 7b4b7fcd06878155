"""Settings that training and serving share: value checks, the base model and the mesh.  No jax here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxlora.config.toml import PathOrName

DEMO_MODEL = "smollm2"  # the installed demo model
Dtype = Literal["float32", "bfloat16", "auto"]  # auto: bfloat16 where it is clearly faster (checkpoints/load.py)
Precision = Literal["auto", "default", "high", "highest"]  # of matrix products; auto: highest in float32, else default


def need(ok: bool, name: str, wanted: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{name} must be {wanted}, got {got!r}")


def need_counts(section: object, *names: str) -> None:
    for name in names:
        need(getattr(section, name) >= 1, name, "at least 1", getattr(section, name))


def need_distinct(names: list[str], what: str) -> None:
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"{what} must be distinct; more than one is called {', '.join(twice)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """Which frozen base model is used, its dtype and the precision of its products."""

    path: PathOrName  # "smollm2", a directory, a .gguf file or a hub id
    dtype: Dtype
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        need(bool(self.path.strip()), "path", '"smollm2", a directory, a .gguf file or a hub id', self.path)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshSection:
    """Devices along each axis of the mesh; their product is the number of devices used."""

    data: int  # batch rows or lanes are split
    fsdp: int  # weights are split and gathered when used
    tensor: int  # heads and features are split
    processes: int = 1  # that hold the devices together; each is started with this file (model/multihost.py)

    def __post_init__(self) -> None:
        need_counts(self, "data", "fsdp", "tensor", "processes")


ONE_DEVICE = MeshSection(data=1, fsdp=1, tensor=1)
