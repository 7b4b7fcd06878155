"""Tools in chat: the official client over a backend whose template writes calls as Hermes and Qwen do."""

import json

import openai
import pytest
from fake_backend import BASE, HI, ByteTokenizer, events

from serve.api.openai.tools import BARE, TAGGED
from serve.engine.grammar import Grammars

pytest_plugins = ["wire_fixtures"]
TEMPLATE = """{%- if tools %}{% for t in tools %}[{{ t | tojson }}]{% endfor %} {"name": N, "arguments": A}{% endif %}
{%- for m in messages %}{{ m.role }}:{{ m.content }}
{%- for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}
{%- if m.tool_call_id %}({{ m.tool_call_id }}){% endif %};{% endfor %}
{%- if mood %}mood={{ mood }};{% endif %}{% if add_generation_prompt %}assistant:{% endif %}"""
BARE_TEMPLATE = (
    """{% if tools %}{{ tools | tojson }}{{ '{"name": "' }}{{ '"parameters": ' }}{% endif %}{{ messages[0].content }}"""
)
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}


def function(name="weather", parameters=CITY, **fields):
    return {"type": "function", "function": {"name": name, "parameters": parameters} | fields}


def json_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def call(name, arguments, form=TAGGED):
    return form.opening(name) + json.dumps(arguments) + form.closing


PARIS = call("weather", {"city": "Paris"})


@pytest.fixture
def calling(backend):
    """The running backend, whose template knows tools; it answers with a call."""
    use(backend, TEMPLATE)
    backend.context = 5000
    backend.reply = lambda request: PARIS
    return backend


def use(backend, template):
    backend.tokenizer = ByteTokenizer()
    backend.tokenizer.chat_template = template
    backend.grammars = Grammars(backend.tokenizer)


def prompt(backend):
    return bytes(backend.requests[-1].prompt).decode()


def said(message):
    return [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls or ()]


def ask(client, **changes):
    asked = {"model": BASE, "messages": HI, "tools": [function()], "max_tokens": 500}
    return client.chat.completions.create(**asked | changes)


def test_an_answer_that_calls(client, calling):
    choice = ask(client).choices[0]
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    assert said(choice.message) == [("weather", {"city": "Paris"})]
    assert choice.message.tool_calls[0].id.startswith("call_")
    assert prompt(calling).startswith('[{"type": "function", "function": {"name": "weather", "parameters": ')
    assert calling.requests[0].params.grammar is None


def test_an_answer_that_does_not_call(client, calling):
    calling.reply = lambda request: "No. "
    choice = ask(client).choices[0]
    assert (choice.message.content, choice.finish_reason, choice.message.tool_calls) == ("No. ", "stop", None)


def test_an_answer_with_text_and_two_calls_streams_as_the_client_adds_it_up(client, calling):
    calling.reply = lambda request: f"Grüße\n{PARIS}\n{call('time', {'zone': '🌍'})}"
    tools = [function(), function("time", None)]
    whole = ask(client, tools=tools).choices[0].message
    with client.chat.completions.stream(model=BASE, messages=HI, tools=tools, max_tokens=500) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.message.content == whole.content == "Grüße"
    assert said(streamed.message) == said(whole) == [("weather", {"city": "Paris"}), ("time", {"zone": "🌍"})]
    assert streamed.finish_reason == "tool_calls"
    assert len({c.id for c in streamed.message.tool_calls}) == 2


def test_the_chunks_of_a_call(http, calling):
    body = {"model": BASE, "messages": HI, "tools": [function()], "stream": True, "max_tokens": 500}
    *raw, done = events(http.post("/v1/chat/completions", json=body))
    opening, first, *more, last = (json.loads(e)["choices"][0] for e in raw)
    assert done == "[DONE]"
    assert opening["delta"] == {"role": "assistant", "content": None}
    (begun,) = first["delta"]["tool_calls"]
    assert (begun["index"], begun["type"], begun["function"]) == (0, "function", {"name": "weather", "arguments": ""})
    pieces = [c["delta"]["tool_calls"][0] for c in more]
    assert all(p.keys() == {"index", "function"} for p in pieces)
    assert len(pieces) > 3
    assert "".join(p["function"]["arguments"] for p in pieces) == '{"city": "Paris"}'
    assert (last["delta"], last["finish_reason"]) == ({}, "tool_calls")


