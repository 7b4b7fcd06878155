"""From the device thread to an event loop: the deltas of one request, and the message that it has come.  Pure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from serve.request import Delta, Request


class DeltaStream:
    """The async iterator a wire reads: ends after the delta with `finish` or `error`."""

    def __init__(self, request_id: str, cancel: Callable[[str], None]):
        """cancel: frees what the request of this id holds; of any thread."""
        self._id, self._cancel = request_id, cancel
        self._queue: asyncio.Queue[Delta] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._ended = False

    def deliver(self, delta: Delta) -> None:
        """Called on the device thread."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, delta)
        except RuntimeError:  # the loop has closed: nobody reads any more
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
        """Frees slot and KV within a step; harmless when the stream has ended."""
        if not self._ended:
            self._cancel(self._id)


@dataclass(frozen=True, slots=True)
class Asked:
    """The message that a request has come."""

    request: Request
    listener: Callable[[Delta], None]
    admit: Callable[[Request, Callable[[Delta], None]], None]

    def __call__(self) -> None:
        """Of the device thread."""
        self.admit(self.request, self.listener)
