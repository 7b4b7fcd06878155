"""Renders chat templates: Jinja in a sandbox, with the settings and helpers Hugging Face templates are written for.

A template comes from whoever chose the base model; what it may do is still limited (`template_sandbox`): it reaches no
Python attribute and changes nothing in place, and its time, what it makes and what it writes are bounded.
Source of the dialect: https://huggingface.co/docs/transformers/chat_templating
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from jaxlora.checkpoints.template_sandbox import METER, Meter, Sandbox
from jaxlora.core.errors import InvalidRequest, ModelInvalid

MAX_TEMPLATE_CHARACTERS = 1 << 20
MAX_GROWTH_CHARACTERS = 1 << 20  # characters a template may add to the messages
MAX_MADE_CHARACTERS = 1 << 24  # that a template may make on the way, and MADE_TIMES those of the messages
MADE_TIMES = 64
MAX_RENDER_S = 5.0
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

RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "bos_token", "eos_token"}
    | {"pad_token", "raise_exception", "strftime_now"}
)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class ChatTemplate:
    """A compiled template and the special tokens it may name."""

    def __init__(self, source: str, special: Mapping[str, str]):
        """Raises ModelInvalid for a template that is not Jinja or too long."""
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise ModelInvalid(f"the chat template has {len(source)} characters, at most {MAX_TEMPLATE_CHARACTERS}")
        sandbox = Sandbox([_GenerationTag, jinja2.ext.loopcontrols])
        helpers = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
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
        meter = Meter(characters=MAX_MADE_CHARACTERS + MADE_TIMES * size, seconds=MAX_RENDER_S)
        pieces: list[str] = []
        length = 0
        running = METER.set(meter)
        try:
            known = {
                "messages": messages,
                "tools": tools,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
            }
            for piece in self._template.generate({**variables, **self._special, **known}):
                pieces.append(piece)
                length += len(piece)
                if length > limit:
                    raise InvalidRequest(f"the chat template wrote more than {limit} characters")
        except InvalidRequest:
            raise
        except jinja2.exceptions.TemplateError as error:
            raise InvalidRequest(
                f"the chat template refuses these messages: {str(error)[:500]}", param="messages"
            ) from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            reason = f"{type(error).__name__}: {str(error)[:500]}"
            raise InvalidRequest(f"the chat template fails on these messages: {reason}", param="messages") from error
        finally:
            METER.reset(running)
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