def test_a_conversation_with_calls_reaches_the_template(client, calling):
    answer = ask(client).choices[0].message
    told = {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "rain"}
    ask(client, messages=[*HI, answer.model_dump(exclude_none=True), told])
    (id,) = (c.id for c in answer.tool_calls)
    assert prompt(calling).endswith(
        'user:hi;assistant:<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>;'
        f"tool:rain({id});assistant:"
    )


def matches(calling, text):
    """Whether the last request's grammar lets the text be the whole answer."""
    state = calling.requests[-1].params.grammar.start()
    return state._matcher.validate_tokens([*text.encode(), 256]) == len(text.encode()) + 1


TIME = call("time", {})
LONDON = call("weather", {"city": "London"})
WRONG = call("weather", {"town": 1})


@pytest.mark.parametrize(
    ("changes", "good", "bad"),
    [
        pytest.param(
            {"tool_choice": "required"},
            [PARIS, TIME, f"{PARIS}\n{LONDON}"],
            ["", "hi", WRONG, PARIS[:-1]],
            id="required",
        ),
        pytest.param(
            {"tool_choice": "required", "parallel_tool_calls": False}, [PARIS, TIME], [f"{PARIS}\n{LONDON}"], id="one"
        ),
        pytest.param(
            {"tool_choice": {"type": "function", "function": {"name": "weather"}}}, [PARIS], [TIME, "hi"], id="named"
        ),
        pytest.param(
            {"parallel_tool_calls": False},
            ["", "hi <tool", PARIS, f"a\n{TIME}", WRONG],
            [f"{PARIS}\n{PARIS}"],
            id="free",
        ),
        pytest.param(
            {"tools": [function(strict=True), function("time", None)]},
            ["hi", f"a\n{PARIS}\n{PARIS} b", call("time", {"any": 1})],
            [WRONG, call("drop", {})],
            id="strict",
        ),
        pytest.param(
            {"response_format": json_format(CITY)},
            ['{"city": "Paris"}', PARIS, f"{PARIS}\n{TIME}", WRONG],
            ["", "hi", '{"town": 1}', f'{PARIS}\n{{"city": "Paris"}}', f'{{"city": "Paris"}}\n{PARIS}'],
            id="or_json",
        ),
        pytest.param(
            {"response_format": {"type": "json_object"}, "parallel_tool_calls": False},
            ['{"town": 1}', TIME],
            ["hi", f"{PARIS}\n{TIME}"],
            id="one_or_json",
        ),
        pytest.param(
            {"response_format": json_format(CITY), "tool_choice": "required"},
            [PARIS, TIME],
            ['{"city": "Paris"}', WRONG],
            id="required_beside_json",
        ),
    ],
)
def test_the_grammar_holds_the_answer_to_what_was_chosen(client, calling, changes, good, bad):
    ask(client, **{"tools": [function(), function("time", None)]} | changes)
    assert {text: matches(calling, text) for text in good} == dict.fromkeys(good, True)
    assert {text: matches(calling, text) for text in bad} == dict.fromkeys(bad, False)


def test_a_base_that_writes_calls_bare(client, calling):
    use(calling, BARE_TEMPLATE)
    paris = call("weather", {"city": "Paris"}, BARE)
    calling.reply = lambda request: paris
    answer = ask(client, tool_choice="required").choices[0]
    assert (said(answer.message), answer.finish_reason) == ([("weather", {"city": "Paris"})], "tool_calls")
    assert [matches(calling, t) for t in (paris, "hi", paris + paris)] == [True, False, False]
    ask(client, parallel_tool_calls=False)
    assert [matches(calling, t) for t in (paris, "hi", paris + paris)] == [True, True, False]
    calling.reply = lambda request: '{"name": "Paris"}'
    answer = ask(client, response_format={"type": "json_object"}).choices[0]
    assert (answer.message.content, answer.finish_reason) == ('{"name": "Paris"}', "stop")
    assert [matches(calling, t) for t in (paris, '{"name": "Paris"}', "hi")] == [True, True, False]


def test_tools_that_must_not_be_called_are_not_shown(client, calling):
    answer = ask(client, tool_choice="none").choices[0]
    assert (answer.message.content, answer.finish_reason) == (PARIS, "stop")
    assert "weather" not in prompt(calling)


