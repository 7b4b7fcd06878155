"""Reads a base model from one GGUF v3 file, through the `gguf` library under our own bounds.

The library trusts a header; `_BoundedReader` checks each of its reads against the file's length and `GgufFile` each
tensor against its neighbours, so a hostile file costs little memory and time.

Shape letters: L layers, D model, F MLP, N query heads, K kv heads, H head, V vocabulary, X Y features in, out.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import numpy.typing as npt

from jaxlora.checkpoints.safetensors import release
from jaxlora.core.errors import ModelInvalid
from jaxlora.core.model_config import LINEARS, Llama3Rope, ModelConfig, check_tensors

MAX_READS = 1 << 22  # numbers and strings in the header; a vocabulary of 256k tokens with its merges takes half
MAX_DIMS = 4
MAX_ALIGNMENT = 1 << 20

PLAIN = ("F32", "F16", "BF16")
QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")

Scalar = bool | int | float | str
Value = Scalar | list[Scalar]


class _BoundedReader(gguf.GGUFReader):
    """The library's reader; every read must lie inside the file and is counted.

    The library reads headers through `_get` alone, which at the end of a file returns too few numbers, for ever.
    """

    reads = 0

    def _get(
        self, offset: int, dtype: npt.DTypeLike, count: int = 1, override_order: Literal["I", "S", "<"] | None = None
    ) -> np.ndarray:
        data = np.asarray(self.data)  # a slice of a memmap takes four times as long
        nbytes = np.dtype(dtype).itemsize * int(count)
        if nbytes > len(data) - offset:
            raise ValueError(f"byte {offset} begins {nbytes} bytes, the file ends at {len(data)}; is it cut off?")
        self.reads += 1
        if self.reads > MAX_READS:
            raise ValueError(f"its header has more than {MAX_READS} numbers and strings")
        return data[offset : offset + nbytes].view(dtype)


class GgufFile:
    """A little-endian GGUF v3 file, mapped into memory: `metadata` by key and `tensors` by name.

    Raises ModelInvalid for anything that is not one, does not lie wholly inside the file, or whose tensors have other
    types than PLAIN and QUANTISED.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                start = file.read(8)
            if start != b"GGUF\3\0\0\0":
                raise ValueError(f"it should start as little-endian GGUF version 3 does, and starts with {start!r}")
            with np.errstate(over="raise"):  # overflow of an offset in 64 bits
                reader = _BoundedReader(self.path)
            self.metadata = {key: self._value(field) for key, field in reader.fields.items()}
        except OSError as error:
            raise ModelInvalid(f"cannot open {self.path}: {error.strerror}") from error
        except (ValueError, LookupError, ArithmeticError, RecursionError) as error:  # what the library raises
            raise self._fail(str(error)) from error
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._map = reader.data.base
        self._check_tensors(reader)

    def _fail(self, what: str) -> ModelInvalid:
        return ModelInvalid(f"{self.path.name} is not a GGUF file we can read: {what[:300]}")

    @staticmethod
    def _value(field: gguf.ReaderField) -> Value:
        if field.types[:2] == [gguf.GGUFValueType.ARRAY] * 2:
            raise ValueError(f"{field.name} is an array of arrays; arrays of numbers or strings are read")
        return field.contents()

    def _check_tensors(self, reader: gguf.GGUFReader) -> None:
        alignment, start = int(reader.alignment), int(reader.data_offset)
        if not 8 <= alignment <= MAX_ALIGNMENT:
            raise self._fail(f"general.alignment must be a power of two from 8 to 2^20, got {alignment}")
        end = start
        for tensor in sorted(self.tensors.values(), key=lambda tensor: tensor.data_offset):
            name, kind, shape = tensor.name, tensor.tensor_type.name, shape_of(tensor)
            if kind not in PLAIN + QUANTISED:
                raise ModelInvalid(f"tensor {name} has type {kind}; supported: {', '.join(PLAIN + QUANTISED)}")
            block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
            if not 1 <= len(shape) <= MAX_DIMS:
                raise self._fail(f"tensor {name} has {len(shape)} axes, 1 to {MAX_DIMS} are accepted")
            if 0 in shape or shape[-1] % block:
                raise self._fail(f"tensor {name} has the shape {list(shape)}, which is not whole blocks of {block}")
            if (tensor.data_offset - start) % alignment:
                raise self._fail(
                    f"tensor {name} starts at byte {tensor.data_offset}, which is not aligned to {alignment}"
                )
            if tensor.n_bytes != math.prod(shape) // block * block_bytes:  # in Python's integers, which do not overflow
                raise self._fail(f"tensor {name} has the shape {list(shape)}, which is beyond 64 bits")
            if tensor.data_offset < end:
                raise self._fail(f"tensor {name} overlaps the one before it")
            end = tensor.data_offset + tensor.n_bytes

    def scalar(self, key: str) -> Scalar | None:
        """Returns the metadata value, None when there is none.  Raises ModelInvalid when it is an array."""
        value = self.metadata.get(key)
        if isinstance(value, list):
            raise ModelInvalid(f"{self.path.name}: metadata {key} must be one value, got an array of {len(value)}")
        return value

    def read(self, name: str) -> np.ndarray:
        """Returns the tensor in float32, dequantised, in numpy's axis order.

        Raises ModelInvalid when a value is NaN or infinite, KeyError when there is no such tensor.
        """
        tensor = self.tensors[name]
        with np.errstate(invalid="ignore", over="ignore"):  # an infinite block scale is reported below
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if not np.isfinite(values).all():
            raise ModelInvalid(f"tensor {name} has values that are NaN or infinite")
        values = np.require(values, requirements="W")  # float32 is returned as the file's own bytes: copy them
        self.let_go(name)
        return values

    def let_go(self, name: str) -> None:
        """Gives back the memory of the pages of a tensor that has been read; another `read` reads the file again."""
        tensor = self.tensors[name]
        assert isinstance(self._map, mmap.mmap)
        release(self._map, tensor.data_offset, tensor.data_offset + tensor.n_bytes)


