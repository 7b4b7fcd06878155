"""One answer in the making: token streams in, an HTTP answer out, whole or as server-sent events; and clients that go.

From a job (prompts, sampling, whose adapter) to its run: the requests of all its choices, submitted together or not at all."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from jaxlora.core.errors import ContextLengthExceeded, DeadlineExceeded, InvalidRequest
from jaxlora.core.lora import AdapterRef
from serve.access.caller import caller_of
from serve.access.rate_limit import Limiter, cost
from serve.api.openai.logprobs import Choice, MergedStreams, Piece, PromptView
from serve.api.openai.render import Renderer, headed, usage_object
from serve.api.openai.sampling import sampling
from serve.api.openai.schemas import (
    MAX_CHOICES,
    ChatChunkChoice,
    ChatCompletion,
    Chunk,
    Heading,
    SamplingBody,
    TextChunkChoice,
    TextCompletion,
    Usage,
)
from serve.api.openai.tokenizing import Tokenizing
from serve.engine.grammar import GrammarSource
from serve.engine.request import Delta
from serve.engine.request import Request as TokenRequest
from serve.http.errors import ErrorObject, error_body, error_code
from serve.http.request_log import Generated, note_generated, note_refused
from serve.http.sse import DONE, sse
from serve.runtime.backend import Backend

LOG = logging.getLogger("serve")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One answer in the making."""

    heading: Heading
    prompts: Sequence[Sequence[int]]
    streams: MergedStreams
    choices: Sequence[Choice]
    deadline: float  # of the event loop's clock: what is not complete then ends with an error
    ping_s: float  # silence after which a stream gets a comment line
    operation: str  # of the request, for metrics and traces
    scope: Scope  # of the HTTP request: what came of it is noted there

    async def pieces(self) -> list[list[Piece]]:
        """All pieces of each choice, when all have ended.  Raises what ended one early.  Cancels its streams in the end."""
        pieces: list[list[Piece]] = [[] for _ in self.choices]
        try:
            while not self.ended:
                item = await self.next()
                if item is not None:
                    index, delta = item
                    pieces[index].append(self.choices[index].take(delta))
        finally:
            self.streams.cancel()
        return pieces

    async def next(self, timeout_s: float = math.inf) -> tuple[int, Delta] | None:
        """(choice, delta), or None when nothing came in time.  Raises what ended a stream early, DeadlineExceeded included."""
        left = self.deadline - asyncio.get_running_loop().time()
        item = await self.streams.next(min(timeout_s, left)) if left > 0 else None
        if item is None and timeout_s >= left:
            raise DeadlineExceeded(
                "the time of this request is over before its answer is complete; ask for less, or later"
            )
        return item

    def failed(self, error: Exception) -> ErrorObject:
        """Returns the error's body, cancels what is left of the answer and logs an internal error."""
        status, body = error_body(error)
        note_refused(self.scope, error_code(error))
        if status == 500:
            LOG.error("stream %s failed", self.heading["id"], exc_info=error)
        self.streams.cancel()
        return body

    def note(self) -> None:
        """Reports to the app's listeners how far it came."""
        note_generated(
            self.scope,
            Generated(
                operation=self.operation,
                model=self.heading["model"],
                prompt_tokens=sum(map(len, self.prompts)),
                completion_tokens=sum(c.tokens for c in self.choices),
                finishes=tuple(c.finish.value for c in self.choices if c.finish is not None),
            ),
        )

    @property
    def ended(self) -> bool:
        """Whether all choices are complete."""
        return all(c.finish is not None for c in self.choices)

    @property
    def versions(self) -> list[int]:
        """Of the adapter, that made the answer."""
        return sorted({version for choice in self.choices for version in choice.versions})


class Writer(Protocol):
    """How one endpoint writes a run."""

    async def whole(self) -> Mapping[str, object]:
        """The answer when the run has ended.  Raises what ended it early."""
        ...

    def events(self, first: tuple[int, Delta] | None) -> AsyncGenerator[bytes]:
        """The stream's bytes, of which the first delta, if it came in time, has been read."""
        ...


