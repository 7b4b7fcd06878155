"""From a chat's bodies to what the template is given: turns, tools, and what the answer must look like to be a call.  No HTTP here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxlora.checkpoints.chat_template import Scalar, Turn
from jaxlora.checkpoints.tokenizer import Tokenizer
from jaxlora.core.errors import InvalidRequest, UnsupportedParameter
from serve.api.openai.schemas import Message, TextContent
from serve.api.openai.tools import CallForm, CallParser, Function, Tool, ToolCall, ToolChoice, ToolChoiceMode, call_form
from serve.engine.grammar import GrammarSource

NOTHING: dict[str, object] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolUse:
    """The tools of one request, which its answer may call."""

    form: CallForm
    shown: Sequence[Turn]  # as the template shows them
    names: frozenset[str]  # that may be called
    grammar: GrammarSource | None  # of the whole answer

    def parser(self) -> CallParser:
        """A new parser for one answer."""
        return CallParser(self.form, self.names)


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """What a chat template is given."""

    turns: Sequence[Turn]
    tools: ToolUse | None
    variables: Mapping[str, Scalar]
    add_generation_prompt: bool
    continue_final: bool

    @property
    def chars(self) -> int:
        """Characters of all turns' texts."""
        return sum(len(text) for turn in self.turns if isinstance(text := turn["content"], str))

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """Token ids.  Not on the event loop: a long text takes a second.  Raises InvalidRequest."""
        return tokenizer.chat(
            self.turns,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final,
            tools=None if self.tools is None else self.tools.shown,
            variables=self.variables,
        )


def conversation(
    messages: Sequence[Message],
    tools: ToolUse | None,
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool | None,
    continue_final: bool | None,
    variables: Mapping[str, Scalar] | None,
) -> Conversation:
    """The messages as the template takes them.  Raises InvalidRequest, naming the field."""
    if continue_final and add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt exclude each other; leave one out",
            param="continue_final_message",
        )
    if continue_final and messages[-1].role != "assistant":
        raise InvalidRequest(
            "continue_final_message needs an assistant's message at the end", param="continue_final_message"
        )
    return Conversation(
        turns=[turn(m, f"messages[{i}]", tokenizer) for i, m in enumerate(messages)],
        tools=tools,
        variables=variables or {},
        add_generation_prompt=not continue_final and add_generation_prompt is not False,
        continue_final=bool(continue_final),
    )


def turn(message: Message, where: str, tokenizer: Tokenizer) -> Turn:
    """A message for the chat template: developer is system, and text parts are joined with line breaks."""
    role = "system" if message.role == "developer" else message.role
    calls = [called(c, f"{where}.tool_calls[{i}]") for i, c in enumerate(message.tool_calls or ())]
    if calls and role != "assistant":
        raise InvalidRequest(f"{where}.tool_calls is for an assistant's message", param=f"{where}.tool_calls")
    if calls:
        need_form(tokenizer, f"{where}.tool_calls")
    out: dict[str, object] = {"role": role, "content": text_of(message, where, bool(calls))}
    if message.tool_call_id is not None:
        out["tool_call_id"] = message.tool_call_id
    return out | ({"tool_calls": calls} if calls else {})


def text_of(message: Message, where: str, has_calls: bool) -> str:
    """The message's text.  Raises InvalidRequest where it has none."""
    if message.content is None:
        if has_calls:
            return ""
        raise InvalidRequest(f"{where}.content is required, as a string or text parts", param=f"{where}.content")
    return plain_text(message.content, f"{where}.content")


def plain_text(content: str | Sequence[TextContent], where: str) -> str:
    """Text parts joined with line breaks.  Raises InvalidRequest for a part without text."""
    texts = []
    for i, part in enumerate([] if isinstance(content, str) else content):
        if part.text is None:
            raise InvalidRequest(f"{where}[{i}].text is required", param=f"{where}[{i}].text")
        texts.append(part.text)
    return content if isinstance(content, str) else "\n".join(texts)


def called(call: ToolCall, where: str) -> Turn:
    """An earlier call as templates read it: its arguments are an object."""
    if call.function is None:
        raise InvalidRequest(f"{where}.function is required", param=f"{where}.function")
    return call_turn(call.id, call.function.name, call.function.arguments, f"{where}.function.arguments")


