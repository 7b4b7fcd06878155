"""Where the rank rows of each slot lie in a serving pool (`pool_rows`).  Pure host code: no jax.

Shape letters: S slots, N tiles of ROW_TILE rank rows.
"""

from __future__ import annotations

import itertools

import numpy as np

ROW_TILE = 8  # rows that a TPU reads together

RankClasses = tuple[tuple[int, int], ...]  # (slots, rank of each), in the order of slots


def tile_count(classes: RankClasses) -> int:
    """Returns N: the tiles in which the rows of all slots lie."""
    return -(-sum(slots * rank for slots, rank in classes) // ROW_TILE)


def slot_ranks(classes: RankClasses) -> np.ndarray:
    """Returns int32 [S]: the rows that each slot owns."""
    return np.repeat(*np.array([(rank, slots) for slots, rank in classes], np.int32).T)


def first_rows(classes: RankClasses) -> np.ndarray:
    """Returns int32 [S]: each slot's first row."""
    ranks = slot_ranks(classes)
    return np.cumsum(ranks, dtype=np.int32) - ranks


def slot_starts(classes: RankClasses) -> tuple[int, ...]:
    """Returns the first slot of each class, then the number of slots."""
    return (0, *itertools.accumulate(slots for slots, _ in classes))
