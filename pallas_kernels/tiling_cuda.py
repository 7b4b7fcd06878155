"""Block sizes of the Triton kernels: ONE row, for every NVIDIA GPU from Ampere on.

The sizes come from the limits of registers and shared memory, not from measurements: no GPU was at hand.
"""

from __future__ import annotations

import importlib.util

DOT = 16  # the smallest side of a matrix that Triton's dot takes
TOKENS = 32  # of a lane in one tile
ACCUMULATOR = 8192  # float32 numbers of a sum that one program holds: 64 registers of each of its 128 threads
FEATURES = 256  # the widest tile
RANK = 256  # the largest rank, of all targets of a kernel together
WORDS = 128  # of the vocabulary in one tile of logits, which 64 tokens share
WORD_TOKENS = ACCUMULATOR // WORDS
WORD_SPLITS = 8  # programs that share the vocabulary of a tile of tokens: few tokens still fill a GPU
WORD_ROWS = 512  # tokens of all lanes whose gradient of the logits is in memory at once
VISITS = 1024  # decode: the most tokens whose slots one program looks through
HEAD = 256  # attention: the largest head
TILE_BYTES = 2**14  # attention: of a tile of queries or keys; six have room in the 99 KB of Ampere's smaller cards
COLUMN_BYTES = 128  # attention: of one feature of such a tile; with twice as much float32 has no room in the registers
PROGRAMS = 512  # attention: enough to keep the processors busy, which are 132 on an H100
WARPS, STAGES = 8, 2  # attention: with 4 warps its backward pass has no room in the registers either


def installed() -> bool:
    """Whether the extra `triton` is there.  Nothing is imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("jax_triton", "triton"))


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n and that Triton's dot takes."""
    return max(DOT, 1 << (n - 1).bit_length())


def feature_block(rank: int, features: int) -> int:
    """Width of the tiles of [rank, features]."""
    return min(power_of_two(features), FEATURES, ACCUMULATOR // power_of_two(rank))


def row_block(rows: int, head: int, itemsize: int) -> int:
    """Rows of attention's tiles of [rows, head]."""
    return min(power_of_two(rows), COLUMN_BYTES // itemsize, TILE_BYTES // (power_of_two(head) * itemsize))
