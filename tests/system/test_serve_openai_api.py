"""The OpenAI wire over real HTTP: the official client, and raw bytes where the client is too forgiving."""

import json
import time

import openai
import pytest
from fake_backend import BASE, EOS, HI, events

pytest_plugins = ["wire_fixtures"]
REPLY = "Grüße 🌍 0.0"
REPLY_TOKENS = len(REPLY.encode()) + 1  # and the end token


# --- models


def test_models_are_listed_base_first_then_newest(client):
    assert [m.id for m in client.models.list()] == [BASE, "ft:base:acme:x:1", "support"]


def test_a_model_with_slash_and_colon_is_read_by_id(client):
    assert client.models.retrieve(BASE).model_extra["state"] == "base"
    card = client.models.retrieve("ft:base:acme:x:1")
    assert (card.owned_by, card.model_extra["parent"], card.model_extra["version"]) == ("acme", BASE, 2)
    assert client.models.retrieve("support@3").model_extra["version"] == 3


def test_an_unknown_model_is_not_found_anywhere(client):
    for call in (
        lambda: client.models.retrieve("nobody"),
        lambda: client.chat.completions.create(model="nobody", messages=HI),
        lambda: client.completions.create(model="nobody", prompt="x"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert (caught.value.code, caught.value.param, caught.value.type) == (
            "model_not_found",
            "model",
            "invalid_request_error",
        )


def test_the_list_is_paged_by_limit_after_and_prefix(http):
    def ids(query):
        answer = http.get("/v1/models" + query).json()
        return [m["id"] for m in answer["data"]], answer["has_more"]

    assert ids("?limit=1") == ([BASE], True)
    assert ids(f"?limit=1&after={BASE}") == (["ft:base:acme:x:1"], True)
    assert ids("?after=ft:base:acme:x:1") == (["support"], False)
    assert ids("?prefix=supp") == (["support"], False)
    for query, param in (("?limit=0", "limit"), ("?limit=x", "limit"), ("?after=gone", "after"), ("?page=2", "page")):
        answer = http.get("/v1/models" + query)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


# --- chat


def test_chat_answers_whole(client, backend):
    answer = client.chat.completions.create(model="support", messages=HI)
    choice = answer.choices[0]
    assert (choice.index, choice.message.role, choice.message.content) == (0, "assistant", REPLY)
    assert (choice.finish_reason, choice.logprobs) == ("stop", None)
    assert answer.model == "support"
    assert answer.model_extra["adapter_version"] == 7
    assert answer.id.startswith("chatcmpl-")
    assert abs(answer.created - time.time()) < 60
    assert answer.object == "chat.completion"
    prompt = len(backend.requests[0].prompt)
    assert answer.usage.prompt_tokens == prompt == len("?user:hi??assistant:")
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (REPLY_TOKENS, prompt + REPLY_TOKENS)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_follows_its_adapter_says_which_versions_made_it(client, backend, stream):
    backend.versions = lambda i: 7 if i < 3 else 8
    asked = {"model": "support", "messages": HI, "extra_body": {"adapter_update": "follow"}}
    if stream:
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        *parts, spent = [c.model_extra["adapter_version"] for c in chunks]
        assert (parts == sorted(parts), set(parts), spent) == (True, {7, 8}, [7, 8])
    else:
        assert client.chat.completions.create(**asked).model_extra["adapter_version"] == [7, 8]
    assert backend.requests[0].follow
    client.chat.completions.create(model="support", messages=HI, extra_body={"adapter_update": "pin"})
    assert not backend.requests[1].follow


def test_the_base_model_has_no_adapter(client, backend):
    assert client.chat.completions.create(model=BASE, messages=HI).model_extra["adapter_version"] is None
    assert backend.requests[0].adapter is None


def test_all_sampling_fields_reach_the_engine(client, backend):
    client.chat.completions.create(
        model="support@3",
        messages=HI,
        max_completion_tokens=5,
        temperature=0,
        top_p=0.5,
        seed=11,
        n=2,
        stop=["Q", "Z"],
        logprobs=True,
        top_logprobs=2,
        extra_body={
            "top_k": 9,
            "min_p": 0.25,
            "include_stop_str_in_output": True,
            "stop_token_ids": [7],
            "ignore_eos": True,
        },
    )
    first, second = (r.params for r in backend.requests)
    assert (first.max_tokens, first.temperature, first.top_p, first.top_k, first.min_p) == (5, 0.0, 0.5, 9, 0.25)
    assert (first.seed, first.stop, first.include_stop, first.stop_token_ids) == (11, ("Q", "Z"), True, (7,))
    assert (first.ignore_eos, first.logprobs, first.choice, second.choice) == (True, 2, 0, 1)
    assert (backend.requests[0].adapter.version, backend.requests[0].tenant) == (3, "local")
    assert backend.requests[0].id != backend.requests[1].id


def test_absent_fields_have_the_api_defaults(client, backend):
    client.chat.completions.create(model=BASE, messages=HI)
    client.completions.create(model=BASE, prompt="x")
    chat, plain = (r.params for r in backend.requests)
    assert (chat.max_tokens, plain.max_tokens) == (64, 16)
    assert (chat.temperature, chat.top_p, chat.top_k, chat.min_p, chat.seed) == (1.0, 1.0, -1, 0.0, None)
    assert (chat.stop, chat.stop_token_ids, chat.ignore_eos, chat.logprobs) == ((), (), False, None)


def test_n_choices_come_in_order_and_the_prompt_counts_once(client, backend):
    answer = client.chat.completions.create(model=BASE, messages=HI, n=3, seed=5)
    assert [(c.index, c.message.content) for c in answer.choices] == [(i, f"Grüße 🌍 5.{i}") for i in range(3)]
    assert answer.usage.prompt_tokens == len(backend.requests[0].prompt)
    assert answer.usage.completion_tokens == 3 * REPLY_TOKENS


def test_max_tokens_ends_with_length(client):
    answer = client.chat.completions.create(model=BASE, messages=HI, max_tokens=2)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Gr", "length")
    assert answer.usage.completion_tokens == 2


@pytest.mark.parametrize(("include", "want"), [(False, "Grü"), (True, "Grüße")])
def test_a_stop_string_ends_the_text(client, include, want):
    extra = {"include_stop_str_in_output": include}
    kinds = {"model": BASE, "messages": HI, "stop": "ße", "extra_body": extra}
    answer = client.chat.completions.create(**kinds)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (want, "stop")
    chunks = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**kinds, stream=True)]
    assert "".join(chunks) == want