async def answer(request: Request, run: Run, writer: Writer, stream: bool) -> Response:
    """The run, whole or as a stream; whatever happens, no token stream outlives it."""
    try:
        if not stream:
            try:
                return JSONResponse(await attend(request, writer.whole()))
            finally:
                run.note()
        # Until the first token an error is a plain HTTP answer.  A long wait must not look dead, though.
        first = await attend(request, run.next(run.ping_s))
        return EventStream(run, writer.events(first))
    except BaseException:
        run.streams.cancel()
        raise


class ChoiceWriter:
    """Writes a run as choices, through the renderer of its endpoint."""

    def __init__(self, run: Run, renderer: Renderer, include_usage: bool):
        self._run, self._renderer, self._include_usage = run, renderer, include_usage

    async def whole(self) -> ChatCompletion | TextCompletion:
        """Returns the answer when all choices have ended.  Raises what ended one early."""
        pieces = await self._run.pieces()
        return self._renderer.whole(self._run.heading, pieces, self._run.versions, self._usage())

    async def events(self, first: tuple[int, Delta] | None) -> AsyncGenerator[bytes]:
        """The stream's bytes.  It ends in one way: the finish of all choices or an error event; then [DONE]."""
        run, renderer, item = self._run, self._renderer, first
        try:
            opening = versions_of(None if item is None else item[1])
            for index in range(len(run.choices)):
                for choice in renderer.opening(index):
                    chunk = self._chunk([choice], opening)
                    if renderer.token_ids:
                        chunk["prompt_token_ids"] = list(run.prompts[0])
                    yield sse(chunk)
            while True:
                if item is None:
                    yield KEEPALIVE_COMMENT
                else:
                    index, delta = item
                    for choice in renderer.chunks(index, run.choices[index].take(delta)):
                        yield sse(self._chunk([choice], versions_of(delta)))
                if run.ended:
                    break
                item = await run.next(run.ping_s)
            if self._include_usage:
                yield sse(self._chunk([], run.versions, self._usage()))
        except Exception as error:
            yield sse(run.failed(error))
        yield DONE

    def _chunk(
        self, choices: list[ChatChunkChoice | TextChunkChoice], versions: Sequence[int], usage: Usage | None = None
    ) -> Chunk:
        heading, object = headed(self._run.heading, versions), self._renderer.chunk_object
        chunk: Chunk = {**heading, "object": object, "choices": choices}
        if self._include_usage:
            chunk["usage"] = usage
        return chunk

    def _usage(self) -> Usage:
        return usage_object([len(p) for p in self._run.prompts], self._run.choices)


def versions_of(delta: Delta | None) -> list[int]:
    """The adapter's version that made a delta, if it names one."""
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
            self._run.streams.cancel()
            self._run.note()


