"""Bodies that must be refused, with status, code and field; and those that must not."""

import json
import typing

import openai
import pytest
from fake_backend import BASE, HI
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params

from serve.api.openai.schemas import ChatBody, CompletionBody

pytest_plugins = ["wire_fixtures"]


def part(**fields):
    return {"messages": [{"role": "user", "content": [fields]}]}


def said(**fields):
    return {"messages": [{"role": "user", "content": "x"} | fields]}


CHAT_TABLE = {
    "unknown": ({"temprature": 1}, "unknown_parameter", "temprature"),
    "unknown_nested": (said(mood="x"), "unknown_parameter", "messages[0].mood"),
    "unknown_in_part": (part(type="text", text="a", colour=1), "unknown_parameter", "messages[0].content[0].colour"),
    "unknown_surrogate": ({"\ud800": 1}, "invalid_value", None),
    "no_model": ({"model": None}, "invalid_value", "model"),
    "no_messages": ({"messages": []}, "invalid_value", "messages"),
    "role": (said(role="boss"), "invalid_value", "messages[0].role"),
    "null_content": (said(content=None), "invalid_value", "messages[0].content"),
    "image": (part(type="image_url", image_url={"url": "x"}), "unsupported_parameter", "messages[0].content[0].type"),
    "part_without_text": (part(type="text"), "invalid_value", "messages[0].content[0].text"),
    "name": (said(name="x"), "unsupported_parameter", "messages[0].name"),
    "surrogate_text": (said(content="\ud800"), "invalid_value", "messages[0].content"),
    "unknown_not_ascii": ({"é": 1}, "unknown_parameter", "é"),
    "unknown_long": ({"k" * 999: 1}, "unknown_parameter", "k" * 64),
    "many_fields": ({f"k{i}": 1 for i in range(99)}, "invalid_value", None),
    "many_notes": ({"metadata": {f"k{i}": 1 for i in range(101)}}, "invalid_value", "metadata"),
    "deep": ({"functions": json.loads("[" * 400 + "]" * 400)}, "invalid_value", "functions"),
    "many_messages": ({"messages": HI * 2049}, "invalid_value", "messages"),
    "many_parts": (said(content=[{"type": "text", "text": "a"}] * 257), "invalid_value", "messages[0].content"),
    "surrogate_model": ({"model": "\ud800"}, "invalid_value", "model"),
    "template_refuses": (said(role="assistant"), "invalid_value", "messages"),
    "temperature_bool": ({"temperature": False}, "invalid_value", "temperature"),
    "temperature_text": ({"temperature": "1"}, "invalid_value", "temperature"),
    "temperature_high": ({"temperature": 2.1}, "invalid_value", "temperature"),
    "top_p_zero": ({"top_p": 0}, "invalid_value", "top_p"),
    "top_k": ({"top_k": -2}, "invalid_value", "top_k"),
    "min_p": ({"min_p": 1.5}, "invalid_value", "min_p"),
    "max_tokens_zero": ({"max_tokens": 0}, "invalid_value", "max_tokens"),
    "max_tokens_float": ({"max_tokens": 5.0}, "invalid_value", "max_tokens"),
    "max_tokens_differ": ({"max_tokens": 5, "max_completion_tokens": 6}, "invalid_value", "max_completion_tokens"),
    "seed": ({"seed": -1}, "invalid_value", "seed"),
    "n_zero": ({"n": 0}, "invalid_value", "n"),
    "n_over_cap": ({"n": 17}, "invalid_value", "n"),
    "n_bool": ({"n": True}, "invalid_value", "n"),
    "stop_empty": ({"stop": ""}, "invalid_value", "stop"),
    "stop_five": ({"stop": list("abcde")}, "invalid_value", "stop"),
    "stop_long": ({"stop": "a" * 257}, "invalid_value", "stop"),
    "stop_id_outside": ({"stop_token_ids": [259]}, "invalid_value", "stop_token_ids"),
    "stream_text": ({"stream": "true"}, "invalid_value", "stream"),
    "stream_options_alone": ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
    "obfuscation": (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "unsupported_parameter",
        "stream_options.include_obfuscation",
    ),
    "logprobs_int": ({"logprobs": 1}, "invalid_value", "logprobs"),
    "top_logprobs_alone": ({"top_logprobs": 1}, "invalid_value", "top_logprobs"),
    "top_logprobs_over": ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
    "continue_user": ({"continue_final_message": True}, "invalid_value", "continue_final_message"),
    "continue_and_prompt": (
        {"continue_final_message": True, "add_generation_prompt": True},
        "invalid_value",
        "continue_final_message",
    ),
    "presence_penalty": ({"presence_penalty": 2.5}, "invalid_value", "presence_penalty"),
    "presence_text": ({"presence_penalty": "1"}, "invalid_value", "presence_penalty"),
    "frequency_penalty": ({"frequency_penalty": -2.5}, "invalid_value", "frequency_penalty"),
    "repetition_zero": ({"repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
    "repetition_over": ({"repetition_penalty": 101}, "invalid_value", "repetition_penalty"),
    "bias_range": ({"logit_bias": {"5": 101}}, "invalid_value", "logit_bias[5]"),
    "bias_bool": ({"logit_bias": {"5": True}}, "invalid_value", "logit_bias[5]"),
    "bias_word": ({"logit_bias": {"the": 1}}, "invalid_value", "logit_bias"),
    "bias_list": ({"logit_bias": [1]}, "invalid_value", "logit_bias"),
    "bias_outside": ({"logit_bias": {"259": 1}}, "invalid_value", "logit_bias"),
    "bias_many": ({"logit_bias": {str(i): 1 for i in range(301)}}, "invalid_value", "logit_bias"),
    "min_tokens": ({"min_tokens": -1}, "invalid_value", "min_tokens"),
    "min_over_max": ({"min_tokens": 6, "max_tokens": 5}, "invalid_value", "min_tokens"),
    "prompt_logprobs_over": ({"prompt_logprobs": 21}, "invalid_value", "prompt_logprobs"),
    "prompt_logprobs_all": ({"prompt_logprobs": -1}, "invalid_value", "prompt_logprobs"),
    "prompt_logprobs_streamed": ({"prompt_logprobs": 1, "stream": True}, "invalid_value", "prompt_logprobs"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "unsupported_parameter", "tools"),
    "tool_choice": ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
    "calls": (
        said(
            role="assistant", tool_calls=[{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
        ),
        "unsupported_parameter",
        "messages[0].tool_calls",
    ),
    "salt_empty": ({"cache_salt": ""}, "invalid_value", "cache_salt"),
    "variable_reserved": ({"chat_template_kwargs": {"messages": "x"}}, "invalid_value", "chat_template_kwargs"),
    "variable_list": ({"chat_template_kwargs": {"a": [1]}}, "invalid_value", "chat_template_kwargs.a"),
    "format_without_type": ({"response_format": {}}, "invalid_value", "response_format.type"),
    "format_unknown": (
        {"response_format": {"type": "structural_tag"}},
        "unsupported_parameter",
        "response_format.type",
    ),
    "format_without_schema": (
        {"response_format": {"type": "json_schema"}},
        "invalid_value",
        "response_format.json_schema",
    ),
    "schema_for_any_object": (
        {"response_format": {"type": "json_object", "json_schema": {"name": "x"}}},
        "invalid_value",
        "response_format.json_schema",
    ),
    "schema_bad": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "cat"}}}},
        "invalid_value",
        "response_format.json_schema.schema",
    ),
    "schema_list": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": []}}},
        "invalid_value",
        "response_format.json_schema.schema",
    ),
    "structured_none": ({"structured_outputs": {}}, "invalid_value", "structured_outputs"),
    "structured_two": ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "invalid_value", "structured_outputs"),
    "structured_unknown": ({"structured_outputs": {"rgx": "a"}}, "unknown_parameter", "structured_outputs.rgx"),
    "structured_and_format": (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "invalid_value",
        "structured_outputs",
    ),
    "structured_white_space": (
        {"structured_outputs": {"json_object": True, "whitespace_pattern": " *"}},
        "unsupported_parameter",
        "structured_outputs.whitespace_pattern",
    ),
    "structured_compact_regex": (
        {"structured_outputs": {"regex": "a", "disable_any_whitespace": True}},
        "invalid_value",
        "structured_outputs.disable_any_whitespace",
    ),
    "regex_bad": ({"structured_outputs": {"regex": "(["}}, "invalid_value", "structured_outputs.regex"),
    "choice_empty": ({"structured_outputs": {"choice": []}}, "invalid_value", "structured_outputs.choice"),
    "grammar_bad": ({"structured_outputs": {"grammar": "start: A"}}, "invalid_value", "structured_outputs.grammar"),
    "json_bad": ({"structured_outputs": {"json": "{"}}, "invalid_value", "structured_outputs.json"),
    "guided": ({"guided_json": {"type": "object"}}, "unsupported_parameter", "guided_json"),
    "follow": ({"adapter_update": "follow", "model": "support@3"}, "invalid_value", "adapter_update"),
    "update": ({"adapter_update": "newest"}, "invalid_value", "adapter_update"),
    "store": ({"store": True}, "unsupported_parameter", "store"),
    "priority_false": ({"priority": False}, "invalid_value", "priority"),
    "too_long": ({"max_tokens": 181}, "context_length_exceeded", "messages"),
    "prompt_fills_context": (said(content="x" * 190), "context_length_exceeded", "messages"),
}


