"""One call for all who ask for the same at once.  Pure."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future


class SingleFlight[K: Hashable, V]:
    """Calls under way, by key.  From any thread.  Nothing is kept of a call that has ended, its error neither."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[K, Future[V]] = {}

    def get(self, key: K, find: Callable[[], V | None], make: Callable[[], V]) -> V:
        """What `find` has, or else what `make` returns, on the thread of who asks first; the others wait for it.

        find: quick; None for what is not there.  It is asked once more before `make`, which may have just ended for others.
        Raises what `make` raised, to all who waited.
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
