"""Answers of the Gradient wire: generated, or one of the given choices by what each scores.  No routes here."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fastapi import Request

from jaxlora.core.errors import ContextLengthExceeded, InvalidRequest
from jaxlora.core.lora import AdapterRef
from serve.answered import Generated, note_generated
from serve.auth import caller_of
from serve.gradient_choice import choose
from serve.gradient_types import CompleteBody, Guidance
from serve.house import House, TokenStream
from serve.limits import Limiter, cost
from serve.openai_run import attend
from serve.openai_stream import Fan
from serve.request import FinishReason, PromptLogprob, SamplingParams
from serve.request import Request as TokenRequest


@dataclass(slots=True)
class Whole:
    """All of one answer."""

    text: str = ""
    tokens: int = 0
    scores: list[PromptLogprob] = field(default_factory=list)
    finish: FinishReason | None = None


class Completer:
    """Asks one house."""

    def __init__(self, house: House, max_tokens: int, draw: Callable[[], float], limiter: Limiter | None):
        """max_tokens: of an answer whose request names none.  draw: numbers in [0, 1).  limiter: as `Admission` takes it."""
        self._house, self._max_tokens, self._draw, self._limiter = house, max_tokens, draw, limiter

    async def complete(
        self, request: Request, model: str, ref: AdapterRef | None, body: CompleteBody
    ) -> tuple[str, str]:
        """(why it ended, the new text).  Frees all it holds when the client is gone.

        Raises ContextLengthExceeded, InvalidRequest, and what ends a stream.
        """
        prompt = await asyncio.to_thread(self._prompt, body)
        if body.guidance is not None:
            return await self._choose(request, model, ref, body, body.guidance, prompt)
        room = self._house.context - len(prompt)
        wanted = body.max_generated_token_count
        max_tokens = min(self._max_tokens, max(room, 1)) if wanted is None else wanted
        self._check_room(len(prompt), max_tokens)
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if body.temperature is None else float(body.temperature),
            top_k=-1 if body.top_k is None else body.top_k,
            top_p=1.0 if body.top_p is None else float(body.top_p),
        )
        (whole,) = await self._ask(request, ref, [prompt], params)
        assert whole.finish is not None
        note_generated(request.scope, self._generated(model, [prompt], [whole], whole.finish))
        return whole.finish.value, whole.text

    async def _choose(
        self,
        request: Request,
        model: str,
        ref: AdapterRef | None,
        body: CompleteBody,
        guidance: Guidance,
        prompt: Sequence[int],
    ) -> tuple[str, str]:
        """One of the choices, by the log-probability of all its tokens after the prompt."""
        choices = await asyncio.to_thread(self._choices, guidance)
        most = body.max_generated_token_count
        for choice, ids in zip(guidance.value, choices, strict=True):
            if not ids:
                raise InvalidRequest(f"the choice {choice!a} has no tokens; leave it out", param="guidance.value")
            if most is not None and len(ids) > most:
                raise InvalidRequest(
                    f"the choice {choice!a} has {len(ids)} tokens, maxGeneratedTokenCount allows {most}",
                    param="maxGeneratedTokenCount",
                )
            self._check_room(len(prompt), len(ids))
        prompts = [[*prompt, *ids] for ids in choices]
        params = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0)
        wholes = await self._ask(request, ref, prompts, params)
        scores = [
            sum(score.logprob for score in whole.scores[-len(ids) :])
            for whole, ids in zip(wholes, choices, strict=True)
        ]
        chosen = choose(
            scores,
            temperature=1.0 if body.temperature is None else float(body.temperature),
            top_k=body.top_k or 0,
            top_p=1.0 if body.top_p is None else float(body.top_p),
            drawn=self._draw(),
        )
        note_generated(request.scope, self._generated(model, prompts, wholes, FinishReason.STOP))
        return FinishReason.STOP.value, guidance.value[chosen]

    def _prompt(self, body: CompleteBody) -> list[int]:
        """Ids of the query: a user's turn in the base's template, where it has one and that is wanted."""
        tokenizer = self._house.tokenizer
        if body.auto_template is False or tokenizer.chat_template is None:
            return tokenizer.encode(body.query)
        return tokenizer.chat([{"role": "user", "content": body.query}])

    def _choices(self, guidance: Guidance) -> list[list[int]]:
        return [self._house.tokenizer.encode(text, add_special_tokens=False) for text in guidance.value]

    def _check_room(self, prompt: int, more: int) -> None:
        """Raises ContextLengthExceeded where the prompt and what follows it do not fit."""
        if prompt + more > self._house.context:
            raise ContextLengthExceeded(
                f"the query has {prompt} tokens and its answer may have {more}, together {prompt + more}; the model's "
                f"context is {self._house.context}; ask for less"
            )

    async def _ask(
        self, request: Request, ref: AdapterRef | None, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[Whole]:
        """The whole answer to each prompt.  No stream outlives it."""
        streams: list[TokenStream] = []
        id, tenant = uuid.uuid4().hex, caller_of(request).owner
        requests = [
            TokenRequest(id=f"gradient-{id}-{i}", tenant=tenant, adapter=ref, prompt=tuple(prompt), params=params)
            for i, prompt in enumerate(prompts)
        ]
        if self._limiter is not None:
            self._limiter.admit(tenant, tokens=cost(requests))
        try:
            for asked in requests:
                streams.append(self._house.submit(asked))
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        fan = Fan(streams)
        try:
            return await attend(request, read_whole(fan, len(streams)))
        finally:
            fan.cancel()

    def _generated(
        self, model: str, prompts: Sequence[Sequence[int]], wholes: Sequence[Whole], finish: FinishReason
    ) -> Generated:
        return Generated(
            operation="text_completion",
            model=model,
            prompt_tokens=sum(map(len, prompts)),
            completion_tokens=sum(whole.tokens for whole in wholes),
            finishes=(finish.value,),
        )


async def read_whole(fan: Fan, count: int) -> list[Whole]:
    """All that each of the streams says.  Raises what ends one of them early."""
    wholes = [Whole() for _ in range(count)]
    while any(whole.finish is None for whole in wholes):
        item = await fan.next()
        assert item is not None, "it waits without a limit"
        index, delta = item
        whole = wholes[index]
        whole.text += delta.text
        whole.tokens += len(delta.tokens)
        whole.scores += delta.prompt_logprobs
        whole.finish = delta.finish
    return wholes
