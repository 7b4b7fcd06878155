"""GGUF v3 files: a bounds-checked reader, and the base model in one.

Everything in a header is checked against the file's length before it is used, so a hostile file costs no memory and
little time.  Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Shape letters: L layers, D model, F MLP, N query heads, K kv heads, H head, V vocabulary, X Y features in, out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxlora.errors import ModelInvalid
from jaxlora.model_config import LINEARS, Llama3Rope, ModelConfig, check_tensors

MAX_KEYS = 4096
MAX_TENSORS = 65_536
MAX_DIMS = 4
MAX_ARRAY_ITEMS = 1 << 23  # in all arrays of strings together; real vocabularies and merges stay far below
MAX_NAME_BYTES = 65_535

STRING, ARRAY = 8, 9
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}

TYPE_NAMES = (
    {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K"}
    | {12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"}
    | {20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"}
    | {29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}
)
# type → (elements in a block, the block as it lies in the file)
BLOCKS = {
    "F32": (1, np.dtype("<f4")),
    "F16": (1, np.dtype("<f2")),
    "BF16": (1, np.dtype("<u2")),
    "Q8_0": (32, np.dtype([("scale", "<f2"), ("level", "i1", 32)])),
    "Q4_1": (32, np.dtype([("scale", "<f2"), ("low", "<f2"), ("level", "u1", 16)])),
}

Value = bool | int | float | str | np.ndarray | list[str]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of the directory; `shape` in numpy's order (slowest axis first)."""

    name: str
    shape: tuple[int, ...]
    type: str
    start: int  # byte in the file
    nbytes: int


