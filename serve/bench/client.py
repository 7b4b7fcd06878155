"""One streamed request to an OpenAI-compatible server, and when each piece of its answer came.

It writes and reads HTTP/1.1 itself: a general client would take as much of a core as a small model does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from jaxlora.core.errors import ConfigInvalid

LINE_BYTES = 2**20  # the longest line of an answer


@dataclass(frozen=True, slots=True)
class Server:
    """Where an OpenAI-compatible server answers."""

    host: str
    port: int
    tls: bool
    prefix: str  # of every path, as "/v1"
    key: str | None

    @classmethod
    def at(cls, url: str, key: str | None = None) -> Server:
        """Returns the server of a URL with or without /v1.  Raises ConfigInvalid for what is no URL of HTTP."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as e:
            raise ConfigInvalid(f"{url!r} is no URL: {e}") from e
        if parts.scheme not in ("http", "https") or not host:
            raise ConfigInvalid(f"{url!r} is no URL of a server, such as http://127.0.0.1:8000")
        tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1") + "/v1"
        return cls(host, port or (443 if tls else 80), tls, prefix, key)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """How one request went; times are those of time.perf_counter."""

    model: str
    began_s: float  # before the connection is made
    pieces_s: tuple[float, ...]  # when each piece of text came
    ended_s: float
    prompt_tokens: int | None  # by the server's usage; None: it told none
    tokens: int  # generated, by the server's usage, else the number of pieces
    text: str
    error: str | None  # why it is not whole


class _Refused(Exception):
    """The server answered with an error, or not in HTTP."""


async def ask(server: Server, path: str, body: Mapping[str, object], timeout_s: float) -> Answer:
    """Asks for a stream and reads it to its end.  path: completions, or chat/completions.

    Never raises for what the network or the server does: that is the answer's `error`.
    """
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    began_s, error = time.perf_counter(), None
    pieces_s: list[float] = []
    text: list[str] = []
    usage: Mapping[str, int] = {}
    finished = False
    try:
        async with asyncio.timeout(timeout_s), contextlib.aclosing(_events(server, path, asked)) as events:
            async for event in events:
                if "error" in event:
                    raise _Refused(str(event["error"].get("message", event["error"])))
                for choice in event.get("choices", ()):
                    if piece := choice.get("text") or (choice.get("delta") or {}).get("content"):
                        pieces_s.append(time.perf_counter())
                        text.append(piece)
                    finished |= choice.get("finish_reason") is not None
                usage = event.get("usage") or usage
        if not finished:
            error = "the answer broke off"
    except TimeoutError:
        error = f"no end after {timeout_s:g} s"
    except (_Refused, OSError, EOFError, ValueError, LookupError, AttributeError, TypeError) as e:
        error = str(e) or type(e).__name__
    return Answer(
        model=str(body.get("model", "")),
        began_s=began_s,
        pieces_s=tuple(pieces_s),
        ended_s=time.perf_counter(),
        prompt_tokens=usage.get("prompt_tokens"),
        tokens=usage.get("completion_tokens", len(pieces_s)),
        text="".join(text),
        error=error,
    )


async def _events(server: Server, path: str, body: Mapping[str, object]) -> AsyncGenerator[dict]:
    """Yields the events of the stream that a POST is answered with."""
    content = json.dumps(body).encode()
    key = "" if server.key is None else f"Authorization: Bearer {server.key}\r\n"
    head = (
        f"POST {server.prefix}/{path} HTTP/1.1\r\nHost: {server.host}:{server.port}\r\n{key}Connection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(
        server.host, server.port, ssl=True if server.tls else None, limit=LINE_BYTES
    )
    try:
        writer.write(head.encode("ascii") + content)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        pieces = _pieces(reader, chunked="\r\ntransfer-encoding: chunked\r\n" in answer)
        status = answer.split(" ", 2)[1]
        if status != "200":
            raise _Refused(f"HTTP {status}: {_reason(b''.join([p async for p in pieces]))}")
        rest = b""
        async for piece in pieces:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                data = line.removeprefix(b"data:").strip()
                if data == line.strip() or data == b"[DONE]":
                    continue  # a comment, an empty line, or the end
                yield json.loads(data)
    finally:
        writer.close()


def _reason(body: bytes) -> str:
    """What a refusal says, in the server's words."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body[:300].decode(errors="replace")


async def _pieces(reader: asyncio.StreamReader, *, chunked: bool) -> AsyncGenerator[bytes]:
    """Yields an answer's body as it comes."""
    while chunked and (size := int((await reader.readline()).split(b";")[0], 16)):
        yield await reader.readexactly(size)
        await reader.readline()
    while not chunked and (piece := await reader.read(2**16)):
        yield piece
