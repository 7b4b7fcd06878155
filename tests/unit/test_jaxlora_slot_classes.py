"""A store's ranks divide the slots into classes in the same memory; one class where they say nothing."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.model.slot_classes import row_ranks, slot_classes
from pallas_kernels.gathered_lora.rank_classes import RankClasses, slot_ranks

SCALES = 3  # bytes that each slot takes besides its rows, where a row takes 1000


def nbytes(classes: RankClasses) -> int:
    return sum(slots * (1000 * rank + SCALES) for slots, rank in classes)


@pytest.mark.parametrize(
    ("ranks", "slots", "max_rank", "least", "classes"),
    [
        pytest.param([], 32, 64, 2, [(32, 64)], id="empty store"),
        pytest.param([64, 40] * 5, 32, 64, 2, [(32, 64)], id="all of the largest"),
        pytest.param([65] * 9, 32, 64, 2, [(32, 64)], id="none that can be served"),
        pytest.param([4] * 1000, 32, 32, 2, [(4, 32), (223, 4)], id="many small ones"),
        pytest.param([8] * 90 + [32] * 10, 32, 64, 2, [(4, 64), (18, 32), (151, 8)], id="in proportion"),
        pytest.param([6] * 20, 32, 64, 2, [(24, 64), (63, 8)], id="two slots for each of few"),
        pytest.param([1, 5, 9, 16], 4, 16, 2, [(2, 16), (2, 8), (2, 4)], id="the least of each"),
        pytest.param([4] * 5 + [16] * 9, 2, 16, 2, [(2, 16)], id="no room beside the largest"),
        pytest.param([4] * 9 + [8], 3, 16, 2, [(2, 16), (3, 4)], id="room for one more class"),
        pytest.param([4] * 100, 32, 64, 9, [(16, 64), (255, 4)], id="slots for pins in each class"),
        pytest.param([4] * 100, 8, 12, 2, [(8, 12)], id="slots would begin within tiles"),
    ],
)
def test_slots_are_divided_by_the_ranks_in_the_store(ranks, slots, max_rank, least, classes):
    assert slot_classes(ranks, slots, max_rank, least, nbytes) == tuple(classes)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 70), max_size=60), st.integers(1, 40), st.sampled_from([4, 8, 24, 64]), st.integers(2, 9)
)
def test_whatever_the_store_holds_the_memory_and_the_promises_hold(ranks, slots, max_rank, least):
    classes = slot_classes(ranks, slots, max_rank, least, nbytes)
    assert nbytes(classes) <= nbytes(((slots, max_rank),))
    assert classes[0][1] == max_rank  # any adapter that may come can be served
    assert all(higher > lower for (_, higher), (_, lower) in itertools.pairwise(classes))
    assert sum(count for count, _ in classes) >= slots
    assert all(count >= min(least, slots) for count, _ in classes)
    assert slot_ranks(classes).shape == (sum(count for count, _ in classes),)


def test_few_changes_of_the_store_keep_the_classes():
    """Each other number of slots is another pool, whose programs would be compiled again."""
    found = {slot_classes([8] * n + [32] * m, 32, 64, 2, nbytes) for n in (70, 90, 128) for m in (9, 16)}
    assert len(found) == 1
    assert slot_classes([8] * 129 + [32] * 16, 32, 64, 2, nbytes) not in found


@pytest.mark.parametrize(
    ("classes", "finely", "ranks"),
    [
        (((4, 64), (9, 8)), False, (8, 64)),
        (((4, 64), (9, 8)), True, (4, 8, 16, 32, 64)),
        (((4, 12),), True, (4, 8, 12)),
        (((4, 2),), True, (2,)),
    ],
)
def test_rows_on_their_way_are_padded_to_the_ranks_of_classes_or_finely(classes, finely, ranks):
    assert row_ranks(classes, finely=finely) == ranks
