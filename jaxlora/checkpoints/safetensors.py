"""Reads safetensors files by strict rules: the header of a base's or an adapter's file, and a base's file, mapped.

    8 bytes     length N of the header, little-endian
    N bytes     JSON: name → {"dtype", "shape", "data_offsets": [begin, end]}, and "__metadata__"
    the rest    the values, without gaps or overlaps

These files come from outside, so we read the (small) format ourselves: the `safetensors` library accepts repeated names
and does not bound how much it reads.  All checks happen before a value is read: an invalid file costs one header read.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from jaxlora.core.errors import ModelInvalid

MAX_HEADER_BYTES = 16 << 20  # of a base's file
MAX_AXES = 8
MAX_COUNT = 2**48  # limit of a size or an offset in a file
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Location of one tensor in a file.  `dtype` is the file's own name for it, which may be one we do not read."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes of the file
    end: int


def strict_json(text: bytes) -> dict[str, object]:
    """Returns the JSON object in `text`.

    Raises ValueError, whose message follows the file's name, when it is not UTF-8, not an object, nested too
    deep, or has a key twice, NaN or Infinity.
    """

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        table: dict[str, object] = {}
        for key, value in items:
            if key in table:
                raise ValueError(f"key {key[:200]} comes twice")
            table[key] = value
        return table

    def constant(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"is not valid JSON: {str(e)[:200]}") from None
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object, got {type(value).__name__}")
    return value


def read_header(file: BinaryIO, size: int, *, max_bytes: int) -> dict[str, StoredTensor]:
    """Returns name → StoredTensor of a file of `size` bytes, in file order.  max_bytes: limit of the header.

    Raises ValueError when the header does not describe this file.  Reads no values.
    """
    start = file.read(8)
    if len(start) < 8:
        raise ValueError(f"it has {size} bytes")
    length = int.from_bytes(start, "little")
    if length > size - 8:
        raise ValueError(f"it is truncated: its header claims {length} bytes of a file of {size}")
    if length > max_bytes:
        raise ValueError(f"its header has {length} bytes; at most {max_bytes}")
    try:
        table = strict_json(file.read(length))
    except ValueError as e:
        raise ValueError(f"its header {e}") from None
    table.pop("__metadata__", None)
    place = 8 + length
    tensors = {name: _stored(name, value, place) for name, value in table.items()}
    for tensor in sorted(tensors.values(), key=lambda t: (t.begin, t.end)):
        if tensor.begin != place or tensor.end < tensor.begin:
            raise ValueError(f"the bytes of {tensor.name[:200]} overlap another tensor's or leave a gap")
        place = tensor.end
    if place != size:
        raise ValueError(f"it has {size} bytes, its header describes {place}; is it cut off?")
    return tensors


def _stored(name: str, entry: object, base: int) -> StoredTensor:
    shown = name[:200]
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {shown} must hold exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise ValueError(f"the dtype of {shown} must be a name")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"shape and data_offsets of {shown} must be short lists of whole numbers")
    begin, end = offsets
    if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"the {end - begin} bytes of {shown} do not hold {dtype} of shape {shape}")
    return StoredTensor(name, dtype, tuple(shape), base + begin, base + end)


def _counts(value: object) -> bool:
    """Returns whether these are few counts, each within any file's size: a product of many takes a minute."""
    return (
        isinstance(value, list) and len(value) <= MAX_AXES and all(type(n) is int and 0 <= n < MAX_COUNT for n in value)
    )


class SafetensorsMap:
    """A base's safetensors file, mapped into memory: `tensors` by name, and `read(name)`.

    Raises ModelInvalid for a header that does not describe this file.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            size = self.path.stat().st_size
            with self.path.open("rb") as file:
                self.tensors = read_header(file, size, max_bytes=MAX_HEADER_BYTES)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._data = np.frombuffer(self._map, np.uint8)
        except OSError as error:
            raise ModelInvalid(f"cannot open {self.path}: {error.strerror}") from error
        except ValueError as error:
            raise ModelInvalid(f"{self.path.name} is not a safetensors file we can read: {error}") from error

    def read(self, name: str) -> np.ndarray:
        """Returns a view of the stored tensor, in the file's dtype.

        Raises ModelInvalid for a dtype other than F32, F16 and BF16, KeyError when there is no such tensor.
        """
        tensor = self.tensors[name]
        if tensor.dtype not in DTYPES:
            raise ModelInvalid(f"tensor {name} has dtype {tensor.dtype[:20]}; supported: {', '.join(DTYPES)}")
        return self._data[tensor.begin : tensor.end].view(DTYPES[tensor.dtype]).reshape(tensor.shape)

    def let_go(self, name: str) -> None:
        """Gives back the memory of the pages of a tensor that has been read; another `read` reads the file again."""
        tensor = self.tensors[name]
        release(self._map, tensor.begin, tensor.end)


def release(mapped: mmap.mmap, begin: int, end: int) -> None:
    """Drops the pages of a file's mapping that lie wholly in these bytes from this process's memory."""
    begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    end = end // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end and hasattr(mmap, "MADV_DONTNEED"):  # absent on Windows
        mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)