def test_messages_reach_the_template(client, backend):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
        {"role": "tool", "content": "d", "tool_call_id": "call_1"},
    ]
    client.chat.completions.create(model=BASE, messages=messages)
    text = backend.tokenizer.decode(backend.requests[0].prompt)
    assert text == "system:be briefuser:a\nbassistant:ctool:dassistant:"


def test_the_last_message_is_continued_or_left_bare(client, backend):
    turns = [*HI, {"role": "assistant", "content": "An"}]
    for extra in ({"continue_final_message": True}, {"add_generation_prompt": False}):
        client.chat.completions.create(model=BASE, messages=turns, extra_body=extra)
    continued, bare = (list(r.prompt) for r in backend.requests)
    assert backend.tokenizer.decode(continued) == "user:hiassistant:An"
    assert bare == [*continued, EOS]


def test_chat_logprobs_follow_the_text(client):
    answer = client.chat.completions.create(model=BASE, messages=HI, logprobs=True, top_logprobs=4, max_tokens=4)
    content = answer.choices[0].logprobs.content
    assert [t.token for t in content] == ["G", "r", "\ufffd", "\ufffd"]
    assert [t.bytes for t in content] == [[b] for b in "Grü".encode()]
    assert [t.logprob for t in content] == [0.0, -0.25, -0.5, -0.75]
    assert [(a.token, a.logprob) for a in content[0].top_logprobs] == [("G", 0.0), ("H", -1), ("I", -2), ("J", -9999)]


