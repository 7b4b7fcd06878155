"""The OpenAI wire: models, chat and plain completions (whole or as server-sent events), tokenize and detokenize.

A body becomes a Job (prompts and sampling), a Job becomes Requests, their token streams become one answer.  The model
name is resolved once, before the prompt is read, so an answer has one adapter version from end to end.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from jaxlora.errors import ContextLengthExceeded, InvalidRequest
from jaxlora.lora import AdapterRef
from serve.auth import caller_of
from serve.house import House
from serve.limits import Limiter, cost
from serve.openai_errors import ERROR_SCHEMA, ERROR_STATUSES
from serve.openai_format import ChatShape, CompletionShape, Heading, Shape, model_object
from serve.openai_run import EventStream, Run, attend
from serve.openai_sampling import grammar_source, sampling
from serve.openai_stream import Choice, Fan, PromptView
from serve.openai_types import (
    MAX_CHOICES,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    Message,
    ModelQuery,
    SamplingBody,
    TokenizeBody,
    refuse_unbuilt,
)
from serve.request import Request as TokenRequest

MAX_LISTED = 1000  # adapters in an answer without `limit`
COMPLETION_MAX_TOKENS = 16  # the API's default for plain completions

# "default" also keeps FastAPI from documenting 422, which this server never sends.
ERRORS: dict[int | str, dict] = {
    status: {"description": text, "content": {"application/json": {"schema": ERROR_SCHEMA}}}
    for status, text in [*ERROR_STATUSES.items(), ("default", "any other error")]
}


@dataclass(frozen=True, kw_only=True, slots=True)
class WireConfig:
    """Limits of the OpenAI wire."""

    default_max_tokens: int  # cap of a chat answer whose request names no max_tokens
    ping_s: float = 15.0  # seconds of silence after which a stream gets a comment line

    def __post_init__(self) -> None:
        if self.default_max_tokens < 1:
            raise InvalidRequest(f"default_max_tokens must be at least 1, got {self.default_max_tokens}")
        if self.ping_s <= 0:
            raise InvalidRequest(f"ping_s must be positive, got {self.ping_s}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What one HTTP request asks of the engine."""

    prompts: Sequence[PromptView]
    max_tokens: int | None  # None: `fallback`, or the rest of the context if that is less
    fallback: int
    max_tokens_field: str  # for messages
    prompt_field: str
    logprobs: int | None
    prompt_logprobs: int | None
    shape: Shape


