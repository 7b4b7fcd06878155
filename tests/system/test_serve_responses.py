"""The Responses API over real HTTP: the official client whole and streamed, and the raw events."""

import json
import typing

import openai
import pytest
from fake_backend import BASE, ByteTokenizer
from openai.types.responses import response_create_params
from test_serve_tools import CITY, PARIS, TEMPLATE

from jaxlora.core.errors import Overloaded
from serve.api.responses.schemas import ResponsesBody
from serve.engine.grammar import Grammars

pytest_plugins = ["wire_fixtures"]
REPLY = "Grüße 🌍 0.0"
WEATHER = {"type": "function", "name": "weather", "parameters": CITY, "strict": True}


@pytest.fixture
def calling(backend):
    backend.tokenizer = ByteTokenizer()
    backend.tokenizer.chat_template = TEMPLATE
    backend.grammars = Grammars(backend.tokenizer)
    backend.context = 5000
    backend.reply = lambda request: PARIS
    return backend


def asked_text(backend):
    return backend.tokenizer.decode(backend.requests[-1].prompt)


def test_a_response_to_text(client, backend):
    answer = client.responses.create(model="support", input="hi", instructions="be brief", max_output_tokens=30)
    assert answer.output_text == REPLY
    assert (answer.status, answer.object, answer.model, answer.error) == ("completed", "response", "support", None)
    assert (answer.instructions, answer.max_output_tokens, answer.temperature, answer.top_p) == ("be brief", 30, 1, 1)
    assert (answer.tools, answer.tool_choice, answer.parallel_tool_calls) == ([], "auto", True)
    assert answer.id.startswith("resp_")
    assert answer.model_extra["adapter_version"] == 7
    assert asked_text(backend) == "system:be briefuser:hiassistant:"
    used = answer.usage
    prompt, said = len(backend.requests[0].prompt), len(REPLY.encode()) + 1
    assert (used.input_tokens, used.output_tokens, used.total_tokens) == (prompt, said, prompt + said)
    assert (used.input_tokens_details.cached_tokens, used.output_tokens_details.reasoning_tokens) == (0, 0)
    (item,) = answer.output
    assert (item.type, item.role, item.status, item.content[0].annotations) == ("message", "assistant", "completed", [])


def test_an_answer_is_repeated_as_input(client, backend):
    first = client.responses.create(model=BASE, input=[{"role": "user", "content": "a"}])
    parts = [{"type": "input_text", "text": "b"}, {"type": "input_text", "text": "c"}]
    talk = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": "a"},
        *[item.model_dump() for item in first.output],
        {"type": "message", "role": "user", "content": parts},
    ]
    client.responses.create(model=BASE, input=talk)
    assert asked_text(backend) == f"system:be kinduser:aassistant:{REPLY}user:b\ncassistant:"


def test_sampling_reaches_the_engine(client, backend):
    answer = client.responses.create(
        model=BASE,
        input="x",
        temperature=0.5,
        top_p=0.25,
        max_output_tokens=4,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
    )
    p = backend.requests[0].params
    assert (p.temperature, p.top_p, p.max_tokens, p.logprobs) == (0.5, 0.25, 4, 2)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.output[0].status == "incomplete"
    tokens = answer.output[0].content[0].logprobs
    assert [t.bytes for t in tokens] == [[b] for b in "Grü".encode()]
    assert [a.token for a in tokens[0].top_logprobs] == ["G", "H"]


def test_the_stream_of_the_official_client(client, backend):
    backend.context = 2000
    with client.responses.stream(model=BASE, input="x") as stream:
        seen = list(stream)
        final = stream.get_final_response()
    assert final.output_text == REPLY == "".join(e.delta for e in seen if e.type == "response.output_text.delta")
    assert [e.sequence_number for e in seen] == list(range(len(seen)))
    assert client.responses.with_raw_response.create(model=BASE, input="x").parse().output_text == REPLY


