"""A safetensors file mapped into memory: header checked, one tensor read at a time, bfloat16 without torch.

The `safetensors` library accepts duplicate names and makes no promise on how much it reads; a base model is large and
comes from outside, so we read the (small) format ourselves.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxlora.errors import ModelInvalid

MAX_HEADER_BYTES = 16 << 20
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of the header.  `dtype` is the file's own name for it, which may be one we do not read."""

    shape: tuple[int, ...]
    dtype: str
    start: int  # byte in the file
    end: int


class SafetensorsMap:
    """`tensors` by name of a safetensors file, and `read(name)`.

    Raises ModelInvalid for a header that does not describe this file.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            size = self.path.stat().st_size
            data = np.memmap(self.path, dtype=np.uint8, mode="r") if size else np.zeros(0, np.uint8)
        except OSError as error:
            raise ModelInvalid(f"cannot open {self.path}: {error.strerror}") from error
        self._data = np.asarray(data)
        if size < 8:
            raise self._fail(f"it has {size} bytes")
        length = int(self._data[:8].view("<u8")[0])
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise self._fail(f"its header claims {length} bytes of a file of {size} (at most {MAX_HEADER_BYTES})")
        header = _parse(self._data[8 : 8 + length].tobytes(), self.path.name)
        header.pop("__metadata__", None)
        self.tensors = {name: self._stored(name, row, 8 + length) for name, row in header.items()}
        self._check_layout(8 + length)

    def _fail(self, what: str) -> ModelInvalid:
        return ModelInvalid(f"{self.path.name} is not a safetensors file we can read: {what}")

    def _stored(self, name: str, row: object, start: int) -> StoredTensor:
        keys = {"dtype", "shape", "data_offsets"}
        if not isinstance(row, dict) or set(row) != keys or not isinstance(row["dtype"], str):
            raise self._fail(f"the entry of {name[:100]} must have exactly dtype, shape and data_offsets")
        for key in ("shape", "data_offsets"):
            values = row[key]
            if not isinstance(values, list) or any(type(value) is not int or value < 0 for value in values):
                raise self._fail(f"{key} of {name[:100]} must be a list of whole numbers")
        if len(row["data_offsets"]) != 2 or len(row["shape"]) > 8:
            raise self._fail(f"{name[:100]} must have two offsets and at most 8 axes")
        first, last = row["data_offsets"]
        dtype = DTYPES.get(row["dtype"])
        if dtype is not None and last - first != math.prod(row["shape"]) * dtype.itemsize:
            raise self._fail(f"{name[:100]} has {last - first} bytes, which its shape and dtype do not give")
        return StoredTensor(tuple(row["shape"]), row["dtype"], start + first, start + last)

    def _check_layout(self, start: int) -> None:
        """The tensors cover the rest of the file without gap or overlap, as the format demands."""
        at = start
        for name, tensor in sorted(self.tensors.items(), key=lambda item: (item[1].start, item[1].end)):
            if tensor.start != at or tensor.end < tensor.start:
                raise self._fail(f"{name[:100]} lies at {tensor.start}, expected {at}")
            at = tensor.end
        if at != len(self._data):
            raise self._fail(f"its tensors end at byte {at}, the file at {len(self._data)}; is it cut off?")

    def read(self, name: str) -> np.ndarray:
        """A view of the stored tensor, in the file's dtype.

        Raises ModelInvalid for a dtype other than F32, F16 and BF16, KeyError when there is no such tensor.
        """
        tensor = self.tensors[name]
        if tensor.dtype not in DTYPES:
            raise ModelInvalid(f"tensor {name} has dtype {tensor.dtype[:20]}; supported: {', '.join(DTYPES)}")
        return self._data[tensor.start : tensor.end].view(DTYPES[tensor.dtype]).reshape(tensor.shape)


def _parse(raw: bytes, name: str) -> dict[str, object]:
    """The header object; duplicate names are refused at every level."""

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        table = dict(items)
        if len(table) != len(items):
            raise ValueError("a name appears twice")
        return table

    try:
        header = json.loads(raw, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        reason = str(error)[:200]
        raise ModelInvalid(f"{name} is not a safetensors file we can read: its header is not JSON: {reason}") from error
    if not isinstance(header, dict):
        raise ModelInvalid(f"{name} is not a safetensors file we can read: its header is not a JSON object")
    return header
