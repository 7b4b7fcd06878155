import json
import re

import numpy as np
import pytest
from fake_tokenizer import END, START, FakeTokenizer, endless, forgetful, strict
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.errors import DataInvalid
from train.data import (
    Example,
    ExampleStream,
    chat_example,
    completion_example,
    load_jsonl,
    pack,
    real_tokens,
    text_example,
    token_example,
)

MAX = 500


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


ASK, ANSWER = turn("user", "one"), turn("assistant", "two")


def of_length(n, first=0):
    """n distinct tokens; every prediction trained with its own weight."""
    weights = np.arange(n, dtype=np.float32)
    return Example(np.arange(first, first + n, dtype=np.int32), weights)


def trained_text(tokenizer, example):
    """The trained tokens, spelled out; | where a run ends."""
    spans = [m.span() for m in re.finditer("1+", "".join(str(int(w)) for w in example.weights))]
    return "|".join(tokenizer.decode(example.tokens[a:b]) for a, b in spans)


# chat


def test_chat_trains_each_assistant_turn_with_its_end_and_nothing_else():
    tokenizer = FakeTokenizer()
    messages = [turn("system", "s"), ASK, ANSWER, turn("user", "three"), turn("assistant", "four")]
    example = chat_example(tokenizer, messages, max_tokens=MAX)
    assert trained_text(tokenizer, example) == "two</s>|four</s>"
    assert example.tokens.dtype == np.int32
    assert example.weights.dtype == np.float32
    assert example.tokens[-1] == END  # the newline after the last turn is dropped


def test_chat_prompt_is_the_serving_prompt():
    tokenizer = FakeTokenizer()
    messages = [ASK, ANSWER, turn("user", "three"), turn("assistant", "four")]
    example = chat_example(tokenizer, messages, max_tokens=MAX)
    starts = [i for i in range(1, len(example)) if example.weights[i] == 1 and example.weights[i - 1] == 0]
    prompts = [tokenizer.chat(messages[:1]), tokenizer.chat(messages[:3])]
    assert [list(example.tokens[:i]) for i in starts] == prompts
    assert "help" in tokenizer.decode(example.tokens)  # the template's default system message is part of both


def test_chat_weight_zero_skips_a_turn():
    tokenizer = FakeTokenizer()
    first = [ASK, dict(ANSWER, weight=0), turn("user", "three"), turn("assistant", "four", weight=1)]
    assert trained_text(tokenizer, chat_example(tokenizer, first, max_tokens=MAX)) == "four</s>"
    last = [ASK, ANSWER, turn("user", "three"), turn("assistant", "four", weight=0)]
    example = chat_example(tokenizer, last, max_tokens=MAX)
    assert trained_text(tokenizer, example) == "two</s>"
    assert "three" not in tokenizer.decode(example.tokens)  # nothing after the last trained token is computed


def test_chat_answer_that_spells_the_end_token_trains_up_to_the_real_end():
    tokenizer = FakeTokenizer()
    example = chat_example(tokenizer, [ASK, turn("assistant", "a</s>b")], max_tokens=MAX)
    assert trained_text(tokenizer, example) == "a</s>b</s>"


LATER = [ASK, ANSWER, turn("user", "three"), turn("assistant", "four")]


@pytest.mark.parametrize(
    ("template", "messages", "field", "says"),
    [
        (forgetful, LATER, "messages[1]", "when later turns follow"),
        (None, [ASK, turn("assistant", "\ntwo")], "messages[1]", "of its own prompt"),
        (endless, [ASK, ANSWER], "messages[1]", "no end-of-sequence"),
        (strict, [turn("system", "s"), ASK, ANSWER], "messages", "the chat template refuses it: no system messages"),
    ],
    ids=["rewrites-earlier", "answer-merges-with-prompt", "no-end", "template-refuses"],
)
def test_chat_template_that_cannot_train(template, messages, field, says):
    tokenizer = FakeTokenizer(template) if template else FakeTokenizer()
    with pytest.raises(DataInvalid, match=re.escape(says)) as caught:
        chat_example(tokenizer, messages, max_tokens=MAX)
    assert caught.value.param == field


