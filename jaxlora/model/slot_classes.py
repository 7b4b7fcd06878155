"""Which slots of which rank a server has for the adapters in its store, and to which ranks these are padded on their way.

Pure host code: no jax.

32 slots of rank 64, a store of 90 adapters of rank 8 and 10 of rank 32
    ─▶ 4 slots of rank 64, 18 of rank 32 and 151 of rank 8 in the same memory
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from pallas_kernels.gathered_lora.rank_classes import ROW_TILE, RankClasses

LEAST_RANK = 4  # of a class; all are powers of two but the largest
LARGE_PART = 8  # of the slots, what stays as it is: whatever adapter comes next finds room
LEAST_SLOTS = 2  # of a class: one is used while the other one's adapter is exchanged
SPARE = 2  # slots for each adapter of a smaller class, at most: the largest class, which holds any rank, takes the rest


def slot_classes(
    ranks: Iterable[int], slots: int, max_rank: int, least: int, nbytes: Callable[[RankClasses], int]
) -> RankClasses:
    """Returns the classes of slots for adapters of these ranks, the largest rank first, in the memory of slots of one rank.

    Each class has slots in proportion to its adapters, and `least` at least, the largest a part of all; where there is no
    room for that, the class with the fewest adapters joins the next larger one.  They are never fewer slots than given.

    ranks: largest rank of each adapter; those above `max_rank` are not served.  nbytes: of the arrays of a pool.
    """
    whole: RankClasses = ((slots, max_rank),)
    if max_rank % ROW_TILE:
        return whole  # smaller slots would begin within a tile, of which a TPU then reads two
    found = Counter(_class_of(rank, max_rank) for rank in ranks if rank <= max_rank)
    # The next power of two, so that a start after few changes has the same classes, and finds its programs compiled.
    adapters = Counter({rank: 1 << (count - 1).bit_length() for rank, count in found.items()})
    counts = {max_rank: max(least, -(-slots // LARGE_PART))}
    counts |= {rank: least for rank in sorted(adapters, reverse=True) if rank != max_rank}
    while len(counts) > 1 and nbytes(_classes(counts)) > nbytes(whole):
        fewest = min((rank for rank in counts if rank != max_rank), key=lambda rank: (adapters[rank], rank))
        del counts[fewest]
        adapters[min(rank for rank in counts if rank > fewest)] += adapters.pop(fewest)
    if len(counts) == 1:
        return whole
    free = slots * max_rank - sum(rank * count for rank, count in counts.items())
    while fits := [r for r in counts if r <= free and (r == max_rank or counts[r] < SPARE * adapters[r])]:
        rank = min(fits, key=lambda r: ((counts[r] + 1) / adapters[r] if adapters[r] else float("inf"), -r))
        counts[rank] += 1
        free -= rank
    while nbytes(_classes(counts)) > nbytes(whole):  # as each slot has scales of its own
        counts[min(rank for rank in counts if counts[rank] > least)] -= 1
    return _classes(counts)


def _class_of(rank: int, largest: int) -> int:
    """Returns the rank of the class that adapters of this rank are at home in."""
    return min(max(1 << (rank - 1).bit_length(), LEAST_RANK), largest)


def row_ranks(classes: RankClasses, *, finely: bool) -> tuple[int, ...]:
    """Returns the ranks that an adapter's rows are padded to on their way to a slot, rising.

    finely: not only those of the classes, but each power of two below: what travels, and waits on the host, is small.
    """
    own = {rank for _, rank in classes}
    powers = {rank for rank in (LEAST_RANK << i for i in range(16)) if rank < max(own)} if finely else set()
    return tuple(sorted(own | powers))


def _classes(counts: dict[int, int]) -> RankClasses:
    return tuple((slots, rank) for rank, slots in counts.items())
