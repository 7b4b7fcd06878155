"""An answer as the Responses API writes it: output items that grow, whole or as numbered events.

created, in_progress ─▶ for each item: added, (part added,) deltas, done, (part done,) done ─▶ completed | incomplete | failed
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fastapi.sse import KEEPALIVE_COMMENT

from serve.api.openai.generation import Run
from serve.api.openai.logprobs import Entry, Piece
from serve.api.openai.render import headed, usage_object
from serve.api.openai.schemas import (
    ItemStatus,
    OutputCall,
    OutputMessage,
    OutputText,
    ResponseEcho,
    ResponseEvent,
    ResponseObject,
    ResponseUsage,
    TokenLogprob,
)
from serve.api.openai.tools import CallParser, CallPart, Part, TextPart
from serve.engine.request import Delta, FinishReason
from serve.http.sse import sse


@dataclass(slots=True)
class OpenItem:
    """The item that grows: a message's text, or a call's arguments."""

    place: int
    id: str
    name: str | None = None  # of a call
    call_id: str = ""
    text: str = ""  # of the message, or the call's arguments
    entries: list[TokenLogprob] = field(default_factory=list)

    def text_part(self) -> OutputText:
        """The message's one part, as it is now."""
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": list(self.entries)}

    def item(self, status: ItemStatus) -> OutputMessage | OutputCall:
        """The item as it is now; one in progress has no content yet."""
        if self.name is not None:
            return {
                "id": self.id,
                "type": "function_call",
                "status": status,
                "call_id": self.call_id,
                "name": self.name,
                "arguments": self.text,
            }
        content = [] if status == "in_progress" else [self.text_part()]
        return {"id": self.id, "type": "message", "status": status, "role": "assistant", "content": content}


class OutputItems:
    """The output of one answer, and its events, without their numbers."""

    def __init__(self) -> None:
        self.done: list[OutputMessage | OutputCall] = []
        self._open: OpenItem | None = None
        self._waiting: list[TokenLogprob] = []  # of tokens whose text has not been sent

    def take(self, parts: Sequence[Part], entries: Sequence[Entry]) -> list[ResponseEvent]:
        """Adds text and calls, and returns their events."""
        self._waiting += [e.shown for e in entries]
        out: list[ResponseEvent] = []
        for part in parts:
            if isinstance(part, TextPart):
                out += self._text(part.text)
            else:
                out += self._call(part)
        return out

    def end(self, status: ItemStatus) -> list[ResponseEvent]:
        """Ends the output, which has one item at least, and returns the events.  status: of the last item."""
        opened = [] if self._open is not None or self.done else self._begin(OpenItem(0, "msg_" + uuid.uuid4().hex))
        return opened + self._close(status)

    def _text(self, text: str) -> list[ResponseEvent]:
        out: list[ResponseEvent] = []
        if self._open is None or self._open.name is not None:
            out = self._close("completed")
            out += self._begin(OpenItem(len(self.done), "msg_" + uuid.uuid4().hex))
        item, news = self._now(), self._waiting
        self._waiting = []
        item.text += text
        item.entries += news
        return [*out, {**self._part(item, "response.output_text.delta"), "delta": text, "logprobs": news}]

    def _call(self, part: CallPart) -> list[ResponseEvent]:
        out: list[ResponseEvent] = []
        self._waiting = []
        if part.name is not None:
            out = self._close("completed")
            ids = "fc_" + uuid.uuid4().hex, "call_" + uuid.uuid4().hex
            out += self._begin(OpenItem(len(self.done), ids[0], name=part.name, call_id=ids[1]))
        item = self._now()
        item.text += part.arguments
        if part.arguments:
            out.append({**self._of(item, "response.function_call_arguments.delta"), "delta": part.arguments})
        return out

    def _now(self) -> OpenItem:
        assert self._open is not None
        return self._open

    def _begin(self, item: OpenItem) -> list[ResponseEvent]:
        self._open = item
        out: list[ResponseEvent] = [
            {"type": "response.output_item.added", "output_index": item.place, "item": item.item("in_progress")}
        ]
        if item.name is None:
            out.append({**self._part(item, "response.content_part.added"), "part": item.text_part()})
        return out

    def _close(self, status: ItemStatus) -> list[ResponseEvent]:
        item, self._open = self._open, None
        if item is None:
            return []
        item.entries += self._waiting
        self._waiting = []
        out: list[ResponseEvent] = []
        if item.name is None:
            text = self._part(item, "response.output_text.done")
            out.append({**text, "text": item.text, "logprobs": list(item.entries)})
            out.append({**self._part(item, "response.content_part.done"), "part": item.text_part()})
        else:
            out.append({**self._of(item, "response.function_call_arguments.done"), "arguments": item.text})
        self.done.append(item.item(status))
        out.append({"type": "response.output_item.done", "output_index": item.place, "item": self.done[-1]})
        return out

    def _of(self, item: OpenItem, type: str) -> ResponseEvent:
        return {"type": type, "item_id": item.id, "output_index": item.place}

    def _part(self, item: OpenItem, type: str) -> ResponseEvent:
        return {**self._of(item, type), "content_index": 0}


