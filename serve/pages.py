"""Which sequence owns which KV pages.  Pure host code."""

from __future__ import annotations


class PageAllocator:
    """Hands out page numbers 0 … pages-1, lowest first; every page has at most one owner."""

    def __init__(self, pages: int, page_tokens: int):
        self.pages, self.page_tokens = pages, page_tokens
        self._free = list(range(pages - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages nobody owns."""
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-tokens // self.page_tokens)

    def take(self, count: int) -> list[int] | None:
        """This many pages, or None when there are not enough."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        """The pages are free again."""
        self._free.extend(reversed(pages))

    def check(self, owned: list[int]) -> None:
        """Asserts that free and owned pages are all the pages, each once."""
        assert sorted(self._free + owned) == list(range(self.pages)), "a page is lost or owned twice"