def test_what_is_cut_by_max_tokens_says_so(client, calling):
    choice = ask(client, max_tokens=len(PARIS) - 20).choices[0]
    assert choice.finish_reason == "length"
    assert PARIS.startswith(TAGGED.opening("weather") + choice.message.tool_calls[0].function.arguments)


def test_log_probabilities_and_ids_of_an_answer_with_calls(client, http, calling):
    extra = {"logprobs": True, "extra_body": {"return_token_ids": True}}
    whole = ask(client, **extra).choices[0]
    assert bytes(whole.model_extra["token_ids"][:-1]).decode() == PARIS
    assert "".join(t.token for t in whole.logprobs.content) == PARIS
    ids, tokens = [], ""
    for chunk in ask(client, **extra, stream=True):
        ids += chunk.choices[0].model_extra["token_ids"]
        tokens += (
            "".join(t.token for t in (chunk.choices[0].logprobs or whole).content) if chunk.choices[0].logprobs else ""
        )
    assert ids == whole.model_extra["token_ids"]
    assert tokens == PARIS


NAMELESS = {"type": "function", "function": {"name": "no spaces"}}
BAD = {
    "custom": ({"tools": [{"type": "custom", "custom": {}}]}, "unsupported_parameter", "tools[0].type"),
    "no_function": ({"tools": [{"type": "function"}]}, "invalid_value", "tools[0].function"),
    "name": ({"tools": [NAMELESS]}, "invalid_value", "tools[0].function.name"),
    "twice": ({"tools": [function(), function()]}, "invalid_value", "tools"),
    "many": ({"tools": [function(f"f{i}") for i in range(129)]}, "invalid_value", "tools"),
    "schema": ({"tools": [function(parameters={"type": "cat"})], "tool_choice": "required"}, "invalid_value", "tools"),
    "choice_unknown": (
        {"tool_choice": {"type": "function", "function": {"name": "drop"}}},
        "invalid_value",
        "tool_choice",
    ),
    "choice_without_function": ({"tool_choice": {"type": "function"}}, "invalid_value", "tool_choice.function"),
    "choice_of_several": (
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}},
        "unsupported_parameter",
        "tool_choice.type",
    ),
    "with_regex": (
        {"extra_body": {"structured_outputs": {"regex": "a"}}},
        "unsupported_parameter",
        "structured_outputs.regex",
    ),
    "schema_beside": (
        {"response_format": json_format({"type": "cat"})},
        "invalid_value",
        "response_format.json_schema.schema",
    ),
    "calls_of_a_user": (
        {
            "messages": [
                HI[0] | {"tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}
            ]
        },
        "invalid_value",
        "messages[0].tool_calls",
    ),
    "arguments": (
        {
            "messages": [
                *HI,
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "[]"}}],
                },
            ]
        },
        "invalid_value",
        "messages[1].tool_calls[0].function.arguments",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tools(client, calling, name):
    change, code, param = BAD[name]
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **change)
    assert (caught.value.code, caught.value.param) == (code, param), caught.value.message
    assert calling.requests == []


def test_a_base_whose_mark_is_a_special_token_is_refused(client, calling):
    tokenizer = calling.tokenizer
    tokenizer.special_ids = frozenset(tokenizer.encode("<", add_special_tokens=False))
    with pytest.raises(openai.BadRequestError, match="special token"):
        ask(client)


def test_tokenize_shows_tools_and_variables(http, calling):
    asked = {"messages": HI, "tools": [function()], "chat_template_kwargs": {"mood": "calm"}}
    text = bytes(http.post("/tokenize", json=asked).json()["tokens"]).decode()
    assert text.endswith("user:hi;mood=calm;assistant:")
    assert '"weather"' in text
    for field in ("tools", "chat_template_kwargs"):
        bad = http.post("/tokenize", json={"prompt": "x", field: asked[field]})
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, field)


def test_variables_reach_the_template(client, calling):
    ask(client, extra_body={"chat_template_kwargs": {"mood": "calm"}})
    assert prompt(calling).endswith("mood=calm;assistant:")


def test_tokenizer_info(http, calling):
    assert http.get("/tokenizer_info").json() == {
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "pad_token": None,
        "chat_template": TEMPLATE,
        "vocab_size": 259,
        "model_max_length": 5000,
    }
