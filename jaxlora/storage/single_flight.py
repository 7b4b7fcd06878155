"""Merges concurrent calls for the same key into one.  Pure."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future


class SingleFlight[K: Hashable, V]:
    """Calls in progress, by key.  Thread-safe.  A call that ended leaves nothing behind, not even its error."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[K, Future[V]] = {}

    def get(self, key: K, find: Callable[[], V | None], make: Callable[[], V]) -> V:
        """Returns what `find` has, else the result of `make`, run on the first caller's thread; the others wait for it.

        find: quick; returns None for a missing value.  Called again before `make`: another call may just have ended.
        Raises what `make` raised, in all waiting callers.
        """
        if (found := find()) is not None:
            return found
        with self._lock:
            call = self._calls.get(key)
            mine = call is None
            if mine:
                call = self._calls[key] = Future()
        if mine:
            try:
                found = find()
                call.set_result(make() if found is None else found)
            except BaseException as error:
                call.set_exception(error)
            finally:
                with self._lock:
                    del self._calls[key]
        return call.result()
