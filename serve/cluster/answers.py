"""An app's answer to a request whose body and client are in another process."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence

from starlette.types import ASGIApp, Message, Scope

from serve.cluster.peer import Chunk

LEAVE_S = 5.0  # for the app to notice that its client is gone
AHEAD = 16  # messages that an app has sent and nobody has taken yet, before it waits


async def answered(app: ASGIApp, scope: Scope, body: Sequence[Chunk]) -> AsyncGenerator[list[Message]]:
    """Yields the messages of the app's answer, those together that were sent meanwhile.  Raises what the app raises.

    The app waits for whoever does not take them, as for a slow client.  Whoever closes it is gone: the app is told as a
    server tells it.
    """
    chunks, gone = deque(body), asyncio.Event()
    sent: asyncio.Queue[Message | None] = asyncio.Queue(AHEAD)

    async def send(message: Message | None) -> None:
        if not gone.is_set():
            await sent.put(message)

    async def receive() -> Message:
        if not chunks:
            await gone.wait()
            return {"type": "http.disconnect"}
        chunk = chunks.popleft()
        data = chunk if isinstance(chunk, bytes) else await chunk
        return {"type": "http.request", "body": data, "more_body": bool(chunks)}

    async def run() -> None:
        try:
            await app(scope, receive, send)
        finally:
            await send(None)

    task = asyncio.create_task(run())
    try:
        messages: list[Message | None] = []
        while None not in messages:
            messages = [await sent.get()]
            while not sent.empty():
                messages.append(sent.get_nowait())
            if said := [message for message in messages if message is not None]:
                yield said
        await task
    finally:
        gone.set()
        while not sent.empty():  # the app may wait for room
            sent.get_nowait()
        if not (await asyncio.wait((task,), timeout=LEAVE_S))[0]:
            task.cancel()
