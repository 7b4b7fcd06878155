"""Streams of deltas from the device thread to event loops.

A loop is woken once for all the deltas of a step, whatever the number of streams.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Generator

from serve.engine.request import Delta


class Mail:
    """Passes deltas to the event loops that read them.  Owned by one thread."""

    def __init__(self) -> None:
        self._gathered: dict[asyncio.AbstractEventLoop, list[tuple[DeltaStream, Delta]]] | None = None

    def put(self, stream: DeltaStream, delta: Delta) -> None:
        """Passes a delta on, at once or with the others that are gathered."""
        if self._gathered is None:
            _send(stream.loop, [(stream, delta)])
        else:
            self._gathered.setdefault(stream.loop, []).append((stream, delta))

    @contextlib.contextmanager
    def gather(self) -> Generator[None]:
        """Gathers what is put while it is entered; each loop then gets its deltas in one call."""
        self._gathered = {}
        try:
            yield
        finally:
            gathered, self._gathered = self._gathered, None
            for loop, deltas in gathered.items():
                _send(loop, deltas)


class DeltaStream:
    """The async iterator of a request's deltas; it ends after the one with `finish` or `error`."""

    def __init__(self, request_id: str, cancel: Callable[[str], None], mail: Mail):
        """cancel: frees what the request of this id holds; from any thread."""
        self._id, self._cancel, self._mail = request_id, cancel, mail
        self._queue: asyncio.Queue[Delta] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self._ended = False

    def deliver(self, delta: Delta) -> None:
        """Passes a delta to the event loop.  Device thread only."""
        self._mail.put(self, delta)

    def take(self, delta: Delta) -> None:
        """Puts a delta in its queue.  Event loop only."""
        self._queue.put_nowait(delta)

    def lose(self) -> None:
        """Frees what the request holds, as nothing reads it any more.  From any thread."""
        self._cancel(self._id)

    def __aiter__(self) -> DeltaStream:
        return self

    async def __anext__(self) -> Delta:
        if self._ended:
            raise StopAsyncIteration
        delta = await self._queue.get()
        self._ended = delta.finish is not None or delta.error is not None
        return delta

    def cancel(self) -> None:
        """Frees slot and KV within a step; does nothing when the stream has ended."""
        if not self._ended:
            self._cancel(self._id)


def _send(loop: asyncio.AbstractEventLoop, deltas: list[tuple[DeltaStream, Delta]]) -> None:
    try:
        loop.call_soon_threadsafe(_take_all, deltas)
    except RuntimeError:  # the loop has closed
        for stream, _ in deltas:
            stream.lose()


def _take_all(deltas: list[tuple[DeltaStream, Delta]]) -> None:
    for stream, delta in deltas:
        stream.take(delta)
