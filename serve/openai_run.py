"""One answer in the making: token streams in, an HTTP answer out, whole or as server-sent events; and clients that go."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Sequence
from dataclasses import dataclass

from fastapi import Request
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from jaxlora.errors import DeadlineExceeded
from serve.answered import Generated, note_generated, note_refused
from serve.openai_errors import error_body, error_code
from serve.openai_format import DONE, Heading, Json, Shape, sse, usage
from serve.openai_stream import Choice, Fan, Piece
from serve.request import Delta

LOG = logging.getLogger("serve")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One answer in the making."""

    heading: Heading
    shape: Shape
    prompt_tokens: Sequence[int]  # of each prompt
    fan: Fan
    choices: Sequence[Choice]
    deadline: float  # of the event loop's clock: what is not complete then ends with an error
    ping_s: float  # silence after which a stream gets a comment line
    scope: Scope  # of the HTTP request: what came of it is noted there

    async def whole(self) -> Json:
        """The answer when all choices have ended.  Raises what ended one early.  Cancels its streams in the end."""
        pieces: list[list[Piece]] = [[] for _ in self.choices]
        try:
            while any(c.finish is None for c in self.choices):
                item = await self.next()
                if item is not None:
                    index, delta = item
                    pieces[index].append(self.choices[index].take(delta))
        finally:
            self.fan.cancel()
            self._note()
        choices = [self.shape.whole(i, p) for i, p in enumerate(pieces)]
        whole = self.heading.wrap(self.shape.whole_object, choices, self._versions())
        return whole | self.shape.beside(pieces[0]) | {"usage": self._usage()}

    async def events(self, first: tuple[int, Delta] | None, include_usage: bool) -> AsyncGenerator[bytes]:
        """The stream's bytes.  It ends in one way: the finish of all choices or an error event; then [DONE]."""
        shape, item = self.shape, first
        extra = {"usage": None} if include_usage else {}
        try:
            opening = versions_of(None if item is None else item[1])
            for index in range(len(self.choices)):
                for choice in shape.opening(index):
                    yield sse(self.heading.wrap(shape.chunk_object, [choice], opening) | extra)
            while True:
                if item is None:
                    yield KEEPALIVE_COMMENT
                else:
                    index, delta = item
                    for choice in shape.chunks(index, self.choices[index].take(delta)):
                        yield sse(self.heading.wrap(shape.chunk_object, [choice], versions_of(delta)) | extra)
                if all(c.finish is not None for c in self.choices):
                    break
                item = await self.next(self.ping_s)
            if include_usage:
                yield sse(self.heading.wrap(shape.chunk_object, [], self._versions()) | {"usage": self._usage()})
        except Exception as error:
            status, body = error_body(error)
            note_refused(self.scope, error_code(error))
            if status == 500:
                LOG.error("stream %s failed", self.heading.id, exc_info=error)
            self.fan.cancel()
            yield sse(body)
        finally:
            self._note()
        yield DONE

    async def next(self, timeout_s: float = math.inf) -> tuple[int, Delta] | None:
        """(choice, delta), or None when nothing came in time.  Raises what ended a stream early, DeadlineExceeded included."""
        left = self.deadline - asyncio.get_running_loop().time()
        item = await self.fan.next(min(timeout_s, left)) if left > 0 else None
        if item is None and timeout_s >= left:
            raise DeadlineExceeded(
                "the time of this request is over before its answer is complete; ask for less, or later"
            )
        return item

    def _note(self) -> None:
        """Has the listeners of the app hear how far it came."""
        note_generated(
            self.scope,
            Generated(
                operation=self.shape.whole_object.partition(".")[0],
                model=self.heading.model,
                prompt_tokens=sum(self.prompt_tokens),
                completion_tokens=sum(c.tokens for c in self.choices),
                finishes=tuple(c.finish.value for c in self.choices if c.finish is not None),
            ),
        )

    def _usage(self) -> Json:
        return usage(self.prompt_tokens, self.choices)

    def _versions(self) -> list[int]:
        return sorted({version for choice in self.choices for version in choice.versions})


def versions_of(delta: Delta | None) -> list[int]:
    """The adapter's version that made a delta, if it says so."""
    return [] if delta is None or delta.adapter is None else [delta.adapter.version]


class EventStream(EventSourceResponse):
    """Sends a run's events; cancels its token streams when the client is gone, even before the first byte."""

    def __init__(self, run: Run, events: AsyncGenerator[bytes]):
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._run.fan.cancel()


async def attend[T](request: Request, work: Awaitable[T]) -> T:
    """The result of the work.  Raises ClientDisconnect, and drops the work, when the client hangs up first."""

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    job, gone = asyncio.ensure_future(work), asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise ClientDisconnect
        return job.result()
    finally:
        job.cancel()
        gone.cancel()
