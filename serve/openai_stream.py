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

from jaxlora.errors import JaxLoraError
from serve.house import Tokenizer, TokenStream
from serve.request import Delta, FinishReason, TokenLogprob

LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have


class Fan:
    """The streams of one HTTP request as one: deltas of all choices as they come.

    `cancel` ends everything and must be called in the end, whatever happened.
    """

    def __init__(self, streams: Sequence[TokenStream]):
        self._streams = list(streams)
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
class Alternative:
    text: str
    raw: bytes
    logprob: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One generated token with its log-probability.  `offset`: characters of the choice's text before it."""

    text: str
    raw: bytes
    logprob: float
    top: tuple[Alternative, ...]
    offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one delta adds to a choice."""

    text: str
    entries: tuple[Entry, ...]
    finish: FinishReason | None


class Choice:
    """How far one choice is."""

    def __init__(self, tokenizer: Tokenizer, name_token: Callable[[int], str]):
        self._tokenizer = tokenizer
        self._name_token = name_token
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decoded_chars = 0
        self._waiting: list[Entry] = []  # tokens whose text has not been sent
        self._chars = 0
        self.tokens = 0
        self.versions: set[int] = set()  # of the adapter, that made its tokens
        self.finish: FinishReason | None = None

    def take(self, delta: Delta) -> Piece:
        """What the delta adds."""
        self.tokens += len(delta.tokens)
        self._chars += len(delta.text)
        self.finish = delta.finish
        self._waiting += [self._entry(logprob) for logprob in delta.logprobs]
        whole = delta.finish is FinishReason.LENGTH
        released = tuple(e for e in self._waiting if whole or e.offset < self._chars)
        self._waiting = self._waiting[len(released) :]  # offsets never fall, so these were the first
        if delta.adapter is not None:
            self.versions.add(delta.adapter.version)
        return Piece(text=delta.text, entries=released, finish=delta.finish)

    def _entry(self, logprob: TokenLogprob) -> Entry:
        entry = Entry(
            text=self._name_token(logprob.token),
            raw=self._tokenizer.token_bytes(logprob.token),
            logprob=clamp(logprob.logprob),
            top=tuple(
                Alternative(text=self._name_token(t), raw=self._tokenizer.token_bytes(t), logprob=clamp(p))
                for t, p in logprob.top
            ),
            offset=self._decoded_chars,
        )
        if self._tokenizer.decode([logprob.token]):  # a special token has a name but no place in the text
            self._decoded_chars += len(self._decoder.decode(entry.raw))
        return entry


def clamp(logprob: float) -> float:
    """The log-probability, or the lowest number we say for minus infinity.  NaN is our own mistake, told as an error."""
    if math.isnan(logprob):
        raise JaxLoraError("a log-probability is NaN")
    return max(logprob, LOWEST_LOGPROB)
