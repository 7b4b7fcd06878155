"""The application in front of several servers: each request is answered by one of them, unchanged.

    request ─▶ the body is read ─▶ who answers? ─┬─ generates, or reads what all know ─▶ the router's choice of the replicas
                                                 └─ everything else ────────────────▶ the keeper, which alone writes

Of a body it looks for the model and where the prompt begins; whether it is right is for the server to say.  A replica that
fails or refuses before its answer began is passed over once.  Where there is none, a request to generate waits for the
first, and the server that writes answers what it can.  A model that is named by an id is looked up, so that all its names go
the same way, and a replica learns with the request what its job has made.  This module knows nothing of what carries the calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from starlette.types import Message, Receive, Scope, Send

from jaxlora.config.cluster import ScalingSection
from jaxlora.core.errors import NoReplica, Unavailable
from serve.access.caller import Caller
from serve.cluster.autoscaler import Load
from serve.cluster.peer import JOB, Chunk, Peer, PeerGone
from serve.cluster.replica_view import Ask, Report, Sent
from serve.cluster.router import Router
from serve.http.drain import OpenEvents
from serve.http.errors import error_body
from serve.http.request_log import HEALTH_PATH, READY_PATH
from serve.http.sse import DONE, sse
from serve.runtime.job_names import FT_NAME, JobName

LOG = logging.getLogger("serve")
CHUNK_BYTES = 4 * 2**20  # of a body, that travel at once; every JSON body is one part
BEGINNING = 256  # characters of a prompt that are looked at
CHARS_PER_TOKEN = 4
MOST_TOKENS = 2**20  # that a request is believed to ask for
MOST_TRIED = 2  # replicas, for one request
# method and path of what any replica answers as well as the keeper
READS = re.compile(r"GET (/v1/models(/(?P<model>.*))?|/tokenizer_info|/version)")
GENERATES = re.compile(
    r"POST (/v1/(chat/completions|completions|responses)|/tokenize|/detokenize|/api/models/(?P<id>[^/]+)/complete)"
)
READY = f"GET {READY_PATH}"
PROBES = frozenset({f"GET {HEALTH_PATH}", READY})
NOT_HELD = ScalingSection(start_s=0, held=0)
NEWEST = ":latest"  # at the end of a job's model name: whether another job has made more, the keeper alone knows
RELAYED = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path")


@dataclass(slots=True)
class Traffic:
    """What became of requests and servers since the front started."""

    sent: Counter[str] = field(default_factory=Counter)  # requests, by replica
    left: Counter[str] = field(default_factory=Counter)  # times that a replica was found gone or hanging
    rerouted: int = 0  # requests sent again
    unplaced: int = 0  # requests that no replica was left for


@dataclass(frozen=True, kw_only=True, slots=True)
class Alias:
    """The adapter that another name means."""

    tenant: str
    adapter: str
    job: JobName | None  # that makes it


class Peers:
    """The servers that can be asked now, and who chooses among the replicas.  Of one event loop."""

    def __init__(
        self,
        router: Router,
        clock: Callable[[], float] = time.monotonic,
        *,
        scaling: ScalingSection = NOT_HELD,
        may_rest: bool = False,
    ):
        """scaling: how many requests wait for a first replica, and how long.  may_rest: there may be none on purpose."""
        self.router, self.clock, self.traffic = router, clock, Traffic()
        self.known: Collection[str] = ()  # replicas that are there or are being started
        self.replicas: dict[str, Peer] = {}
        self.keeper: Peer | None = None
        self.may_rest = may_rest
        self.held = 0  # requests that wait for a first replica
        self.asked = 0  # requests to generate
        self._scaling, self._joined = scaling, asyncio.Event()
        self._draining: dict[str, Peer] = {}
        self._wants_since_s: float | None = None  # when a request first found no replica
        self._start_s = scaling.start_s  # that the first replica took the last time

    def report(self, name: str, peer: Peer, report: Report) -> None:
        """Takes in what a replica says; one that is not known joins."""
        if self.replicas.get(name) is not peer:
            self.replicas[name] = peer
            self.router.join(name, 1.0, report, self.clock())
            if self._draining.get(name) is peer:
                self.router.drain(name)
                return
            self._draining.pop(name, None)
            if self._wants_since_s is not None:
                self._start_s, self._wants_since_s = self.clock() - self._wants_since_s, None
            self._joined.set()
            self._joined = asyncio.Event()
        else:
            self.router.report(name, report, self.clock())

    def leave(self, name: str, peer: Peer) -> None:
        """Asks a server no more until it reports, unless another process has taken its name."""
        if self.keeper is peer:
            self.keeper = None
        elif self.replicas.get(name) is peer:
            del self.replicas[name]
            self.traffic.left[name] += 1
            self.router.leave(name, self.clock())

    def drain(self, name: str) -> None:
        """Sends a replica's process nothing more; its answers go on."""
        if (peer := self.replicas.get(name)) is not None:
            self._draining[name] = peer
            self.router.drain(name)

    @property
    def serving(self) -> bool:
        """Whether there is a replica that gets requests."""
        return any(self._draining.get(name) is not peer for name, peer in self.replicas.items())

    def load(self) -> Load:
        """Returns what decides how many replicas there should be."""
        return Load(replicas=self.router.reports(), held=self.held, asked=self.asked)

    def starting(self) -> NoReplica:
        """Returns what a request is told that finds no replica."""
        now_s = self.clock()
        if self._wants_since_s is None:
            self._wants_since_s = now_s
            LOG.info("no replica runs; requests wait for the first")
        wait_s = math.ceil(max(1.0, self._start_s - (now_s - self._wants_since_s)))
        return NoReplica(f"a replica is being started for this; retry in ~{wait_s} s", retry_after_s=wait_s)

    def ready_at_rest(self) -> Iterable[Message]:
        """Returns the answer whether requests are taken while there is no replica.  Raises NoReplica, PeerGone."""
        if not self.may_rest:
            raise self.starting()
        if self.keeper is None:
            raise no_keeper()
        state = "a replica is being started" if self.held else "no replica runs; the next request starts one"
        head = [(b"content-type", b"application/json")]
        yield {"type": "http.response.start", "status": 200, "headers": head}
        yield {"type": "http.response.body", "body": json.dumps({"status": "ok", "detail": state}).encode()}

    async def first(self) -> None:
        """Waits until there is a replica.  Raises NoReplica where too many wait, or it takes too long."""
        refusal = self.starting()
        if self.held >= self._scaling.held:
            self.traffic.unplaced += 1
            raise refusal
        self.held += 1
        try:
            async with asyncio.timeout(self._scaling.start_s):
                while not self.serving:
                    await self._joined.wait()
        except TimeoutError:
            self.traffic.unplaced += 1
            raise self.starting() from None
        finally:
            self.held -= 1

    def send(self, ask: Ask, tried: Collection[str]) -> Sent:
        """Chooses a replica, none of those that were tried.  Raises Unavailable when none is left."""
        try:
            sent = self.router.send(ask, self.clock(), tried)
        except Unavailable:
            self.traffic.unplaced += 1
            raise
        self.traffic.sent[sent.replica] += 1
        self.traffic.rerouted += bool(tried)
        return sent

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
        find: Callable[[str], Awaitable[Alias | None]],
    ):
        """keep: puts a part of a large body where every server can read it.  find: see `Aliases`."""
        self._peers, self._base_name = peers, base_name
        self._default_max_tokens, self._keep, self._find = default_max_tokens, keep, find

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
        asked = await self._ask(scope, body)
        if asked is not None and scope["method"] == "POST":
            self._peers.asked += 1
            if not self._peers.serving:
                await self._peers.first()
        elif not self._peers.serving:
            asked = None
            if f"{scope['method']} {scope['path']}" == READY:
                await _send_all(self._peers.ready_at_rest(), send)
                return
        if asked is None:
            keeper = self._peers.keeper
            if keeper is None:
                raise no_keeper()
            async with contextlib.aclosing(keeper.answer(relayed(scope), body)) as answer:
                async for messages in answer:
                    await _send_all(messages, send)
        else:
            ask, job = asked
            told = relayed(scope)
            if job is not None:
                told["state"][JOB] = job
            await self._ask_replicas(ask, told, body, send)

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
                async with contextlib.aclosing(peer.answer(scope, body)) as answer:
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

    async def _ask(self, scope: Scope, body: Sequence[Chunk]) -> tuple[Ask, JobName | None] | None:
        """Returns what the router must know of a request, and the job of its model; None: only the keeper can answer it.

        Raises Unavailable.
        """
        what = f"{scope['method']} {scope['path']}"
        caller: Caller | None = scope.get("state", {}).get("caller")
        tenant = "" if caller is None else caller.owner
        if what in PROBES:
            return Ask(tenant=tenant, adapter=None, tokens=0, beginning=""), None
        reads, generates = READS.fullmatch(what), GENERATES.fullmatch(what)
        if reads is None and generates is None:
            return None
        text = body[0] if len(body) == 1 and isinstance(body[0], bytes) else b""
        fields = _fields(text) if generates else {}
        id = generates["id"] if generates else None
        named = _text(fields.get("model"), 512) if reads is None else reads["model"] or ""
        model = id or named.removeprefix(f"{self._base_name}:")
        names_job = FT_NAME.fullmatch(model) is not None
        if names_job and model.endswith(NEWEST):
            return None
        alias = await self._find(model) if id or names_job else None
        job = None if alias is None else alias.job
        if reads is not None:
            return Ask(tenant=tenant, adapter=None, tokens=0, beginning=""), job
        adapter: str | None
        if alias is not None:
            tenant, adapter = alias.tenant, alias.adapter
        elif id or model in (self._base_name, ""):
            adapter = None
        else:
            owner, slash, adapter = model.partition("@")[0].rpartition("/")
            tenant = owner if slash else tenant
        asked = [fields.get(field) for field in ("max_completion_tokens", "max_output_tokens", "max_tokens")]
        most = next((n for n in asked if isinstance(n, int)), self._default_max_tokens)
        prompt = next((p for f in ("messages", "prompt", "input", "query") if (p := fields.get(f)) is not None), "")
        ask = Ask(
            tenant=tenant,
            adapter=adapter,
            tokens=len(text) // CHARS_PER_TOKEN + min(max(most, 0), MOST_TOKENS),
            beginning=_text(prompt, BEGINNING),
        )
        return ask, job


def no_keeper() -> PeerGone:
    """Returns what a request is told that only the server can answer which writes, while that is not there."""
    return PeerGone("the server that keeps files, jobs and adapters is starting; retry soon")


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