class _Cursor:
    """Reads forward through the header; every read is checked against the end of the file."""

    def __init__(self, data: np.ndarray, name: str):
        self.data, self.name, self.at = data, name, 0
        self.items_left = MAX_ARRAY_ITEMS

    def fail(self, what: str) -> ModelInvalid:
        return ModelInvalid(f"{self.name} is not a GGUF file we can read: {what}")

    def take(self, nbytes: int, what: str) -> np.ndarray:
        """The next `nbytes` bytes."""
        if nbytes > len(self.data) - self.at:
            left = len(self.data) - self.at
            raise self.fail(f"{what} at byte {self.at} needs {nbytes} bytes, the file has {left} left")
        part = self.data[self.at : self.at + nbytes]
        self.at += nbytes
        return part

    def number(self, kind: str, what: str) -> int | float | bool:
        dtype = np.dtype(kind)
        return self.take(dtype.itemsize, what).view(dtype)[0].item()

    def count(self, limit: int, what: str) -> int:
        value = int(self.number("<u8", what))
        if value > limit:
            raise self.fail(f"{what} is {value}, at most {limit} is accepted")
        return value

    def string(self, limit: int, what: str) -> str:
        raw = self.take(self.count(limit, f"the length of {what}"), what).tobytes()
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8") from error

    def value(self, key: str) -> Value:
        kind = int(self.number("<u4", f"the type of {key}"))
        if kind == STRING:
            return self.string(len(self.data), key)
        if kind == ARRAY:
            return self.array(key)
        if kind not in SCALARS:
            raise self.fail(f"{key} has the unknown value type {kind}")
        return self.number(SCALARS[kind], key)

    def array(self, key: str) -> np.ndarray | list[str]:
        kind = int(self.number("<u4", f"the item type of {key}"))
        if kind != STRING and kind not in SCALARS:
            raise self.fail(f"{key} is an array of value type {kind}; arrays of numbers or strings are read")
        least = 8 if kind == STRING else np.dtype(SCALARS[kind]).itemsize  # bytes of the smallest item
        count = self.count((len(self.data) - self.at) // least, f"the number of items of {key}")
        if kind != STRING:
            return self.take(count * least, key).view(SCALARS[kind])
        self.items_left -= count
        if self.items_left < 0:
            raise self.fail(f"{key} brings the strings in the header above {MAX_ARRAY_ITEMS}")
        return [self.string(len(self.data), f"an item of {key}") for _ in range(count)]


class GgufFile:
    """`metadata` by key and `tensors` by name of a GGUF v3 file, mapped into memory.

    Raises ModelInvalid for anything that is not one, or does not lie wholly inside the file.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            empty = self.path.stat().st_size == 0
            data = np.zeros(0, np.uint8) if empty else np.memmap(self.path, dtype=np.uint8, mode="r")
        except OSError as error:
            raise ModelInvalid(f"cannot open {self.path}: {error.strerror}") from error
        self._data = np.asarray(data)
        cursor = _Cursor(self._data, self.path.name)
        if cursor.take(4, "the magic").tobytes() != b"GGUF":
            raise cursor.fail("it does not start with the letters GGUF")
        if (version := int(cursor.number("<u4", "the version"))) != 3:
            raise cursor.fail(f"it has version {version}; little-endian version 3 is read")
        tensor_count = cursor.count(MAX_TENSORS, "the number of tensors")
        key_count = cursor.count(MAX_KEYS, "the number of metadata keys")
        self.metadata = self._read_metadata(cursor, key_count)
        self.tensors = self._read_directory(cursor, tensor_count)

    @staticmethod
    def _read_metadata(cursor: _Cursor, key_count: int) -> dict[str, Value]:
        metadata: dict[str, Value] = {}
        for _ in range(key_count):
            key = cursor.string(MAX_NAME_BYTES, "a metadata key")
            if key in metadata:
                raise cursor.fail(f"the key {key} appears twice")
            metadata[key] = cursor.value(key)
        return metadata

    def _read_directory(self, cursor: _Cursor, tensor_count: int) -> dict[str, TensorInfo]:
        alignment = self.metadata.get("general.alignment", 32)  # 32 is the format's own default
        if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise cursor.fail(f"general.alignment must be a power of two from 8 to 2^20, got {alignment!r}"[:200])
        rows = [self._read_info(cursor, alignment) for _ in range(tensor_count)]
        start = -(-cursor.at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        end = start
        for info in sorted(rows, key=lambda info: info.start):
            at = start + info.start
            if info.name in tensors:
                raise cursor.fail(f"the tensor {info.name} appears twice")
            if at + info.nbytes > len(self._data):
                raise cursor.fail(
                    f"tensor {info.name} ends at byte {at + info.nbytes}, the file at {len(self._data)}; is it cut off?"
                )
            if at < end:
                raise cursor.fail(f"tensor {info.name} overlaps the one before it")
            end = at + info.nbytes
            tensors[info.name] = TensorInfo(info.name, info.shape, info.type, at, info.nbytes)
        return tensors

    @staticmethod
    def _read_info(cursor: _Cursor, alignment: int) -> TensorInfo:
        """A directory row; its `start` still counts from the beginning of the data."""
        name = cursor.string(MAX_NAME_BYTES, "a tensor name")
        dims = int(cursor.number("<u4", f"the rank of {name}"))
        if not 1 <= dims <= MAX_DIMS:
            raise cursor.fail(f"tensor {name} has {dims} axes, 1 to {MAX_DIMS} are accepted")
        shape = tuple(int(cursor.number("<u8", f"the shape of {name}")) for _ in range(dims))
        code = int(cursor.number("<u4", f"the type of {name}"))
        offset = int(cursor.number("<u8", f"the offset of {name}"))
        kind = TYPE_NAMES.get(code, f"number {code}")
        if kind not in BLOCKS:
            raise ModelInvalid(f"tensor {name} has type {kind}; supported: {', '.join(BLOCKS)}")
        block, dtype = BLOCKS[kind]
        if 0 in shape or shape[0] % block:
            raise cursor.fail(f"tensor {name} has the shape {list(shape)}, which is not whole blocks of {block}")
        if offset % alignment:
            raise cursor.fail(f"tensor {name} starts at {offset}, not a multiple of {alignment}")
        nbytes = math.prod(shape) // block * dtype.itemsize  # Python integers: no overflow
        return TensorInfo(name, shape[::-1], kind, offset, nbytes)

    def scalar(self, key: str) -> bool | int | float | str | None:
        """The metadata value, None when there is none.  Raises ModelInvalid when it is an array."""
        value = self.metadata.get(key)
        if isinstance(value, (np.ndarray, list)):
            raise ModelInvalid(f"{self.path.name}: metadata {key} must be one value, got an array of {len(value)}")
        return value

    def read(self, name: str) -> np.ndarray:
        """The tensor in float32, dequantised, in numpy's axis order.

        Raises ModelInvalid when a value is NaN or infinite, KeyError when there is no such tensor.
        """
        info = self.tensors[name]
        _, dtype = BLOCKS[info.type]
        with np.errstate(invalid="ignore"):  # an infinite block scale: told below
            values = dequantise(self._data[info.start : info.start + info.nbytes].view(dtype), info.type)
        if not np.isfinite(values).all():
            raise ModelInvalid(f"tensor {name} has values that are NaN or infinite")
        return values.reshape(info.shape)


def dequantise(blocks: np.ndarray, kind: str) -> np.ndarray:
    """Flat float32 values of `blocks`, an array of the block dtype of `kind` (see BLOCKS)."""
    if kind == "BF16":
        return (blocks.astype(np.uint32) << 16).view(np.float32)
    if kind in ("F32", "F16"):
        return blocks.astype(np.float32)
    scale = blocks["scale"].astype(np.float32)[:, None]
    if kind == "Q8_0":
        return (scale * blocks["level"].astype(np.float32)).reshape(-1)
    if kind == "Q4_1":
        level = blocks["level"]
        level = np.concatenate([level & 15, level >> 4], axis=1).astype(np.float32)  # low nibbles come first
        return (scale * level + blocks["low"].astype(np.float32)[:, None]).reshape(-1)
    raise ValueError(f"no dequantiser for {kind}")


FAMILIES = ("llama", "qwen2", "qwen3")  # general.architecture, and our family of the same name

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
    """The base model in a GGUF file: `config`, and `read(name, layer)` by the names of model.parameters().

    Raises ModelInvalid, naming the key or the tensor, for anything missing, extra, wrong-shaped or unsupported.
    """

    def __init__(self, path: Path):
        self.file = GgufFile(path)
        self.metadata: Mapping[str, Value] = self.file.metadata
        self.config = _config(self.file)
        found = {name: info.shape for name, info in self.file.tensors.items()}
        check_tensors(self.config, TENSOR_NAMES, found, unread={ROPE_FREQS}, where=self.file.path.name)

    @property
    def quantised(self) -> list[str]:
        """The types of its tensors that are not plain floating point."""
        return sorted({info.type for info in self.file.tensors.values()} - {"F32", "F16", "BF16"})

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """One array of the base in float32: linears [X, Y], embed [V, D], norms and biases flat.

        `layer` is None for embed, norm and head.  Query and key rows come back in the order of half-split rope.
        """
        weight = self.file.read(TENSOR_NAMES[name].format(layer))
        if self.config.family == "llama" and name in ("q_proj", "k_proj"):
            heads = self.config.heads if name == "q_proj" else self.config.kv_heads
            out, x = weight.shape
            weight = weight.reshape(heads, out // heads // 2, 2, x).swapaxes(1, 2).reshape(out, x)
        return np.ascontiguousarray(weight.T) if name in LINEARS else weight


def to_gguf_rows(config: ModelConfig, target: str, rows: np.ndarray) -> np.ndarray:
    """Rows [Y, ...] of a linear in the order a GGUF file stores them: what `GgufSource.read` undoes."""
    if config.family not in ("llama", "mistral") or target not in ("q_proj", "k_proj"):
        return rows
    heads = config.heads if target == "q_proj" else config.kv_heads
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _config(file: GgufFile) -> ModelConfig:
    """ModelConfig from the metadata."""
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
    head_dim = d_model // heads  # what an absent key_length means in this format
    if file.scalar(f"{family}.attention.key_length") is not None:
        head_dim = int(number("attention.key_length", int))
    for key in ("attention.value_length", "rope.dimension_count"):
        require(key, head_dim)
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        require(key, 1)
    layers = int(number("block_count", int))
    if layers > len(file.tensors):  # also keeps a false count from making us list tensors for ever
        raise ModelInvalid(f"{name}: {family}.block_count is {layers}, but the file has {len(file.tensors)} tensors")
    embed = file.tensors.get("token_embd.weight")
    if embed is None or len(embed.shape) != 2:
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
        vocab=embed.shape[0],
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
    """None, or the Llama-3 scaling whose factors the file stores.  Raises ModelInvalid for any other scaling."""
    name, kind = file.path.name, file.scalar(f"{family}.rope.scaling.type")
    if kind not in (None, "none"):
        raise ModelInvalid(f"{name}: {family}.rope.scaling.type {repr(kind)[:60]} is not supported; supported: none")
    if ROPE_FREQS not in file.tensors:
        return None
    stored_H = file.read(ROPE_FREQS)
    if stored_H.shape != (head_dim // 2,):
        raise ModelInvalid(f"tensor {ROPE_FREQS} has shape {list(stored_H.shape)}, expected {[head_dim // 2]}")
    # The file keeps only the result.  Every Llama 3.1, 3.2 and 3.3 has the same limits, so we check that they give it.
    rope = Llama3Rope(factor=float(stored_H.max()), low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    frequency = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if not np.allclose(stored_H, frequency / rope.scaled(frequency), rtol=1e-4, atol=0):
        raise ModelInvalid(f"tensor {ROPE_FREQS} does not hold Llama-3 factors (limits 1 and 4, context 8192)")
    return rope
