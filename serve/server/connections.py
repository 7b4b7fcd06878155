"""The connections of an HTTP server: bounded by the process's descriptors, none held without a request for long.

A connection *waits* while none of its requests is being answered: its head has not come, or it idles between two.  One that
waits is closed after a time, and the one that has waited longest is closed when another comes and there is no room.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource

import h11
import uvicorn
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from serve.http.errors import error_response

RESERVED = 128  # descriptors for all but connections: adapters, files, the database, object storage
SPARE = 16  # connections beyond the requests being answered: for /health, and to refuse the others


def connections_within(wanted: int) -> int:
    """How many connections the process may have, `wanted` at most.  Raises its limit of descriptors as far as needed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    if soft < wanted + RESERVED:
        most = wanted + RESERVED if hard == resource.RLIM_INFINITY else min(wanted + RESERVED, hard)
        with contextlib.suppress(OSError, ValueError):  # some systems allow less than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(min(wanted, soft - RESERVED), SPARE + 1)


class Connections(ServerState):
    """All connections of one server, as uvicorn shares them.  Of the event loop's thread."""

    def __init__(self, most: int, header_timeout_s: float):
        super().__init__()
        self._most, self._header_timeout_s = most, header_timeout_s
        self._waiting: dict[Connection, float] = {}  # since when, the longest first

    def admit(self, connection: Connection, now: float) -> None:
        """Takes a new connection in; the one that has waited longest makes room for it, which may be itself."""
        self._waiting[connection] = now
        if len(self.connections) > self._most:
            oldest = next(iter(self._waiting))
            self.forget(oldest)
            oldest.transport.abort()

    def note(self, connection: Connection, now: float) -> None:
        """Notes whether a connection waits now."""
        if connection.is_answering:
            self._waiting.pop(connection, None)
        elif connection in self.connections:
            self._waiting.setdefault(connection, now)

    def forget(self, connection: Connection) -> None:
        """Leaves out a connection that is closed."""
        self.connections.discard(connection)
        self._waiting.pop(connection, None)

    def close_overdue(self, now: float) -> None:
        """Closes the connections that have waited too long.  What is still being sent to one is sent."""
        while self._waiting:
            oldest, since = next(iter(self._waiting.items()))
            if now - since < self._header_timeout_s:
                break
            del self._waiting[oldest]
            self._waiting[oldest] = now  # until it is closed
            oldest.expire(self._header_timeout_s)


class Connection(H11Protocol):
    """uvicorn's connection, whose state `Connections` knows."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: Connections,
        app_state: dict[str, object],
        _loop: asyncio.AbstractEventLoop | None = None,
    ):
        super().__init__(config, server_state, app_state, _loop)
        self._all = server_state

    @property
    def is_answering(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begins to wait for a request."""
        super().connection_made(transport)
        self._all.admit(self, self.loop.time())

    def data_received(self, data: bytes) -> None:
        """Takes bytes of a head or a body."""
        super().data_received(data)
        self._all.note(self, self.loop.time())

    def on_response_complete(self) -> None:
        """Begins to wait again, unless the next request is there already."""
        super().on_response_complete()
        self._all.note(self, self.loop.time())

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends."""
        super().connection_lost(exc)
        self._all.forget(self)

    def expire(self, limit_s: float) -> None:
        """Closes the connection; if it has begun a request's head, it is told why."""
        if self.conn.their_state is h11.IDLE and self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            error = HTTPException(408, f"the request's line and headers took over {limit_s:g} s to arrive")
            answer = error_response(error)
            headers = [*answer.raw_headers, (b"connection", b"close")]
            head = h11.Response(status_code=408, headers=headers)
            for event in (head, h11.Data(bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
