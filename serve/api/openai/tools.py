"""Calls of functions in an answer's text: in which form a base writes them, and a parser for text that comes in pieces.

Which form is read off the chat template, for the model was trained on it.  Whatever the pieces, the calls are the same.
Pure: no jax here.

The bodies of tools: what may be called, what shall be called, and calls that a conversation repeats."""

from __future__ import annotations

import enum
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import regex
from pydantic import Field, JsonValue

from serve.http.schema import Only, Strict, Text, Unbuilt

NAME = "[a-zA-Z0-9_-]{1,64}"
HEAD = regex.compile(rf'\s*\{{\s*"name"\s*:\s*"({NAME})"\s*,\s*"(?:arguments|parameters)"\s*:\s*\{{')
SHOWS_TOOLS = regex.compile(r"{[{%][^}]*\btools\b")


@dataclass(frozen=True, kw_only=True, slots=True)
class CallForm:
    """How a base writes a call: `begin`, an object of name and arguments, `end`."""

    begin: str  # "": a call is the whole answer
    end: str
    between: str  # what stands between begin and object, and between object and end
    key: str  # of the arguments

    def opening(self, name: str) -> str:
        """What a call of this function begins with, up to its arguments."""
        return f'{self.begin}{self.between}{{"name": "{name}", "{self.key}": '

    @property
    def closing(self) -> str:
        """What follows its arguments."""
        return f"}}{self.between}{self.end}"


TAGGED = CallForm(begin="<tool_call>", end="</tool_call>", between="\n", key="arguments")  # Hermes, Qwen
BARE = CallForm(begin="", end="", between="", key="parameters")  # Llama 3.1