class ResponseWriter:
    """Writes a run of one choice."""

    def __init__(self, run: Run, echo: ResponseEcho, parser: CallParser | None):
        """echo: the request's fields, which every response object repeats."""
        self._run, self._echo, self._parser = run, echo, parser
        self._items = OutputItems()
        self._events = 0

    async def whole(self) -> ResponseObject:
        """Returns the response when the run has ended.  Raises what ended it early."""
        (pieces,) = await self._run.pieces()
        for piece in pieces:
            self._take(piece)
        return self._ended()[1]

    async def events(self, first: tuple[int, Delta] | None) -> AsyncGenerator[bytes]:
        """The stream's bytes.  It ends in one way: response.completed, incomplete or failed."""
        run, item = self._run, first
        try:
            for type in ("response.created", "response.in_progress"):
                yield self._event({"type": type, "response": self._response("in_progress")})
            while True:
                if item is None:
                    yield KEEPALIVE_COMMENT
                else:
                    for event in self._take(run.choices[0].take(item[1])):
                        yield self._event(event)
                if run.ended:
                    break
                item = await run.next(run.ping_s)
            last, response = self._ended()
            for event in last:
                yield self._event(event)
            yield self._event({"type": f"response.{response['status']}", "response": response})
        except Exception as error:
            failed = self._response("failed")
            failed["error"] = run.failed(error)["error"]
            yield self._event({"type": "response.failed", "response": failed})

    def _take(self, piece: Piece) -> list[ResponseEvent]:
        parts: list[Part] = [TextPart(text=piece.text)] if piece.text else []
        if self._parser is not None:
            parts = self._parser.push(piece.text) + (self._parser.flush() if piece.finish is not None else [])
        return self._items.take(parts, piece.entries)

    def _ended(self) -> tuple[list[ResponseEvent], ResponseObject]:
        """(the last items' events, the response)."""
        cut = self._run.choices[0].finish is FinishReason.LENGTH
        status: ItemStatus = "incomplete" if cut else "completed"
        events, response = self._items.end(status), self._response(status)
        response["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        response["usage"] = self._usage()
        return events, response

    def _event(self, event: ResponseEvent) -> bytes:
        event["sequence_number"] = self._events
        self._events += 1
        return sse(event, event["type"])

    def _response(self, status: ItemStatus | Literal["failed"]) -> ResponseObject:
        heading = headed(self._run.heading, self._run.versions)
        return {
            "id": heading["id"],
            "object": "response",
            "created_at": heading["created"],
            "status": status,
            "model": heading["model"],
            "adapter_version": heading["adapter_version"],
            "output": list(self._items.done),
            "error": None,
            "incomplete_details": None,
            "usage": None,
            **self._echo,
        }

    def _usage(self) -> ResponseUsage:
        usage = usage_object([len(p) for p in self._run.prompts], self._run.choices)
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
