"""Block sizes of the TPU kernels: ONE table, one row for each kind of device.

The kind is that of the abstract device a program is traced for, else of the default device when it is a TPU, else the
row `any TPU`, whose sizes fit every generation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

LANES = 128  # the last axis of a tile
TILE_BYTES = 32 * LANES  # 8 rows of 4 bytes, 16 of 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """Memory and block limits of one kind of TPU."""

    vmem_bytes: int  # on-chip memory a kernel may ask for
    tokens: int  # largest block of lane tokens

    @property
    def block_bytes(self) -> int:
        """Returns the bytes for a kernel's double-buffered blocks: the rest is for intermediate values."""
        return self.vmem_bytes * 3 // 4


MiB = 2**20
TABLE = {
    "any TPU": Blocks(vmem_bytes=16 * MiB, tokens=256),
    "TPU v4": Blocks(vmem_bytes=16 * MiB, tokens=256),  # all that a core has
    "TPU v5 lite": Blocks(vmem_bytes=32 * MiB, tokens=256),  # v5e: 128 MiB, of which the compiler keeps what we leave
    "TPU v5": Blocks(vmem_bytes=32 * MiB, tokens=512),  # v5p: 64 MiB a core
    "TPU v6 lite": Blocks(vmem_bytes=32 * MiB, tokens=512),  # v6e: 128 MiB
    "TPU7x": Blocks(vmem_bytes=32 * MiB, tokens=512),  # 64 MiB a core
}


def blocks() -> Blocks:
    """Returns the row of the device that is traced for."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return TABLE.get(abstract.device_kind, TABLE["any TPU"])
    device = jax.devices()[0]
    return TABLE.get(device.device_kind if device.platform == "tpu" else "any TPU", TABLE["any TPU"])


def padded_bytes(rows: int, features: int, dtype: jnp.dtype) -> int:
    """Returns the bytes of a [rows, features] block on the chip, where tiles are whole."""
    width = jnp.dtype(dtype).itemsize
    tile_rows = TILE_BYTES // (LANES * width)
    return math.ceil(rows / tile_rows) * tile_rows * math.ceil(features / LANES) * LANES * width


def token_block(tokens: int, limit: int) -> int:
    """Returns the largest block of whole tiles, at most `limit`, that divides a lane's tokens; else all of them."""
    fits = [n for n in range(16, min(tokens, limit) + 1, 16) if tokens % n == 0]
    return max(fits, default=tokens)


def feature_splits(sizes: tuple[int, ...]) -> list[int]:
    """Returns every number of equal blocks of whole tiles that all these feature sizes can be cut into, 1 first."""
    common = math.gcd(*sizes)
    return [1, *(n for n in range(2, common // LANES + 1) if common % (n * LANES) == 0)]


def dot(left: jax.Array, right: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Returns the float32 product of two matrices over these axes: exact for float32, bfloat16 with float32 sums."""
    wide = jnp.promote_types(left.dtype, right.dtype)
    precision = lax.Precision.HIGHEST if wide == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        left.astype(wide),
        right.astype(wide),
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
