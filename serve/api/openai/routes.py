"""The OpenAI wire: models, chat and plain completions (whole or as server-sent events), tokenize and detokenize.

A body becomes a Generation (prompts and sampling), a Generation becomes Requests, their token streams become one answer.  The model
name is resolved once, before the prompt is read, so an answer has one adapter version from end to end.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from jaxlora.core.errors import InvalidRequest
from serve.access.caller import caller_of
from serve.access.worker_pool import WorkerPool
from serve.api.openai.generation import Admission, ChoiceWriter, Generation, answer
from serve.api.openai.logprobs import PromptView
from serve.api.openai.messages import Conversation, ToolUse, chosen, conversation, functions_of, tool_use
from serve.api.openai.render import ChatRenderer, CompletionRenderer, Renderer, model_object
from serve.api.openai.sampling import grammar_source
from serve.api.openai.schemas import (
    ChatBody,
    ChatCompletion,
    CompletionBody,
    DetokenizeBody,
    Detokenized,
    Model,
    ModelList,
    ModelQuery,
    SamplingBody,
    TextCompletion,
    TokenizeBody,
    TokenizerInfo,
    Tokens,
)
from serve.http.errors import ERRORS
from serve.http.pagination import page_after
from serve.http.schema import ok, refuse_unbuilt
from serve.http.strict_json import JsonRoute
from serve.runtime.backend import Backend

MAX_LISTED = 1000  # adapters in an answer without `limit`
LISTING_S = 30.0  # for a look at the adapters, which may be on a disk
COMPLETION_MAX_TOKENS = 16  # the API's default for plain completions


class OpenAIRoutes:
    """The routes, over one backend.  default_max_tokens: of a chat answer whose request names no max_tokens."""

    def __init__(self, backend: Backend, admission: Admission, default_max_tokens: int):
        self._backend, self._admission, self._default_max_tokens = backend, admission, default_max_tokens
        self._tokenizing = admission.tokenizing
        self._listing = WorkerPool("list of models", threads=2, waiting=64, timeout_s=LISTING_S)

    def router(self) -> APIRouter:
        """All routes of this wire."""
        router = APIRouter(responses=ERRORS, route_class=JsonRoute)
        for method, path, handler, responses in (
            ("GET", "/v1/models", self.list_models, ok(ModelList)),
            ("GET", "/v1/models/{model:path}", self.read_model, ok(Model)),
            (
                "POST",
                "/v1/chat/completions",
                self.chat,
                ok(ChatCompletion, events="chat.completion.chunk objects, then [DONE]"),
            ),
            (
                "POST",
                "/v1/completions",
                self.complete,
                ok(TextCompletion, events="text_completion objects, then [DONE]"),
            ),
            ("POST", "/tokenize", self.tokenize, ok(Tokens)),
            ("POST", "/detokenize", self.detokenize, ok(Detokenized)),
            ("GET", "/tokenizer_info", self.tokenizer_info, ok(TokenizerInfo)),
        ):
            router.add_api_route(path, handler, methods=[method], response_model=None, responses=responses)
        return router

    async def list_models(self, request: Request, query: Annotated[ModelQuery, Query()]) -> Response:
        """The base models, then the caller's adapters, newest first."""
        caller = caller_of(request)
        cards = await self._listing.run(caller.owner, lambda: self._backend.models(caller.sees))
        cards = sorted(cards, key=lambda c: (c.parent is not None, -c.created, c.id))
        cards = [c for c in cards if c.id.startswith(query.prefix)]
        limit = query.limit if query.limit is not None else MAX_LISTED + sum(c.parent is None for c in cards)
        page = page_after(cards, lambda c: c.id, after=query.after, limit=limit, kind="a model")
        return JSONResponse(ModelList(object="list", data=[model_object(c) for c in page.records], has_more=page.more))

    async def read_model(self, request: Request, model: str) -> Response:
        """One model, by any name that a completion takes."""
        caller = caller_of(request)
        card = await self._listing.run(caller.owner, lambda: self._backend.model(caller.sees, model))
        return JSONResponse(model_object(card))

    async def chat(self, request: Request, body: ChatBody) -> Response:
        """The answer to a conversation."""
        refuse_unbuilt(body)
        adapter = self._backend.resolve(caller_of(request).sees, body.model)
        max_tokens = chat_max_tokens(body)
        if body.top_logprobs and not body.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        grammar = grammar_source(body)
        tools = tool_use(
            functions_of(body.tools or ()),
            chosen(body.tool_choice),
            body.parallel_tool_calls,
            self._backend.tokenizer,
            grammar,
        )
        talk = self._conversation(body, tools)
        ids = await self._talk_ids(request, talk)
        job = Generation(
            id_prefix=ChatRenderer.id_prefix,
            operation="chat",
            prompts=[PromptView(tokens=ids, echo=None, logprobs=None, ranked=body.prompt_logprobs)],
            adapter=adapter,
            max_tokens=max_tokens,
            fallback=self._default_max_tokens,
            max_tokens_field="max_completion_tokens" if body.max_tokens is None else "max_tokens",
            prompt_field="messages",
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
            grammar=grammar if tools is None else tools.grammar,
        )
        renderer = ChatRenderer(
            logprobs=bool(body.logprobs),
            prompt_logprobs=body.prompt_logprobs is not None,
            token_ids=bool(body.return_token_ids),
            calls=None if tools is None else tools.parser,
        )
        return await self._answer(request, body, job, renderer)

    async def complete(self, request: Request, body: CompletionBody) -> Response:
        """The continuation of each prompt."""
        refuse_unbuilt(body)
        adapter = self._backend.resolve(caller_of(request).sees, body.model)
        if body.max_tokens == 0 and not body.echo:
            raise InvalidRequest("max_tokens must be at least 1 without echo, got 0", param="max_tokens")
        if body.best_of is not None and body.best_of < (body.n or 1):
            raise InvalidRequest(f"best_of must be at least n, got {body.best_of} and {body.n}", param="best_of")
        echoed = body.logprobs if body.echo else None
        job = Generation(
            id_prefix=CompletionRenderer.id_prefix,
            operation="text_completion",
            prompts=await self._prompts(request, body),
            adapter=adapter,
            max_tokens=body.max_tokens,
            fallback=COMPLETION_MAX_TOKENS,
            max_tokens_field="max_tokens",
            prompt_field="prompt",
            logprobs=body.logprobs,
            prompt_logprobs=max((p for p in (body.prompt_logprobs, echoed) if p is not None), default=None),
            grammar=grammar_source(body),
        )
        renderer = CompletionRenderer(
            logprobs=body.logprobs is not None,
            prompt_logprobs=body.prompt_logprobs is not None,
            token_ids=bool(body.return_token_ids),
        )
        return await self._answer(request, body, job, renderer)

    async def tokenize(self, request: Request, body: TokenizeBody) -> Response:
        """Ids of a text or of a conversation."""
        refuse_unbuilt(body)
        if body.model is not None:
            self._backend.resolve(caller_of(request).sees, body.model)
        if body.messages is not None and body.prompt is None:
            refuse_given(body, "messages", "add_special_tokens")
            tools = tool_use(functions_of(body.tools or ()), chosen(None), None, self._backend.tokenizer, None)
            ids = await self._talk_ids(request, self._conversation(body, tools), generates=False)
        elif body.prompt is not None and body.messages is None:
            refuse_given(
                body, "prompt", "add_generation_prompt", "continue_final_message", "tools", "chat_template_kwargs"
            )
            special = body.add_special_tokens is not False
            text, tokenizer = body.prompt, self._backend.tokenizer
            ids = await self._tokenizing.run(
                caller_of(request).owner,
                lambda: tokenizer.encode(text, add_special_tokens=special),
                field="prompt",
                chars=[len(text)],
                generates=False,
            )
        else:
            raise InvalidRequest("give either prompt or messages", param="prompt")
        return JSONResponse(Tokens(tokens=list(ids), count=len(ids), max_model_len=self._backend.context))

    async def detokenize(self, request: Request, body: DetokenizeBody) -> Response:
        """Text of ids."""
        if body.model is not None:
            self._backend.resolve(caller_of(request).sees, body.model)
        self._tokenizing.check_length(len(body.tokens), "tokens")
        self._admission.check_ids(body.tokens, "tokens")
        tokenizer = self._backend.tokenizer
        text = await self._tokenizing.run(
            caller_of(request).owner, lambda: tokenizer.decode(body.tokens), field="tokens", chars=[], generates=False
        )
        return JSONResponse(Detokenized(prompt=text))

    async def tokenizer_info(self) -> Response:
        """The base model's special tokens and chat template."""
        tokenizer = self._backend.tokenizer
        special = tokenizer.special_texts
        return JSONResponse(
            TokenizerInfo(
                eos_token=special.get("eos_token"),
                bos_token=special.get("bos_token"),
                pad_token=special.get("pad_token"),
                chat_template=tokenizer.chat_template,
                vocab_size=tokenizer.vocab_size,
                model_max_length=self._backend.context,
            )
        )

    def _conversation(self, body: ChatBody | TokenizeBody, tools: ToolUse | None) -> Conversation:
        return conversation(
            body.messages or (),
            tools,
            self._backend.tokenizer,
            add_generation_prompt=body.add_generation_prompt,
            continue_final=body.continue_final_message,
            variables=body.chat_template_kwargs,
        )

    async def _talk_ids(self, request: Request, talk: Conversation, *, generates: bool = True) -> tuple[int, ...]:
        tokenizer = self._backend.tokenizer
        return await self._tokenizing.run(
            caller_of(request).owner,
            lambda: tuple(talk.ids(tokenizer)),
            field="messages",
            chars=[talk.chars],
            generates=generates,
        )

    async def _prompts(self, request: Request, body: CompletionBody) -> list[PromptView]:
        """Ids of each prompt; those given as ids stay as they are."""
        prompts = prompt_list(body.prompt)
        if not prompts or not all(prompts):
            raise InvalidRequest("prompt must not be empty, and no prompt of a list may be", param="prompt")
        for prompt in prompts:
            if isinstance(prompt, str):
                continue
            if body.add_special_tokens is not None:
                raise InvalidRequest(
                    "add_special_tokens is for text prompts; ids stay as they are", param="add_special_tokens"
                )
            self._tokenizing.check_length(len(prompt), "prompt")
            self._admission.check_ids(prompt, "prompt")
        texts = [len(prompt) for prompt in prompts if isinstance(prompt, str)]
        if texts or body.echo:
            return await self._tokenizing.run(
                caller_of(request).owner,
                lambda: [self._view(body, prompt) for prompt in prompts],
                field="prompt",
                chars=texts,
            )
        return [self._view(body, prompt) for prompt in prompts]

    def _view(self, body: CompletionBody, prompt: str | list[int]) -> PromptView:
        tokenizer = self._backend.tokenizer
        special = body.add_special_tokens is not False
        ids = tokenizer.encode(prompt, add_special_tokens=special) if isinstance(prompt, str) else prompt
        echo = None
        if body.echo:
            echo = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
        return PromptView(tokens=tuple(ids), echo=echo, logprobs=body.logprobs, ranked=body.prompt_logprobs)

    async def _answer(self, request: Request, body: SamplingBody, job: Generation, renderer: Renderer) -> Response:
        run = await self._admission.run(request, body, job)
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return await answer(request, run, ChoiceWriter(run, renderer, usage), bool(body.stream))


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