async def attend[T](request: Request, work: Awaitable[T]) -> T:
    """Returns the result of the work.  Raises ClientDisconnect, and drops the work, when the client hangs up first."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """What one HTTP request wants of the engine."""

    id_prefix: str
    operation: str  # for metrics and traces
    prompts: Sequence[PromptView]
    adapter: AdapterRef | None
    max_tokens: int | None  # None: `fallback`, or the rest of the context if that is less
    fallback: int
    max_tokens_field: str  # for messages
    prompt_field: str
    logprobs: int | None
    prompt_logprobs: int | None
    grammar: GrammarSource | None


class Admission:
    """Lets jobs into one backend."""

    def __init__(self, backend: Backend, ping_s: float, limiter: Limiter | None):
        """limiter: of each tenant's tokens; None: no limit."""
        self._backend, self._ping_s, self._limiter = backend, ping_s, limiter
        self.tokenizing = Tokenizing(backend, limiter)

    async def run(self, request: Request, body: SamplingBody, job: Generation) -> Run:
        """The job under way; its `streams` must be cancelled in the end.  Raises InvalidRequest and what refuses a request."""
        heading = Heading(
            id=job.id_prefix + uuid.uuid4().hex,
            created=int(time.time()),
            model=body.model,
            adapter_version=job.adapter.version if job.adapter is not None else None,
        )
        requests = await self._requests(request, body, job, heading["id"])
        if self._limiter is not None:
            self._limiter.admit(caller_of(request).owner, tokens=cost(requests))
        tokenizer = self._backend.tokenizer
        name = "token_id:{}".format if body.return_tokens_as_token_ids else tokenizer.token_text
        choices = [Choice(tokenizer, name, job.prompts[i // (body.n or 1)]) for i in range(len(requests))]
        return Run(
            heading=heading,
            prompts=[view.tokens for view in job.prompts],
            streams=MergedStreams(self._backend, requests),
            choices=choices,
            deadline=request.state.deadline,
            ping_s=self._ping_s,
            operation=job.operation,
            scope=request.scope,
        )

    def check_ids(self, ids: Sequence[int], field: str) -> None:
        """Raises InvalidRequest for an id outside the vocabulary: on the device it would read another row."""
        vocab = self._backend.tokenizer.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < vocab:
            wrong = next(i for i in ids if not 0 <= i < vocab)
            raise InvalidRequest(f"{field} has the token id {wrong}; ids go from 0 to {vocab - 1}", param=field)

    def _max_tokens(self, job: Generation, prompt: Sequence[int]) -> int:
        """Tokens this prompt may generate.  Raises ContextLengthExceeded when prompt and max_tokens do not fit."""
        room = self._backend.context - len(prompt)
        wanted = job.max_tokens if job.max_tokens is not None else min(job.fallback, max(room, 1))
        if wanted > room:
            raise ContextLengthExceeded(
                f"the prompt has {len(prompt)} tokens and {job.max_tokens_field} asks for {wanted}, together "
                f"{len(prompt) + wanted}; the model's context is {self._backend.context}. "
                + (
                    f"Ask for at most {room} tokens" if room > 0 else f"Shorten the prompt by {1 - room} tokens or more"
                ),
                param=job.prompt_field,
            )
        return wanted

    async def _requests(self, request: Request, body: SamplingBody, job: Generation, id: str) -> list[TokenRequest]:
        """One request for each prompt and choice, in index order."""
        n = body.n or 1
        if len(job.prompts) * n > MAX_CHOICES:
            raise InvalidRequest(
                f"n times the number of prompts may be at most {MAX_CHOICES}, got {n} times {len(job.prompts)}",
                param="n",
            )
        self.check_ids(body.stop_token_ids or (), "stop_token_ids")
        self.check_ids(list(body.logit_bias or ()), "logit_bias")
        if body.adapter_update == "follow" and "@" in body.model:
            raise InvalidRequest(
                "a request for one version cannot follow the adapter; leave out @VERSION or adapter_update",
                param="adapter_update",
            )
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest("stream_options needs stream: true", param="stream_options")
        if body.prompt_logprobs is not None and body.stream:
            raise InvalidRequest("prompt_logprobs are not streamed; leave out one of them", param="prompt_logprobs")
        limits = [self._max_tokens(job, view.tokens) for view in job.prompts]
        grammar = (
            None if job.grammar is None else await self._backend.grammars.compile(job.grammar, caller_of(request).owner)
        )
        out = []
        for view, max_tokens in zip(job.prompts, limits, strict=True):
            params = sampling(body, max_tokens, job.logprobs, job.prompt_logprobs, grammar)
            for choice in range(n):
                out.append(
                    TokenRequest(
                        id=f"{id}-{len(out)}",
                        tenant=caller_of(request).owner,
                        adapter=job.adapter,
                        prompt=view.tokens,
                        params=replace(params, choice=choice),
                        follow=body.adapter_update == "follow",
                        cache_salt=body.cache_salt,
                    )
                )
        return out
