"""The shapes of answers: chat and plain completions, whole and in chunks; and server-sent events.  Pure but for SSE bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fastapi.sse import format_sse_event

from serve.house import ModelCard
from serve.openai_stream import Alternative, Choice, Entry, Piece
from serve.request import FinishReason

Json = dict[str, object]
DONE = format_sse_event(data_str="[DONE]")


def sse(data: Mapping[str, object]) -> bytes:
    """One event: a raw `data:` line and an empty line."""
    return format_sse_event(data_str=json.dumps(data, ensure_ascii=False, separators=(",", ":")))


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
    id_prefix, whole_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, logprobs: bool, prompt_logprobs: bool):
        self._logprobs, self._prompt_logprobs = logprobs, prompt_logprobs

    def opening(self, index: int) -> list[Json]:
        return [self._chunk(index, {"role": "assistant", "content": ""}, None, None)]

    def chunks(self, index: int, piece: Piece) -> list[Json]:
        out = []
        if piece.text or piece.entries:
            out.append(self._chunk(index, {"content": piece.text}, self._entries(piece.entries), None))
        if piece.finish is not None:
            out.append(self._chunk(index, {}, None, piece.finish))
        return out

    def whole(self, index: int, pieces: Sequence[Piece]) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(p.text for p in pieces), "refusal": None},
            "logprobs": self._entries([e for p in pieces for e in p.entries]),
            "finish_reason": last_finish(pieces),
        }

    def beside(self, pieces: Sequence[Piece]) -> Json:
        return {"prompt_logprobs": ranked(pieces)} if self._prompt_logprobs else {}

    def _chunk(self, index: int, delta: Json, logprobs: Json | None, finish: FinishReason | None) -> Json:
        reason = finish.value if finish is not None else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _entries(self, entries: Sequence[Entry]) -> Json | None:
        if not self._logprobs:
            return None
        content = [self._token(e) | {"top_logprobs": [self._token(t) for t in e.top]} for e in entries]
        return {"content": content, "refusal": None}

    def _token(self, token: Entry | Alternative) -> Json:
        return {"token": token.text, "logprob": token.logprob, "bytes": list(token.raw)}


class CompletionShape:
    id_prefix, whole_object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def __init__(self, logprobs: bool, prompt_logprobs: bool):
        self._logprobs, self._prompt_logprobs = logprobs, prompt_logprobs

    def opening(self, index: int) -> list[Json]:
        return []

    def chunks(self, index: int, piece: Piece) -> list[Json]:
        news = piece.text or piece.entries or piece.finish is not None
        return [self.whole(index, [piece])] if news else []

    def whole(self, index: int, pieces: Sequence[Piece]) -> Json:
        return {
            "index": index,
            "text": "".join(p.text for p in pieces),
            "logprobs": self._lists([e for p in pieces for e in p.entries]),
            "finish_reason": last_finish(pieces),
        } | ({"prompt_logprobs": ranked(pieces)} if self._prompt_logprobs else {})

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


def last_finish(pieces: Sequence[Piece]) -> str | None:
    """The finish reason in OpenAI's word, None before the end."""
    return pieces[-1].finish.value if pieces and pieces[-1].finish is not None else None


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