@pytest.mark.parametrize("name", CHAT_TABLE)
def test_bad_chat_bodies(http, backend, name):
    change, code, param = CHAT_TABLE[name]
    body = {k: v for k, v in ({"model": BASE, "messages": HI} | change).items() if v is not None}
    answer = http.post("/v1/chat/completions", content=json.dumps(body), headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param), error["message"]
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]
    assert backend.requests == []


COMPLETION_TABLE = {
    "empty": ({"prompt": ""}, "invalid_value", "prompt"),
    "empty_list": ({"prompt": []}, "invalid_value", "prompt"),
    "empty_text_in_list": ({"prompt": ["a", ""]}, "invalid_value", "prompt"),
    "empty_ids_in_list": ({"prompt": [[1], []]}, "invalid_value", "prompt"),
    "mixed": ({"prompt": [1, "a"]}, "invalid_value", "prompt"),
    "bool_id": ({"prompt": [True]}, "invalid_value", "prompt"),
    "number": ({"prompt": 5}, "invalid_value", "prompt"),
    "missing": ({"prompt": None}, "invalid_value", "prompt"),
    "outside": ({"prompt": [259]}, "invalid_value", "prompt"),
    "negative": ({"prompt": [[0], [-1]]}, "invalid_value", "prompt"),
    "many": ({"prompt": ["a"] * 65}, "invalid_value", "prompt"),
    "many_choices": ({"prompt": ["a"] * 64, "n": 3}, "invalid_value", "n"),
    "special_for_ids": ({"prompt": [1], "add_special_tokens": True}, "invalid_value", "add_special_tokens"),
    "logprobs_bool": ({"logprobs": True}, "invalid_value", "logprobs"),
    "logprobs_over": ({"logprobs": 21}, "invalid_value", "logprobs"),
    "zero_without_echo": ({"max_tokens": 0}, "invalid_value", "max_tokens"),
    "best_of": ({"best_of": 2}, "unsupported_parameter", "best_of"),
    "best_of_below_n": ({"best_of": 1, "n": 2}, "invalid_value", "best_of"),
    "suffix": ({"suffix": "x"}, "unsupported_parameter", "suffix"),
    "messages": ({"messages": HI}, "unknown_parameter", "messages"),
    "too_long": ({"prompt": [1] * 100, "max_tokens": 101}, "context_length_exceeded", "prompt"),
}


