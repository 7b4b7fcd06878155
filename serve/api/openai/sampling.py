"""From a body's fields to sampling parameters and the source of a grammar.  No HTTP here."""

from __future__ import annotations

import json

from jaxlora.core.errors import InvalidRequest
from serve.api.openai.schemas import ResponseFormat, SamplingBody, StructuredOutputs
from serve.engine.grammar import Grammar, GrammarSource
from serve.engine.request import SamplingParams

ANY_OBJECT = {"type": "object"}


def sampling(
    body: SamplingBody, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None, grammar: Grammar | None
) -> SamplingParams:
    """The body's sampling fields; what is absent has the API's default."""

    def given[T](value: T | None, default: T) -> T:
        return default if value is None else value

    return SamplingParams(
        max_tokens=max_tokens,
        temperature=given(body.temperature, 1.0),
        top_p=given(body.top_p, 1.0),
        top_k=given(body.top_k, -1),
        min_p=given(body.min_p, 0.0),
        seed=body.seed,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(given(body.stop, [])),
        include_stop=given(body.include_stop_str_in_output, False),
        stop_token_ids=tuple(given(body.stop_token_ids, [])),
        ignore_eos=given(body.ignore_eos, False),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        min_tokens=given(body.min_tokens, 0),
        presence_penalty=given(body.presence_penalty, 0.0),
        frequency_penalty=given(body.frequency_penalty, 0.0),
        repetition_penalty=given(body.repetition_penalty, 1.0),
        logit_bias=tuple(given(body.logit_bias, {}).items()),
        grammar=grammar,
    )


def grammar_source(body: SamplingBody) -> GrammarSource | None:
    """Returns the source of the answer's grammar, if the body has one.  Raises InvalidRequest for two, or an unclear one."""
    form, structured = body.response_format, body.structured_outputs
    wanted = None if form is None or form.type == "text" else _of_format(form)
    if structured is None:
        return wanted
    if wanted is not None:
        raise InvalidRequest(
            "response_format and structured_outputs both say what the answer looks like; give one of them",
            param="structured_outputs",
        )
    return _of_structured(structured)


def _of_format(form: ResponseFormat) -> GrammarSource:
    if form.type == "json_object":
        if form.json_schema is not None:
            raise InvalidRequest("json_schema needs type: json_schema", param="response_format.json_schema")
        return GrammarSource(kind="json", text=json.dumps(ANY_OBJECT), param="response_format")
    if form.json_schema is None:
        raise InvalidRequest("response_format.json_schema is required", param="response_format.json_schema")
    schema = ANY_OBJECT if form.json_schema.schema_ is None else form.json_schema.schema_
    return GrammarSource(kind="json", text=json.dumps(schema), param="response_format.json_schema.schema")


def _of_structured(outputs: StructuredOutputs) -> GrammarSource:
    forms: list[GrammarSource] = []
    compact = bool(outputs.disable_any_whitespace)
    if outputs.json_ is not None:
        text = outputs.json_ if isinstance(outputs.json_, str) else json.dumps(outputs.json_)
        forms.append(GrammarSource(kind="json", text=text, param="structured_outputs.json", compact=compact))
    if outputs.json_object:
        param = "structured_outputs.json_object"
        forms.append(GrammarSource(kind="json", text=json.dumps(ANY_OBJECT), param=param, compact=compact))
    if outputs.regex is not None:
        forms.append(GrammarSource(kind="regex", text=outputs.regex, param="structured_outputs.regex"))
    if outputs.choice is not None:
        forms.append(GrammarSource(kind="choice", text=json.dumps(outputs.choice), param="structured_outputs.choice"))
    if outputs.grammar is not None:
        forms.append(GrammarSource(kind="grammar", text=outputs.grammar, param="structured_outputs.grammar"))
    if len(forms) != 1:
        raise InvalidRequest(
            f"structured_outputs needs exactly one of json, json_object, regex, choice and grammar, got {len(forms)}",
            param="structured_outputs",
        )
    if outputs.disable_any_whitespace is not None and forms[0].kind != "json":
        raise InvalidRequest(
            "disable_any_whitespace is for JSON; leave it out", param="structured_outputs.disable_any_whitespace"
        )
    return forms[0]
