"""Reads the tensors of a PEFT file: its header, by stricter rules than a base's, and the meaning of each key.

The header is at most 1 MB and every dtype is floating point.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from jaxlora.checkpoints.safetensors import DTYPES, StoredTensor, read_header, strict_json
from jaxlora.core.errors import AdapterInvalid
from jaxlora.peft.config import (
    DORA,
    EMBEDDING_LORA,
    LORA_BIAS,
    TARGET_PARAMETERS,
    TRAINABLE_TOKENS,
    replaces_base,
)
from jaxlora.peft.reasons import Reasons, shown

MAX_HEADER_BYTES = 1_000_000
PICKLE = "pickle weights are not accepted; convert to adapter_model.safetensors"
PREFIX = "base_model.model."
HEAD_COPY = "lm_head.base_layer.weight"
LORA_KEY = re.compile(r"(?P<path>.+)\.lora_(?P<half>[AB])(?:\.(?P<name>[^.]+))?\.weight")


def parse_json(text: bytes, what: str) -> dict[str, object]:
    """Returns the JSON object in `text`.  Raises AdapterInvalid where `strict_json` raises ValueError."""
    try:
        return strict_json(text)
    except ValueError as e:
        raise AdapterInvalid(f"{what} {e}") from None


def read_tensors(file: BinaryIO, size: int) -> dict[str, StoredTensor]:
    """Returns name → StoredTensor of a PEFT file of `size` bytes, in file order.

    Raises AdapterInvalid when the file breaks a rule of the format or one of ours.  Reads no values.
    """
    start = file.read(8)
    # A valid length may begin with the byte 0x80 too, so the magic counts only where the length is impossible.
    impossible = len(start) < 8 or int.from_bytes(start, "little") > size - 8
    if impossible and (start[:1] == b"\x80" or start[:4] == b"PK\x03\x04"):
        raise AdapterInvalid(PICKLE)
    file.seek(0)
    try:
        tensors = read_header(file, size, max_bytes=MAX_HEADER_BYTES)
    except ValueError as e:
        raise AdapterInvalid(f"adapter_model.safetensors is not a safetensors file we can read: {e}") from None
    for tensor in tensors.values():
        if tensor.dtype not in DTYPES:
            raise AdapterInvalid(
                f"{shown(tensor.name)} has dtype {shown(tensor.dtype)}; only {', '.join(DTYPES)} are read"
            )
    return tensors


def read_tensor(file: BinaryIO, entry: StoredTensor) -> np.ndarray:
    """Returns the values in the file's own dtype.  Raises AdapterInvalid when the file has shrunk."""
    file.seek(entry.begin)
    data = file.read(entry.end - entry.begin)
    if len(data) != entry.end - entry.begin:
        raise AdapterInvalid(f"{shown(entry.name)}: the file ended before its last byte")
    return np.frombuffer(data, DTYPES[entry.dtype]).reshape(entry.shape)


@dataclass(slots=True)
class AdapterKeys:
    """The keys of a file, grouped by meaning."""

    pairs: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)  # path → "A" or "B" → tensor
    extra: list[str] = field(default_factory=list)  # keys without a meaning here
    head_copy: StoredTensor | None = None  # PEFT saves the base's lm_head beside a LoRA on it
    prefixed: bool = True


def sort_keys(header: dict[str, StoredTensor], bias: str, reasons: Reasons) -> AdapterKeys:
    """Groups keys as A and B of each module path.  Adds a reason for each tensor of an unsupported feature.

    The prefix may be missing, but then from every key.  A key may contain an adapter's name, but only one name.
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
            reasons.unsupported(reason)
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
        reasons.unsupported(replaces_base(full))
    return keys


def _feature(key: str, bias: str) -> str | None:
    """Returns the message for a key that another kind of adapter writes."""
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
