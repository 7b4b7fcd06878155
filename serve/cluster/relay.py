"""The application in front of several servers: each request is answered by one of them, unchanged.

    request ─▶ the body is read ─▶ who answers? ─┬─ generates, or reads what all know ─▶ the router's choice of the replicas
                                                 └─ everything else ────────────────▶ the keeper, which alone writes

Of a body it looks for the model and where the prompt begins; whether it is right is for the server to say.  A replica that
fails or refuses before its answer began is passed over once.  This module knows nothing of what carries the calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence

from starlette.types import Message, Receive, Scope, Send

from jaxlora.core.errors import Unavailable
from serve.access.caller import Caller
from serve.cluster.peer import Chunk, Peer, PeerGone
from serve.cluster.replica_view import Ask, Report, Sent
from serve.cluster.router import Router
from serve.http.drain import OpenEvents
from serve.http.errors import error_body
from serve.http.request_log import HEALTH_PATH, READY_PATH
from serve.http.sse import DONE, sse

CHUNK_BYTES = 4 * 2**20  # of a body, that travel at once; every JSON body is one part
BEGINNING = 256  # characters of a prompt that are looked at
CHARS_PER_TOKEN = 4
MOST_TOKENS = 2**20  # that a request is believed to ask for
MOST_TRIED = 2  # replicas, for one request
# method and path of what any replica answers as well as the keeper
READS = re.compile(r"GET (/v1/models(/.*)?|/tokenizer_info|/version)")
GENERATES = re.compile(
    r"POST (/v1/(chat/completions|completions|responses)|/tokenize|/detokenize|/api/models/(?P<id>[^/]+)/complete)"
)
PROBES = frozenset({f"GET {HEALTH_PATH}", f"GET {READY_PATH}"})
JOB_NAMES = "ft:"  # of models, which the keeper alone knows
RELAYED = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path")


class Peers:
    """The servers that can be asked now, and who chooses among the replicas.  Of one event loop."""

    def __init__(self, router: Router, clock: Callable[[], float] = time.monotonic):
        self.router, self.clock = router, clock
        self.replicas: dict[str, Peer] = {}
        self.keeper: Peer | None = None

    def report(self, name: str, peer: Peer, report: Report) -> None:
        """Takes in what a replica says; one that is not known joins."""
        if self.replicas.get(name) is not peer:
            self.replicas[name] = peer
            self.router.join(name, 1.0, report, self.clock())
        else:
            self.router.report(name, report, self.clock())

    def leave(self, name: str, peer: Peer) -> None:
        """Asks a server no more until it reports, unless another process has taken its name."""
        if self.keeper is peer:
            self.keeper = None
        elif self.replicas.get(name) is peer:
            del self.replicas[name]
            self.router.leave(name, self.clock())

    def send(self, ask: Ask, tried: Collection[str]) -> Sent:
        """Chooses a replica, none of those that were tried.  Raises Unavailable when none is left."""
        return self.router.send(ask, self.clock(), tried)

    def end(self, sent: Sent) -> None:
        """Takes note that a request has ended, in whichever way."""
        self.router.end(sent, self.clock())


class Relay:
    """ASGI application within the gate, which has found the caller and bounds the body.  Of one event loop."""

    def __init__(
        self,
        peers: Peers,
        *,
        base_name: str,
        default_max_tokens: int,
        keep: Callable[[bytes], Awaitable[Chunk]],
    ):
        """keep: puts a part of a large body where every server can read it."""
        self._peers, self._base_name = peers, base_name
        self._default_max_tokens, self._keep = default_max_tokens, keep

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        body = await self._read(receive)
        if body is None:
            return
        events = OpenEvents(send)
        relaying = asyncio.create_task(self._relay(scope, body, events))
        leaving = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait((relaying, leaving), return_when=asyncio.FIRST_COMPLETED)
            if relaying.done():
                relaying.result()
        except PeerGone as error:
            if not events.open:
                raise
            await send({"type": "http.response.body", "body": sse(error_body(error)[1]) + DONE, "more_body": False})
        finally:
            for task in (relaying, leaving):
                task.cancel()
            await asyncio.gather(relaying, leaving, return_exceptions=True)

    async def _read(self, receive: Receive) -> list[Chunk] | None:
        """Returns the body in parts, of which the last is as it came; None: the client is gone."""
        chunks: list[Chunk] = []
        part, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part += message.get("body", b"")
            more = message.get("more_body", False)
            if more and len(part) >= CHUNK_BYTES:
                chunks.append(await self._keep(bytes(part)))
                part.clear()
        return [*chunks, bytes(part)]

    async def _relay(self, scope: Scope, body: list[Chunk], send: Send) -> None:
        ask = self._ask(scope, body)
        if ask is None:
            keeper = self._peers.keeper
            if keeper is None:
                raise PeerGone("the server that keeps files, jobs and adapters is starting; retry soon")
            async with contextlib.aclosing(keeper.answer(relayed(scope), body)) as answer:
                async for messages in answer:
                    await _send_all(messages, send)
        else:
            await self._ask_replicas(ask, scope, body, send)

    async def _ask_replicas(self, ask: Ask, scope: Scope, body: list[Chunk], send: Send) -> None:
        """Has a replica answer; another one where the first fails or refuses before its answer has begun."""
        tried: list[str] = []
        began, refusal = False, None
        while True:
            try:
                sent = self._peers.send(ask, tried)
            except Unavailable:
                if refusal is None:
                    raise
                await _send_all(refusal, send)
                return
            tried.append(sent.replica)
            peer = self._peers.replicas[sent.replica]
            try:
                async with contextlib.aclosing(peer.answer(relayed(scope), body)) as answer:
                    async for messages in answer:
                        if not began and _refuses(messages[0]) and len(tried) < MOST_TRIED:
                            refusal = [*messages, *[message async for more in answer for message in more]]
                            break
                        began = True
                        await _send_all(messages, send)
                    else:
                        return
            except PeerGone:
                self._peers.leave(sent.replica, peer)
                if began or len(tried) == MOST_TRIED:
                    raise
            finally:
                self._peers.end(sent)

    def _ask(self, scope: Scope, body: Sequence[Chunk]) -> Ask | None:
        """Returns what the router must know of a request; None: only the keeper can answer it."""
        what = f"{scope['method']} {scope['path']}"
        caller: Caller | None = scope.get("state", {}).get("caller")
        tenant = "" if caller is None else caller.owner
        if what in PROBES:
            return Ask(tenant=tenant, adapter=None, tokens=0, beginning="")
        if (match := READS.fullmatch(what)) is not None:
            names_job = match[2] is not None and JOB_NAMES in match[2]
            return None if names_job else Ask(tenant=tenant, adapter=None, tokens=0, beginning="")
        if (match := GENERATES.fullmatch(what)) is None:
            return None
        text = body[0] if len(body) == 1 and isinstance(body[0], bytes) else b""
        fields = _fields(text)
        model = match["id"] or _text(fields.get("model"), 512).removeprefix(f"{self._base_name}:")
        if model.startswith(JOB_NAMES):
            return None
        is_base = model == self._base_name
        owner, slash, name = ("", "", "") if is_base else model.partition("@")[0].rpartition("/")
        asked = [fields.get(field) for field in ("max_completion_tokens", "max_output_tokens", "max_tokens")]
        most = next((n for n in asked if isinstance(n, int)), self._default_max_tokens)
        prompt = next((p for f in ("messages", "prompt", "input", "query") if (p := fields.get(f)) is not None), "")
        return Ask(
            tenant=owner if slash else tenant,
            adapter=None if is_base else name,
            tokens=len(text) // CHARS_PER_TOKEN + min(max(most, 0), MOST_TOKENS),
            beginning=_text(prompt, BEGINNING),
        )


def _refuses(message: Message) -> bool:
    """Whether a replica has no room for a request that another one may take."""
    return message["type"] == "http.response.start" and message["status"] == 503


async def _send_all(messages: Iterable[Message], send: Send) -> None:
    for message in messages:
        await send(message)


def relayed(scope: Scope) -> Scope:
    """Returns the request as another process reads it."""
    told = {name: scope[name] for name in RELAYED if name in scope}
    id = scope["state"]["request_id"]
    headers, client = [tuple(pair) for pair in scope["headers"]], scope.get("client")
    return told | {"headers": headers, "client": client, "server": scope.get("server"), "state": {"request_id": id}}


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _fields(body: bytes) -> Mapping[str, object]:
    """Returns the fields of a JSON object; none of what is no such object, which the server will tell."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def _text(value: object, most: int) -> str:
    """Returns the beginning of a text, or of what stands first in a list, as a text."""
    if isinstance(value, list) and value:
        first = value[0]
        value = first.get("content") if isinstance(first, dict) else first
    return value[:most] if isinstance(value, str) else ""