class OpenAIWire:
    """The routes, over one house."""

    def __init__(self, house: House, config: WireConfig, limiter: Limiter | None = None):
        """limiter: refuses who asks for too much in a minute; None: nobody is."""
        self._house = house
        self._config = config
        self._limiter = limiter

    def router(self) -> APIRouter:
        """All routes of this wire."""
        router = APIRouter(responses=ERRORS)
        router.add_api_route("/v1/models", self.list_models, methods=["GET"], response_model=None)
        router.add_api_route("/v1/models/{model:path}", self.read_model, methods=["GET"], response_model=None)
        router.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], response_model=None)
        router.add_api_route("/v1/completions", self.complete, methods=["POST"], response_model=None)
        router.add_api_route("/tokenize", self.tokenize, methods=["POST"], response_model=None)
        router.add_api_route("/detokenize", self.detokenize, methods=["POST"], response_model=None)
        return router

    async def list_models(self, request: Request, query: Annotated[ModelQuery, Query()]) -> Response:
        """The base models, then the caller's adapters, newest first."""
        cards = await asyncio.to_thread(self._house.models, caller_of(request).sees)
        cards = sorted(cards, key=lambda c: (c.parent is not None, -c.created, c.id))
        cards = [c for c in cards if c.id.startswith(query.prefix)]
        if query.after is not None:
            places = [i for i, c in enumerate(cards) if c.id == query.after]
            if not places:
                raise InvalidRequest("after must be the id of a model in this list", param="after")
            cards = cards[places[0] + 1 :]
        limit = query.limit if query.limit is not None else MAX_LISTED + sum(c.parent is None for c in cards)
        page = [model_object(c) for c in cards[:limit]]
        return JSONResponse({"object": "list", "data": page, "has_more": len(cards) > limit})

    async def read_model(self, request: Request, model: str) -> Response:
        """One model, by any name that a completion takes."""
        return JSONResponse(model_object(await asyncio.to_thread(self._house.model, caller_of(request).sees, model)))

    async def chat(self, request: Request, body: ChatBody) -> Response:
        """The answer to a conversation."""
        refuse_unbuilt(body)
        adapter = self._house.resolve(caller_of(request).sees, body.model)
        asked = chat_max_tokens(body)
        if body.top_logprobs and not body.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        ids = await self._chat_ids(body.messages, body.add_generation_prompt, body.continue_final_message)
        job = Job(
            prompts=[PromptView(tokens=ids, echo=None, logprobs=None, ranked=body.prompt_logprobs)],
            max_tokens=asked,
            fallback=self._config.default_max_tokens,
            max_tokens_field="max_completion_tokens" if body.max_tokens is None else "max_tokens",
            prompt_field="messages",
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
            shape=ChatShape(bool(body.logprobs), body.prompt_logprobs is not None),
        )
        return await self._answer(request, body, adapter, job)

    async def complete(self, request: Request, body: CompletionBody) -> Response:
        """The continuation of each prompt."""
        refuse_unbuilt(body)
        adapter = self._house.resolve(caller_of(request).sees, body.model)
        if body.max_tokens == 0 and not body.echo:
            raise InvalidRequest("max_tokens must be at least 1 without echo, got 0", param="max_tokens")
        if body.best_of is not None and body.best_of < (body.n or 1):
            raise InvalidRequest(f"best_of must be at least n, got {body.best_of} and {body.n}", param="best_of")
        echoed = body.logprobs if body.echo else None
        job = Job(
            prompts=await self._prompts(body),
            max_tokens=body.max_tokens,
            fallback=COMPLETION_MAX_TOKENS,
            max_tokens_field="max_tokens",
            prompt_field="prompt",
            logprobs=body.logprobs,
            prompt_logprobs=max((p for p in (body.prompt_logprobs, echoed) if p is not None), default=None),
            shape=CompletionShape(body.logprobs is not None, body.prompt_logprobs is not None),
        )
        return await self._answer(request, body, adapter, job)

    async def tokenize(self, request: Request, body: TokenizeBody) -> Response:
        """Ids of a text or of a conversation."""
        refuse_unbuilt(body)
        if body.model is not None:
            self._house.resolve(caller_of(request).sees, body.model)
        if body.messages is not None and body.prompt is None:
            refuse_given(body, "messages", "add_special_tokens")
            ids = await self._chat_ids(body.messages, body.add_generation_prompt, body.continue_final_message)
        elif body.prompt is not None and body.messages is None:
            refuse_given(body, "prompt", "add_generation_prompt", "continue_final_message")
            special = body.add_special_tokens is not False
            ids = await asyncio.to_thread(self._house.tokenizer.encode, body.prompt, add_special_tokens=special)
        else:
            raise InvalidRequest("give either prompt or messages", param="prompt")
        return JSONResponse({"tokens": list(ids), "count": len(ids), "max_model_len": self._house.context})

    async def detokenize(self, request: Request, body: DetokenizeBody) -> Response:
        """Text of ids."""
        if body.model is not None:
            self._house.resolve(caller_of(request).sees, body.model)
        self._check_ids(body.tokens, "tokens")
        return JSONResponse({"prompt": await asyncio.to_thread(self._house.tokenizer.decode, body.tokens)})

    async def _chat_ids(
        self, messages: Sequence[Message], add_generation_prompt: bool | None, continue_final: bool | None
    ) -> tuple[int, ...]:
        """Ids of a conversation.  Off the event loop: a long text takes a second."""
        if continue_final and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other; leave one out",
                param="continue_final_message",
            )
        if continue_final and messages[-1].role != "assistant":
            raise InvalidRequest(
                "continue_final_message needs an assistant's message at the end", param="continue_final_message"
            )

        def ids() -> list[int]:
            return self._house.tokenizer.chat(
                [turn(m, f"messages[{i}]") for i, m in enumerate(messages)],
                add_generation_prompt=not continue_final and add_generation_prompt is not False,
                continue_final_message=bool(continue_final),
            )

        return tuple(await asyncio.to_thread(ids))

    async def _prompts(self, body: CompletionBody) -> list[PromptView]:
        """Ids of each prompt; those given as ids stay as they are."""
        prompts = prompt_list(body.prompt)
        if not prompts or not all(prompts):
            raise InvalidRequest("prompt must not be empty, and no prompt of a list may be", param="prompt")
        tokenizer, out = self._house.tokenizer, []
        for prompt in prompts:
            if isinstance(prompt, str):
                special = body.add_special_tokens is not False
                ids = await asyncio.to_thread(tokenizer.encode, prompt, add_special_tokens=special)
            elif body.add_special_tokens is None:
                ids = prompt
                self._check_ids(ids, "prompt")
            else:
                raise InvalidRequest(
                    "add_special_tokens is for text prompts; ids stay as they are", param="add_special_tokens"
                )
            text = None
            if body.echo:
                text = prompt if isinstance(prompt, str) else await asyncio.to_thread(tokenizer.decode, ids)
            out.append(PromptView(tokens=tuple(ids), echo=text, logprobs=body.logprobs, ranked=body.prompt_logprobs))
        return out

    def _check_ids(self, ids: Sequence[int], field: str) -> None:
        """Raises InvalidRequest for an id outside the vocabulary: on the device it would read another row."""
        vocab = self._house.tokenizer.vocab_size
        for i in ids:
            if not 0 <= i < vocab:
                raise InvalidRequest(f"{field} has the token id {i}; ids go from 0 to {vocab - 1}", param=field)

    def _max_tokens(self, job: Job, prompt: Sequence[int]) -> int:
        """Tokens this prompt may generate.  Raises ContextLengthExceeded when prompt and max_tokens do not fit."""
        room = self._house.context - len(prompt)
        wanted = job.max_tokens if job.max_tokens is not None else min(job.fallback, max(room, 1))
        if wanted > room:
            raise ContextLengthExceeded(
                f"the prompt has {len(prompt)} tokens and {job.max_tokens_field} asks for {wanted}, together "
                f"{len(prompt) + wanted}; the model's context is {self._house.context}. "
                + (
                    f"Ask for at most {room} tokens" if room > 0 else f"Shorten the prompt by {1 - room} tokens or more"
                ),
                param=job.prompt_field,
            )
        return wanted

    async def _requests(
        self, request: Request, body: SamplingBody, adapter: AdapterRef | None, job: Job, id: str
    ) -> list[TokenRequest]:
        """One request for each prompt and choice, in index order."""
        n = body.n or 1
        if len(job.prompts) * n > MAX_CHOICES:
            raise InvalidRequest(
                f"n times the number of prompts may be at most {MAX_CHOICES}, got {n} times {len(job.prompts)}",
                param="n",
            )
        self._check_ids(body.stop_token_ids or (), "stop_token_ids")
        self._check_ids(list(body.logit_bias or ()), "logit_bias")
        if body.adapter_update == "follow" and "@" in body.model:
            raise InvalidRequest(
                "a request for one version cannot follow the adapter; leave out @VERSION or adapter_update",
                param="adapter_update",
            )
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest("stream_options needs stream: true", param="stream_options")
        if body.prompt_logprobs is not None and body.stream:
            raise InvalidRequest("prompt_logprobs are not streamed; leave out one of them", param="prompt_logprobs")
        source = grammar_source(body)
        limits = [self._max_tokens(job, view.tokens) for view in job.prompts]
        grammar = None if source is None else await self._house.grammars.compile(source)
        out = []
        for view, max_tokens in zip(job.prompts, limits, strict=True):
            params = sampling(body, max_tokens, job.logprobs, job.prompt_logprobs, grammar)
            for choice in range(n):
                out.append(
                    TokenRequest(
                        id=f"{id}-{len(out)}",
                        tenant=caller_of(request).owner,
                        adapter=adapter,
                        prompt=view.tokens,
                        params=replace(params, choice=choice),
                        follow=body.adapter_update == "follow",
                    )
                )
        return out

    async def _answer(self, request: Request, body: SamplingBody, adapter: AdapterRef | None, job: Job) -> Response:
        """Submits the job and answers whole or as a stream; whatever happens, no token stream outlives the answer."""
        heading = Heading(
            id=job.shape.id_prefix + uuid.uuid4().hex,
            created=int(time.time()),
            model=body.model,
            adapter_version=adapter.version if adapter is not None else None,
        )
        requests = await self._requests(request, body, adapter, job, heading.id)
        if self._limiter is not None:
            self._limiter.admit(caller_of(request).owner, tokens=cost(requests))
        tokenizer = self._house.tokenizer
        name = "token_id:{}".format if body.return_tokens_as_token_ids else tokenizer.token_text
        choices = [Choice(tokenizer, name, job.prompts[i // (body.n or 1)]) for i in range(len(requests))]
        run = Run(
            heading=heading,
            shape=job.shape,
            prompt_tokens=[len(view.tokens) for view in job.prompts],
            fan=self._submit(requests),
            choices=choices,
            deadline=request.state.deadline,
            ping_s=self._config.ping_s,
            scope=request.scope,
        )
        try:
            if not body.stream:
                return JSONResponse(await attend(request, run.whole()))
            # Until the first token an error is a plain HTTP answer.  A long wait must not look dead, though.
            first = await attend(request, run.next(self._config.ping_s))
            options = body.stream_options
            return EventStream(run, run.events(first, bool(options is not None and options.include_usage)))
        except BaseException:
            run.fan.cancel()
            raise

    def _submit(self, requests: Sequence[TokenRequest]) -> Fan:
        """The streams of all requests.  When one cannot even be sent, none goes on; what is refused later ends its stream."""
        streams = []
        try:
            for r in requests:
                streams.append(self._house.submit(r))
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        return Fan(streams)


def prompt_list(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """The prompts of any of the four forms, each a text or ids."""
    if isinstance(prompt, str):
        return [prompt]
    ids = [p for p in prompt if isinstance(p, int)]
    return [ids] if ids else [p for p in prompt if not isinstance(p, int)]


def chat_max_tokens(body: ChatBody) -> int | None:
    """The one limit that two fields may name.  Raises InvalidRequest when they differ."""
    new, old = body.max_completion_tokens, body.max_tokens
    if new is not None and old is not None and new != old:
        raise InvalidRequest(
            f"max_completion_tokens is {new} and max_tokens {old}; give one of them", param="max_completion_tokens"
        )
    return new if new is not None else old


def refuse_given(body: TokenizeBody, beside: str, *fields: str) -> None:
    """Raises InvalidRequest for a field that has no meaning beside another."""
    for field in fields:
        if getattr(body, field) is not None:
            raise InvalidRequest(f"{field} has no meaning beside {beside}; leave it out", param=field)


def turn(message: Message, where: str) -> dict[str, str]:
    """A message for the chat template: developer is system, and text parts are joined with line breaks."""
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    texts = []
    for i, part in enumerate(message.content):
        if part.text is None:
            field = f"{where}.content[{i}].text"
            raise InvalidRequest(f"{field} is required", param=field)
        texts.append(part.text)
    return {"role": role, "content": "\n".join(texts)}
