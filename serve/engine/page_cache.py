"""The page allocator and prefix cache of the KV cache.  Pure host code.

A cached page is known by its exact chain: its salt (tenant, adapter with its version or none, cache_salt), every token
before it, and its own.  Only full pages are shared, and a full page is never written again; the page that a sequence
still writes is its own.  So nothing is ever copied on write.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class _Cached:
    """The place of a cached page in its chain."""

    salt: Hashable
    parent: bytes  # key of the page before it; of a first page the root of its salt
    key: bytes


@dataclass(frozen=True, slots=True)
class _Salt:
    """The cached pages of one salt."""

    root: bytes  # where its chains begin; made once and never used again
    pages: dict[int, None] = field(default_factory=dict)  # a set that keeps its order


def _key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Returns the key of the page with these tokens after the page of key `parent`.  No two chains share one."""
    return hashlib.blake2b(parent + array("i", tokens).tobytes(), digest_size=KEY_BYTES).digest()


class PageAllocator:
    """Hands out pages 0 … pages-1, lowest first, and finds cached pages of the beginning of a prompt.

    A page is free, or referred to by sequences, or cached, or the last two.  A cached page without references is
    evicted when no free one is left: the least recently used first, and the end of a chain before its beginning.
    """

    def __init__(self, pages: int, page_tokens: int):
        self.page_tokens = page_tokens
        self.lookups = 0  # tokens of all calls of `match`
        self.hits = 0  # those of them that were cached
        self._cached: dict[int, _Cached] = {}
        self._page_of: dict[bytes, int] = {}  # of a cached page's key
        self._salts: dict[Hashable, _Salt] = {}  # those that have cached pages
        self._roots = 0  # made so far
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached, not referred to; the next to be evicted is first
        self._begin(pages)

    def _begin(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))
        self._references = [0] * pages

    @property
    def free(self) -> int:
        """Pages that `take` can give: free ones, and cached ones without references."""
        return len(self._free) + len(self._idle)

    def needed(self, tokens: int) -> int:
        """Returns the number of pages that hold this many tokens."""
        return -(-tokens // self.page_tokens)

    def take(self, count: int) -> list[int] | None:
        """Returns this many pages to write, each with one reference; None when there are not enough."""
        if count > self.free:
            return None
        while len(self._free) < count:
            self._drop(next(iter(self._idle)))
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def give_back(self, pages: list[int]) -> None:
        """Removes one reference from each of a sequence's pages, given in order.  Cached ones stay cached."""
        last = None
        for page in reversed(pages):
            assert self._references[page] > 0, f"page {page} is given back, and nobody refers to it"
            self._references[page] -= 1
            if self._references[page]:
                continue
            if page in self._cached:
                self._idle[page] = None
                last = page if last is None else last
            else:
                self._free.append(page)
        self._touch(last)

    def match(self, salt: Hashable, tokens: Sequence[int]) -> list[int]:
        """Returns the longest chain of cached pages that holds the first of these tokens, and adds a reference to each.

        It never holds the last token: at least one must be computed to sample from.
        """
        pages: list[int] = []
        if salt in self._salts:
            key = self._salts[salt].root
            for start in range(0, len(tokens) - self.page_tokens, self.page_tokens):
                key = _key(key, tokens[start : start + self.page_tokens])
                if key not in self._page_of:
                    break
                pages.append(self._page_of[key])
        for page in pages:
            self._references[page] += 1
            self._idle.pop(page, None)
        self.lookups += len(tokens)
        self.hits += len(pages) * self.page_tokens
        return pages

    def register(self, salt: Hashable, tokens: Sequence[int], pages: list[int]) -> None:
        """Caches the full pages of a sequence, which hold these computed tokens.

        A chain that is cached already, in another page, stays in that one.
        """
        full = len(tokens) // self.page_tokens
        assert len(pages) >= full, f"{len(tokens)} tokens in {len(pages)} pages"
        if not full:
            return
        if salt not in self._salts:
            self._roots += 1
            self._salts[salt] = _Salt(self._roots.to_bytes(KEY_BYTES))
        parent = self._salts[salt].root
        for i, page in enumerate(pages[:full]):
            cached = self._cached.get(page)
            if cached is None:
                assert self._references[page] > 0, f"page {page} is registered, and nobody refers to it"
                start = i * self.page_tokens
                cached = _Cached(salt, parent, _key(parent, tokens[start : start + self.page_tokens]))
                if cached.key not in self._page_of:
                    self._cached[page] = cached
                    self._page_of[cached.key] = page
                    self._salts[salt].pages[page] = None
            assert cached.parent == parent, f"page {page} is registered under two chains"
            parent = cached.key
        self._touch(self._page_of[parent])

    @property
    def salts(self) -> list[Hashable]:
        """The salts that have cached pages."""
        return list(self._salts)

    def forget(self, salt: Hashable) -> None:
        """Drops all cached pages of this salt, as its version is deleted or its adapter has changed.

        Sequences of the salt that still run must not register their pages afterwards.
        """
        if salt in self._salts:
            for page in list(self._salts[salt].pages):
                self._drop(page)

    def resize(self, pages: int) -> None:
        """Changes the number of pages while nobody refers to one; drops all cached pages."""
        assert not any(self._references), "a page is in use"
        for salt in self.salts:
            self.forget(salt)
        self._begin(pages)

    def check(self, owned: list[int]) -> None:
        """Asserts that free, cached and owned pages are all the pages; `owned` has a page once for each reference."""
        assert dict(Counter(owned)) == {p: n for p, n in enumerate(self._references) if n}, (
            "a reference is lost, or a page is owned twice"
        )
        apart = sorted([*self._free, *self._idle, *set(owned)])
        assert apart == list(range(self.pages)), "a page is lost, or in two places"
        assert self._page_of == {c.key: p for p, c in self._cached.items()}
        assert set(self._idle) == {p for p in self._cached if not self._references[p]}
        of_salts = sorted((p, self._cached[p].salt == salt) for salt, of in self._salts.items() for p in of.pages)
        assert of_salts == [(p, True) for p in sorted(self._cached)]
        assert all(of.pages for of in self._salts.values())
        rank = {page: i for i, page in enumerate(self._idle)}
        for page, at in self._cached.items():
            parent = self._page_of.get(at.parent)
            assert rank.get(page, -1) < rank.get(parent, self.pages), f"page {parent} would go before {page}, its next"

    def _touch(self, page: int | None) -> None:
        """Makes the chain up to this page the most recently used one, its beginning last of all."""
        while page is not None:
            if page in self._idle:
                self._idle.move_to_end(page)
            page = self._page_of.get(self._cached[page].parent)

    def _drop(self, page: int) -> None:
        """Removes a page from the cache, and frees it if it has no reference.

        Pages after it that are in use stay cached, and match again once their beginning is cached.
        """
        cached = self._cached.pop(page)
        del self._page_of[cached.key]
        of_salt = self._salts[cached.salt].pages
        del of_salt[page]
        if not of_salt:
            del self._salts[cached.salt]
        if page in self._idle:
            del self._idle[page]
            self._free.append(page)