def test_chat_forgetful_template_trains_a_last_turn():
    tokenizer = FakeTokenizer(forgetful)
    example = chat_example(tokenizer, [ASK, dict(ANSWER, weight=0), *LATER[2:]], max_tokens=MAX)
    assert trained_text(tokenizer, example) == "four</s>"


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ("hi", "messages"),
        ([ASK], "messages[0].role"),
        ([ASK, "hi"], "messages[1]"),
        ([ASK, {"role": "assistant"}], "messages[1].content"),
        ([ASK, turn("assistant", None)], "messages[1].content"),
        ([ASK, turn("assistant", [{"type": "text", "text": "x"}])], "messages[1].content"),
        ([ASK, turn("tool", "x"), ANSWER], "messages[1].role"),
        ([dict(ASK, name="bob"), ANSWER], "messages[0].name"),
        ([dict(ASK, weight=1), ANSWER], "messages[0].weight"),
        ([ASK, dict(ANSWER, weight=0.5)], "messages[1].weight"),
        ([ASK, dict(ANSWER, weight=True)], "messages[1].weight"),
        ([ASK, dict(ANSWER, weight=None)], "messages[1].weight"),
        ([ASK, dict(ANSWER, weight=0)], "messages"),
        ([ASK, turn("assistant", "\ud800")], "messages[1].content"),
    ],
)
def test_chat_bad_messages_name_the_field(messages, field):
    with pytest.raises(DataInvalid) as caught:
        chat_example(FakeTokenizer(), messages, max_tokens=MAX)
    assert caught.value.param == field


def test_chat_length_limit_is_exact():
    length = len(chat_example(FakeTokenizer(), [ASK, ANSWER], max_tokens=MAX))
    chat_example(FakeTokenizer(), [ASK, ANSWER], max_tokens=length)
    with pytest.raises(DataInvalid, match=f"{length} tokens, more than the {length - 1} allowed"):
        chat_example(FakeTokenizer(), [ASK, ANSWER], max_tokens=length - 1)


# the other kinds


def test_completion_is_prompt_then_trained_completion_and_end():
    tokenizer = FakeTokenizer(bos=True)
    example = completion_example(tokenizer, "ab", "cd", max_tokens=MAX)
    assert list(example.tokens[:3]) == tokenizer.encode("ab")
    assert example.tokens[0] == START
    assert trained_text(tokenizer, example) == "cd</s>"


def test_completion_prompt_tokens_do_not_merge_with_the_completion():
    tokenizer = FakeTokenizer()
    example = completion_example(tokenizer, "a\n", "\nb", max_tokens=MAX)
    assert list(example.tokens[:2]) == tokenizer.encode("a\n")


def test_text_trains_all_but_the_first_token_and_adds_no_end():
    example = text_example(FakeTokenizer(), "abc", max_tokens=MAX)
    assert list(example.weights) == [0, 1, 1]
    assert FakeTokenizer().decode(example.tokens) == "abc"


def test_token_example_keeps_ids_and_signed_weights_and_ignores_the_first():
    example = token_example([5, 6, 7], [9, -0.5, 2], max_tokens=3, vocab=8)
    assert list(example.tokens) == [5, 6, 7]
    assert list(example.weights) == [0, -0.5, 2]


@pytest.mark.parametrize(
    ("tokens", "weights", "says"),
    [
        (np.arange(3, dtype=np.int64), np.ones(3, np.float32), "int32"),
        (np.arange(3, dtype=np.int32), np.ones(3), "float32"),
        (np.arange(3, dtype=np.int32), np.array([0, 1], np.float32), "3 tokens but 2 weights"),
        (np.arange(1, dtype=np.int32), np.zeros(1, np.float32), "at least 2"),
        (np.arange(2, dtype=np.int32), np.zeros(2, np.float32), "no trainable token"),
        (np.arange(2, dtype=np.int32), np.ones(2, np.float32), "weights\\[0\\] must be 0"),
        (np.arange(2, dtype=np.int32), np.array([0, np.nan], np.float32), "finite"),
    ],
)
def test_example_refuses(tokens, weights, says):
    with pytest.raises(DataInvalid, match=says):
        Example(tokens, weights)


# JSONL

CHAT_LINE = json.dumps({"messages": [ASK, ANSWER]})


def load(tmp_path, content, max_tokens=MAX):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_jsonl(path, FakeTokenizer(), max_tokens=max_tokens)