def test_chat_logprobs_leave_out_the_end_token_and_a_cut_stop_string(client):
    ask = {"model": BASE, "messages": HI, "logprobs": True}
    whole = client.chat.completions.create(**ask).choices[0].logprobs.content
    assert len(whole) == REPLY_TOKENS - 1
    assert all(t.top_logprobs == [] for t in whole)
    cut = client.chat.completions.create(**ask, stop="ße").choices[0].logprobs.content
    assert bytes(b for t in cut for b in t.bytes).decode() == "Grü"


def test_chat_stream_has_role_text_finish_usage_and_end_mark(http):
    body = {"model": "support", "messages": HI, "stream": True, "stream_options": {"include_usage": True}}
    response = http.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-request-id"].startswith("req_")
    *raw, done = events(response)
    assert done == "[DONE]"
    first, *middle, last, spent = map(json.loads, raw)
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert "".join(c["choices"][0]["delta"]["content"] for c in middle) == REPLY
    assert {c["choices"][0]["finish_reason"] for c in middle} == {None}
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert spent["choices"] == []
    assert spent["usage"]["completion_tokens"] == REPLY_TOKENS
    assert all(c["usage"] is None for c in (first, *middle, last))
    same = {(c["id"], c["created"], c["model"], c["adapter_version"], c["object"]) for c in (first, last, spent)}
    assert len(same) == 1
    assert same.pop()[2:] == ("support", 7, "chat.completion.chunk")


def test_without_include_usage_there_is_no_usage(http):
    body = {"model": BASE, "messages": HI, "stream": True}
    chunks = [json.loads(e) for e in events(http.post("/v1/chat/completions", json=body))[:-1]]
    assert all("usage" not in c and len(c["choices"]) == 1 for c in chunks)


def test_streamed_choices_equal_whole_ones_with_logprobs(client):
    ask = {"model": BASE, "messages": HI, "n": 3, "seed": 2, "stop": [".1"], "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**ask)
    got = {i: ["", [], None] for i in range(3)}
    for chunk in client.chat.completions.create(**ask, stream=True):
        choice = chunk.choices[0]
        state = got[choice.index]
        assert state[2] is None, "a chunk after the finish"
        state[0] += choice.delta.content or ""
        state[1] += choice.logprobs.content if choice.logprobs else []
        state[2] = choice.finish_reason
    for choice in whole.choices:
        content = choice.logprobs.content
        assert got[choice.index] == [choice.message.content, content, choice.finish_reason]
    assert [c.message.content for c in whole.choices] == ["Grüße 🌍 2.0", "Grüße 🌍 2", "Grüße 🌍 2.2"]


# --- completions


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        pytest.param("ab", [(257, 97, 98)], id="text"),
        pytest.param(["a", "b"], [(257, 97), (257, 98)], id="texts"),
        pytest.param([5, 6], [(5, 6)], id="ids"),
        pytest.param([[5], [6, 7]], [(5,), (6, 7)], id="lists_of_ids"),
    ],
)
def test_a_prompt_in_each_form(client, backend, prompt, ids):
    answer = client.completions.create(model=BASE, prompt=prompt, n=2, max_tokens=30)
    assert [r.prompt for r in backend.requests] == [p for p in ids for _ in range(2)]
    assert [c.index for c in answer.choices] == list(range(2 * len(ids)))
    assert [c.text for c in answer.choices] == ["Grüße 🌍 0.0", "Grüße 🌍 0.1"] * len(ids)
    assert answer.usage.prompt_tokens == sum(map(len, ids))
    assert (answer.object, answer.choices[0].finish_reason, answer.choices[0].logprobs) == (
        "text_completion",
        "stop",
        None,
    )


def test_special_tokens_can_be_left_off_a_text_prompt(client, backend):
    client.completions.create(model=BASE, prompt="a", extra_body={"add_special_tokens": False})
    assert backend.requests[0].prompt == (97,)


def test_completion_logprobs_are_four_lists_with_offsets(client):
    answer = client.completions.create(model=BASE, prompt="x", logprobs=2, max_tokens=30, stop="🌍")
    lists = answer.choices[0].logprobs
    assert answer.choices[0].text == "Grüße "
    assert lists.text_offset == [0, 1, 2, 2, 3, 3, 4, 5]
    assert lists.tokens == ["G", "r", "\ufffd", "\ufffd", "\ufffd", "\ufffd", "e", " "]
    assert lists.token_logprobs == [-i / 4 for i in range(8)]
    assert lists.top_logprobs[0] == {"G": 0.0, "H": -1.0}
    assert len(lists.top_logprobs) == 8


