"""The bodies of tools: what may be called, what shall be called, and calls that a conversation repeats."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from serve.strict import Only, Strict, Text, Unbuilt
from serve.tool_calls import NAME

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
