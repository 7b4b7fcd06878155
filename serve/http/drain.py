"""Who is inside: requests are let in until the server drains, and those whose key is revoked are shut out.  Pure."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Generator

from starlette.datastructures import Headers
from starlette.types import Message, Send

from jaxlora.core.errors import JaxLoraError, Unauthorized, Unavailable
from serve.http.errors import error_body
from serve.http.sse import DONE, sse


class Starting(Unavailable):
    """The server is not ready yet; the message says what it waits for."""

    code = "starting"


class Drain:
    """Lets requests in from the time that the server is ready until it is closed, and knows who is inside.

    Of the event loop's thread, but for `close` and `shut_out`.
    """

    def __init__(self, waits_for: Callable[[], str] | None = None) -> None:
        """waits_for: says what a server does that is not ready; it is until this is None."""
        self.waits_for = waits_for
        self.open = True
        self.inside = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._staying: dict[str | None, set[asyncio.Timeout]] = {}  # by the id of their key
        self._last_word: JaxLoraError | None = None  # to who is turned out when the server ends

    def close(self) -> None:
        """From now on nobody comes in."""
        self.open = False

    def check_started(self) -> None:
        """Raises Starting while the server is not ready yet."""
        waits_for = self.waits_for
        if waits_for is not None:
            raise Starting(f"the server is starting: {waits_for() or 'almost ready'}; retry when /ready answers 200")

    def check(self) -> None:
        """Raises Starting while the server is not ready yet, Unavailable when it is closed."""
        self.check_started()
        if not self.open:
            raise Unavailable("the server is stopping; ask another one, or this one when it is up again")

    @contextlib.contextmanager
    def entered(self) -> Generator[None]:
        """One more inside.  Raises as `check` does."""
        self.check()
        self._loop = asyncio.get_running_loop()
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    @contextlib.asynccontextmanager
    async def staying(self, key_id: str | None, send: Send) -> AsyncGenerator[Send]:
        """`send`, for an answer to this key.  When the key is shut out meanwhile, what answers is cancelled.

        A stream of events then ends with an error event; anything else raises the error: Unauthorized, or that of `turn_out`.
        """
        events = OpenEvents(send)
        until = asyncio.timeout(None)  # rescheduled to expire
        staying = self._staying.setdefault(key_id, set())
        staying.add(until)
        try:
            async with until:
                yield events
        except TimeoutError:
            if not until.expired():
                raise
            error = self._last_word or Unauthorized("the API key was revoked while this request was open")
            if not events.open:
                raise error from None
            await send({"type": "http.response.body", "body": sse(error_body(error)[1]) + DONE, "more_body": False})
        finally:
            staying.discard(until)
            if not staying:
                self._staying.pop(key_id, None)

    def shut_out(self, key_id: str | None) -> None:
        """Ends every open request with this key; None: those without one."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._expire, key_id)

    def turn_out(self, error: JaxLoraError) -> None:
        """Ends every open request with this error: the server ends."""
        self._last_word = error
        for key_id in self._staying:
            self._expire(key_id)

    def _expire(self, key_id: str | None) -> None:
        for until in self._staying.get(key_id, ()):
            if not until.expired():
                until.reschedule(asyncio.get_running_loop().time())


class OpenEvents:
    """`send`, which knows whether a stream of server-sent events is under way."""

    def __init__(self, send: Send):
        self._send = send
        self.open = False

    async def __call__(self, message: Message) -> None:
        """Sends one part of an answer."""
        if message["type"] == "http.response.start":
            self.open = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
        elif not message.get("more_body", False):
            self.open = False
        await self._send(message)
