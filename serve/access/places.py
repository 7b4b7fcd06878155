"""Places that all share: so many at once together, and of each owner so many at most.  Pure."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Generator

from jaxlora.core.errors import Overloaded, RateLimited

RETRY_S = 1.0  # nobody knows when a place becomes free


class Places:
    """Counts who holds a place.  Of one thread."""

    def __init__(self, what: str, total: int | None):
        """what: takes a place, in messages, such as "uploads".  total: places; None: any number."""
        self._what, self._total = what, total
        self._held: Counter[str] = Counter()
        self._all = 0

    @contextlib.contextmanager
    def held(self, owner: str, most: int | None) -> Generator[None]:
        """Holds one place for an owner, who may have `most` at once; None: any number.

        Raises RateLimited where the owner has them, Overloaded where there is none left.
        """
        if most is not None and self._held[owner] >= most:
            raise RateLimited(
                f"you may have {most} {self._what} at once; try again when one has ended", retry_after_s=RETRY_S
            )
        if self._total is not None and self._all >= self._total:
            raise Overloaded(f"the server has {self._total} {self._what} at once already; retry later")
        self._held[owner] += 1
        self._all += 1
        try:
            yield
        finally:
            self._all -= 1
            self._held[owner] -= 1
            if not self._held[owner]:
                del self._held[owner]