def test_jsonl_reads_every_kind_in_order(tmp_path):
    lines = [
        CHAT_LINE,
        "",
        '{"prompt": "añ", "completion": "b"}',
        "   \r",
        '{"input_ids": [4, 5], "weights": [0, 1.5]}',
        '{"text": "xyz"}',
    ]
    examples = load(tmp_path, "\n".join(lines))
    assert [len(e) for e in examples] == [len(chat_example(FakeTokenizer(), [ASK, ANSWER], max_tokens=MAX)), 5, 2, 3]
    assert examples[2].weights[1] == 1.5


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"messages": [], "tools": []}', "tools: unknown key; known are messages"),
        ('{"prompt": "a"}', "completion: is missing"),
        ('{"prompt": 1, "completion": "b"}', "prompt: must be a string, got a number"),
        ('{"prompt": "a", "completion": "b", "text": "c"}', "text: unknown key"),
        ('{"text": ["a"]}', "text: must be a string, got a list"),
        ('{"text": ""}', "0 token"),
        ('{"text": "\\ud800"}', "text: holds half of a surrogate pair"),
        ('{"\\ud800": 1}', r"keys \ud800 are of no known kind"),
        ('{"input_ids": [4, 260], "weights": [0, 1]}', "input_ids: must be a list of whole numbers in [0, 260)"),
        ('{"input_ids": [4, -1], "weights": [0, 1]}', "input_ids: must be a list"),
        ('{"input_ids": [4, true], "weights": [0, 1]}', "input_ids: must be a list"),
        ('{"input_ids": [4, 5.0], "weights": [0, 1]}', "input_ids: must be a list"),
        ('{"input_ids": [4, 5], "weights": [0]}', "weights: 2 input_ids but 1 weights"),
        ('{"input_ids": [4, 5], "weights": [1, 0]}', "weights: no trainable token"),
        ('{"input_ids": [4, 5], "weights": [0, NaN]}', "NaN is not JSON"),
        ('{"input_ids": [4, 5], "weights": [0, 1e999]}', "weights: must be a list of finite numbers"),
        ('{"input_ids": [4, 5], "weights": [0, 1' + "0" * 400 + "]}", "weights: must be a list of finite numbers"),
        ('{"input_ids": [4, 1' + "0" * 5000 + '], "weights": [0, 1]}', "not JSON"),
        ('{"text": "' + "x" * 501 + '"}', "text: 501 tokens, more than the 500 allowed"),
        ('{"input": {}, "preferred_output": []}', "keys input, preferred_output are of no known kind"),
        ("{}", "keys (none) are of no known kind"),
        ('{"text": "a", "text": "b"}', "text: the key is given twice"),
        ("[1]", "must be an object, got a list"),
        ("{", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        (b'{"text": "\xff"}', "not UTF-8: byte 11"),
    ],
)
def test_jsonl_problem_names_line_and_field(tmp_path, line, says):
    raw = line if isinstance(line, bytes) else line.encode()
    with pytest.raises(DataInvalid) as caught:
        load(tmp_path, CHAT_LINE.encode() + b"\n\n" + raw + b"\n")
    assert re.search("line 3[,:].*" + re.escape(says), str(caught.value))


def test_jsonl_names_the_file(tmp_path):
    for content, says in ((b"", "data.jsonl has no examples"), (b"[1]", "data.jsonl is not valid:\nline 1: must be")):
        with pytest.raises(DataInvalid, match=says):
            load(tmp_path, content)
    with pytest.raises(DataInvalid, match=r"cannot be read \(Is a directory\)"):
        load_jsonl(tmp_path, FakeTokenizer(), max_tokens=MAX)


def test_jsonl_shows_the_first_five_problems(tmp_path):
    with pytest.raises(DataInvalid) as caught:
        load(tmp_path, "\n".join(['{"text": 1}', CHAT_LINE, *['{"text": 2}'] * 8]))
    assert re.findall(r"line (\d+), text", str(caught.value)) == ["1", "3", "4", "5", "6"]
    assert str(caught.value).endswith("reading stopped here")


def test_jsonl_refuses_byte_order_mark_and_emptiness(tmp_path):
    with pytest.raises(DataInvalid, match="line 1: the file starts with a byte order mark"):
        load(tmp_path, b"\xef\xbb\xbf" + CHAT_LINE.encode())
    with pytest.raises(DataInvalid, match="no examples"):
        load(tmp_path, "\n \n")


