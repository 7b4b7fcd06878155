"""Block sizes of the Triton kernels: ONE row, for every NVIDIA GPU from Ampere on.

The sizes come from the limits of registers and shared memory, not from measurements: no GPU was at hand.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from pallas_kernels.triton_launch import packages

DOT = 16  # smallest side of a matrix in Triton's dot
TOKENS = 32  # of a lane in one tile
ACCUMULATOR = 8192  # float32 numbers of a sum that one program holds: 64 registers of each of its 128 threads
FEATURES = 256  # widest tile
PROGRAMS = 264  # shrink of lanes: two for each of an H100's 132 processors, by splitting features where tokens are few
RANK = 256  # largest rank, summed over all targets of a kernel
WORD_SPLITS = 32  # programs that share the vocabulary of a tile of tokens, so that few tokens still fill a GPU
WORD_ROWS = 512  # tokens of all lanes whose gradient of the logits is in memory at once
VISITS = 1024  # decode: the most tokens whose slots one program looks through
HEAD = 256  # attention: the largest head
TILE_BYTES = 2**14  # attention: bytes of a tile of queries or keys; six fit the 99 KB of Ampere's smaller cards
COLUMN_BYTES = 128  # attention: of one feature of such a tile; with twice as much float32 does not fit the registers
PART_KEYS = 1024  # paged attention: keys of a part, so that a long lane occupies many programs
PROMPT_PART_KEYS = 8192  # of prompts, which are many programs by their tokens, and each token's parts take memory
ATTENDING = 4096  # paged attention: programs, most of which find nothing to do; they share the parts of their lane
PARTS_JOINED = 4  # paged attention: parts that are joined at once
WARPS, STAGES = 8, 2  # attention: with 4 warps its backward pass does not fit the registers either


@dataclass(frozen=True, kw_only=True, slots=True)
class WordTile:
    """A tile of logits that one program holds in float32."""

    tokens: int
    words: int
    warps: int


# By size of a number.  Of bfloat16 both halves of the product are read from L2 half as often as with a quarter of the tile.
# float32, which tensor cores do not multiply, spills 2 KB of registers of each thread with that tile.
WORD_TILES = {2: WordTile(tokens=128, words=256, warps=8), 4: WordTile(tokens=64, words=128, warps=4)}


def installed() -> bool:
    """Returns whether what launches Triton kernels is installed, which the extra `triton` brings.  Imports none of it."""
    return all(importlib.util.find_spec(name) is not None for name in packages())


def power_of_two(n: int) -> int:
    """Returns the smallest power of two that is at least n and that Triton's dot takes."""
    return max(DOT, 1 << (n - 1).bit_length())


def feature_block(rank: int, features: int) -> int:
    """Returns the width of the tiles of [rank, features]."""
    return min(power_of_two(features), FEATURES, ACCUMULATOR // power_of_two(rank))


def row_block(rows: int, head: int, itemsize: int) -> int:
    """Returns the rows of attention's tiles of [rows, head]."""
    return min(power_of_two(rows), COLUMN_BYTES // itemsize, TILE_BYTES // (power_of_two(head) * itemsize))


def word_tile(*itemsizes: int) -> WordTile:
    """Returns the tile of logits of products of numbers of these sizes in bytes."""
    return WORD_TILES[max(itemsizes)]
