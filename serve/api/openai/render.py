"""The shapes of answers: chat and plain completions, whole and in chunks; and server-sent events.  Pure but for SSE bytes."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from serve.api.openai.logprobs import Alternative, Choice, Entry, Piece
from serve.api.openai.tools import CallParser, CallPart, gathered
from serve.engine.request import FinishReason
from serve.runtime.backend import ModelCard

Json = dict[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Heading:
    """What every part of one answer repeats."""

    id: str
    created: int
    model: str  # as it was asked
    adapter_version: int | None  # that the name meant

    def wrap(self, object: str, choices: Sequence[Json], versions: Sequence[int] = ()) -> Json:
        """The answer or chunk around its choices.  versions: that made them; several are told as a list."""
        return {
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "adapter_version": list(versions) if len(versions) > 1 else next(iter(versions), self.adapter_version),
            "choices": list(choices),
        }


class Shape(Protocol):
    """One of the two endpoints' ways to write choices."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def opening(self, index: int) -> list[Json]:
        """Choices of the chunks that come before the first text."""
        ...

    def head(self, prompt: Sequence[int]) -> Json:
        """What those chunks say beside their choices."""
        ...

    def chunks(self, index: int, piece: Piece) -> list[Json]:
        """Choices of the chunks that say one piece, one choice for each chunk."""
        ...

    def whole(self, index: int, pieces: Sequence[Piece]) -> Json:
        """The choice of an answer that is not streamed."""
        ...

    def beside(self, pieces: Sequence[Piece]) -> Json:
        """What an answer that is not streamed says beside its choices, of which the first has these pieces."""
        ...


class ChatShape:
    """calls: makes the parser of one answer's calls; None where nothing may be called."""

    id_prefix, whole_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(
        self, *, logprobs: bool, prompt_logprobs: bool, token_ids: bool, calls: Callable[[], CallParser] | None
    ):
        self._logprobs, self._prompt_logprobs, self._token_ids = logprobs, prompt_logprobs, token_ids
        self._calls = calls
        self._parsers: dict[int, CallParser] = {}  # of streamed choices

    def opening(self, index: int) -> list[Json]:
        # With calls there may be no text at all.
        empty = "" if self._calls is None else None
        return [self._chunk(index, {"role": "assistant", "content": empty}, Piece(text="", entries=(), finish=None))]

    def head(self, prompt: Sequence[int]) -> Json:
        return {"prompt_token_ids": list(prompt)} if self._token_ids else {}

    def chunks(self, index: int, piece: Piece) -> list[Json]:
        finish, parser = None, None
        if self._calls is not None:
            parser = self._parsers.setdefault(index, self._calls())
        deltas: list[Json] = [{"content": piece.text}] if piece.text else []
        if parser is not None:
            parts = parser.push(piece.text) + (parser.flush() if piece.finish is not None else [])
            deltas = [call_delta(part) if isinstance(part, CallPart) else {"content": part.text} for part in parts]
        if not deltas and (piece.entries or (self._token_ids and piece.tokens)):
            deltas = [{"content": ""} if parser is None else {}]
        # The tokens of a piece are told once.
        silent = replace(piece, entries=(), tokens=())
        out = [self._chunk(index, d, silent if i else piece) for i, d in enumerate(deltas)]
        if piece.finish is not None:
            finish = reason(piece.finish, parser)
            out.append(self._chunk(index, {}, silent) | {"logprobs": None, "finish_reason": finish})
        return out

    def whole(self, index: int, pieces: Sequence[Piece]) -> Json:
        text = "".join(p.text for p in pieces)
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        parser = None
        if self._calls is not None:
            parser = self._calls()
            text, calls = gathered(parser.push(text) + parser.flush())
            message["content"] = text or (None if calls else "")
            if calls:
                message["tool_calls"] = [call_object(name, arguments) for name, arguments in calls]
        choice: Json = {
            "index": index,
            "message": message,
            "logprobs": self._entries([e for p in pieces for e in p.entries]),
            "finish_reason": reason(pieces[-1].finish, parser),
        }
        return choice | ({"token_ids": [t for p in pieces for t in p.tokens]} if self._token_ids else {})

    def beside(self, pieces: Sequence[Piece]) -> Json:
        ids = self.head(pieces[0].prompt_tokens)
        return ids | ({"prompt_logprobs": ranked(pieces)} if self._prompt_logprobs else {})

    def _chunk(self, index: int, delta: Json, piece: Piece) -> Json:
        logprobs = self._entries(piece.entries) if piece.entries else None
        chunk: Json = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        return chunk | ({"token_ids": list(piece.tokens)} if self._token_ids else {})

    def _entries(self, entries: Sequence[Entry]) -> Json | None:
        return {"content": [entry_object(e) for e in entries], "refusal": None} if self._logprobs else None


