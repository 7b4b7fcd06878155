"""From deltas to choices: merges the token streams of one HTTP request and keeps account of each choice.  No HTTP here.

Log-probability entries follow the text: an entry is released once the first character of its token has been sent, and
what a stop cut off the text (the end-of-sequence token, a stop string) is cut off the entries alike.
"""

from __future__ import annotations

import asyncio
import codecs
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxlora.checkpoints.tokenizer import Tokenizer
from jaxlora.core.errors import JaxLoraError
from serve.api.openai.schemas import Alternative, PromptPlace, TokenLogprob
from serve.engine.request import Delta, FinishReason, PromptLogprob, Request
from serve.engine.request import TokenLogprob as Logprob
from serve.runtime.backend import Backend, TokenStream

LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have


class MergedStreams:
    """The streams of one HTTP request as one: deltas of all choices as they come.

    `cancel` ends everything and must be called in the end, whatever happened.
    """

    def __init__(self, backend: Backend, requests: Sequence[Request]):
        """Submits all requests.  When one cannot even be sent, cancels those before it; one refused later ends its stream."""
        self._streams: list[TokenStream] = []
        try:
            for request in requests:
                self._streams.append(backend.submit(request))
        except BaseException:
            for stream in self._streams:
                stream.cancel()
            raise
        # Bounded, so that a client who reads slowly is felt here and not as a growing queue.
        self._queue: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue(maxsize=len(self._streams))
        self._pumps = [asyncio.create_task(self._pump(i, s)) for i, s in enumerate(self._streams)]

    async def _pump(self, index: int, stream: TokenStream) -> None:
        error: Exception = JaxLoraError("a token stream ended without a finish")
        try:
            async for delta in stream:
                await self._queue.put((index, delta))
                if delta.finish is not None or delta.error is not None:
                    return
        except Exception as caught:
            error = caught
        await self._queue.put((index, Delta(request_id="", error=error)))

    async def next(self, timeout_s: float | None = None) -> tuple[int, Delta] | None:
        """(choice, delta), or None when nothing came in time.  Raises what ended a stream early."""
        try:
            async with asyncio.timeout(timeout_s):
                index, delta = await self._queue.get()
        except TimeoutError:
            return None
        if delta.error is not None:
            raise delta.error
        return index, delta

    def cancel(self) -> None:
        """Cancels every stream.  Idempotent."""
        for stream in self._streams:
            stream.cancel()
        for pump in self._pumps:
            pump.cancel()


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One token with its log-probability, which the first of an echoed prompt has not."""

    shown: TokenLogprob  # as chats show it
    offset: int  # characters of the choice's text before it


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptView:
    """What an answer repeats of its prompt."""

    tokens: tuple[int, ...]
    echo: str | None  # the prompt as text, put before the answer's
    logprobs: int | None  # entries of the echoed prompt with so many alternatives
    ranked: int | None  # prompt_logprobs with so many alternatives


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one delta adds to a choice."""

    text: str
    entries: tuple[Entry, ...]
    finish: FinishReason | None
    tokens: tuple[int, ...] = ()
    prompt: tuple[PromptPlace, ...] = ()  # of every prompt token but the first, itself first
    prompt_tokens: tuple[int, ...] = ()  # with the first piece


