"""KV pages: none is lost, each is found by its exact beginning and by no other, and the one used longest ago goes first.

The truth that the state machine holds against the allocator: what each sequence holds, and which beginning of which salt
each cached page has, as plain tuples, without keys or links.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxlora.core.lora import AdapterRef
from serve.engine.page_cache import PageAllocator

PAGES, PAGE_TOKENS = 8, 2
WORDS = st.sampled_from([1, 257])  # equal in their last byte
SALTS = st.sampled_from([("ab", None), ("a", "b"), ("a", AdapterRef("a", "x", 1)), ("a", AdapterRef("a", "x", 2))])
WHICH = st.integers(0, 100)


@dataclass
class Held:
    """A sequence: what it knows, the pages it refers to, and whether what it computes may be found."""

    salt: object = None
    tokens: list = field(default_factory=list)
    pages: list = field(default_factory=list)
    may_register: bool = True


class PageMachine(RuleBasedStateMachine):
    """Sequences begin, grow, register and end at random.  A node is (salt, all tokens up to the end of its page)."""

    def __init__(self):
        super().__init__()
        self.allocator = PageAllocator(PAGES, PAGE_TOKENS)
        self.pages = PAGES
        self.held: list[Held] = []
        self.page_of: dict[tuple, int] = {}  # of a cached node
        self.used: dict[tuple, int] = {}  # when a cached node was used last
        self.now = self.hits = self.lookups = 0

    # ---- the truth

    def references(self) -> list[int]:
        return [p for h in self.held for p in h.pages]

    def node(self, page: int) -> tuple | None:
        return next((n for n, p in self.page_of.items() if p == page), None)

    def nodes(self, salt, tokens) -> list[tuple]:
        full = len(tokens) // PAGE_TOKENS
        return [(salt, tuple(tokens[: PAGE_TOKENS * (i + 1)])) for i in range(full)]

    def use(self, salt, tokens) -> None:
        """From the end of these tokens to the beginning, as far as it is cached without a gap."""
        for node in reversed(self.nodes(salt, tokens)):
            if node not in self.page_of:
                break
            self.used[node] = self.now

    def uncache(self, node) -> None:
        del self.page_of[node], self.used[node]

    def take(self, count: int) -> list[int] | None:
        """What the allocator gives, when it gives what it must."""
        busy = set(self.references())
        idle = {n for n, p in self.page_of.items() if p not in busy}
        free = set(range(self.pages)) - busy - set(self.page_of.values())
        pages = self.allocator.take(count)
        if count > len(free) + len(idle):
            assert pages is None
            return None
        assert len(pages) == len(set(pages)) == count
        gone = {n for n in idle if self.page_of[n] in pages}
        assert set(pages) - free == {self.page_of[n] for n in gone}
        assert len(gone) == max(count - len(free), 0)  # a free page is given before anything is forgotten
        for node in gone:
            for kept in idle - gone:
                assert self.used[node] <= self.used[kept], "used later, and yet it went first"
                assert kept[0] != node[0] or kept[1][:-PAGE_TOKENS] != node[1], "the beginning went before its end"
        for node in gone:
            self.uncache(node)
        return pages

    def give_back(self, held: Held) -> None:
        self.allocator.give_back(held.pages)
        self.now += 1
        busy = self.references()  # without these
        left = [n for p in held.pages if p not in busy and (n := self.node(p)) is not None]
        for node in left:
            self.used[node] = self.now
        if left:
            self.use(*max(left, key=lambda n: len(n[1])))

    # ---- what happens

    @rule(salt=SALTS, tokens=st.lists(WORDS, min_size=1, max_size=9))
    def begin(self, salt, tokens):
        found = []
        for node in self.nodes(salt, tokens[:-1]):
            if node not in self.page_of:
                break
            found.append(self.page_of[node])
        pages = self.allocator.match(salt, tokens)
        assert pages == found
        self.lookups += len(tokens)
        self.hits += len(found) * PAGE_TOKENS
        sequence = Held(salt, list(tokens), pages)
        self.held.append(sequence)
        self.extend(sequence, [])

    @precondition(lambda self: self.held)
    @rule(which=WHICH, tokens=st.lists(WORDS, min_size=1, max_size=3))
    def grow(self, which, tokens):
        self.extend(self.held[which % len(self.held)], tokens)

    def extend(self, sequence: Held, tokens) -> None:
        """Pages for the tokens, or the sequence ends."""
        known = [*sequence.tokens, *tokens]
        more = self.take(self.allocator.needed(len(known)) - len(sequence.pages))
        if more is None:
            self.held.remove(sequence)
            self.give_back(sequence)
        else:
            sequence.tokens, sequence.pages = known, sequence.pages + more

    @precondition(lambda self: self.held)
    @rule(which=WHICH, count=st.integers(0, 12))
    def register(self, which, count):
        sequence = self.held[which % len(self.held)]
        if not sequence.may_register:
            return
        tokens = sequence.tokens[:count]
        self.allocator.register(sequence.salt, tokens, sequence.pages)
        self.now += 1
        for node, page in zip(self.nodes(sequence.salt, tokens), sequence.pages, strict=False):
            if self.node(page) is None:
                self.page_of.setdefault(node, page)
        self.use(sequence.salt, tokens)

    @precondition(lambda self: self.held)
    @rule(which=WHICH)
    def end(self, which):
        self.give_back(self.held.pop(which % len(self.held)))

    @rule(salt=SALTS)
    def forget(self, salt):
        self.allocator.forget(salt)
        for node in [n for n in self.page_of if n[0] == salt]:
            self.uncache(node)
        for sequence in self.held:
            sequence.may_register &= sequence.salt != salt

    @precondition(lambda self: not any(h.pages for h in self.held))
    @rule(pages=st.integers(PAGES - 2, PAGES + 2))
    def resize(self, pages):
        """All cached pages are forgotten."""
        self.allocator.resize(pages)
        self.pages = pages
        for node in list(self.page_of):
            self.uncache(node)

    @invariant()
    def nothing_is_lost(self):
        references = self.references()
        assert self.allocator.free == self.allocator.pages - len(set(references))
        assert (self.allocator.hits, self.allocator.lookups) == (self.hits, self.lookups)
        self.allocator.check(references)


TestPageMachine = PageMachine.TestCase
TestPageMachine.settings = settings(max_examples=60, stateful_step_count=40)


def allocator_with(tokens, salt="s", pages=PAGES) -> PageAllocator:
    """An allocator in which these tokens are cached, and nobody refers to a page."""
    allocator = PageAllocator(pages, PAGE_TOKENS)
    add(allocator, tokens, salt)
    return allocator


def add(allocator: PageAllocator, tokens, salt="s") -> list[int]:
    """The pages of a sequence that began, computed all its tokens, and ended."""
    pages = allocator.match(salt, tokens)
    pages += allocator.take(allocator.needed(len(tokens)) - len(pages))
    allocator.register(salt, tokens, pages)
    allocator.give_back(pages)
    return pages


def found(allocator: PageAllocator, tokens, salt="s") -> list[int]:
    """The pages that a prompt would share."""
    pages = allocator.match(salt, tokens)
    allocator.give_back(pages)
    return pages


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (2, 1), (3, 2), (4, 2), (5, 3)])
def test_pages_needed(tokens, pages):
    assert PageAllocator(PAGES, PAGE_TOKENS).needed(tokens) == pages


def test_lowest_pages_come_first():
    allocator = PageAllocator(PAGES, PAGE_TOKENS)
    first = allocator.take(2)
    assert first == [0, 1]
    assert allocator.take(2) == [2, 3]
    allocator.give_back(first)
    assert allocator.take(3) == [0, 1, 4]


@pytest.mark.parametrize(("length", "shared"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (6, 2), (7, 3), (9, 3)])
def test_the_last_token_is_never_found(length, shared):
    """Something must be computed, or there is nothing to sample from."""
    allocator = allocator_with([1, 2, 3, 4, 5, 6])
    assert len(found(allocator, [1, 2, 3, 4, 5, 6, 7, 8, 9][:length])) == shared


def test_a_page_is_found_after_its_own_beginning_only():
    allocator = allocator_with([1, 2, 3, 4])
    assert len(found(allocator, [1, 2, 3, 4, 0])) == 2
    for other in ([3, 4, 0], [1, 2, 4, 3, 0], [2, 1, 3, 4, 0], [1, 2 + 2**8, 3, 4, 0], [1, 2 + 2**16, 3, 4, 0]):
        assert len(found(allocator, other)) == (1 if other[:2] == [1, 2] else 0), other


@pytest.mark.fault("T2")
def test_no_salt_finds_the_pages_of_another():
    """Also not one that begins when the other's are forgotten, or comes back itself."""
    allocator = allocator_with([1, 2, 3, 4], salt="one")
    assert found(allocator, [1, 2, 3, 4, 5], "two") == []
    two = add(allocator, [1, 2, 9], "two")
    allocator.forget("one")
    assert found(allocator, [1, 2, 3, 4, 5], "one") == []
    assert found(allocator, [1, 2, 3, 4, 5], "three") == []
    one = add(allocator, [1, 2, 9], "one")
    assert (found(allocator, [1, 2, 3], "one"), found(allocator, [1, 2, 3], "two")) == (one[:1], two[:1])
    assert one[0] != two[0]


