"""Records: what each kind becomes, and that every problem of a JSONL file names its line and field."""

import json
import re
import time
import tracemalloc

import numpy as np
import pytest
from fake_tokenizer import END, START, FakeTokenizer, endless, forgetful, strict

from jaxlora.config.training import LOSSES
from jaxlora.core.errors import DataInvalid
from train.data.load import LengthLimit, load_file
from train.data.records import (
    chat_example,
    completion_example,
    preference_pair,
    rollout_example,
    text_example,
    token_example,
)

MAX = 500


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


ASK, ANSWER = turn("user", "one"), turn("assistant", "two")


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


class Counting(FakeTokenizer):
    """Counts what it is asked."""

    def __init__(self):
        super().__init__()
        self.renders, self.encoded = 0, 0

    def render(self, messages, **how):
        self.renders += 1
        return super().render(messages, **how)

    def encode(self, text, **how):
        self.encoded += len(text)
        return super().encode(text, **how)


@pytest.mark.parametrize(("max_tokens", "renders"), [(600, 1), (2000, 3)], ids=["bytes", "tokens"])
def test_a_conversation_that_is_too_long_is_rendered_a_few_times_however_many_turns_it_has(max_tokens, renders):
    tokenizer = Counting()
    with pytest.raises(DataInvalid, match=f"tokens, more than the {max_tokens} allowed"):
        chat_example(tokenizer, [ASK, ANSWER] * 100, max_tokens=max_tokens)
    assert tokenizer.renders == renders
    assert (tokenizer.encoded == 0) is (renders == 1)


def test_a_conversation_of_very_many_turns_to_train_is_refused_before_they_are_rendered():
    """The cost grows with their square."""
    tokenizer = Counting()
    with pytest.raises(
        DataInvalid, match=r"each of its 500 turns to train is .* about \d+ bytes, more than the 16777216"
    ):
        chat_example(tokenizer, [ASK, ANSWER] * 500, max_tokens=10**6)
    assert tokenizer.renders == 1
    few = [ASK, dict(ANSWER, weight=0)] * 499 + [ASK, ANSWER]
    assert trained_text(tokenizer, chat_example(tokenizer, few, max_tokens=10**6)) == "two</s>"


# the other kinds


@pytest.mark.parametrize("make", [text_example, lambda t, text, **how: completion_example(t, "", text, **how)])
def test_a_text_that_cannot_fit_is_not_tokenised(make):
    tokenizer = Counting()
    with pytest.raises(DataInvalid, match="41 bytes of text are at least 11 tokens, more than the 10 allowed"):
        make(tokenizer, "é" * 20 + "x", max_tokens=10)
    assert tokenizer.encoded == 0
    with pytest.raises(DataInvalid, match=r"4[01] tokens, more than the 10 allowed"):
        make(tokenizer, "x" * 40, max_tokens=10)


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


def rollout(**changes):
    line = {"input_ids": [5, 6, 7], "logprobs": [9, -0.5, -1], "advantages": [9, 2, -2]} | changes
    return rollout_example(line, max_tokens=3, vocab=8)


def test_rollout_keeps_signed_numbers_and_counts_every_token_unless_told():
    example = rollout()
    assert list(example.tokens) == [5, 6, 7]
    assert list(example.weights) == [0, 1, 1]
    assert list(example.rollout.logprobs[1:]) == [-0.5, -1]
    assert list(example.rollout.advantages[1:]) == [2, -2]
    assert example.rollout.ratio_mask.all()
    example = rollout(weights=[1, 0, -3], sequence_ratio_mask=[0, 0, 1])
    assert list(example.weights) == [0, 0, -3]
    assert list(example.rollout.ratio_mask) == [False, False, True]


