"""The types of a LoRA adapter: its specification, its identity and its weights on the host.

    y_Y = x_X @ W_XY + scale * (x_X @ A_RX.T) @ B_RY          scale = alpha / rank, or alpha / sqrt(rank) for rsLoRA

Shape letters: L layers, R LoRA rank, X features in, Y features out.
Source: LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Self

import ml_dtypes
import numpy as np

from jaxlora.core.errors import AdapterInvalid, AdapterNotFinite, InvalidRequest

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")
LAYER_TARGETS = ATTENTION_TARGETS + MLP_TARGETS
HEAD_TARGET = "lm_head"
ALL_TARGETS = (*LAYER_TARGETS, HEAD_TARGET)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
BLOCK = 1 << 16  # numbers that are rounded together, in a core's cache

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleException:
    """Rank and alpha of one (target, layer) that differ from the adapter's own; rank 0: the module is not adapted."""

    target: str
    layer: int  # 0 for lm_head
    rank: int
    alpha: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSpec:
    """Everything about an adapter except its weights.

    Raises AdapterInvalid for rank below 1, zero or non-finite alpha, unknown or repeated target, dropout not in [0, 1).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = LAYER_TARGETS
    rslora: bool = False
    dropout: float = 0.0  # of the input of A, in training
    exceptions: tuple[ModuleException, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise AdapterInvalid(f"lora rank must be at least 1, got {self.rank}")
        if not math.isfinite(self.alpha) or self.alpha == 0:
            raise AdapterInvalid(f"lora alpha must be finite and not zero, got {self.alpha}")
        unknown = [t for t in self.targets if t not in ALL_TARGETS]
        if unknown or not self.targets or len(set(self.targets)) != len(self.targets):
            raise AdapterInvalid(
                f"lora targets must be distinct names out of {', '.join(ALL_TARGETS)}; got {self.targets}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise AdapterInvalid(f"lora dropout must be in [0, 1), got {self.dropout}")
        for e in self.exceptions:
            if e.target not in self.targets or e.rank < 0 or not math.isfinite(e.alpha):
                raise AdapterInvalid(
                    f"exception for {e.target} of layer {e.layer} is not possible: rank {e.rank}, alpha {e.alpha}"
                )

    @property
    def max_rank(self) -> int:
        """Returns the largest rank of any module, which a slot must hold."""
        return max([self.rank, *(e.rank for e in self.exceptions)])

    def module(self, target: str, layer: int) -> tuple[int, float]:
        """Returns (rank, alpha) of one module; rank 0 where the module is not adapted."""
        if target not in self.targets:
            return 0, self.alpha
        for e in self.exceptions:
            if e.target == target and e.layer == layer:
                return e.rank, e.alpha
        return self.rank, self.alpha

    def scale(self, target: str, layer: int) -> float:
        """Returns alpha / rank of the module, with its true rank (never the padded one); 0 where it is not adapted."""
        rank, alpha = self.module(target, layer)
        if rank == 0:
            return 0.0
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def to_json(self) -> dict[str, object]:
        """Returns a JSON object that `from_json` converts back into an equal spec."""
        exceptions = [[e.target, e.layer, e.rank, e.alpha] for e in self.exceptions]
        return asdict(self) | {"targets": list(self.targets), "exceptions": exceptions}

    @staticmethod
    def from_json(data: Mapping) -> LoraSpec:
        """Parses what `to_json` returned.  Raises AdapterInvalid for impossible values, KeyError for a missing one."""
        return LoraSpec(
            rank=int(data["rank"]),
            alpha=float(data["alpha"]),
            targets=tuple(data["targets"]),
            rslora=bool(data["rslora"]),
            dropout=float(data["dropout"]),
            exceptions=tuple(
                ModuleException(target=t, layer=int(i), rank=int(r), alpha=float(a))
                for t, i, r, a in data["exceptions"]
            ),
        )


@dataclass(frozen=True, slots=True, order=True)
class AdapterRef:
    """Identifies an immutable version of one tenant's adapter.  The key of every cache."""

    tenant: str
    name: str
    version: int

    def __post_init__(self) -> None:
        check_name(self.tenant, "tenant")
        check_name(self.name, "adapter name")
        if self.version < 1:
            raise InvalidRequest(f"adapter version must be at least 1, got {self.version}", param="version")

    def __str__(self) -> str:
        return f"{self.tenant}/{self.name}@{self.version}"