def call_turn(id: str, name: str, arguments: str, field: str) -> Turn:
    """One call for the template.  field: of the arguments, for messages.  Raises InvalidRequest where they are no object."""
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise InvalidRequest(f"{field} must be a JSON object, written as a string", param=field)
    return {"id": id, "type": "function", "function": {"name": name, "arguments": parsed}}


def need_form(tokenizer: Tokenizer, field: str) -> CallForm:
    """How this base writes calls.  Raises UnsupportedParameter, naming the field, where it cannot."""
    form = call_form(tokenizer.chat_template)
    if form is None:
        raise UnsupportedParameter(
            f"{field} needs a base model whose chat template shows tools and calls in a form known here (Hermes and "
            "Qwen, or Llama 3.1); this one's does not; leave it out",
            param=field,
        )
    if any(i in tokenizer.special_ids for i in tokenizer.encode(form.begin, add_special_tokens=False)):
        raise UnsupportedParameter(
            f"{field} needs a base model that writes {form.begin} as text; to this one it is a special token",
            param=field,
        )
    return form


def functions_of(tools: Sequence[Tool]) -> list[Function]:
    """What they define.  Raises InvalidRequest for one without a function, and for one name twice."""
    out: list[Function] = []
    for i, tool in enumerate(tools):
        if tool.function is None:
            raise InvalidRequest(f"tools[{i}].function is required", param=f"tools[{i}].function")
        out.append(tool.function)
    return out


def chosen(choice: ToolChoiceMode | ToolChoice | None) -> tuple[ToolChoiceMode, str | None]:
    """(how to choose, the one function that must be called).  Raises InvalidRequest for a choice of no function."""
    if not isinstance(choice, ToolChoice):
        return choice or "auto", None
    if choice.function is None:
        raise InvalidRequest("tool_choice.function is required", param="tool_choice.function")
    return "required", choice.function.name


def tool_use(
    functions: Sequence[Function],
    choice: tuple[ToolChoiceMode, str | None],
    parallel: bool | None,
    tokenizer: Tokenizer,
    answer: GrammarSource | None,
) -> ToolUse | None:
    """What may be called; None for nothing.

    choice: see `chosen`.  answer: what an answer without calls must look like, if something is said of it.
    Raises InvalidRequest where the choice names no function of the list, UnsupportedParameter where the base writes no calls
    and for an answer that is not JSON.
    """
    mode, wanted = choice
    names = [f.name for f in functions]
    if len(set(names)) < len(names):
        raise InvalidRequest("tools must not define one name twice", param="tools")
    if not functions and mode == "required":
        raise InvalidRequest("tool_choice needs tools; leave it out", param="tool_choice")
    if wanted is not None and wanted not in names:
        raise InvalidRequest("tool_choice names a function that is not in tools", param="tool_choice")
    if not functions or mode == "none":
        return None
    form = need_form(tokenizer, "tools")
    if answer is not None and answer.kind != "json":
        raise UnsupportedParameter(
            f"{answer.param} and tools cannot stand together; ask for a JSON schema in its place, leave it out, or give "
            "tool_choice: none",
            param=answer.param,
        )
    offered = [f for f in functions if wanted in (None, f.name)]
    free = mode == "auto"
    many = parallel is not False and wanted is None and bool(form.begin)
    # A free answer needs a grammar where it could break a promise: one call only, or JSON as a schema says.
    bound = not free or parallel is False or any(f.strict for f in functions) or answer is not None
    return ToolUse(
        form=form,
        shown=[shown(f) for f in functions],
        names=frozenset(f.name for f in offered),
        grammar=calls_source(form, offered, free=free, many=many, answer=answer) if bound else None,
    )


def shown(function: Function) -> Turn:
    """A function as chat templates show it."""
    fields = function.model_dump(exclude_unset=True, exclude={"strict"})
    return {"type": "function", "function": fields}


def calls_source(
    form: CallForm, functions: Sequence[Function], *, free: bool, many: bool, answer: GrammarSource | None
) -> GrammarSource:
    """The grammar of an answer of calls.

    free: text may stand there instead, and between, or `answer` instead if there is one.  many: several calls.
    """
    calls = [
        {
            "opening": form.opening(f.name),
            "schema": (f.parameters if f.parameters is not None else NOTHING)
            if f.strict or not free
            else {"type": "object"},
        }
        for f in functions
    ]
    calls_form = {"begin": form.begin, "closing": form.closing, "calls": calls, "free": free, "many": many}
    return GrammarSource(kind="calls", text=json.dumps(calls_form), param="tools", answer=answer if free else None)