def shape_of(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    """Returns the shape in numpy's order, slowest axis first."""
    return tuple(reversed(tensor.shape.tolist()))


FAMILIES = ("llama", "qwen2", "qwen3")  # general.architecture, equal to our family name

# our name → the file's; {} is the layer
TENSOR_NAMES = {
    "embed": "token_embd.weight",
    "attn_norm": "blk.{}.attn_norm.weight",
    "q_proj": "blk.{}.attn_q.weight",
    "k_proj": "blk.{}.attn_k.weight",
    "v_proj": "blk.{}.attn_v.weight",
    "o_proj": "blk.{}.attn_output.weight",
    "q_bias": "blk.{}.attn_q.bias",
    "k_bias": "blk.{}.attn_k.bias",
    "v_bias": "blk.{}.attn_v.bias",
    "q_norm": "blk.{}.attn_q_norm.weight",
    "k_norm": "blk.{}.attn_k_norm.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "gate_proj": "blk.{}.ffn_gate.weight",
    "up_proj": "blk.{}.ffn_up.weight",
    "down_proj": "blk.{}.ffn_down.weight",
    "norm": "output_norm.weight",
    "head": "output.weight",
}
ROPE_FREQS = "rope_freqs.weight"


class GgufSource:
    """The base model in a GGUF file: `config`, and `read(name, layer)` by the names of parameters().

    Raises ModelInvalid, naming the key or the tensor, for anything missing, extra, wrong-shaped or unsupported.
    """

    def __init__(self, path: Path):
        self.file = GgufFile(path)
        self.metadata: Mapping[str, Value] = self.file.metadata
        self.config = _config(self.file)
        found = {name: shape_of(tensor) for name, tensor in self.file.tensors.items()}
        check_tensors(self.config, TENSOR_NAMES, found, unread={ROPE_FREQS}, where=self.file.path.name)

    @property
    def quantised(self) -> list[str]:
        """Returns the types of the tensors that are not plain floating point."""
        return sorted({tensor.tensor_type.name for tensor in self.file.tensors.values()} - set(PLAIN))

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """Returns one array of the base in float32: linears [X, Y], embed [V, D], norms and biases flat.

        layer: None for embed, norm and head.  Query and key rows are returned in the order of half-split rope.
        """
        weight = self.file.read(TENSOR_NAMES[name].format(layer))
        if self.config.family == "llama" and name in ("q_proj", "k_proj"):
            heads = self.config.heads if name == "q_proj" else self.config.kv_heads
            out, x = weight.shape
            weight = weight.reshape(heads, out // heads // 2, 2, x).swapaxes(1, 2).reshape(out, x)
        return weight.T if name in LINEARS else weight


def to_gguf_rows(config: ModelConfig, target: str, rows: np.ndarray) -> np.ndarray:
    """Returns rows [Y, ...] of a linear in the order of a GGUF file: the inverse of what `GgufSource.read` does."""
    if config.family not in ("llama", "mistral") or target not in ("q_proj", "k_proj"):
        return rows
    heads = config.heads if target == "q_proj" else config.kv_heads
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _config(file: GgufFile) -> ModelConfig:
    """Returns the ModelConfig of the metadata."""
    name, family = file.path.name, file.scalar("general.architecture")
    if family not in FAMILIES:
        shown = repr(family)[:60]
        raise ModelInvalid(f"{name} has general.architecture {shown}; supported: {', '.join(FAMILIES)}")

    def number(key: str, kind: type[int] | type[float]) -> int | float:
        value = file.scalar(f"{family}.{key}")
        if isinstance(value, (bool, str)) or not isinstance(value, kind) or not 0 < value < math.inf:
            raise ModelInvalid(f"{name}: metadata {family}.{key} must be a positive number, got {repr(value)[:60]}")
        return value

    def require(key: str, wanted: int | float) -> None:
        if file.scalar(f"{family}.{key}") not in (None, wanted):
            raise ModelInvalid(f"{name}: metadata {family}.{key} is not supported unless it is {wanted} or absent")

    for key in ("expert_count", "attention.sliding_window"):
        require(key, 0)
    d_model, heads = int(number("embedding_length", int)), int(number("attention.head_count", int))
    kv_heads = int(number("attention.head_count_kv", int))
    head_dim = d_model // heads  # the meaning of an absent key_length in this format
    if file.scalar(f"{family}.attention.key_length") is not None:
        head_dim = int(number("attention.key_length", int))
    for key in ("attention.value_length", "rope.dimension_count"):
        require(key, head_dim)
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        require(key, 1)
    layers = int(number("block_count", int))
    if layers > len(file.tensors):  # also bounds the tensor names we list
        raise ModelInvalid(f"{name}: {family}.block_count is {layers}, but the file has {len(file.tensors)} tensors")
    embed = shape_of(file.tensors["token_embd.weight"]) if "token_embd.weight" in file.tensors else ()
    if len(embed) != 2:
        raise ModelInvalid(f"{name} has no two-dimensional tensor token_embd.weight")
    theta = float(number("rope.freq_base", float))
    return ModelConfig(
        family=str(family),
        layers=layers,
        d_model=d_model,
        d_ff=int(number("feed_forward_length", int)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=embed[0],
        context=int(number("context_length", int)),
        norm_eps=float(number("attention.layer_norm_rms_epsilon", float)),
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, str(family), head_dim, theta),
        window=None,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tied="output.weight" not in file.tensors,
    )


def _rope_scaling(file: GgufFile, family: str, head_dim: int, theta: float) -> Llama3Rope | None:
    """Returns the Llama-3 scaling whose factors the file stores, or None.  Raises ModelInvalid for another scaling."""
    name, kind = file.path.name, file.scalar(f"{family}.rope.scaling.type")
    if kind not in (None, "none"):
        raise ModelInvalid(f"{name}: {family}.rope.scaling.type {repr(kind)[:60]} is not supported; supported: none")
    if ROPE_FREQS not in file.tensors:
        return None
    stored_H = file.read(ROPE_FREQS)
    if stored_H.shape != (head_dim // 2,):
        raise ModelInvalid(f"tensor {ROPE_FREQS} has shape {list(stored_H.shape)}, expected {[head_dim // 2]}")
    # The file stores only the factors.  All Llama 3.1, 3.2 and 3.3 have the same limits; we check that these give them.
    rope = Llama3Rope(factor=float(stored_H.max()), low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    frequency = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if not np.allclose(stored_H, frequency / rope.scaled(frequency), rtol=1e-4, atol=0):
        raise ModelInvalid(f"tensor {ROPE_FREQS} does not hold Llama-3 factors (limits 1 and 4, context 8192)")
    return rope