class Choice:
    """How far one choice is."""

    def __init__(self, tokenizer: Tokenizer, name_token: Callable[[int], str], prompt: PromptView):
        self._tokenizer = tokenizer
        self._name_token = name_token
        self._prompt = prompt
        self._begun = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decoded_chars = 0
        self._waiting: list[Entry] = []  # tokens whose text has not been sent
        self._chars = 0
        self.tokens = 0
        self.cached_tokens = 0  # of the prompt
        self.versions: set[int] = set()  # of the adapter, that made its tokens
        self.finish: FinishReason | None = None

    def take(self, delta: Delta) -> Piece:
        """What the delta adds; the first one also what is repeated of the prompt."""
        first = not self._begun
        echo, echoed, prompt = self._begin(delta) if first else ("", (), ())
        self.tokens += len(delta.tokens)
        self.cached_tokens += delta.cached_tokens
        self._chars += len(delta.text)
        self.finish = delta.finish
        self._waiting += [self._next_entry(logprob) for logprob in delta.logprobs]
        whole = delta.finish is FinishReason.LENGTH
        released = tuple(e for e in self._waiting if whole or e.offset < self._chars)
        self._waiting = self._waiting[len(released) :]  # offsets never fall, so these were the first
        if delta.adapter is not None:
            self.versions.add(delta.adapter.version)
        return Piece(
            text=echo + delta.text,
            entries=(*echoed, *released),
            finish=delta.finish,
            tokens=delta.tokens,
            prompt=prompt,
            prompt_tokens=self._prompt.tokens if first else (),
        )

    def _begin(self, delta: Delta) -> tuple[str, tuple[Entry, ...], tuple[PromptPlace, ...]]:
        """(echoed text, its entries, the prompt's log-probabilities)."""
        self._begun = True
        view, scores = self._prompt, delta.prompt_logprobs
        ranked = () if view.ranked is None else tuple(self._ranked(s, view.ranked) for s in scores)
        if view.echo is None:
            return "", (), ranked
        self._chars = self._decoded_chars = len(view.echo)
        if view.logprobs is None:
            return view.echo, (), ranked
        offsets = prompt_offsets(self._tokenizer, view.echo, view.tokens)
        first = view.tokens[0]
        entries = [Entry(shown={**self._shown(first, None), "top_logprobs": []}, offset=offsets[0])]
        entries += [self._entry(s, o, view.logprobs) for s, o in zip(scores, offsets[1:], strict=True)]
        return view.echo, tuple(entries), ranked

    def _ranked(self, score: PromptLogprob, count: int) -> PromptPlace:
        own = (score.token, score.logprob, score.rank)
        best = [(t, p, i) for i, (t, p) in enumerate(score.top[:count], start=1) if t != score.token]
        return {
            str(t): {"logprob": clamp(p), "rank": rank, "decoded_token": self._tokenizer.token_text(t)}
            for t, p, rank in (own, *best)
        }

    def _next_entry(self, logprob: Logprob) -> Entry:
        entry = self._entry(logprob, self._decoded_chars, len(logprob.top))
        if self._tokenizer.decode([logprob.token]):  # a special token has a name but no place in the text
            self._decoded_chars += len(self._decoder.decode(bytes(entry.shown["bytes"])))
        return entry

    def _entry(self, logprob: Logprob, offset: int, count: int) -> Entry:
        top = [self._shown(t, p) for t, p in logprob.top[:count]]
        return Entry(shown={**self._shown(logprob.token, logprob.logprob), "top_logprobs": top}, offset=offset)

    def _shown(self, token: int, logprob: float | None) -> Alternative:
        raw, known = self._tokenizer.token_bytes(token), None if logprob is None else clamp(logprob)
        return {"token": self._name_token(token), "logprob": known, "bytes": list(raw)}


def prompt_offsets(tokenizer: Tokenizer, text: str, tokens: Sequence[int]) -> list[int]:
    """Where each token of a prompt begins in its text.  One that the tokenizer added, or the text has not, has no width."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    offsets, at = [], 0
    for token in tokens:
        offsets.append(at)
        piece = decoder.decode(tokenizer.token_bytes(token))
        if not text.startswith(piece, at) and text.startswith(piece[1:], at):
            piece = piece[1:]  # the space that some tokenizers put before a text
        if tokenizer.decode([token]) or text.startswith(piece, at):
            at = min(at + len(piece), len(text))
    return offsets


def clamp(logprob: float) -> float:
    """The log-probability, or the lowest number that stands for minus infinity.  Raises JaxLoraError for NaN, our own mistake."""
    if math.isnan(logprob):
        raise JaxLoraError("a log-probability is NaN")
    return max(logprob, LOWEST_LOGPROB)