def test_a_page_that_is_in_use_is_not_given_away_though_it_was_used_longest_ago():
    allocator = PageAllocator(3, PAGE_TOKENS)
    held = allocator.take(1)
    allocator.register("s", [1, 2], held)
    add(allocator, [3, 4])
    assert allocator.take(3) is None
    assert sorted([*held, *allocator.take(2)]) == [0, 1, 2]
    assert found(allocator, [1, 2, 3]) == held
    assert found(allocator, [3, 4, 5]) == []


@pytest.mark.parametrize(("taken", "left"), [(0, (2, 2)), (1, (2, 1)), (2, (2, 0)), (3, (1, 0)), (4, (0, 0))])
def test_the_chain_used_longest_ago_goes_first_from_its_end(taken, left):
    allocator = PageAllocator(4, PAGE_TOKENS)
    add(allocator, [1, 2, 3, 4])
    add(allocator, [5, 6, 7, 8])
    found(allocator, [1, 2, 3, 4, 0])
    allocator.take(taken)
    assert (len(found(allocator, [1, 2, 3, 4, 0])), len(found(allocator, [5, 6, 7, 8, 0]))) == left


def test_a_chain_that_two_computed_is_kept_once():
    allocator = PageAllocator(PAGES, PAGE_TOKENS)
    one, two = allocator.take(2), allocator.take(2)
    allocator.register("s", [1, 2, 3, 4], one)
    allocator.register("s", [1, 2, 3, 4], two)
    allocator.give_back(two)
    assert allocator.free == PAGES - 2
    assert found(allocator, [1, 2, 3, 4, 5]) == one
    allocator.check(one)


