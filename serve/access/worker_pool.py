"""Threads for work that is slow for the event loop, shared fairly: a piece of each tenant's at a time, in turns.

A pool serves one purpose, so that what waits in one, for a database or a long text, holds up nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from jaxlora.core.errors import Overloaded, RateLimited

RETRY_S = 1.0


@dataclass(slots=True)
class Line:
    """What a tenant has in a pool."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while a thread works for the tenant
    calls: int = 0


class WorkerPool:
    """A few threads.  Of one event loop."""

    def __init__(self, name: str, *, threads: int, waiting: int, timeout_s: float):
        """name: of the threads.  waiting: calls of one tenant at once.  timeout_s: of one call, its wait included."""
        self._name, self._waiting, self._timeout_s = name, waiting, timeout_s
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._lines: dict[str, Line] = {}

    async def run[Result](
        self, tenant: str, work: Callable[[], Result], *, admit: Callable[[], None] = lambda: None
    ) -> Result:
        """What `work` gives, called on one of the threads when it is the tenant's turn.

        admit: called when its turn has come; raises for a tenant that may not have it done any more.
        Raises RateLimited for too many calls of the tenant, Overloaded when it takes too long, though it may still be done.
        """
        line = self._lines.setdefault(tenant, Line())
        if line.calls >= self._waiting:
            raise RateLimited(
                f"{line.calls} of your requests wait for the {self._name} already; retry when some are answered",
                retry_after_s=RETRY_S,
            )
        line.calls += 1
        try:
            async with asyncio.timeout(self._timeout_s):
                await line.turn.acquire()
                return await self._begin(line, work, admit)
        except TimeoutError:
            raise Overloaded(f"the {self._name} took over {self._timeout_s:g} s; retry later") from None
        finally:
            line.calls -= 1
            if line.calls == 0 and not line.turn.locked():
                self._lines.pop(tenant, None)

    def _begin[Result](
        self, line: Line, work: Callable[[], Result], admit: Callable[[], None]
    ) -> asyncio.Future[Result]:
        """Starts the work.  The turn ends with it, however long its caller waits."""
        loop = asyncio.get_running_loop()

        def end(_: Future[Result]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits
                loop.call_soon_threadsafe(line.turn.release)

        try:
            admit()
            future = self._threads.submit(work)
        except BaseException:
            line.turn.release()
            raise
        answer = asyncio.wrap_future(future)  # before the next turn: what follows from the answer comes first
        future.add_done_callback(end)
        return answer
