"""JSON that something behind the parser cannot hold: refused in the wire's own form at every place, never an error of ours."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

import httpx2
import pytest
from edge_world import every_wire
from fake_backend import BASE

HI = '[{"role": "user", "content": "hi"}]'
CHAT = f'"model": "{BASE}", "max_tokens": 2, "messages": {HI}'
COMPLETION = f'"model": "{BASE}", "max_tokens": 2, "prompt": "x"'
RESPONSE = f'"model": "{BASE}", "max_output_tokens": 20, "input": "x"'
JOB = f'"model": "{BASE}", "training_file": "file-1"'
GRADIENT = {"x-gradient-workspace-id": "w"}
REFUSED = {  # JSON text of a value → it cannot pass anywhere
    "nan": "NaN",
    "infinity": "-Infinity",
    "1e400": "1e400",
    "digits": "9" * 5000,
    "few_digits": "9" * 4000,
    "surrogate": r'"\ud800"',
    "surrogate_key": r'{"\udfff": 1}',
    "surrogate_deep": r'[[{"a": "x\ud800y"}]]',
    "deep": "[" * 150 + "]" * 150,
    "deep_object": '{"a":' * 150 + "1" + "}" * 150,
    "very_deep": "[" * 50_000 + "]" * 50_000,
}
ODD = {  # what may pass somewhere
    "1e308": "1e308",
    "tiny": "1e-400",
    "minus_zero": "-0.0",
    "2**53": str(2**53 + 1),
    "2**64": str(2**64),
    "pair": r'"\ud83d\ude00"',
    "zero": r'"\u0000"',
    "deep_enough": "[" * 90 + "]" * 90,
    "list": "[]",
    "null": "null",
    "true": "true",
    "long": '"' + "x" * 70_000 + '"',
}
PLACES = [  # route, and a body with VALUE in it
    ("/v1/chat/completions", "{%s, %s}" % (CHAT, '"metadata": VALUE')),  # noqa: UP031  braces are JSON's
    ("/v1/chat/completions", "{%s, %s}" % (CHAT, '"logit_bias": {"1": VALUE}')),  # noqa: UP031
    ("/v1/chat/completions", "{%s, %s}" % (CHAT, '"stop": VALUE')),  # noqa: UP031
    ("/v1/chat/completions", "{%s, %s}" % (CHAT, '"chat_template_kwargs": {"a": VALUE}')),  # noqa: UP031
    ("/v1/completions", "{%s, %s}" % (COMPLETION, '"seed": VALUE')),  # noqa: UP031
    ("/v1/completions", "{%s, %s}" % (COMPLETION, '"temperature": VALUE')),  # noqa: UP031
    ("/v1/completions", '{"model": "m", "prompt": VALUE}'),
    ("/v1/responses", "{%s, %s}" % (RESPONSE, '"metadata": VALUE')),  # noqa: UP031
    ("/v1/responses", f'{{"model": "{BASE}", "input": VALUE}}'),
    ("/tokenize", f'{{"model": "{BASE}", "prompt": VALUE}}'),
    ("/detokenize", f'{{"model": "{BASE}", "tokens": [VALUE]}}'),
    ("/v1/fine_tuning/jobs", "{%s, %s}" % (JOB, '"metadata": {"a": VALUE}')),  # noqa: UP031
    ("/v1/fine_tuning/jobs", "{%s, %s}" % (JOB, '"seed": VALUE')),  # noqa: UP031
    ("/v1/load_lora_adapter", '{"lora_name": VALUE, "lora_path": "/x"}'),
    ("/v1/unload_lora_adapter", '{"lora_name": "a", "lora_int_id": VALUE}'),
    ("/api/models", '{"model": {"baseModelId": "b", "name": VALUE}}'),
    ("/api/models/x/fine-tune", '{"samples": [{"inputs": VALUE}]}'),
    ("/api/models/x/complete", '{"query": "x", "temperature": VALUE}'),
    ("/v1/chat/completions", "VALUE"),
    ("/v1/fine_tuning/jobs", '{"unknown": VALUE}'),
]
SCHEMAS = [  # JSON schemas with VALUE in them
    '{"type": "number", "multipleOf": VALUE}',
    '{"type": "integer", "minimum": VALUE, "maximum": 7}',
    '{"type": "string", "maxLength": VALUE}',
    '{"type": "string", "pattern": VALUE}',
    '{"enum": [VALUE]}',
    '{"const": VALUE}',
    '{"type": "object", "properties": {"a": VALUE}}',
    '{"type": "array", "items": VALUE, "minItems": 2}',
    '{"$ref": VALUE}',
    '{"anyOf": [{"type": "null"}, VALUE]}',
    '{"type": "object", "required": VALUE}',
]
WRONG_SCHEMAS = [
    '{"$ref": "#"}',
    '{"type": "number", "multipleOf": 0}',
    '{"type": "number", "multipleOf": -1}',
    '{"type": "string", "pattern": "("}',
    '{"type": "string", "pattern": "(a{1000}){1000}"}',
    '{"type": "array", "items": {}, "minItems": 1000000000000}',
    '{"allOf": [' * 40 + "{}" + "]}" * 40,
    '{"anyOf": [' * 40 + '{"type": "null"}' + "]}" * 40,
    '{"properties": {"a": ' * 45 + "{}" + "}}" * 45,
    '{"type": 5}',
    '{"type": "object", "properties": {"": {}}, "additionalProperties": false}',
]
FORMS = [  # how a request wants its answer to fit a schema
    (
        "/v1/chat/completions",
        CHAT,
        '"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": S}}',
    ),
    (
        "/v1/chat/completions",
        CHAT,
        '"tools": [{"type": "function", "function": {"name": "f", "parameters": S}}], "tool_choice": "required"',
    ),
    ("/v1/completions", COMPLETION, '"structured_outputs": {"json": S}'),
    ("/v1/responses", RESPONSE, '"text": {"format": {"type": "json_schema", "name": "a", "schema": S}}'),
]


def bodies() -> Iterator[tuple[str, str, bool]]:
    """(route, body, whether it must be refused)."""
    values = [(text, True) for text in REFUSED.values()] + [(text, False) for text in ODD.values()]
    for route, body in PLACES:
        for text, wrong in values:
            yield route, body.replace("VALUE", text), wrong
    for route, common, form in FORMS:
        for schema in SCHEMAS:
            for text, wrong in values:
                yield route, "{%s, %s}" % (common, form.replace("S}", schema.replace("VALUE", text) + "}", 1)), wrong  # noqa: UP031
        for schema in WRONG_SCHEMAS:
            yield route, "{%s, %s}" % (common, form.replace("S}", schema + "}", 1)), False  # noqa: UP031


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[httpx2.Client]:
    with every_wire(tmp_path_factory.mktemp("wires")) as url:
        headers = {"content-type": "application/json"} | GRADIENT
        with httpx2.Client(base_url=url, headers=headers, timeout=30) as it:
            yield it


def test_no_hostile_body_is_an_error_of_ours(client):
    statuses: Counter[int] = Counter()
    wrong = []
    for route, body, refused in bodies():
        answer = client.post(route, content=body.encode())
        statuses[answer.status_code] += 1
        is_told = answer.status_code < 400 or answer.json().keys() & {"error", "message"}
        if answer.status_code >= 500 or not is_told or (refused and answer.status_code != 400):
            wrong.append((route, body[:200], answer.status_code, answer.text[:200]))
    assert wrong == []
    assert statuses.total() >= 227
    assert statuses[200] > 0  # the bodies around the values are right


def test_what_is_refused_names_the_field_and_says_why(client):
    for text, param, word in (
        (r'{"model": "m", "messages": [], "metadata": {"a": "\ud800"}}', "metadata.a", "surrogates"),
        ('{"model": "m", "messages": [], "metadata": %s}' % REFUSED["deep"], "metadata", "100 levels"),  # noqa: UP031
        ('{"model": "m", "messages": [], "seed": 1e400}', None, "1e400"),
    ):
        error = client.post("/v1/chat/completions", content=text.encode()).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_value", param)
        assert word in error["message"]


def test_bodies_in_utf_8_pass_with_and_without_escapes_and_no_other_bytes_do(client):
    for text in ("Grüße 🌍", r"Gr\u00fc\u00dfe \ud83c\udf0d"):
        body = json.dumps({"model": BASE, "prompt": "TEXT"}).replace("TEXT", text)
        assert client.post("/tokenize", content=body.encode()).json()["count"] == 1 + len("Grüße 🌍".encode())
    for body in (b'{"prompt": "\xed\xa0\x80"}', b"\xff", '{"prompt": "x"}'.encode("utf-16")):
        assert client.post("/tokenize", content=body).status_code == 400