def test_a_chain_of_which_another_computed_the_middle_is_as_new_in_its_middle():
    """Or the middle would go first, and the end with it could not be found."""
    allocator = PageAllocator(PAGES, PAGE_TOKENS)
    add(allocator, [1, 2])
    one, two = (allocator.match("s", [1, 2, 3]) for _ in range(2))
    one, two = one + allocator.take(1), two + allocator.take(2)
    allocator.register("s", [1, 2, 3, 4], one)
    allocator.register("s", [1, 2, 3, 4, 5, 6], two)
    allocator.give_back(one)
    add(allocator, [7, 8])
    allocator.give_back(two)
    allocator.check([])
    assert allocator.take(PAGES - 3) is not None
    assert found(allocator, [1, 2, 3, 4, 5, 6, 7]) == [*one, two[2]]


def test_pages_whose_beginning_went_are_found_again_when_it_is_back():
    """The second sequence has the beginning in a page of its own, so that the cached one may go."""
    allocator = PageAllocator(4, PAGE_TOKENS)
    cached = add(allocator, [1, 2])
    own = [*allocator.take(1), *allocator.take(1)]
    allocator.register("s", [1, 2, 3, 4], own)
    others = allocator.take(2)
    assert cached[0] in others
    assert found(allocator, [1, 2, 3, 4, 5]) == []
    allocator.give_back(others)
    allocator.register("s", [1, 2, 3, 4], own)
    assert found(allocator, [1, 2, 3, 4, 5]) == own


def test_what_is_forgotten_while_it_is_in_use_is_free_when_it_is_given_back():
    allocator = PageAllocator(3, PAGE_TOKENS)
    held = allocator.take(2)
    allocator.register("s", [1, 2, 3, 4], held)
    allocator.forget("s")
    allocator.forget("never seen")
    assert allocator.take(2) is None
    allocator.give_back(held)
    allocator.check([])
    assert found(allocator, [1, 2, 3, 4, 5]) == []
    assert len(allocator.take(3)) == 3


def test_check_finds_what_is_wrong():
    allocator = PageAllocator(PAGES, PAGE_TOKENS)
    pages = allocator.take(2)
    allocator.check(pages)
    for wrong in (pages[:1], [*pages, 6], [*pages, pages[0]]):
        with pytest.raises(AssertionError, match="lost"):
            allocator.check(wrong)
    allocator._free.remove(7)
    with pytest.raises(AssertionError, match="a page is lost"):
        allocator.check(pages)
    allocator._free.append(7)
    add(allocator, [1, 2, 3, 4])
    allocator.check(pages)
    allocator._idle.move_to_end(next(iter(allocator._idle)))
    with pytest.raises(AssertionError, match="would go before"):
        allocator.check(pages)


def test_what_only_our_own_mistake_can_do_is_refused():
    allocator = PageAllocator(PAGES, PAGE_TOKENS)
    pages = allocator.take(2)
    with pytest.raises(AssertionError, match="3 tokens in 0 pages"):
        allocator.register("s", [1, 2, 3], [])
    allocator.register("s", [1, 2, 3, 4], pages)
    with pytest.raises(AssertionError, match="two chains"):
        allocator.register("s", [5, 6, 3, 4], [*allocator.take(1), pages[1]])
    allocator.give_back(pages)
    with pytest.raises(AssertionError, match="nobody refers"):
        allocator.give_back(pages)
