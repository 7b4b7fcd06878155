"""The tensors of a PEFT file: the safetensors header, read by strict rules, and what each key means.

    8 bytes     length N of the header, little-endian
    N bytes     JSON: name → {"dtype", "shape", "data_offsets": [begin, end]}, and "__metadata__"
    the rest    the values, without gaps or overlaps

Stricter than the format asks: the header is at most 1 MB, no key comes twice, only float dtypes.
All of this happens before a value is read, so a file that lies costs a header.
Source: the safetensors format description.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import BinaryIO

import ml_dtypes
import numpy as np

from jaxlora.errors import AdapterInvalid
from jaxlora.peft_config import (
    DORA,
    EMBEDDING_LORA,
    LORA_BIAS,
    TARGET_PARAMETERS,
    TRAINABLE_TOKENS,
    Reasons,
    replaces_base,
    shown,
)

MAX_HEADER_BYTES = 1_000_000
MAX_AXES = 8
MAX_COUNT = 2**48  # of a size or a place in a file
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
PICKLE = "pickle weights are not accepted; convert to adapter_model.safetensors"
PREFIX = "base_model.model."
HEAD_COPY = "lm_head.base_layer.weight"
LORA_KEY = re.compile(r"(?P<path>.+)\.lora_(?P<half>[AB])(?:\.(?P<name>[^.]+))?\.weight")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: begin and end are bytes of the file."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def parse_json(text: bytes, what: str) -> dict[str, object]:
    """The JSON object in `text`.

    Raises AdapterInvalid when it is not UTF-8, not an object, nested too deep, or has a key twice, NaN or Infinity.
    """

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        table: dict[str, object] = {}
        for key, value in items:
            if key in table:
                raise ValueError(f"key {shown(key)} comes twice")
            table[key] = value
        return table

    def constant(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as e:
        raise AdapterInvalid(f"{what} is not valid JSON: {str(e)[:200]}") from None
    if not isinstance(value, dict):
        raise AdapterInvalid(f"{what} must be a JSON object, got {type(value).__name__}")
    return value


def read_header(file: BinaryIO, size: int) -> dict[str, TensorEntry]:
    """name → TensorEntry of a safetensors file of `size` bytes, in file order.

    Raises AdapterInvalid when the file breaks a rule of the format or one of ours.  Reads no values.
    """
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        # A true length may begin with the byte 0x80 too, so the magic counts only where the length is impossible.
        if start[:1] == b"\x80" or start[:4] == b"PK\x03\x04":
            raise AdapterInvalid(PICKLE)
        raise AdapterInvalid("adapter_model.safetensors is truncated or not a safetensors file")
    if length > MAX_HEADER_BYTES:
        raise AdapterInvalid(f"the header of adapter_model.safetensors has {length} bytes; at most {MAX_HEADER_BYTES}")
    table = parse_json(file.read(length), "the header of adapter_model.safetensors")
    table.pop("__metadata__", None)
    entries = [_entry(name, value, 8 + length) for name, value in table.items()]
    place = 8 + length
    for entry in sorted(entries, key=lambda e: (e.begin, e.end)):
        if entry.begin != place:
            raise AdapterInvalid(f"{shown(entry.name)}: its bytes overlap another tensor's or leave a gap")
        place = entry.end
    if place != size:
        raise AdapterInvalid(f"adapter_model.safetensors has {size} bytes, its header describes {place}")
    return {entry.name: entry for entry in entries}


def _entry(name: str, value: object, base: int) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise AdapterInvalid(f"{shown(name)}: the header entry must hold dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise AdapterInvalid(f"{shown(name)} has dtype {shown(dtype)}; only {', '.join(DTYPES)} are read")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise AdapterInvalid(f"{shown(name)}: shape and data_offsets must be short lists of whole numbers")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise AdapterInvalid(f"{shown(name)}: {end - begin} bytes do not hold {dtype} of shape {shown(shape)}")
    return TensorEntry(name, DTYPES[dtype], tuple(shape), base + begin, base + end)


def _counts(value: object) -> bool:
    """Whether these are few and no number among them is beyond any file: a product of many takes a minute."""
    return (
        isinstance(value, list)
        and len(value) <= MAX_AXES
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < MAX_COUNT for n in value)
    )


def read_tensor(file: BinaryIO, entry: TensorEntry) -> np.ndarray:
    """The values in the file's own dtype.  Raises AdapterInvalid when the file has shrunk."""
    file.seek(entry.begin)
    data = file.read(entry.end - entry.begin)
    if len(data) != entry.end - entry.begin:
        raise AdapterInvalid(f"{shown(entry.name)}: the file ended before its last byte")
    return np.frombuffer(data, entry.dtype).reshape(entry.shape)


@dataclass(slots=True)
class AdapterKeys:
    """The keys of a file by what they mean."""

    pairs: dict[str, dict[str, TensorEntry]] = field(default_factory=dict)  # path → "A" or "B" → tensor
    extra: list[str] = field(default_factory=list)  # keys without a meaning here
    head_copy: TensorEntry | None = None  # PEFT saves the base's lm_head beside a LoRA on it
    prefixed: bool = True


def sort_keys(header: dict[str, TensorEntry], bias: str, reasons: Reasons) -> AdapterKeys:
    """The A and B of each module path.  Adds a reason for each tensor that belongs to a feature we do not hold.

    The prefix may be missing, but then from every key.  An adapter's name may be left in a key, but only one name.
    """
    keys = AdapterKeys(prefixed=any(name.startswith(PREFIX) for name in header))
    left_over: set[str | None] = set()
    full: list[str] = []
    for name, entry in header.items():
        if keys.prefixed and not name.startswith(PREFIX):
            keys.extra.append(name)
            continue
        key = name.removeprefix(PREFIX)
        match = LORA_KEY.fullmatch(key)
        if reason := _feature(key, bias):
            reasons.add(reason)
        elif key == HEAD_COPY:
            keys.head_copy = entry
        elif match:
            pair = keys.pairs.setdefault(match["path"], {})
            left_over.add(match["name"])
            if match["half"] in pair or len(left_over) > 1:
                keys.extra.append(name)
            else:
                pair[match["half"]] = entry
        elif key.endswith(".weight") and ".lora_" not in key:
            full.append(key.removesuffix(".weight").removesuffix(".base_layer").rpartition(".")[2])
        else:
            keys.extra.append(name)
    if full:
        reasons.add(replaces_base(full))
    return keys


def _feature(key: str, bias: str) -> str | None:
    """The message for a key that another kind of adapter writes."""
    if ".lora_magnitude_vector" in key:
        return DORA
    if re.search(r"\.lora_B(\.[^.]+)?\.bias$", key):
        return LORA_BIAS
    if "lora_embedding_" in key or re.search(r"(^|\.)embed_tokens\.(lora_|base_layer\.)", key):
        return EMBEDDING_LORA
    if "trainable_tokens_" in key:
        return TRAINABLE_TOKENS
    if ".experts." in key:
        return TARGET_PARAMETERS
    if key.endswith(".bias"):
        return f"trained biases are not supported (bias={'lora_only' if bias == 'none' else shown(bias)})"
    return None
