"""Renders chat templates: Jinja in a sandbox, with the settings and helpers Hugging Face templates are written for.

A template comes from whoever chose the base model; what it may do is still limited: it reaches no Python attribute
and changes nothing in place, the text is bounded, and the time is checked at every piece of output, loop iteration
and macro call.
Source of the dialect: https://huggingface.co/docs/transformers/chat_templating
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from jaxlora.core.errors import InvalidRequest, ModelInvalid

MAX_TEMPLATE_CHARACTERS = 1 << 20
MAX_GROWTH_CHARACTERS = 1 << 20  # characters a template may add to the messages
MAX_RENDER_S = 5.0  # checked between pieces of output, in every loop iteration and in every macro
MAX_INTERCEPTED = 1 << 20  # largest result of a repetition, bits of a power
END_MARK = "<<the last message ends here>> "  # with a space, to detect whether the template strips messages


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the trained text; here it only keeps its own scope."""

    tags = {"generation"}  # noqa: RUF012 - the base class types it as a plain set

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


Scalar = str | int | float | bool | None
Turn = Mapping[str, object]  # role and content as text; tool_call_id as text, tool_calls as JSON
DEADLINE = "deadline_s"  # of a rendering, time.monotonic(); in the context's parent, which no template can change

RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "bos_token", "eos_token"}
    | {"pad_token", "raise_exception", "strftime_now", DEADLINE}
)


@jinja2.pass_context
def _check_time(context: jinja2.runtime.Context) -> None:
    if time.monotonic() > context.parent[DEADLINE]:
        raise jinja2.exceptions.SecurityError(f"it took longer than {MAX_RENDER_S:g} seconds")


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The immutable sandbox, which also refuses `"x" * 10**9` and `9 ** 9 ** 9`, and checks the time in every loop."""

    check_time = staticmethod(_check_time)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        template = super()._parse(source, name, filename)
        for place in template.find_all((jinja2.nodes.For, jinja2.nodes.Macro, jinja2.nodes.CallBlock)):
            check = jinja2.nodes.Call(jinja2.nodes.EnvironmentAttribute("check_time"), [], [], None, None)
            place.body.insert(0, jinja2.nodes.ExprStmt(check).set_lineno(place.lineno))
        return template

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: object, right: object) -> object:
        too_big = False
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            too_big = left.bit_length() * abs(right) > MAX_INTERCEPTED
        for one, other in ((left, right), (right, left)):
            if operator == "*" and isinstance(one, (str, list, tuple)) and isinstance(other, int):
                too_big = len(one) * other > MAX_INTERCEPTED
        if too_big:
            raise jinja2.exceptions.SecurityError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A compiled template and the special tokens it may name."""

    def __init__(self, source: str, special: Mapping[str, str]):
        """Raises ModelInvalid for a template that is not Jinja or too long."""
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise ModelInvalid(f"the chat template has {len(source)} characters, at most {MAX_TEMPLATE_CHARACTERS}")
        sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols])
        sandbox.filters["tojson"] = _to_json  # unlike Jinja's own, without HTML escapes
        helpers = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        del sandbox.globals["lipsum"]  # it makes text of any length
        try:
            self._template = sandbox.from_string(source, globals=helpers)
        except (jinja2.exceptions.TemplateError, RecursionError, SyntaxError) as error:
            raise ModelInvalid(f"the chat template cannot be read: {str(error)[:200]}") from error
        self._special = dict(special)

    def render(
        self,
        messages: Sequence[Turn],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Turn] | None = None,
        variables: Mapping[str, Scalar] | None = None,
    ) -> str:
        """Renders the conversation as text.

        continue_final_message: leaves the last message open, so that the completion continues it.  tools: functions to
        call, as JSON.  variables: more that the template may read.
        Raises InvalidRequest for messages the template refuses, and for a variable that the server sets.
        """
        plain, more = _check(messages), dict(variables or {})
        for name in more:
            if name in RESERVED:
                raise InvalidRequest(
                    f"chat_template_kwargs must not set {name}, which the server sets; leave it out",
                    param="chat_template_kwargs",
                )
        if not continue_final_message:
            return self._run(plain, add_generation_prompt, tools, more)
        if add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other; set one of them to false",
                param="continue_final_message",
            )
        final = str(plain[-1]["content"])
        plain[-1]["content"] = final + END_MARK
        text = self._run(plain, False, tools, more)
        mark = END_MARK.rstrip()
        if mark not in text or final.strip() not in text:
            raise InvalidRequest("the chat template does not show the last message, so it cannot be continued")
        at = text.rindex(mark)
        return text[:at] if text.startswith(END_MARK, at) else text[:at].rstrip()

    def _run(
        self,
        messages: list[dict[str, object]],
        add_generation_prompt: bool,
        tools: Sequence[Turn] | None,
        variables: Mapping[str, Scalar],
    ) -> str:
        size = _characters([*messages, *(tools or ()), variables])
        limit = MAX_GROWTH_CHARACTERS + 4 * size
        deadline_s = time.monotonic() + MAX_RENDER_S
        pieces: list[str] = []
        length = 0
        try:
            known = {
                "messages": messages,
                "tools": tools,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
            }
            for piece in self._template.generate({**variables, **self._special, **known, DEADLINE: deadline_s}):
                pieces.append(piece)
                length += len(piece)
                if length > limit or time.monotonic() > deadline_s:
                    raise InvalidRequest(f"the chat template wrote more than {limit} characters or took too long")
        except InvalidRequest:
            raise
        except jinja2.exceptions.TemplateError as error:
            raise InvalidRequest(
                f"the chat template refuses these messages: {str(error)[:500]}", param="messages"
            ) from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            reason = f"{type(error).__name__}: {str(error)[:500]}"
            raise InvalidRequest(f"the chat template fails on these messages: {reason}", param="messages") from error
        return "".join(pieces)


def _characters(value: object) -> int:
    """Returns the number of characters of all texts in the value."""
    todo, count = [value], 0
    while todo:
        one = todo.pop()
        if isinstance(one, str):
            count += len(one)
        elif isinstance(one, Mapping):
            todo += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple):
            todo += one
    return count


def _check(messages: Sequence[Turn]) -> list[dict[str, object]]:
    """Returns plain copies of the messages.  Raises InvalidRequest, naming the place, for one that is not all text."""
    if not messages:
        raise InvalidRequest("messages must hold at least one message", param="messages")
    for i, message in enumerate(messages):
        for field in ("role", "content"):
            if field not in message:
                raise InvalidRequest(f"messages[{i}] has no {field}", param=f"messages[{i}].{field}")
        for field, value in message.items():
            if not isinstance(value, str) and field != "tool_calls":
                got = type(value).__name__
                raise InvalidRequest(f"messages[{i}].{field} must be text, got {got}", param=f"messages[{i}].{field}")
    return [dict(message) for message in messages]