@pytest.mark.parametrize(
    ("changes", "field", "says"),
    [
        ({"logprobs": [0, 1]}, "logprobs", "3 input_ids but 2 logprobs"),
        ({"advantages": [0, 1, "2"]}, "advantages", "finite numbers"),
        ({"advantages": [0, 1, 1e39]}, "advantages", "finite numbers"),
        ({"weights": [1, 0, 0]}, "weights", "no trainable token"),
        ({"sequence_ratio_mask": [1, 2, 0]}, "sequence_ratio_mask", "0 and 1"),
        ({"input_ids": [5, 6, 8]}, "input_ids", "whole numbers"),
    ],
)
def test_rollout_refuses(changes, field, says):
    with pytest.raises(DataInvalid, match=says) as caught:
        rollout(**changes)
    assert caught.value.param == field


# preference pairs

WORSE = turn("assistant", "three")


def pair(prompt=(ASK,), preferred=(ANSWER,), other=(WORSE,), max_tokens=MAX, tokenizer=None):
    tokenizer = tokenizer or FakeTokenizer()
    return preference_pair(tokenizer, {"messages": list(prompt)}, list(preferred), list(other), max_tokens=max_tokens)


def test_pair_trains_the_answers_after_the_serving_prompt():
    """What the assistant said earlier belongs to the prompt."""
    tokenizer, prompt = FakeTokenizer(), [ASK, ANSWER, turn("user", "and?")]
    got = pair(prompt)
    assert [trained_text(tokenizer, e) for e in (got.chosen, got.rejected)] == ["two</s>", "three</s>"]
    for example in (got.chosen, got.rejected):
        start = int(np.flatnonzero(example.weights)[0])
        assert list(example.tokens[:start]) == tokenizer.chat(prompt)


@pytest.mark.parametrize(
    ("given", "field", "says"),
    [
        ({"prompt": []}, "input.messages", "at least one message"),
        ({"prompt": [ASK, ANSWER]}, "input.messages[1].role", "must not be an assistant's"),
        ({"prompt": [ASK, dict(ANSWER, weight=0), ASK]}, "input.messages[1].weight", "unknown key"),
        ({"preferred": []}, "preferred_output", "at least one message"),
        ({"preferred": [ASK]}, "preferred_output[0].role", "the last message must be an assistant's"),
        ({"other": [dict(WORSE, content=3)]}, "non_preferred_output[0].content", "must be a string"),
        ({"other": [turn("assistant", "\ntwo")]}, "non_preferred_output[0]", "of its own prompt"),
        ({"other": [ANSWER]}, "preferred_output", "are the same"),
        ({"tokenizer": FakeTokenizer(strict), "prompt": [turn("system", "s"), ASK]}, "preferred_output", "refuses it"),
    ],
)
def test_pair_problems_name_the_field(given, field, says):
    with pytest.raises(DataInvalid, match=says) as caught:
        pair(**given)
    assert caught.value.param == field


def test_pair_length_limit_is_that_of_both_answers_in_one_lane():
    together = pair().predictions
    assert together == pair().chosen.predictions + pair().rejected.predictions
    pair(max_tokens=together + 1)
    with pytest.raises(
        DataInvalid, match=f"take {together} predictions together, more than the {together - 1} allowed"
    ):
        pair(max_tokens=together)


# JSONL

CHAT_LINE = json.dumps({"messages": [ASK, ANSWER]})
PAIR_LINE = json.dumps({"input": {"messages": [ASK]}, "preferred_output": [ANSWER], "non_preferred_output": [WORSE]})
ROLLOUT_LINE = json.dumps({"input_ids": [4, 5], "logprobs": [0, -1], "advantages": [0, 1]})


def load(tmp_path, content, max_tokens=MAX, loss="cross_entropy"):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_file(path, FakeTokenizer(), limit=LengthLimit(lane_tokens=max_tokens - 1), loss=loss).units


