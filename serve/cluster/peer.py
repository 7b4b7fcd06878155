"""What whoever stands before several servers knows of one, wherever its process is.  Pure."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from starlette.types import Message, Scope

from jaxlora.core.errors import Unavailable
from serve.cluster.replica_view import Report

JOB = "job"  # in the state of a request whose model a job made: the `JobName`, as the front has just read it
KEEPER, REPLICA = "keeper", "replica-"  # names of servers; a number follows the second

type Chunk = bytes | Awaitable[bytes]  # of a body; the second lies where every process can read it


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """What does not change of a server."""

    base_name: str
    most_values: int  # of a JSON body
    body_limits: Mapping[str, int]  # path → bytes uploaded there


class PeerGone(Unavailable):
    """The server's process has ended, or cannot be reached."""


class Peer(Protocol):
    """A server."""

    def answer(self, scope: Scope, body: Sequence[Chunk]) -> AsyncGenerator[list[Message]]:
        """Yields the messages of its answer; closed early, it frees what the request holds.  Raises PeerGone."""
        ...

    async def report(self, asked_s: float) -> Report:
        """Returns what it has to do, asked at this time of who asks.  Raises PeerGone; it may wait long for a server that starts or hangs."""
        ...
