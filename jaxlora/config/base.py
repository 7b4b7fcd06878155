"""Settings that training and serving share: value checks, the base model and the mesh.  No jax here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from jaxlora.config.toml import PathOrName

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

DEMO_MODEL = "smollm2"  # the installed demo model
Dtype = Literal["float32", "bfloat16", "auto"]  # auto: bfloat16 where it is clearly faster (checkpoints/load.py)
Precision = Literal["auto", "default", "high", "highest"]  # of matrix products; auto: highest in float32, else default


def need(ok: bool, name: str, wanted: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{name} must be {wanted}, got {got!r}")


def need_counts(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        need(value is None or value >= 1, name, "at least 1", value)


def need_distinct(names: list[str], what: str) -> None:
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"{what} must be distinct; more than one is called {', '.join(twice)}")


def completed[T](cls: type[T], section: DataclassInstance, sizes: Mapping[str, object]) -> T:
    """Returns a section's settings as the class `cls` whose sizes are known: of those left out, these."""
    given = {f.name: value for f in fields(section) if (value := getattr(section, f.name)) is not None}
    return cls(**{**sizes, **given})


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """Which frozen base model is used, its dtype and the precision of its products."""

    path: PathOrName  # "smollm2", a directory, a .gguf file or a hub id
    dtype: Dtype = "auto"
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        need(bool(self.path.strip()), "path", '"smollm2", a directory, a .gguf file or a hub id', self.path)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshSection:
    """Devices along each axis of the mesh; their product is the number of devices used."""

    data: int = 1  # batch rows or lanes are split
    fsdp: int = 1  # weights are split and gathered when used
    tensor: int = 1  # heads and features are split
    processes: int = 1  # that hold the devices together; each is started with this file (model/multihost.py)

    def __post_init__(self) -> None:
        need_counts(self, "data", "fsdp", "tensor", "processes")


ONE_DEVICE = MeshSection()