def raw_events(http, **changes):
    response = http.post("/v1/responses", json={"model": BASE, "input": "x", "stream": True} | changes)
    assert response.headers["content-type"].startswith("text/event-stream")
    names = [line.removeprefix("event: ") for line in response.text.split("\n") if line.startswith("event: ")]
    told = [json.loads(line[6:]) for line in response.text.split("\n") if line.startswith("data: ")]
    assert names == [e["type"] for e in told]
    assert [e["sequence_number"] for e in told] == list(range(len(told)))
    return told


def test_the_raw_events_of_text(http):
    told = raw_events(http)
    before = ["created", "in_progress", "output_item.added", "content_part.added"]
    after = ["output_text.done", "content_part.done", "output_item.done", "completed"]
    deltas = ["output_text.delta"] * len(REPLY)
    assert [e["type"].removeprefix("response.") for e in told] == [*before, *deltas, *after]
    assert (told[0]["response"]["status"], told[0]["response"]["output"]) == ("in_progress", [])
    assert (told[2]["item"]["content"], told[3]["part"]["text"]) == ([], "")
    assert told[-4]["text"] == REPLY
    last = told[-1]["response"]
    assert (last["status"], last["output"]) == ("completed", [told[-2]["item"]])
    assert last["usage"]["output_tokens"] == len(REPLY.encode()) + 1
    assert {e["item_id"] for e in told if "item_id" in e} == {last["output"][0]["id"]}


def test_a_stream_that_is_cut_is_incomplete(http):
    told = raw_events(http, max_output_tokens=3)
    assert told[-1]["type"] == "response.incomplete"
    assert told[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert told[-2]["item"]["status"] == "incomplete"


def test_an_answer_of_nothing_is_an_empty_message(client, backend):
    backend.reply = lambda request: ""
    (item,) = client.responses.create(model=BASE, input="x").output
    assert item.content[0].text == ""


def test_a_stream_that_fails_says_so(http, client, backend):
    backend.fail_after, backend.failure = 3, Overloaded("draining; retry later")
    told = raw_events(http)
    assert told[-1]["type"] == "response.failed"
    assert (told[-1]["response"]["status"], told[-1]["response"]["error"]["code"]) == ("failed", "overloaded")
    with pytest.raises(openai.InternalServerError):
        client.responses.create(model=BASE, input="x")


def test_calls(client, http, calling):
    answer = client.responses.create(model=BASE, input="x", tools=[WEATHER], max_output_tokens=500)
    (item,) = answer.output
    assert (item.type, item.name, json.loads(item.arguments)) == ("function_call", "weather", {"city": "Paris"})
    told = {"type": "function_call_output", "call_id": item.call_id, "output": "rain"}
    talk = [{"role": "user", "content": "x"}, item.model_dump(exclude_none=True), told]
    client.responses.create(model=BASE, input=talk, tools=[WEATHER], max_output_tokens=500)
    assert asked_text(calling).endswith(
        'user:x;assistant:<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>;'
        f"tool:rain({item.call_id});assistant:"
    )
    calling.reply = lambda request: f"So:\n{PARIS}\n{PARIS}"
    told = raw_events(http, tools=[WEATHER], max_output_tokens=500)
    added = [e for e in told if e["type"] == "response.output_item.added"]
    assert [(e["output_index"], e["item"]["type"]) for e in added] == [
        (0, "message"),
        (1, "function_call"),
        (2, "function_call"),
    ]
    done = [e["item"] for e in told if e["type"] == "response.output_item.done"]
    assert told[-1]["response"]["output"] == done
    deltas = [e["delta"] for e in told if "arguments.delta" in e["type"] and e["output_index"] == 1]
    assert "".join(deltas) == done[1]["arguments"] == '{"city": "Paris"}'
    with client.responses.stream(model=BASE, input="x", tools=[WEATHER], max_output_tokens=500) as stream:
        final = stream.get_final_response()
    assert [i.type for i in final.output] == ["message", "function_call", "function_call"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}], ids=["required", "named"])
