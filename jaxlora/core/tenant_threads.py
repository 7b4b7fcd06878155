"""Threads on which tenants take turns.  Pure."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class TenantThreads:
    """Runs calls on a fixed number of threads: the tenants in turn, and one call of a tenant at a time.

    However many calls a tenant submits, and however long they take, others have all threads but one.  Thread-safe.
    """

    def __init__(self, threads: int, name: str):
        self._pool = ThreadPoolExecutor(threads, name)
        self._lock = threading.Lock()
        # Calls that wait, by tenant; a tenant is in it, and once in the pool's queue, until its last call has ended.
        self._lines: dict[str, deque[tuple[Future, Callable[[], None]]]] = {}

    def submit[**P, T](self, tenant: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Returns the call's future.  Raises RuntimeError after `shutdown`."""
        future: Future[T] = Future()
        entry = future, functools.partial(_run, future, functools.partial(call, *args, **kwargs))
        with self._lock:
            if tenant in self._lines:
                self._lines[tenant].append(entry)
            else:
                self._pool.submit(self._next, tenant)
                self._lines[tenant] = deque([entry])
        return future

    def shutdown(self) -> None:
        """Cancels the calls that have not begun, and waits for the others."""
        with self._lock:
            waiting = [future for line in self._lines.values() for future, _ in line]
            self._lines.clear()
        for future in waiting:
            future.cancel()
        self._pool.shutdown(cancel_futures=True)

    def _next(self, tenant: str) -> None:
        """Runs the tenant's oldest call, and puts the tenant at the end of the queue."""
        with self._lock:
            line = self._lines.get(tenant)
            if line is None:
                return
            _, run = line.popleft()
        run()
        with self._lock:
            if self._lines.get(tenant) is not line:
                return  # shut down meanwhile
            if line:
                self._pool.submit(self._next, tenant)
            else:
                del self._lines[tenant]


def _run[T](future: Future[T], call: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(call())
    except BaseException as error:
        future.set_exception(error)
