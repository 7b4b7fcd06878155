"""What the wire makes of penalties, biases, echo, prompt_logprobs and structured outputs; a fake backend answers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from fake_backend import BASE, HI, ByteTokenizer, events

from serve.api.openai.logprobs import prompt_offsets
from serve.engine.sequence import Sequence

pytest_plugins = ["wire_fixtures"]


def allowed_first(backend) -> set[str]:
    """Characters with which an answer of the last request may begin."""
    bits_W = np.zeros(-(-ByteTokenizer.vocab_size // 32), np.uint32)
    backend.requests[-1].params.grammar.start().allow(bits_W)
    return {chr(i) for i in np.flatnonzero(np.unpackbits(bits_W.view(np.uint8), bitorder="little")) if i < 128}


def test_penalties_and_biases_reach_the_engine(client, backend):
    client.chat.completions.create(
        model=BASE,
        messages=HI,
        presence_penalty=1.5,
        frequency_penalty=-0.5,
        logit_bias={"7": 2, "258": -100},
        max_tokens=9,
        extra_body={"repetition_penalty": 1.25, "min_tokens": 4, "prompt_logprobs": 2},
    )
    p = backend.requests[-1].params
    assert (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) == (1.5, -0.5, 1.25)
    assert p.logit_bias == ((7, 2.0), (258, -100.0))
    assert (p.min_tokens, p.prompt_logprobs, p.grammar) == (4, 2, None)


# --- echo


def test_echo_puts_the_prompt_before_every_answer_and_counts_only_what_was_generated(client):
    answer = client.completions.create(model=BASE, prompt=["héllo ", "x"], echo=True, n=2, max_tokens=3)
    plain = client.completions.create(model=BASE, prompt=["héllo ", "x"], n=2, max_tokens=3)
    prompts = ["héllo ", "héllo ", "x", "x"]
    for prompt, echoed, alone in zip(prompts, answer.choices, plain.choices, strict=True):
        assert echoed.text == prompt + alone.text
        assert echoed.logprobs is None
    assert answer.usage == plain.usage


def test_echoed_logprobs_are_four_lists_over_prompt_and_answer(client):
    answer = client.completions.create(model=BASE, prompt=[104, 195, 164, 105], echo=True, logprobs=2, max_tokens=2)
    choice = answer.choices[0]
    lp = choice.logprobs
    assert choice.text == "häiGr"
    assert len(lp.tokens) == len(lp.token_logprobs) == len(lp.top_logprobs) == len(lp.text_offset) == 6
    assert lp.token_logprobs[:4] == [None, -1.0, -2.0, -3.0]
    assert lp.top_logprobs[0] is None
    assert lp.top_logprobs[3] == {"i": -3.0, "j": 0.0, "k": -0.125}
    assert lp.text_offset == [0, 1, 1, 2, 3, 4]
    assert lp.token_logprobs[4:] == [0.0, -0.25]


def test_a_prompt_is_scored_without_an_answer(client, backend):
    answer = client.completions.create(model=BASE, prompt="abc", echo=True, logprobs=0, max_tokens=0)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == ("abc", "length")
    assert choice.logprobs.token_logprobs == [None, -1.0, -2.0, -3.0]
    assert choice.logprobs.text_offset == [0, 0, 1, 2]  # the begin token has no width
    assert answer.usage.completion_tokens == 0
    assert backend.requests[-1].params.max_tokens == 0
    client.completions.create(model=BASE, prompt=[1] * 200, echo=True, max_tokens=0)  # it may fill the context


def test_a_streamed_echo_equals_the_whole(client, http):
    body = {"model": BASE, "prompt": "hé", "echo": True, "logprobs": 1, "max_tokens": 5, "n": 2}
    whole = http.post("/v1/completions", json=body).json()["choices"]
    parts = [json.loads(e) for e in events(http.post("/v1/completions", json=body | {"stream": True}))[:-1]]
    for index in range(2):
        mine = [c for p in parts for c in p["choices"] if c["index"] == index]
        assert mine[0]["text"].startswith("hé")
        assert "".join(c["text"] for c in mine) == whole[index]["text"]
        for name, values in whole[index]["logprobs"].items():
            assert [v for c in mine if c["logprobs"] for v in c["logprobs"][name]] == values


@pytest.mark.parametrize(
    ("text", "tokens", "offsets"),
    [
        ("ab", [97, 98], [0, 1]),
        ("ab", [257, 97, 98], [0, 0, 1]),
        ("<bos>ab", [257, 97, 98], [0, 5, 6]),
        ("é", [195, 169], [0, 0]),
        ("b", [32, 98], [0, 0]),
        ("", [256], [0]),
    ],
    ids=["plain", "added_token", "written_token", "parts_of_a_character", "space_of_the_tokenizer", "nothing"],
)
def test_offsets_are_places_in_the_text(text, tokens, offsets):
    assert prompt_offsets(ByteTokenizer(), text, tokens) == offsets


# --- prompt_logprobs


def test_prompt_logprobs_are_vllms(client):
    answer = client.completions.create(
        model=BASE, prompt=["ab", "c"], max_tokens=2, extra_body={"prompt_logprobs": 1, "add_special_tokens": False}
    )
    assert answer.choices[0].model_extra["prompt_logprobs"] == [
        None,
        {
            "98": {"logprob": -1.0, "rank": 3, "decoded_token": "b"},
            "99": {"logprob": 0.0, "rank": 1, "decoded_token": "c"},
        },
    ]
    assert answer.choices[1].model_extra["prompt_logprobs"] == [None]
    chat = client.chat.completions.create(model=BASE, messages=HI, max_tokens=2, n=2, extra_body={"prompt_logprobs": 0})
    assert len(chat.model_extra["prompt_logprobs"]) == chat.usage.prompt_tokens
    assert "prompt_logprobs" not in chat.choices[0].model_extra
    plain = client.chat.completions.create(model=BASE, messages=HI, max_tokens=2)
    assert "prompt_logprobs" not in plain.model_extra


def test_echo_and_prompt_logprobs_each_have_their_own_count(client, backend):
    answer = client.completions.create(
        model=BASE, prompt=[97, 98], echo=True, logprobs=1, max_tokens=2, extra_body={"prompt_logprobs": 3}
    )
    assert backend.requests[-1].params.prompt_logprobs == 3
    assert len(answer.choices[0].model_extra["prompt_logprobs"][1]) == 4
    assert len(answer.choices[0].logprobs.top_logprobs[1]) == 2


# --- structured outputs


SCHEMA = {"type": "array", "items": {"type": "integer"}}


@pytest.mark.parametrize(
    ("fields", "begins"),
    [
        pytest.param({"response_format": {"type": "text"}}, None, id="text"),
        pytest.param({"response_format": {"type": "json_object"}}, "{", id="json_object"),
        pytest.param(
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
                }
            },
            "[",
            id="json_schema",
        ),
        pytest.param(
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "description": "d"}}},
            "{",
            id="json_schema_of_nothing",
        ),
        pytest.param({"structured_outputs": {"json": SCHEMA}}, "[", id="json"),
        pytest.param({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "[", id="json_as_text"),
        pytest.param({"structured_outputs": {"json_object": True, "disable_fallback": True}}, "{", id="any_object"),
        pytest.param({"structured_outputs": {"regex": "[xyz]+"}}, "xyz", id="regex"),
        pytest.param({"structured_outputs": {"choice": ["no", "yes"]}}, "ny", id="choice"),
        pytest.param({"structured_outputs": {"grammar": 'start: "a" | "b"'}}, "ab", id="grammar"),
        pytest.param({"structured_outputs": {"grammar": 'root ::= "a" | "b"'}}, "ab", id="gbnf"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_each_form_of_an_answer_reaches_the_engine(http, backend, path, fields, begins):
    prompt = {"messages": HI} if "chat" in path else {"prompt": "x"}
    answer = http.post(path, json={"model": BASE} | prompt | fields)
    assert answer.status_code == 200, answer.text
    if begins is None:
        assert backend.requests[-1].params.grammar is None
    else:
        assert allowed_first(backend) == set(begins)


def test_compact_json_has_no_white_space(client, backend):
    for compact in (True, None):
        structured = {"json": {"type": "array", "items": {"const": 1}}} | (
            {"disable_any_whitespace": True} if compact else {}
        )
        client.completions.create(model=BASE, prompt="x", extra_body={"structured_outputs": structured})
        state = backend.requests[-1].params.grammar.start()
        for token in b"[1,":
            state.take(token)
        bits_W = np.zeros(9, np.uint32)
        state.allow(bits_W)
        allowed = {chr(i) for i in np.flatnonzero(np.unpackbits(bits_W.view(np.uint8), bitorder="little"))}
        assert allowed == ({"1"} if compact else {" "})


def test_all_choices_share_one_compiled_grammar(client, backend):
    client.completions.create(model=BASE, prompt=["a", "b"], n=2, extra_body={"structured_outputs": {"regex": "a+"}})
    assert len({id(r.params.grammar) for r in backend.requests}) == 1


# --- token ids, and who shares cached prompts


def test_chat_returns_the_ids_of_prompt_and_answer(client, http, backend):
    asked = {"model": BASE, "messages": HI, "n": 2, "max_tokens": 9, "return_token_ids": True}
    whole = http.post("/v1/chat/completions", json=asked).json()
    assert whole["prompt_token_ids"] == list(backend.requests[0].prompt)
    for index, choice in enumerate(whole["choices"]):
        assert choice["token_ids"] == list(f"Grüße 🌍 0.{index}".encode()[:9])
    parts = [json.loads(e) for e in events(http.post("/v1/chat/completions", json=asked | {"stream": True}))[:-1]]
    assert [p["prompt_token_ids"] for p in parts if "prompt_token_ids" in p] == [whole["prompt_token_ids"]] * 2
    for index, choice in enumerate(whole["choices"]):
        told = [c["token_ids"] for p in parts for c in p["choices"] if c["index"] == index]
        assert [t for ids in told for t in ids] == choice["token_ids"]
    plain = client.chat.completions.create(model=BASE, messages=HI)
    assert "prompt_token_ids" not in plain.model_extra
    assert "token_ids" not in plain.choices[0].model_extra


def test_completions_return_the_ids_of_prompt_and_answer(http):
    asked = {"model": BASE, "prompt": [[5, 6], [7]], "max_tokens": 4, "return_token_ids": True}
    whole = http.post("/v1/completions", json=asked).json()["choices"]
    assert [(c["prompt_token_ids"], c["token_ids"]) for c in whole] == [
        ([5, 6], [71, 114, 195, 188]),
        ([7], [71, 114, 195, 188]),
    ]
    parts = [json.loads(e) for e in events(http.post("/v1/completions", json=asked | {"stream": True}))[:-1]]
    for index, choice in enumerate(whole):
        mine = [c for p in parts for c in p["choices"] if c["index"] == index]
        assert [t for c in mine for t in c["token_ids"]] == choice["token_ids"]
        assert [c["prompt_token_ids"] for c in mine if "prompt_token_ids" in c] == [choice["prompt_token_ids"]]


def test_a_salt_keeps_cached_prompts_apart(client, backend):
    for salt in ({}, {"cache_salt": "a"}, {"cache_salt": "b"}):
        client.completions.create(model=BASE, prompt="x", extra_body=salt)
    salts = {Sequence(r, list(r.prompt), r.adapter, 0, 0.0, 0.0).salt for r in backend.requests}
    assert len(salts) == 3