def test_a_choice_is_a_grammar(client, calling, choice):
    client.responses.create(model=BASE, input="x", tools=[WEATHER], tool_choice=choice, max_output_tokens=500)
    assert calling.requests[0].params.grammar is not None


@pytest.mark.parametrize(
    "form",
    [
        pytest.param({"type": "json_object"}, id="json_object"),
        pytest.param({"type": "json_schema", "name": "n", "strict": True, "schema": {"type": "array"}}, id="schema"),
    ],
)
def test_the_form_of_the_text_is_a_grammar(client, backend, form):
    answer = client.responses.create(model=BASE, input="x", text={"format": form})
    assert backend.requests[0].params.grammar is not None
    assert answer.text.format.type == form["type"]


def test_a_response_is_not_found_again(client):
    for call in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            call("resp_1")
        assert caught.value.code == "not_found"


def item(**fields):
    return {"input": [{"role": "user", "content": "x"} | fields]}


BAD = {
    "unknown": ({"inputs": "x"}, "unknown_parameter", "inputs"),
    "no_input": ({"input": None}, "invalid_value", "input"),
    "empty_input": ({"input": []}, "invalid_value", "input"),
    "previous": ({"previous_response_id": "resp_1"}, "unsupported_parameter", "previous_response_id"),
    "conversation": ({"conversation": "conv_1"}, "unsupported_parameter", "conversation"),
    "store": ({"store": True}, "unsupported_parameter", "store"),
    "background": ({"background": True}, "unsupported_parameter", "background"),
    "include": ({"include": ["reasoning.encrypted_content"]}, "unsupported_parameter", "include[0]"),
    "top_logprobs_alone": ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
    "web_search": ({"tools": [{"type": "web_search"}]}, "unsupported_parameter", "tools[0].type"),
    "tools": ({"tools": [WEATHER]}, "unsupported_parameter", "tools"),
    "tool_without_name": ({"tools": [{"type": "function"}]}, "invalid_value", "tools[0].name"),
    "image": (
        item(content=[{"type": "input_image", "image_url": "x"}]),
        "unsupported_parameter",
        "input[0].content[0].type",
    ),
    "part_without_text": (item(content=[{"type": "input_text"}]), "invalid_value", "input[0].content[0].text"),
    "reference": ({"input": [{"type": "item_reference", "id": "x"}]}, "unsupported_parameter", "input[0].type"),
    "role": (item(role="boss"), "unsupported_parameter", "input[0].role"),
    "no_role": ({"input": [{"content": "x"}]}, "invalid_value", "input[0].role"),
    "field_of_another_type": (item(call_id="x"), "invalid_value", "input[0].call_id"),
    "call": (
        {"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}]},
        "unsupported_parameter",
        "input[0].type",
    ),
    "format_without_schema": (
        {"text": {"format": {"type": "json_schema", "name": "x"}}},
        "invalid_value",
        "text.format.schema",
    ),
    "schema": (
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "cat"}}}},
        "invalid_value",
        "text.format.schema",
    ),
    "too_long": ({"max_output_tokens": 200}, "context_length_exceeded", "input"),
    "model": ({"model": 5}, "invalid_value", "model"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bodies(http, backend, name):
    change, code, param = BAD[name]
    body = {k: v for k, v in ({"model": BASE, "input": "x"} | change).items() if v is not None}
    answer = http.post("/v1/responses", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param), error["message"]
    assert backend.requests == []


def test_every_field_of_the_client_is_known():
    known = typing.get_type_hints(response_create_params.ResponseCreateParamsNonStreaming)
    assert set(known) - set(ResponsesBody.model_fields) == set()


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(model="nobody", input="x")
    assert caught.value.code == "model_not_found"