def check_name(name: str, what: str) -> str:
    """Returns the name if it is 1 to 64 ASCII letters, digits, dots, dashes, underscores, the first a letter or digit.

    Raises InvalidRequest otherwise.  Such a name is never a path.
    """
    if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
        shown = repr(name)[:80]
        raise InvalidRequest(
            f"{what} must be 1 to 64 letters, digits, '.', '_' or '-' and start with a letter or digit; got {shown}",
            param="name",
        )
    return name


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterWeights:
    """Weights and specification of an adapter on the host, which has no name and no version yet.

    weights: target → (a_LRX, b_LRY), R = spec.max_rank, float32; bfloat16 where only a server reads them.  Rows past a
    module's own rank, and modules that are not adapted, are zero in both.  L is 1 for lm_head.  lm_head is [1, R, d_model]
    and [1, R, vocab].
    """

    spec: LoraSpec
    base_hash: str
    weights: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(repr=False)

    def named(self, ref: AdapterRef) -> Adapter:
        """Returns these weights as a version of an adapter."""
        return Adapter(ref=ref, spec=self.spec, base_hash=self.base_hash, weights=self.weights)

    def check_finite(self) -> None:
        """Raises AdapterNotFinite, naming the tensor, when a weight is NaN or infinite."""
        for target, pair in self.weights.items():
            for half, value in zip("AB", pair, strict=True):
                if not _is_finite(value):
                    raise AdapterNotFinite(f"lora_{half} of {target} has non-finite values; the adapter is refused")

    @property
    def dtype(self) -> str:
        """Returns the dtype of all weights, by name."""
        return next((a.dtype.name for a, _ in self.weights.values()), "float32")

    def rounded(self) -> Self:
        """Returns float32 weights in bfloat16: the nearest, of two the even one, as a device rounds.

        Raises AdapterNotFinite.
        """
        self.check_finite()
        return replace(self, weights={t: (_to_bfloat16(a), _to_bfloat16(b)) for t, (a, b) in self.weights.items()})

    @property
    def nbytes(self) -> int:
        """Returns the bytes of the weights in host memory."""
        return sum(a.nbytes + b.nbytes for a, b in self.weights.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter(AdapterWeights):
    """One adapter version on the host."""

    ref: AdapterRef


def _is_finite(values: np.ndarray) -> bool:
    if values.dtype != BFLOAT16:
        return bool(np.isfinite(values).all())
    return bool(((values.view(np.uint16) & 0x7F80) != 0x7F80).all())  # NumPy's own is slower, and holds the interpreter


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Returns finite float32 numbers rounded.  NumPy's own cast to bfloat16 holds the interpreter as long as it takes."""
    bits = np.ascontiguousarray(values).reshape(-1).view(np.uint32)
    rounded, work = np.empty(bits.size, np.uint16), np.empty(min(BLOCK, bits.size), np.uint32)
    for start in range(0, bits.size, BLOCK):
        block = bits[start : start + BLOCK]
        up = work[: block.size]
        np.right_shift(block, 16, out=up)
        np.bitwise_and(up, 1, out=up)  # of two nearest numbers the even one
        np.add(up, block, out=up)
        np.add(up, 0x7FFF, out=up)
        np.right_shift(up, 16, out=up)
        rounded[start : start + BLOCK] = up
    return rounded.reshape(values.shape).view(BFLOAT16)