def test_logprobs_zero_is_the_chosen_token_alone(client):
    extra = {"return_tokens_as_token_ids": True}
    answer = client.completions.create(model=BASE, prompt="x", logprobs=0, max_tokens=1, extra_body=extra)
    assert answer.choices[0].logprobs.tokens == ["token_id:71"]
    assert answer.choices[0].logprobs.top_logprobs == [{"token_id:71": 0.0}]


def test_of_alternatives_with_one_text_the_best_stays(client, backend):
    backend.reply = lambda request: "~"
    answer = client.completions.create(model=BASE, prompt="x", logprobs=4)
    assert answer.choices[0].logprobs.top_logprobs == [{"~": 0.0, "\x7f": -1.0, "\ufffd": -2.0}]


def test_a_special_token_inside_the_text_has_no_width(client, backend):
    backend.reply = lambda request: "ab"
    extra = {"ignore_eos": True}
    answer = client.completions.create(model=BASE, prompt="x", logprobs=0, max_tokens=5, extra_body=extra)
    assert answer.choices[0].text == "abab"
    assert answer.choices[0].logprobs.tokens == ["a", "b", "<eos>", "a", "b"]
    assert answer.choices[0].logprobs.text_offset == [0, 1, 2, 2, 3]


def test_completion_stream_equals_the_whole(client, http):
    ask = {"model": "support", "prompt": ["x", "y"], "logprobs": 2, "stop": ["0."], "max_tokens": 30}
    whole = client.completions.create(**ask)
    text, offsets = ["", ""], [[], []]
    for chunk in client.completions.create(**ask, stream=True):
        assert chunk.object == "text_completion"
        choice = chunk.choices[0]
        text[choice.index] += choice.text
        offsets[choice.index] += choice.logprobs.text_offset
    assert text == [c.text for c in whole.choices] == ["Grüße 🌍 "] * 2
    assert offsets == [c.logprobs.text_offset for c in whole.choices]
    last = json.loads(events(http.post("/v1/completions", json=ask | {"stream": True}))[-2])
    assert (last["choices"][0]["finish_reason"], last["adapter_version"]) == ("stop", 7)


# --- tokenize


def test_tokenize_and_detokenize(http, backend):
    answer = http.post("/tokenize", json={"model": BASE, "prompt": "hé"}).json()
    assert answer == {"tokens": [257, 104, 195, 169], "count": 4, "max_model_len": 200}
    bare = http.post("/tokenize", json={"prompt": "h", "add_special_tokens": False}).json()
    assert bare["tokens"] == [104]
    chat = http.post("/tokenize", json={"model": BASE, "messages": HI, "add_generation_prompt": False}).json()
    assert chat["tokens"] == backend.tokenizer.chat(HI, add_generation_prompt=False)
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "hé"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        pytest.param("/tokenize", {}, "prompt", id="neither"),
        pytest.param("/tokenize", {"prompt": "a", "messages": HI}, "prompt", id="both"),
        pytest.param("/tokenize", {"messages": HI, "add_special_tokens": True}, "add_special_tokens", id="special"),
        pytest.param("/tokenize", {"prompt": "a", "continue_final_message": True}, "continue_final_message", id="cont"),
        pytest.param("/tokenize", {"prompt": "a", "model": "nobody"}, "model", id="model"),
        pytest.param("/detokenize", {"tokens": [259]}, "tokens", id="out_of_vocabulary"),
        pytest.param("/detokenize", {"tokens": [-1]}, "tokens", id="negative"),
        pytest.param("/detokenize", {"tokens": [1.5]}, "tokens[0]", id="float"),
    ],
)
def test_bad_tokenize_bodies(http, path, body, param):
    answer = http.post(path, json=body)
    assert answer.status_code == (404 if param == "model" else 400)
    assert answer.json()["error"]["param"] == param