class CompletionShape:
    id_prefix, whole_object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def __init__(self, *, logprobs: bool, prompt_logprobs: bool, token_ids: bool):
        self._logprobs, self._prompt_logprobs, self._token_ids = logprobs, prompt_logprobs, token_ids

    def opening(self, index: int) -> list[Json]:
        return []

    def head(self, prompt: Sequence[int]) -> Json:
        return {}

    def chunks(self, index: int, piece: Piece) -> list[Json]:
        news = piece.text or piece.entries or piece.finish is not None or (self._token_ids and piece.tokens)
        return [self.whole(index, [piece])] if news else []

    def whole(self, index: int, pieces: Sequence[Piece]) -> Json:
        choice: Json = {
            "index": index,
            "text": "".join(p.text for p in pieces),
            "logprobs": self._lists([e for p in pieces for e in p.entries]),
            "finish_reason": reason(pieces[-1].finish, None),
        }
        if self._token_ids:
            choice["token_ids"] = [t for p in pieces for t in p.tokens]
            if pieces[0].prompt_tokens:
                choice["prompt_token_ids"] = list(pieces[0].prompt_tokens)
        return choice | ({"prompt_logprobs": ranked(pieces)} if self._prompt_logprobs else {})

    def beside(self, pieces: Sequence[Piece]) -> Json:
        return {}

    def _lists(self, entries: Sequence[Entry]) -> Json | None:
        if not self._logprobs:
            return None
        # Ids with one text collide here; the better one stays, and the chosen token always has its own value.
        tops = [
            None if e.logprob is None else {t.text: t.logprob for t in reversed(e.top)} | {e.text: e.logprob}
            for e in entries
        ]
        return {
            "tokens": [e.text for e in entries],
            "token_logprobs": [e.logprob for e in entries],
            "top_logprobs": tops,
            "text_offset": [e.offset for e in entries],
        }


def ranked(pieces: Sequence[Piece]) -> list[Json | None]:
    """prompt_logprobs as vLLM writes them: nothing for the first token, then for each an object by token id."""
    return [None] + [
        {str(r.token): {"logprob": r.logprob, "rank": r.rank, "decoded_token": r.text} for r in place}
        for place in pieces[0].prompt
    ]


def entry_object(entry: Entry) -> Json:
    """A token of the answer with its log-probability and its alternatives."""
    return token_object(entry) | {"top_logprobs": [token_object(t) for t in entry.top]}


def token_object(token: Entry | Alternative) -> Json:
    """A token with its log-probability."""
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.raw)}


def reason(finish: FinishReason | None, parser: CallParser | None) -> str | None:
    """The finish reason in OpenAI's word, None before the end.  parser: has read the answer's calls."""
    if finish is FinishReason.STOP and parser is not None and parser.calls:
        return "tool_calls"
    return None if finish is None else finish.value


def call_object(name: str, arguments: str) -> Json:
    """One call of a message."""
    id = "call_" + uuid.uuid4().hex
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def call_delta(part: CallPart) -> Json:
    """A part of a call, as clients add them up: the first one says which call it is, and of what."""
    if part.name is None:
        return {"tool_calls": [{"index": part.index, "function": {"arguments": part.arguments}}]}
    return {"tool_calls": [{"index": part.index} | call_object(part.name, part.arguments)]}


def usage(prompt_tokens: Sequence[int], choices: Sequence[Choice]) -> Json:
    """Tokens spent.  A prompt counts once, whatever n; cached are what its first choice found."""
    prompt, completion = sum(prompt_tokens), sum(c.tokens for c in choices)
    firsts = choices[:: len(choices) // len(prompt_tokens)]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(c.cached_tokens for c in firsts)},
    }


def model_object(card: ModelCard) -> Json:
    """A model as the list and the single read show it."""
    return {
        "id": card.id,
        "object": "model",
        "created": card.created,
        "owned_by": card.owned_by,
        "root": card.root,
        "parent": card.parent,
        "version": card.version,
        "rank": card.rank,
        "state": card.state,
    }
