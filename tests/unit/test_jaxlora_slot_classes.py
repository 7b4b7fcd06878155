"""A store's ranks divide the slots into classes in the same memory; one class where they say nothing."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.model.slot_classes import slot_classes
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
        pytest.param([8] * 90 + [32] * 10, 32, 64, 2, [(4, 64), (17, 32), (155, 8)], id="in proportion"),
        pytest.param([6] * 20, 32, 64, 2, [(27, 64), (39, 8)], id="two slots for each of few"),
        pytest.param([1, 5, 9, 16], 4, 16, 2, [(2, 16), (2, 8), (2, 4)], id="the least of each"),
        pytest.param([4] * 5 + [16] * 9, 2, 16, 2, [(2, 16)], id="no room beside the largest"),
        pytest.param([4] * 9 + [8], 3, 16, 2, [(2, 16), (3, 4)], id="room for one more class"),
        pytest.param([4] * 100, 32, 64, 9, [(19, 64), (200, 4)], id="slots for pins in each class"),
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
