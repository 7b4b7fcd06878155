"""Answers of the Gradient wire: generated, or one of the given choices by its score.  No routes here."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fastapi import Request

from jaxlora.config.base import Checks
from jaxlora.core.errors import ContextLengthExceeded, InvalidRequest
from jaxlora.core.lora import AdapterRef
from serve.access.caller import caller_of
from serve.access.rate_limit import Limiter, cost
from serve.api.gradient.schemas import CompleteBody, Guidance
from serve.api.openai.generation import attend
from serve.api.openai.logprobs import MergedStreams
from serve.api.openai.tokenizing import Tokenizing
from serve.engine.request import FinishReason, PromptLogprob, SamplingParams
from serve.engine.request import Request as TokenRequest
from serve.http.request_log import Generated, note_generated
from serve.runtime.backend import Backend


def choose(scores: Sequence[float], *, temperature: float, top_k: int, top_p: float, drawn: float) -> int:
    """Returns the index of the chosen score, each a log-probability up to a constant.

    temperature: 0 takes the best, the first of equals.  top_k: the best so many (0 or less: all), then top_p: the fewest
    best whose share comes to it.  drawn: a number in [0, 1) that decides.
    """
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if temperature == 0:
        return order[0]
    order = order[:top_k] if top_k > 0 else order
    best = scores[order[0]]
    shares = [math.exp((scores[i] - best) / temperature) for i in order]
    total, kept, reached = sum(shares), 0, 0.0
    while kept < len(order) and (kept == 0 or reached < top_p * total):
        reached += shares[kept]
        kept += 1
    at = drawn * reached
    for i, share in zip(order[:kept], shares, strict=False):
        at -= share
        if at < 0:
            return i
    return order[kept - 1]  # rounding


@dataclass(slots=True)
class Whole:
    """All of one answer."""

    text: str = ""
    tokens: int = 0
    scores: list[PromptLogprob] = field(default_factory=list)
    finish: FinishReason | None = None


class Completer:
    """Completes queries through one backend."""

    def __init__(
        self,
        backend: Backend,
        tokenizing: Tokenizing,
        max_tokens: int,
        draw: Callable[[], float],
        limiter: Limiter | None,
    ):
        """max_tokens: of an answer whose request names none.  draw: numbers in [0, 1).  limiter: as `Admission` takes it."""
        self._backend, self._tokenizing = backend, tokenizing
        self._max_tokens, self._draw, self._limiter = max_tokens, draw, limiter

    async def complete(
        self, request: Request, model: str, ref: AdapterRef | None, body: CompleteBody
    ) -> tuple[FinishReason, str]:
        """Returns (why it ended, the new text).  Frees all it holds when the client is gone.

        Raises ContextLengthExceeded, InvalidRequest, and what ends a stream.
        """
        prompt = await self._tokenizing.run(
            caller_of(request).owner, lambda: self._prompt(body), field="query", chars=[len(body.query)]
        )
        if body.guidance is not None:
            return await self._choose(request, model, ref, body, body.guidance, prompt)
        room = self._backend.context - len(prompt)
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
        return whole.finish, whole.text

    async def _choose(
        self,
        request: Request,
        model: str,
        ref: AdapterRef | None,
        body: CompleteBody,
        guidance: Guidance,
        prompt: Sequence[int],
    ) -> tuple[FinishReason, str]:
        """One of the choices, by the log-probability of all its tokens after the prompt."""
        choices = await self._tokenizing.run(
            caller_of(request).owner,
            lambda: self._choices(guidance),
            field="guidance.value",
            chars=[len(text) for text in guidance.value],
        )
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
        return FinishReason.STOP, guidance.value[chosen]

    def _prompt(self, body: CompleteBody) -> list[int]:
        """Ids of the query: a user's turn in the base's template, where it has one and that is wanted."""
        tokenizer = self._backend.tokenizer
        if body.auto_template is False or tokenizer.chat_template is None:
            return tokenizer.encode(body.query)
        return tokenizer.chat([{"role": "user", "content": body.query}])

    def _choices(self, guidance: Guidance) -> list[list[int]]:
        return [self._backend.tokenizer.encode(text, add_special_tokens=False) for text in guidance.value]

    def _check_room(self, prompt: int, more: int) -> None:
        """Raises ContextLengthExceeded where the prompt and what follows it do not fit."""
        if prompt + more > self._backend.context:
            raise ContextLengthExceeded(
                f"the query has {prompt} tokens and its answer may have {more}, together {prompt + more}; the model's "
                f"context is {self._backend.context}; ask for less"
            )

    async def _ask(
        self, request: Request, ref: AdapterRef | None, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[Whole]:
        """Returns the whole answer to each prompt.  No stream outlives it."""
        id, tenant = uuid.uuid4().hex, caller_of(request).owner
        requests = [
            TokenRequest(id=f"gradient-{id}-{i}", tenant=tenant, adapter=ref, prompt=tuple(prompt), params=params)
            for i, prompt in enumerate(prompts)
        ]
        if self._limiter is not None:
            self._limiter.admit(tenant, tokens=cost(requests))
        streams = MergedStreams(self._backend, requests)
        try:
            return await attend(request, read_whole(streams, len(requests)))
        finally:
            streams.cancel()

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


async def read_whole(streams: MergedStreams, count: int) -> list[Whole]:
    """Reads each of the streams to its end.  Raises what ends one of them early."""
    wholes = [Whole() for _ in range(count)]
    while any(whole.finish is None for whole in wholes):
        item = await streams.next()
        assert item is not None, "it waits without a limit"
        index, delta = item
        whole = wholes[index]
        whole.text += delta.text
        whole.tokens += len(delta.tokens)
        whole.scores += delta.prompt_logprobs
        whole.finish = delta.finish
    return wholes


DEFAULT_RANK = 8  # of an adapter whose client names none


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientConfig:
    """Defaults of the Gradient wire, and the longest sample it takes."""

    default_lr: float
    longest: int  # tokens of a sample in training
    rank: int = DEFAULT_RANK
    alpha: float = 32.0
    max_tokens: int = 128  # of an answer

    def __post_init__(self) -> None:
        with Checks() as check:
            check.need(0 < self.default_lr < 1, "default_lr", "between 0 and 1", self.default_lr)
            check.need(self.longest >= 2, "longest", "at least 2", self.longest)
