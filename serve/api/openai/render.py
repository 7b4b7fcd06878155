"""Chat and plain completions as JSON objects, whole and in chunks.  Pure."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import cast

from serve.api.openai.logprobs import Choice, Entry, Piece
from serve.api.openai.schemas import (
    CallDelta,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChunkDelta,
    ChunkObject,
    Heading,
    MadeCall,
    Model,
    Reason,
    TextChoiceFields,
    TextChunkChoice,
    TextCompletion,
    TextLogprobs,
    Usage,
)
from serve.api.openai.tools import CallParser, CallPart, gathered
from serve.engine.request import FinishReason
from serve.runtime.backend import ModelCard


def headed(heading: Heading, versions: Sequence[int]) -> Heading:
    """The heading of an answer or chunk.  versions: of the adapter, that made it; several are written as a list."""
    one = next(iter(versions), heading["adapter_version"])
    return {**heading, "adapter_version": list(versions) if len(versions) > 1 else one}


class ChatRenderer:
    """Writes the choices of chat completions.  calls: makes the parser of one answer's calls; None where nothing may be called."""

    id_prefix = "chatcmpl-"
    chunk_object: ChunkObject = "chat.completion.chunk"

    def __init__(
        self, *, logprobs: bool, prompt_logprobs: bool, token_ids: bool, calls: Callable[[], CallParser] | None
    ):
        self._logprobs, self._prompt_logprobs, self.token_ids = logprobs, prompt_logprobs, token_ids
        self._calls = calls
        self._parsers: dict[int, CallParser] = {}  # of streamed choices

    def opening(self, index: int) -> list[ChatChunkChoice]:
        """Returns the choices of the chunks before the first text."""
        # With calls there may be no text at all.
        empty = "" if self._calls is None else None
        return [self._chunk(index, {"role": "assistant", "content": empty}, Piece(text="", entries=(), finish=None))]

    def chunks(self, index: int, piece: Piece) -> list[ChatChunkChoice]:
        """Returns the choices of the chunks that hold one piece, one choice for each chunk."""
        parser = None
        if self._calls is not None:
            parser = self._parsers.setdefault(index, self._calls())
        deltas: list[ChunkDelta] = [{"content": piece.text}] if piece.text else []
        if parser is not None:
            parts = parser.push(piece.text) + (parser.flush() if piece.finish is not None else [])
            deltas = [
                {"tool_calls": [call_delta(part)]} if isinstance(part, CallPart) else {"content": part.text}
                for part in parts
            ]
        if not deltas and (piece.entries or (self.token_ids and piece.tokens)):
            deltas = [{"content": ""} if parser is None else {}]
        # The tokens of a piece are sent once.
        silent = replace(piece, entries=(), tokens=())
        out = [self._chunk(index, d, silent if i else piece) for i, d in enumerate(deltas)]
        if piece.finish is not None:
            last = self._chunk(index, {}, silent)
            last["finish_reason"] = reason(piece.finish, parser)
            out.append(last)
        return out

    def whole(
        self, heading: Heading, choices: Sequence[Sequence[Piece]], versions: Sequence[int], usage: Usage
    ) -> ChatCompletion:
        """Returns an answer that is not streamed.  choices: the pieces of each."""
        answer: ChatCompletion = {
            **headed(heading, versions),
            "object": "chat.completion",
            "choices": [self._choice(i, pieces) for i, pieces in enumerate(choices)],
            "usage": usage,
        }
        if self.token_ids:
            answer["prompt_token_ids"] = list(choices[0][0].prompt_tokens)
        if self._prompt_logprobs:
            answer["prompt_logprobs"] = [None, *choices[0][0].prompt]
        return answer

    def _choice(self, index: int, pieces: Sequence[Piece]) -> ChatChoice:
        text, parser = "".join(p.text for p in pieces), None
        message: ChatMessage = {"role": "assistant", "content": text, "refusal": None}
        if self._calls is not None:
            parser = self._calls()
            text, calls = gathered(parser.push(text) + parser.flush())
            message["content"] = text or (None if calls else "")
            if calls:
                message["tool_calls"] = [call_object(name, arguments) for name, arguments in calls]
        choice: ChatChoice = {
            "index": index,
            "message": message,
            "logprobs": self._entries([e for p in pieces for e in p.entries]),
            "finish_reason": reason(finish_of(pieces), parser),
        }
        if self.token_ids:
            choice["token_ids"] = [t for p in pieces for t in p.tokens]
        return choice

    def _chunk(self, index: int, delta: ChunkDelta, piece: Piece) -> ChatChunkChoice:
        logprobs = self._entries(piece.entries) if piece.entries else None
        chunk: ChatChunkChoice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        if self.token_ids:
            chunk["token_ids"] = list(piece.tokens)
        return chunk

    def _entries(self, entries: Sequence[Entry]) -> ChatLogprobs | None:
        return {"content": [e.shown for e in entries], "refusal": None} if self._logprobs else None