@pytest.mark.parametrize("loss", LOSSES)
def test_jsonl_of_one_loss_holds_one_family_of_lines(tmp_path, loss):
    """Each loss reads its own kind, and names the first line of another kind."""
    good = {"cross_entropy": CHAT_LINE, "dpo": PAIR_LINE}.get(loss, ROLLOUT_LINE)
    assert len(load(tmp_path, f"{good}\n{good}\n", loss=loss)) == 2
    for bad in {CHAT_LINE, PAIR_LINE, ROLLOUT_LINE, '{"text": "abc"}'} - {good}:
        if loss == "cross_entropy" and "text" in bad:
            continue
        with pytest.raises(DataInvalid, match=f"line 2, loss: loss {loss} trains on"):
            load(tmp_path, f"{good}\n{bad}\n", loss=loss)


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
        (PAIR_LINE.replace("input", "input_"), "input_: unknown key; known are input, preferred_output"),
        (PAIR_LINE.replace('"messages"', '"tools": [], "messages"'), "input.tools: unknown key"),
        (ROLLOUT_LINE.replace("logprobs", "logprob"), "logprob: unknown key; known are input_ids, logprobs"),
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
        ('{"input": {}, "preferred_output": []}', "non_preferred_output: is missing"),
        ('{"question": "a"}', "keys question are of no known kind"),
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
    for content, says in (
        (b"", "data.jsonl has no examples"),
        (b"[1]", "data.jsonl is not valid:\nelement 1: must be"),
    ):
        with pytest.raises(DataInvalid, match=says):
            load(tmp_path, content)
    with pytest.raises(DataInvalid, match=r"cannot be read \(Is a directory\)"):
        load_file(tmp_path, FakeTokenizer(), limit=LengthLimit(lane_tokens=MAX - 1))


def test_jsonl_shows_the_first_five_problems(tmp_path):
    with pytest.raises(DataInvalid) as caught:
        load(tmp_path, "\n".join(['{"text": 1}', CHAT_LINE, *['{"text": 2}'] * 8]))
    assert re.findall(r"line (\d+), text", str(caught.value)) == ["1", "3", "4", "5", "6"]
    assert str(caught.value).endswith("reading stopped here")


def test_jsonl_refuses_emptiness_and_passes_over_a_byte_order_mark(tmp_path):
    assert len(load(tmp_path, b"\xef\xbb\xbf" + CHAT_LINE.encode())) == 1
    for nothing in ("\n \n", "\ufeff"):
        with pytest.raises(DataInvalid, match="no examples"):
            load(tmp_path, nothing)


def test_a_line_that_is_too_long_is_not_held_and_not_parsed(tmp_path):
    most, path = MAX * 128 + 2**16, tmp_path / "data.jsonl"
    path.write_bytes(b"\n{" + b" " * 2**23 + b'"text": "x"}\n' + b'{"text": "' + b"x" * most + b'"}')
    tracemalloc.start()
    with pytest.raises(DataInvalid) as caught:
        load_file(path, FakeTokenizer(), limit=LengthLimit(lane_tokens=MAX - 1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    for line, size in ((2, 2**23 + 13), (3, most + 12)):
        assert f"line {line}: {size} bytes, more than the {most} that the longest example may take" in str(caught.value)
    assert peak < 8 * most


def test_a_line_may_be_as_long_as_its_tokens_need(tmp_path):
    escaped = "".join(f"\\u{ord(c):04x}" for c in "x" * MAX)
    ids = json.dumps({"input_ids": [99] * MAX, "weights": [0.12345678901234567] * MAX}, indent=None)
    assert [len(e) for e in load(tmp_path, f'{{"text": "{escaped}"}}\n{ids}')] == [MAX, MAX]


def test_many_keys_of_which_one_is_given_twice_cost_no_more_than_many_keys(tmp_path):
    def seconds(names):
        began = time.process_time()
        with pytest.raises(DataInvalid, match=r"given twice|no known kind"):
            load(tmp_path, "{" + ",".join(f'"{name}": 0' for name in names) + "}")
        return time.process_time() - began

    names = [f"k{i}" for i in range(8000)]
    assert seconds([*names, names[-1]]) < 10 * min(seconds(names) for _ in range(3))
