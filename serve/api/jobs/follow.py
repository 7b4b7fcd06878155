"""Following jobs: whoever follows the same job shares one look at the database, four times a second."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncGenerator, Generator

from jaxlora.core.errors import JaxLoraError
from serve.db.jobs import StoredJobs
from serve.db.models import EventRecord
from train.jobs.status import ENDED

LOG = logging.getLogger("serve")
LOOK_S = 0.25  # between two looks for new events
PAGE = 100  # events read at once
KEPT = 200  # events of a job in memory; who is further behind reads them again
PING_S = 15.0  # silence after which a follower is told that there is nothing


class Feed:
    """The events of one job from some number on, as they come.  Of the event loop's thread."""

    def __init__(self, stored: StoredJobs, id: str, seen: int):
        """seen: number of the event after which it begins."""
        self._stored, self._id = stored, id
        self._recent: deque[EventRecord] = deque(maxlen=KEPT)
        self._seen = seen
        self.over = False  # the job has ended, and all its events are read
        self.error: Exception | None = None  # why no more are read
        self.changed = asyncio.Event()  # set at the next news, and replaced by another
        self.followers = 0

    async def run(self) -> None:
        """Looks until the job has ended."""
        while not self.over and self.error is None:
            events: list[EventRecord] = []
            try:
                ended, events = await self._stored.database.ask(self._look)
            except Exception as error:
                if not isinstance(error, JaxLoraError):
                    LOG.exception("the events of job %s cannot be followed", self._id)
                self.error = error
            else:
                self._recent += events
                self._seen = events[-1].seq if events else self._seen
                self.over = ended and not events
            if events or self.over or self.error is not None:
                told, self.changed = self.changed, asyncio.Event()
                told.set()
            else:
                await asyncio.sleep(LOOK_S)

    def _look(self) -> tuple[bool, list[EventRecord]]:
        """(whether the job had ended before, new events)."""
        ended = self._stored.get(self._id, None).status in ENDED
        return ended, self._stored.events_since(self._id, None, self._seen, limit=PAGE)

    async def after(self, seq: int) -> list[EventRecord]:
        """Events with numbers above `seq`, oldest first, as far as they are read.  Raises as `StoredJobs.events_since`."""
        if seq >= self._seen:
            return []
        if self._recent and self._recent[0].seq <= seq + 1:
            return [event for event in self._recent if event.seq > seq]
        return await self._stored.database.ask(self._stored.events_since, self._id, None, seq, limit=PAGE)


class Feeds:
    """The feeds of all jobs that are followed.  Of the event loop's thread."""

    def __init__(self, stored: StoredJobs):
        self._stored = stored
        self._feeds: dict[str, tuple[Feed, asyncio.Task[None]]] = {}

    async def follow(self, id: str, seen: int, deadline: float) -> AsyncGenerator[list[EventRecord]]:
        """New events as they come, no event in PING_S of silence; it ends when the job has, or at the deadline of the loop's clock.

        seen: number of the event after which it begins.  Raises NotFound, Unavailable.
        """
        clock = asyncio.get_running_loop().time
        with self._feed(id, seen) as feed:
            while clock() < deadline:
                changed = feed.changed  # before the look, so that none is missed
                events = await feed.after(seen)
                if events:
                    yield events
                    seen = events[-1].seq
                elif feed.error is not None:
                    raise feed.error
                elif feed.over:
                    return
                else:
                    try:
                        async with asyncio.timeout_at(min(clock() + PING_S, deadline)):
                            await changed.wait()
                    except TimeoutError:
                        yield []

    @contextlib.contextmanager
    def _feed(self, id: str, seen: int) -> Generator[Feed]:
        """A job's feed, which is read while somebody is inside."""
        if id not in self._feeds:
            feed = Feed(self._stored, id, seen)
            self._feeds[id] = feed, asyncio.create_task(feed.run())
        feed, task = self._feeds[id]
        feed.followers += 1
        try:
            yield feed
        finally:
            feed.followers -= 1
            if not feed.followers:
                task.cancel()
                del self._feeds[id]
