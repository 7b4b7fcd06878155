"""Settings that training and serving share: value checks, the base model and the mesh.  No jax here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from jaxlora.config.toml import DoNotGoTogether, Mistakes, PathOrName
from jaxlora.config.words import meant
from jaxlora.core.errors import JaxLoraError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

DEMO_MODEL = "smollm2"  # the installed demo model
Dtype = Literal["float32", "bfloat16", "auto"]  # auto: bfloat16 where it is clearly faster (checkpoints/load.py)
Quantization = Literal["none", "int8"]
Precision = Literal["auto", "default", "high", "highest"]  # of matrix products; auto: highest in float32, else default


class Checks:
    """Collects what is wrong with a section in a `with`, which ends with one error: the mistake, or Mistakes."""

    def __init__(self) -> None:
        self.found: list[JaxLoraError] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self.found:
            raise self.found[0] if len(self.found) == 1 else Mistakes(self.found)

    def need(self, ok: bool, name: str, wanted: str, got: object) -> None:
        """Notes a value that is not what it must be."""
        if not ok:
            self.refuse(name, f"{name} must be {wanted}, got {got!r}")

    def counts(self, section: object, *names: str) -> None:
        """Notes the settings of these names that are below 1; one that is None is fine."""
        for name in names:
            value = getattr(section, name)
            self.need(value is None or value >= 1, name, "at least 1", value)

    def positive(self, section: object, *names: str) -> None:
        """Notes the settings of these names that are not positive and finite; one that is None is fine."""
        for name in names:
            value = getattr(section, name)
            self.need(value is None or 0 < value < math.inf, name, "positive and finite", value)

    def distinct(self, names: Sequence[str], what: str, key: str) -> None:
        """Notes names that occur twice; key: of the second one, with {} for its index."""
        for i, name in enumerate(names):
            if name in names[:i]:
                self.refuse(key.format(i), f"{what} must be distinct; more than one is called {name}")

    def refuse(self, key: str, message: str, *others: str) -> None:
        """Notes a mistake, which is also one of other keys."""
        self.found.append(DoNotGoTogether(message, param=key, others=others))

    def call(self, key: str, check: Callable[[], object], *, section: str = "") -> None:
        """Calls another check and notes what it raises, under this key unless the error names one; keys are the section's."""
        try:
            check()
        except JaxLoraError as e:
            for error in e.found if isinstance(e, Mistakes) else [e]:
                error.param = section + (error.param or key)
                self.found.append(error)


def completed[T](cls: type[T], section: DataclassInstance, sizes: Mapping[str, object]) -> T:
    """Returns a section's settings as the class `cls` whose sizes are known: of those left out, these."""
    given = {f.name: value for f in fields(section) if (value := getattr(section, f.name)) is not None}
    return cls(**{**sizes, **given})


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """Which frozen base model is used, and how it computes."""

    path: PathOrName  # "smollm2", a directory, a .gguf file or a hub id
    dtype: Dtype = "auto"  # float32 or bfloat16; auto: bfloat16 where it is clearly faster
    precision: Precision = "auto"  # of matrix products: default, high or highest; auto: highest in float32
    # int8, on one CPU device: linears and head in 8 bits, a scale for each output feature; half of bfloat16's memory.
    quantization: Quantization = "none"

    def __post_init__(self) -> None:
        with Checks() as check:
            wanted = f'"{DEMO_MODEL}", a directory, a .gguf file or a hub id'
            check.need(bool(self.path.strip()), "path", wanted, self.path)
            if self.path != DEMO_MODEL and meant(self.path, [DEMO_MODEL]) and not Path(self.path).exists():
                check.refuse("path", f"path must be {wanted}, got {self.path!r}; did you mean {DEMO_MODEL}?")


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshSection:
    """Devices along each axis of the mesh; their product is the number of devices used."""

    data: int = 1  # batch rows or lanes are split
    fsdp: int = 1  # weights are split and gathered when used
    tensor: int = 1  # heads and features are split
    processes: int = 1  # processes that hold the devices together, each started with this file

    def __post_init__(self) -> None:
        with Checks() as check:
            check.counts(self, "data", "fsdp", "tensor", "processes")


ONE_DEVICE = MeshSection()