def call_form(template: str | None) -> CallForm | None:
    """The form in which a chat template shows calls; None where it shows no tools, or calls in a form we do not know."""
    if template is None or SHOWS_TOOLS.search(template) is None or "<function=" in template:
        return None
    if TAGGED.begin in template and TAGGED.end in template and '"arguments"' in template:
        return TAGGED
    if '{"name": "' in template and '"parameters": ' in template:
        return BARE
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPart:
    """Text that is no call."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CallPart:
    """A part of a call.  `name`: with its first part alone."""

    index: int  # of the call in the answer
    name: str | None
    arguments: str  # more of the JSON text


Part = TextPart | CallPart


class _State(enum.Enum):
    TEXT = enum.auto()  # a call may begin
    HEAD = enum.auto()  # in a call, before its arguments
    ARGUMENTS = enum.auto()
    TAIL = enum.auto()  # after them
    PLAIN = enum.auto()  # no call may begin any more


class CallParser:
    """The calls in one answer.  What names no known function, or is not JSON, stays text.

    White space before a call, and after the last one, is left out.
    """

    def __init__(self, form: CallForm, names: Collection[str]):
        self._form, self._names = form, names
        self._state = _State.TEXT
        self._buffer = ""  # not yet understood
        self._space = ""  # white space that is text, if text follows it
        self._depth, self._quoted, self._escaped = 0, False, False  # in the arguments
        self.calls = 0  # begun

    def push(self, text: str) -> list[Part]:
        """What more text brings."""
        self._buffer += text
        out: list[Part] = []
        while True:
            before = self._state, len(self._buffer)
            out += self._advance()
            if (self._state, len(self._buffer)) == before:
                return out

    def flush(self) -> list[Part]:
        """What is left when the text has ended."""
        if self._state in (_State.ARGUMENTS, _State.TAIL):
            return []
        rest, self._buffer = self._buffer, ""
        out = self._whole(rest, "") if self._state is _State.HEAD else self._say(rest)
        space, self._space = self._space, ""
        return [*out, TextPart(text=space)] if space and not self.calls else out

    def _advance(self) -> list[Part]:
        match self._state:
            case _State.TEXT:
                return self._read_text() if self._form.begin else self._read_start()
            case _State.PLAIN:
                text, self._buffer = self._buffer, ""
                return self._say(text)
            case _State.HEAD:
                return self._read_head()
            case _State.ARGUMENTS:
                return self._read_arguments()
            case _State.TAIL:
                return self._read_tail()

    def _say(self, text: str) -> list[Part]:
        """The text, but for white space at its end, which waits."""
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        return [TextPart(text=kept)] if kept else []

    def _read_text(self) -> list[Part]:
        begin = self._form.begin
        text, tag, rest = self._buffer.partition(begin)
        if tag:
            self._state, self._buffer = _State.HEAD, rest
            return self._say(text)
        held = next(n for n in range(min(len(begin) - 1, len(text)), -1, -1) if begin.startswith(text[len(text) - n :]))
        self._buffer = text[len(text) - held :]
        return self._say(text[: len(text) - held])

    def _read_start(self) -> list[Part]:
        first = self._buffer.lstrip()[:1]
        if first:
            self._state = _State.HEAD if first == "{" else _State.PLAIN
        return []

    def _read_head(self) -> list[Part]:
        found = HEAD.match(self._buffer, partial=True)
        if found is not None and not found.partial and found[1] in self._names:
            self._state, self._buffer = _State.ARGUMENTS, self._buffer[found.end() - 1 :]
            return [self._begin(found[1], "")]
        if not self._form.end:
            if found is None or not found.partial:
                self._state = _State.PLAIN
            return []
        inside, tag, rest = self._buffer.partition(self._form.end)
        if not tag:
            return []
        self._state, self._buffer = _State.TEXT, rest
        return self._whole(inside, tag)

    def _whole(self, inside: str, tag: str) -> list[Part]:
        """A call in another order of its fields, or else text."""
        try:
            parsed = json.loads(inside)
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict) and parsed.get("name") in self._names:
            arguments = parsed.get("arguments", parsed.get("parameters", {}))
            if isinstance(arguments, dict):
                return [self._begin(parsed["name"], json.dumps(arguments, ensure_ascii=False))]
        return self._say(self._form.begin + inside + tag)

    def _begin(self, name: str, arguments: str) -> CallPart:
        self.calls += 1
        self._space = ""
        self._depth, self._quoted, self._escaped = 0, False, False
        return CallPart(index=self.calls - 1, name=name, arguments=arguments)

    def _read_arguments(self) -> list[Part]:
        end = len(self._buffer)
        for i, c in enumerate(self._buffer):
            if self._quoted:
                self._quoted = self._escaped or c != '"'
                self._escaped = c == "\\" and not self._escaped
            elif c == "<":  # not JSON: the end mark
                end, self._state = i, _State.TAIL
                break
            else:
                self._quoted = c == '"'
                self._depth += (c in "{[") - (c in "}]")
                if self._depth == 0:
                    end, self._state = i + 1, _State.TAIL
                    break
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        return [CallPart(index=self.calls - 1, name=None, arguments=text)] if text else []

    def _read_tail(self) -> list[Part]:
        if not self._form.end:
            rest = self._buffer.lstrip()
            if rest:
                self._state, self._buffer = _State.PLAIN, rest.removeprefix("}")
            return []
        _, tag, rest = self._buffer.partition(self._form.end)
        if tag:
            self._state, self._buffer = _State.TEXT, rest
        return []


def gathered(parts: Iterable[Part]) -> tuple[str, list[tuple[str, str]]]:
    """(text, the name and arguments of each call)."""
    text, calls = "", []
    for part in parts:
        if isinstance(part, TextPart):
            text += part.text
        elif part.name is not None:
            calls.append((part.name, part.arguments))
        else:
            name, arguments = calls[-1]
            calls[-1] = (name, arguments + part.arguments)
    return text, calls


MAX_TOOLS = 128
MAX_CALLS = 128  # of one message

FunctionName = Annotated[str, Field(pattern=f"^{NAME}$")]


class Function(Strict):
    """A function that may be called.  `strict`: where it is true, an answer can call it with no other arguments."""

    name: FunctionName
    description: Text | None = None
    parameters: dict[str, JsonValue] | None = None  # a JSON schema of its arguments; absent: it has none
    strict: bool | None = None


class Tool(Strict):
    type: Annotated[str, Only(("function",))]
    function: Function | None = None
    custom: Unbuilt = None


class Named(Strict):
    name: FunctionName


class ToolChoice(Strict):
    """The one function to call."""

    type: Annotated[str, Only(("function",))]
    function: Named | None = None
    allowed_tools: Unbuilt = None
    custom: Unbuilt = None


ToolChoiceMode = Literal["none", "auto", "required"]


class CalledFunction(Strict):
    name: FunctionName
    arguments: Text  # JSON


class ToolCall(Strict):
    """A call that an earlier answer made."""

    id: Text
    type: Annotated[str, Only(("function",))]
    function: CalledFunction | None = None
    custom: Unbuilt = None
    index: int | None = None  # streams have it