# the stream


def firsts(examples):
    return [int(e.tokens[0]) for e in examples]


def numbered(count):
    return [of_length(2, first=i) for i in range(count)]


def test_stream_shows_every_example_once_an_epoch_in_changing_order():
    stream = ExampleStream(numbered(10), seed=3)
    epochs = [firsts(stream.take(10)) for _ in range(3)]
    assert all(sorted(e) == list(range(10)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3
    assert firsts(ExampleStream(numbered(10), seed=4).take(10)) != epochs[0]


def test_stream_order_is_the_written_one():
    """Guards resumption across releases: these numbers may never change."""
    assert firsts(ExampleStream(numbered(6), seed=7).take(12)) == [4, 3, 2, 1, 0, 5, 1, 4, 3, 2, 5, 0]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(0, 2**62), st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_stream_resumes_exactly_and_does_not_depend_on_the_takes(count, seed, takes):
    whole = firsts(ExampleStream(numbered(count), seed).take(sum(takes) + 20))
    stream, seen = ExampleStream(numbered(count), seed), []
    for n in takes:
        assert firsts(stream.peek(n)) == whole[len(seen) : len(seen) + n]
        seen += firsts(stream.take(n))
        assert stream.cursor == len(seen)
    resumed = ExampleStream(numbered(count), seed, cursor=stream.cursor)
    assert seen + firsts(resumed.take(20)) == whole


@pytest.mark.parametrize(("count", "seed", "cursor"), [(0, 0, 0), (1, -1, 0), (1, 0, -1)])
def test_stream_refuses(count, seed, cursor):
    with pytest.raises(DataInvalid):
        ExampleStream(numbered(count), seed, cursor)


# packing


def test_pack_lays_out_by_hand():
    lanes = pack([of_length(3, first=10), of_length(5, first=20)], 7)
    assert len(lanes) == 1
    lane = lanes[0]
    assert list(lane.token_J) == [20, 21, 22, 23, 10, 11, 0]
    assert list(lane.target_J) == [21, 22, 23, 24, 11, 12, 0]
    assert list(lane.weight_J) == [1, 2, 3, 4, 1, 2, 0]
    assert list(lane.position_J) == [0, 1, 2, 3, 0, 1, 0]
    assert list(lane.segment_J) == [1, 1, 1, 1, 2, 2, 0]
    assert real_tokens(lanes) == 6
    assert {lane.token_J.dtype, lane.target_J.dtype, lane.position_J.dtype, lane.segment_J.dtype} == {np.dtype("i4")}
    assert lane.weight_J.dtype == np.float32


def test_pack_is_first_fit_decreasing():
    lanes = pack([of_length(n + 1) for n in (2, 5, 4, 7, 1, 3)], 8)
    assert [real_tokens([lane]) for lane in lanes] == [8, 8, 6]  # 7+1, 5+3, 4+2


def test_pack_refuses_an_example_longer_than_a_lane():
    assert len(pack([of_length(9)], 8)) == 1
    with pytest.raises(DataInvalid, match="example 1 has 10 tokens, but a lane of 8 positions holds at most 9"):
        pack([of_length(3), of_length(10)], 8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 17), max_size=30))
def test_pack_keeps_every_example_whole(lengths):
    examples = [of_length(n, first=100 * i) for i, n in enumerate(lengths)]
    lanes = pack(examples, 16)
    found = []
    for lane in lanes:
        count = int(lane.segment_J.max())
        for segment in range(1, count + 1):
            at = np.flatnonzero(lane.segment_J == segment)
            assert (np.diff(at) == 1).all()
            assert list(lane.position_J[at]) == list(range(len(at)))
            tokens = [*lane.token_J[at], lane.target_J[at[-1]]]
            assert list(lane.weight_J[at]) == list(range(1, len(at) + 1))
            found.append(tuple(int(t) for t in tokens))
        padding = lane.segment_J == 0
        assert not lane.weight_J[padding].any()
    assert sorted(found) == sorted(tuple(int(t) for t in e.tokens) for e in examples)
    assert real_tokens(lanes) == sum(n - 1 for n in lengths)
    assert len(lanes) <= max(1, 2 * (sum(n - 1 for n in lengths) + 15) // 16)