class CompletionRenderer:
    """Writes the choices of plain completions."""

    id_prefix = "cmpl-"
    chunk_object: ChunkObject = "text_completion"

    def __init__(self, *, logprobs: bool, prompt_logprobs: bool, token_ids: bool):
        self._logprobs, self._prompt_logprobs, self.token_ids = logprobs, prompt_logprobs, token_ids

    def opening(self, index: int) -> list[TextChunkChoice]:
        """Returns none: text is all that such a stream has."""
        return []

    def chunks(self, index: int, piece: Piece) -> list[TextChunkChoice]:
        """Returns the choice of the chunk that holds one piece, if there is anything to send."""
        news = piece.text or piece.entries or piece.finish is not None or (self.token_ids and piece.tokens)
        finish = None if piece.finish is None else piece.finish.value
        return [{**self._fields(index, [piece]), "finish_reason": finish}] if news else []

    def whole(
        self, heading: Heading, choices: Sequence[Sequence[Piece]], versions: Sequence[int], usage: Usage
    ) -> TextCompletion:
        """Returns an answer that is not streamed.  choices: the pieces of each."""
        return {
            **headed(heading, versions),
            "object": "text_completion",
            "choices": [{**self._fields(i, p), "finish_reason": finish_of(p).value} for i, p in enumerate(choices)],
            "usage": usage,
        }

    def _fields(self, index: int, pieces: Sequence[Piece]) -> TextChoiceFields:
        fields: TextChoiceFields = {
            "index": index,
            "text": "".join(p.text for p in pieces),
            "logprobs": self._lists([e for p in pieces for e in p.entries]),
        }
        if self.token_ids:
            fields["token_ids"] = [t for p in pieces for t in p.tokens]
            if pieces[0].prompt_tokens:
                fields["prompt_token_ids"] = list(pieces[0].prompt_tokens)
        if self._prompt_logprobs:
            fields["prompt_logprobs"] = [None, *pieces[0].prompt]
        return fields

    def _lists(self, entries: Sequence[Entry]) -> TextLogprobs | None:
        if not self._logprobs:
            return None
        shown = [e.shown for e in entries]
        # Ids with one text collide here; the better one stays, and the chosen token always has its own value.
        tops: list[dict[str, float] | None] = []
        for e in shown:
            all_of_them = (*reversed(e["top_logprobs"]), e)
            named = {t["token"]: p for t in all_of_them if (p := t["logprob"]) is not None}
            tops.append(None if e["logprob"] is None else named)
        return {
            "tokens": [e["token"] for e in shown],
            "token_logprobs": [e["logprob"] for e in shown],
            "top_logprobs": tops,
            "text_offset": [e.offset for e in entries],
        }


Renderer = ChatRenderer | CompletionRenderer


def finish_of(pieces: Sequence[Piece]) -> FinishReason:
    """Why a choice ended, all of whose pieces are there."""
    finish = pieces[-1].finish
    assert finish is not None
    return finish


def reason(finish: FinishReason, parser: CallParser | None) -> Reason:
    """The finish reason in OpenAI's word.  parser: has read the answer's calls."""
    calls = finish is FinishReason.STOP and parser is not None and parser.calls
    return "tool_calls" if calls else finish.value


def call_object(name: str, arguments: str) -> MadeCall:
    """One call of a message."""
    id = "call_" + uuid.uuid4().hex
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def call_delta(part: CallPart) -> CallDelta:
    """A part of a call, as clients add them up: the first one holds its id and its function's name."""
    if part.name is None:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    return {"index": part.index, **call_object(part.name, part.arguments)}


def usage_object(prompt_tokens: Sequence[int], choices: Sequence[Choice]) -> Usage:
    """Tokens spent.  A prompt counts once, whatever n; cached are what its first choice found."""
    prompt, completion = sum(prompt_tokens), sum(c.tokens for c in choices)
    firsts = choices[:: len(choices) // len(prompt_tokens)]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(c.cached_tokens for c in firsts)},
    }


def model_object(card: ModelCard) -> Model:
    """A model as the list and the single read show it."""
    return cast(Model, {**asdict(card), "object": "model"})
