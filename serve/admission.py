"""From a job (prompts, sampling, whose adapter) to its run: the requests of all its choices, submitted together or not at all."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastapi import Request

from jaxlora.core.errors import ContextLengthExceeded, InvalidRequest
from jaxlora.core.lora import AdapterRef
from serve.auth import caller_of
from serve.grammar import GrammarSource
from serve.house import House
from serve.limits import Limiter, cost
from serve.openai_format import Heading
from serve.openai_run import Run
from serve.openai_sampling import sampling
from serve.openai_stream import Choice, Fan, PromptView
from serve.openai_types import MAX_CHOICES, SamplingBody
from serve.request import Request as TokenRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What one HTTP request asks of the engine."""

    id_prefix: str
    operation: str  # what is asked for, for who counts requests
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
    """Lets jobs into one house."""

    def __init__(self, house: House, ping_s: float, limiter: Limiter | None):
        """limiter: who counts what each tenant asks for; None: nobody."""
        self._house, self._ping_s, self._limiter = house, ping_s, limiter

    async def run(self, request: Request, body: SamplingBody, job: Job) -> Run:
        """The job under way; its `fan` must be cancelled in the end.  Raises InvalidRequest and what refuses a request."""
        heading = Heading(
            id=job.id_prefix + uuid.uuid4().hex,
            created=int(time.time()),
            model=body.model,
            adapter_version=job.adapter.version if job.adapter is not None else None,
        )
        requests = await self._requests(request, body, job, heading.id)
        if self._limiter is not None:
            self._limiter.admit(caller_of(request).owner, tokens=cost(requests))
        tokenizer = self._house.tokenizer
        name = "token_id:{}".format if body.return_tokens_as_token_ids else tokenizer.token_text
        choices = [Choice(tokenizer, name, job.prompts[i // (body.n or 1)]) for i in range(len(requests))]
        return Run(
            heading=heading,
            prompts=[view.tokens for view in job.prompts],
            fan=self._submit(requests),
            choices=choices,
            deadline=request.state.deadline,
            ping_s=self._ping_s,
            operation=job.operation,
            scope=request.scope,
        )

    def check_ids(self, ids: Sequence[int], field: str) -> None:
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

    async def _requests(self, request: Request, body: SamplingBody, job: Job, id: str) -> list[TokenRequest]:
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
        grammar = None if job.grammar is None else await self._house.grammars.compile(job.grammar)
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
