"""KV pages: every page has at most one owner, and none is lost."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve.pages import PageAllocator

PAGES, PAGE_TOKENS = 7, 4


class PageMachine(RuleBasedStateMachine):
    """Takes and gives back at random; the model is a plain set of owners."""

    def __init__(self):
        super().__init__()
        self.allocator = PageAllocator(PAGES, PAGE_TOKENS)
        self.owned: list[list[int]] = []

    @rule(count=st.integers(0, PAGES + 2))
    def take(self, count):
        free = PAGES - sum(map(len, self.owned))
        pages = self.allocator.take(count)
        if count > free:
            assert pages is None
        else:
            assert len(pages) == count
            self.owned.append(pages)

    @precondition(lambda self: self.owned)
    @rule(which=st.integers(0, 100))
    def give_back(self, which):
        self.allocator.give_back(self.owned.pop(which % len(self.owned)))

    @invariant()
    def nothing_is_lost_or_shared(self):
        flat = [p for pages in self.owned for p in pages]
        assert len(set(flat)) == len(flat)
        assert set(flat) <= set(range(PAGES))
        assert self.allocator.free == PAGES - len(flat)
        self.allocator.check(flat)


TestPageMachine = PageMachine.TestCase
TestPageMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_pages_needed(tokens, pages):
    assert PageAllocator(PAGES, PAGE_TOKENS).needed(tokens) == pages


def test_lowest_pages_come_first():
    allocator = PageAllocator(PAGES, PAGE_TOKENS)
    first = allocator.take(2)
    assert first == [0, 1]
    assert allocator.take(2) == [2, 3]
    allocator.give_back(first)
    assert allocator.take(3) == [0, 1, 4]


def test_check_finds_what_is_wrong():
    allocator = PageAllocator(PAGES, PAGE_TOKENS)
    pages = allocator.take(2)
    allocator.check(pages)
    with pytest.raises(AssertionError, match="lost"):
        allocator.check(pages[:1])
    with pytest.raises(AssertionError, match="twice"):
        allocator.check([*pages, 6])
