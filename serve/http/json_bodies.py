"""JSON bodies, charged to their tenant before they are read and again before they are parsed: the event loop is everyone's."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxlora.core.errors import RateLimited
from serve.access.body_rate import BodyRate

VALUE_MARKS = (b",", b"[", b"{")  # as many of them as values, or more: some stand in texts


class JsonBodies:
    """ASGI middleware within the gate, which has found the caller and bounds each body."""

    def __init__(
        self,
        app: ASGIApp,
        rate: BodyRate,
        *,
        uploads: Collection[str],
        most_values: int,
        pause_s: float = 1.0,
    ):
        """uploads: paths whose bodies are no JSON.  most_values: of a body, in its lists and objects together.

        pause_s: before a refusal, for a client that would ask again at once: its bytes are taken from the socket even so.
        """
        self._app, self._rate, self._uploads, self._most_values = app, rate, uploads, most_values
        self._pause_s = pause_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller, headers = scope.get("state", {}).get("caller"), Headers(scope=scope)
        announced = headers.get("content-length", "")
        has_body = announced not in ("", "0") or "transfer-encoding" in headers
        if caller is not None and has_body and scope["path"] not in self._uploads:
            try:
                receive = await self._read(caller.owner, int(announced) if announced.isdecimal() else 0, receive)
            except RateLimited:
                await asyncio.sleep(self._pause_s)
                raise
        await self._app(scope, receive, send)

    async def _read(self, tenant: str, announced: int, receive: Receive) -> Receive:
        """Reads the whole body and returns what gives it again.  Raises RateLimited; 413 for too many values."""
        self._rate.charge(tenant, announced)
        messages: deque[Message] = deque()
        size = values = 0
        while not messages or messages[-1].get("more_body"):
            messages.append(await receive())
            body = messages[-1].get("body", b"")
            size += len(body)
            values += sum(body.count(mark) for mark in VALUE_MARKS)
        self._rate.settle(tenant, charged=announced, size_bytes=size, values=values)
        if values > self._most_values:
            raise HTTPException(
                413, f"the body may hold at most {self._most_values} values, it has about {values}; send fewer at once"
            )

        async def again() -> Message:
            return messages.popleft() if messages else await receive()

        return again