@pytest.mark.fault("R2")
@pytest.mark.parametrize("name", COMPLETION_TABLE)
def test_bad_completion_bodies(http, backend, name):
    change, code, param = COMPLETION_TABLE[name]
    body = {k: v for k, v in ({"model": BASE, "prompt": "x"} | change).items() if v is not None}
    answer = http.post("/v1/completions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param), error["message"]
    assert backend.requests == []


def test_values_that_ask_for_nothing_are_accepted(http):
    neutral = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "n": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "repetition_penalty": 1,
        "min_tokens": 0,
        "prompt_logprobs": None,
        "structured_outputs": None,
        "guided_json": None,
        "adapter_update": "pin",
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "stop": None,
        "stream": False,
        "logprobs": False,
        "top_logprobs": 0,
    }
    answer = http.post("/v1/chat/completions", json={"model": BASE, "messages": HI} | neutral)
    assert answer.status_code == 200, answer.text


def test_every_field_of_the_client_is_known():
    chat = typing.get_type_hints(chat_params.CompletionCreateParamsNonStreaming)
    plain = typing.get_type_hints(completion_params.CompletionCreateParamsNonStreaming)
    assert set(chat) - set(ChatBody.model_fields) == set()
    assert set(plain) - set(CompletionBody.model_fields) == set()


@pytest.mark.fault("R2", "R3")
def test_caps_and_numbers_are_named(client, backend):
    with pytest.raises(openai.BadRequestError, match="16"):
        client.chat.completions.create(model=BASE, messages=HI, n=17)
    with pytest.raises(openai.BadRequestError, match="at most 4 items"):
        client.chat.completions.create(model=BASE, messages=HI, stop=list("abcde"))
    with pytest.raises(openai.BadRequestError, match=r"100 tokens .* 101, together 201.* 200.*at most 100") as caught:
        client.completions.create(model=BASE, prompt=[1] * 100, max_tokens=101)
    assert caught.value.code == "context_length_exceeded"
    client.completions.create(model=BASE, prompt=[1] * 100, max_tokens=100)  # the boundary itself fits
    client.completions.create(model=BASE, prompt=[1] * 199)
    assert [r.params.max_tokens for r in backend.requests] == [100, 1]


def test_what_replaces_a_field_is_named(http):
    answer = http.post("/v1/completions", json={"model": BASE, "prompt": "x", "guided_regex": "a"})
    assert "use structured_outputs" in answer.json()["error"]["message"]


@pytest.mark.fault("T8")
def test_errors_never_quote_the_prompt(http):
    for body in ({"prompt": ["canary", 5]}, {"prompt": "canary", "suffix": "x"}, {"prompt": "canary" * 60}):
        assert "canary" not in http.post("/v1/completions", json={"model": BASE, "max_tokens": 9} | body).text
