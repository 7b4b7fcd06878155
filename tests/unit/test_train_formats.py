"""Files of training data: every format holds the same examples, and what is none of them is told as what it is."""

from __future__ import annotations

import csv
import io
import json
import random
import sys

import pytest
from fake_tokenizer import FakeTokenizer

from jaxlora.core.errors import DataInvalid
from train.data import file_formats
from train.data.load import LengthLimit, load_file, load_records
from train.data.records import read_record

pyarrow = pytest.importorskip("pyarrow", reason="the group `test` brings pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

MAX = 300
ROWS = [("Say it", "", "ä, b"), ('Say "x"', "two\nlines", "y;\tz"), ("tab\there", "more", "c")]
CHATS = [
    {"messages": [{"role": "user", "content": f"{a}\n\n{b}" if b else a}, {"role": "assistant", "content": c}]}
    for a, b, c in ROWS
]
ALPACA = [{"instruction": a, "input": b, "output": c} for a, b, c in ROWS]
SHARED = [
    {
        "conversations": [
            {"from": who, "value": m["content"]} for who, m in zip(("human", "gpt"), chat["messages"], strict=True)
        ]
    }
    for chat in CHATS
]
PAIRS = [
    {
        "input": {"messages": chat["messages"][:1]},
        "preferred_output": chat["messages"][1:],
        "non_preferred_output": [{"role": "assistant", "content": "no"}],
    }
    for chat in CHATS
]
CHOSEN = [
    {"prompt": c["messages"][0]["content"], "chosen": c["messages"][1]["content"], "rejected": "no"} for c in CHATS
]


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows, delimiter=",") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
    return out.getvalue().encode()


def parquet(rows, **how) -> bytes:
    out = io.BytesIO()
    pq.write_table(pyarrow.Table.from_pylist(rows), out, **how)
    return out.getvalue()


def plain(units):
    return [(e.tokens.tolist(), e.weights.tolist()) for unit in units for e in unit.segments]


@pytest.fixture
def load(tmp_path):
    """What a file of these bytes holds; what it says of long examples is its `note`."""

    def load(content: bytes, *, max_tokens=MAX, loss=None, **how):
        (tmp_path / "data").write_bytes(content)
        limit = LengthLimit(lane_tokens=max_tokens - 1, **how)
        return load_file(tmp_path / "data", FakeTokenizer(), limit=limit, loss=loss, name="data")

    return load


def refusal(load, content: bytes, **how) -> str:
    with pytest.raises(DataInvalid) as caught:
        load(content, **how)
    return caught.value.message


BOM = b"\xef\xbb\xbf"
SAME = {
    "jsonl": jsonl(CHATS),
    "jsonl-bom": BOM + jsonl(CHATS),
    "jsonl-no-last-newline": jsonl(CHATS).rstrip(),
    "jsonl-about": jsonl([c | {"id": 3, "source": "web"} for c in CHATS]),
    "array": json.dumps(CHATS, indent=2).encode(),
    "array-bom": BOM + b" \n" + json.dumps(CHATS, ensure_ascii=False).encode() + b"\n",
    "alpaca": jsonl(ALPACA),
    "alpaca-null": jsonl(
        [{k: v or None for k, v in row.items()} | {"text": "all of it", "system": None} for row in ALPACA]
    ),
    "alpaca-array": json.dumps(ALPACA).encode(),
    "sharegpt": jsonl(SHARED),
    "sharegpt-array": json.dumps(SHARED).encode(),
    "sharegpt-roles": jsonl([{"conversations": chat["messages"]} for chat in CHATS]),
    "csv-alpaca": table(ALPACA),
    "csv-bom": BOM + table(ALPACA),
    "csv-capitals": table([{k.title(): v for k, v in row.items()} for row in ALPACA]),
    "csv-semicolons": table(ALPACA, ";"),
    "csv-unix": table(ALPACA).replace(b"\r\n", b"\n"),
    "csv-chats": table(CHATS),
    "csv-about": table([row | {"id": "1", "category": "x"} for row in ALPACA]),
    "tsv": table(ALPACA, "\t"),
    "parquet-alpaca": parquet(ALPACA),
    "parquet-chats": parquet(CHATS, compression="zstd"),
    "parquet-sharegpt": parquet([row | {"system": None, "score": 0.5} for row in SHARED], row_group_size=1),
}


@pytest.mark.parametrize("form", SAME)
def test_a_conversation_is_the_same_example_in_every_format(load, form):
    assert plain(load(SAME[form]).units) == plain(load(jsonl(CHATS)).units)
    assert len(load(SAME[form]).units) == len(ROWS)


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (jsonl(CHOSEN), PAIRS),
        (table(CHOSEN), PAIRS),
        (parquet(CHOSEN), PAIRS),
        (table(PAIRS), PAIRS),
        (parquet(PAIRS), PAIRS),
        (
            jsonl(
                [
                    {"chosen": [*p["input"]["messages"], *p["preferred_output"]]}
                    | {"rejected": [*p["input"]["messages"], *p["non_preferred_output"]]}
                    for p in PAIRS
                ]
            ),
            PAIRS,
        ),
        (
            jsonl(
                [
                    {"prompt": p["input"]["messages"], "chosen": p["preferred_output"]}
                    | {"rejected": p["non_preferred_output"]}
                    for p in PAIRS
                ]
            ),
            PAIRS,
        ),
    ],
    ids=["texts", "csv-texts", "parquet-texts", "csv", "parquet", "whole-conversations", "messages"],
)
def test_a_preference_is_the_same_pair_in_every_format(load, content, rows):
    assert plain(load(content, loss="dpo").units) == plain(load(jsonl(rows), loss="dpo").units)


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "ä", "completion": "b"}, {"prompt": "c", "completion": "d"}],
        [{"text": "abc"}, {"text": "def"}],
        [{"input_ids": [4, 5, 6], "weights": [0.0, 1.5, -1.0]}],
        [{"input_ids": [4, 5], "logprobs": [0.0, -1.5], "advantages": [0.0, 1.0], "weights": [0.0, 2.0]}],
    ],
    ids=["completion", "text", "ids", "rollouts"],
)
def test_other_kinds_come_in_every_format(load, rows):
    wanted = plain(load(jsonl(rows)).units)
    for content in (json.dumps(rows).encode(), table(rows), table(rows, "\t"), parquet(rows)):
        assert plain(load(content).units) == wanted


# What is none of them.


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"hello there\nyou", r"begins with 'hello there', which is none of what is read; give JSONL .*CSV.*Parquet"),
        (b"question,answer\na,b\n", r"columns question, answer, which are of no known kind; give examples \(messages"),
        (b"question\tanswer\na\tb\n", "columns question, answer"),
        (b"\x1f\x8b\x08\x00", "is a gzip file; unpack it first; accepted are JSONL"),
        (b"PK\x03\x04stuff", "an Excel workbook; unpack it, or save it as CSV"),
        ("{}".encode("utf-16"), "is text in UTF-16; save it as UTF-8"),
        (b"\x00\x01\x02", "begins with"),
        (
            b"prompt,completion,weight\na,b,c\n",
            "column weight is not known for prompt and completion; known are prompt",
        ),
        (b"prompt,answer\na,b\n", "column answer is not known"),
        (b"prompt,id\na,b\n", "column completion is missing for prompt and completion; the file has prompt, id"),
        (b"prompt,completion,Prompt\na,b,c\n", "two columns are called prompt"),
        (b"PAR1 and no more", "not whole Parquet"),
        (parquet(ALPACA)[:-9], "not whole Parquet"),
        (parquet([{"question": "a", "answer": "b"}]), "columns question, answer are of no known kind"),
        (parquet([{"prompt": "a", "completion": "b", "rank": 1}]), "column rank is not known"),
        (b"", "data has no examples; give JSONL"),
        (b"[]", "data has no examples"),
        (b"prompt,completion\n", "data has no examples"),
    ],
)
def test_a_file_of_no_known_kind_says_what_was_seen_and_what_is_accepted(load, content, says):
    with pytest.raises(DataInvalid, match=says):
        load(content)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (jsonl([ALPACA[0], ALPACA[1] | {"output": 3}]), "line 2, output: must be a string"),
        (jsonl([ALPACA[0], ALPACA[1] | {"inputs": "x"}]), "line 2, inputs: unknown key; known are instruction, output"),
        (jsonl([{"instruction": "x"}]), "line 1, output: is missing"),
        (
            jsonl([{"conversations": [{"from": "tool", "value": "x"}]}]),
            r"line 1, conversations\[0\].from: must be one of",
        ),
        (jsonl([{"conversations": [{"from": "gpt", "value": 3}]}]), r"line 1, conversations\[0\].value: must be a str"),
        (
            jsonl([{"system": "s", "conversations": [{"from": "human", "value": "x"}]}]),
            r"line 1, conversations\[0\].from: the last message must be an assistant's",
        ),
        (jsonl([{"chosen": "a", "rejected": "a", "prompt": "p"}]), "line 1, chosen: .*are the same"),
        (jsonl([{"chosen": [], "rejected": [], "prompt": "p"}]), "line 1, chosen: must be a list of at least one"),
        (
            jsonl([CHATS[0], PAIRS[0]]),
            "line 2: this is one of the preference pairs .*but line 1 is one of the examples",
        ),
        (json.dumps([*CHATS, 3]).encode(), "element 4: must be an object, got a number"),
        (json.dumps([*CHATS, {"text": 3}, *CHATS]).encode(), "element 4, text: must be a string"),
        (json.dumps(CHATS).encode()[:-1], "element 3: the array does not end with ]"),
        (json.dumps(CHATS).encode()[:-3], "element 3: the array does not end with ]"),
        (json.dumps(CHATS).encode() + b"x", "element 4: something follows the end of the array"),
        (b'[{"text": "ab"}, {"text": "ab", "text": "c"}]', "element 2, text: the key is given twice"),
        (b'[{"text": "ab"} {"text": "ab"}]', "element 1: not JSON: Extra data"),
        (b'[{"text": "\xff"}]', "element 1: not UTF-8"),
        (b"prompt,completion\na,b\nc\n", "line 3: 1 cells, but the header names 2 columns"),
        (b'prompt,completion\n"a\nb",c\nd,"e"f\ng,h\n', "line 4: not CSV: .*quote a cell"),
        (b'prompt,completion\na,"b\n', "line 2: not CSV: unexpected end of data"),
        (b"prompt,completion\na,\xff\nb,c\n", "line 2, completion: not UTF-8"),
        (b"input_ids,weights\n[4],x\n", "line 2, weights: must be JSON: not JSON"),
        (parquet([*ALPACA, ALPACA[0] | {"output": None}]), "row 4, output: is missing"),
        (parquet([{"text": b"bytes"}]), "row 1, text: must be a string, got bytes"),
    ],
)
def test_a_bad_record_is_named_where_its_writer_finds_it(load, content, says):
    with pytest.raises(DataInvalid, match=says):
        load(content)


def test_parquet_without_pyarrow_says_what_to_install(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    says = refusal(load, parquet(ALPACA))
    assert "install it with `uv sync --extra data` or `pip install 'jaxlora[data]'`" in says
    assert len(says.splitlines()) == 2  # of which the first names the file


@pytest.mark.parametrize("part", [1, 2, 3, 7, 10**6])
def test_an_array_is_read_alike_in_pieces_of_any_size(load, monkeypatch, part):
    rng = random.Random(part)
    rows = [{"text": "".join(rng.choices('ab"\\[]{},\n é', k=rng.randrange(2, 30)))} for _ in range(40)]
    monkeypatch.setattr(file_formats, "PART_BYTES", part)
    for how in ({"indent": 1}, {"ensure_ascii": False}):
        assert plain(load(json.dumps(rows, **how).encode()).units) == plain(load(jsonl(rows)).units)


# What is too long.

LONG = {"text": "x" * (MAX + 40)}
MIXED = [{"text": "ab"}, LONG, {"text": "cd"}, {"text": "y" * (MAX + 1)}, {"text": "z" * MAX}]


def test_a_long_example_refuses_the_file_and_names_the_setting_and_the_value_that_would_fit(load):
    says = refusal(load, jsonl(MIXED), setting="training.lane_tokens")
    assert "line 2, text: 340 tokens, more than the 300 allowed" in says
    assert (
        "2 of 5 are longer than training.lane_tokens = 299 holds (lines 2, 4); training.lane_tokens = 352 would hold all; "
        'or set too_long = "skip" or "truncate"'
    ) in says
    assert len(load(jsonl(MIXED), max_tokens=353).units) == 5


def test_long_examples_are_left_out_and_counted(load):
    loaded = load(jsonl(MIXED), too_long="skip")
    assert [len(e) for e in loaded.units] == [2, 2, MAX]
    assert loaded.note == (
        "2 of 5 are longer than lane_tokens = 299 holds and were left out (lines 2, 4); lane_tokens = 352 would hold all"
    )
    assert load(jsonl(MIXED[:1]), too_long="skip").note is None
    assert "1 of 1 is longer" in refusal(load, jsonl([LONG]), too_long="skip")
    many = load(jsonl([*[LONG] * 14, MIXED[0]]), too_long="skip")
    assert "(lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 4 more)" in many.note


def test_long_examples_are_cut_and_one_without_anything_to_train_is_left_out(load):
    chat = [{"role": "user", "content": "q" * 40}, {"role": "assistant", "content": "a" * 400}]
    asked = [{"role": "user", "content": "q" * 400}, {"role": "assistant", "content": "a"}]
    rows = [*MIXED, {"messages": chat}, {"messages": asked}]
    loaded = load(jsonl(rows), too_long="truncate")
    assert [len(e) for e in loaded.units] == [2, MAX, 2, MAX, MAX, MAX]
    whole = read_record(rows[5], FakeTokenizer(), 10**6)
    assert plain(loaded.units[5:]) == [(whole.tokens[:MAX].tolist(), whole.weights[:MAX].tolist())]
    assert "4 of 7 are longer than lane_tokens = 299 holds and were cut (lines 2, 4, 6, 7)" in loaded.note
    assert "; of 1 nothing to train remained" in loaded.note


@pytest.mark.parametrize(("first", "second"), [(500, 3), (3, 500), (400, 500)])
def test_a_long_pair_is_cut_to_fit_one_lane(load, first, second):
    row = {"prompt": "p", "chosen": "a" * first, "rejected": "b" * second}
    (pair,) = load(jsonl([row]), too_long="truncate", loss="dpo").units
    whole = read_record(row, FakeTokenizer(), 10**6)
    assert MAX - 2 <= pair.predictions <= MAX - 1
    for cut, side, length in zip(pair.segments, whole.segments, (first, second), strict=True):
        assert cut.tokens.tolist() == side.tokens[: len(cut)].tolist()
        assert length > 3 or len(cut) == len(side)


def test_a_long_rollout_is_cut_in_all_of_its_columns(load):
    ids = [4] * (MAX + 10)
    row = {"input_ids": ids, "logprobs": [-1.0] * len(ids), "advantages": [*range(len(ids))]}
    (unit,) = load(jsonl([row]), too_long="truncate").units
    assert (len(unit), len(unit.rollout.logprobs), unit.rollout.advantages[-1]) == (MAX, MAX, MAX - 1)


def test_the_lane_that_would_hold_a_text_is_exact_where_it_is_measured_or_cut(load):
    """By its bytes a text of 2000 one-byte tokens has at least 500."""
    content = jsonl([{"text": "ab"}, {"text": "x" * 2000}])
    assert "lane_tokens = 512 or more would hold all" in refusal(load, content)
    assert "lane_tokens = 2016 would hold all" in refusal(load, content, measured=True)
    assert "lane_tokens = 512 or more would hold all" in load(content, too_long="skip").note
    assert "lane_tokens = 2016 would hold all" in load(content, too_long="skip", measured=True).note
    cut = load(content, too_long="truncate")
    assert ([len(unit) for unit in cut.units], "lane_tokens = 2016 would hold all" in cut.note) == ([2, MAX], True)


@pytest.mark.parametrize("form", ["jsonl", "array", "csv"])
def test_a_record_that_is_too_large_to_be_read_is_passed_over(load, form):
    """It is longer than any text of so many tokens; the records after it are read."""
    most = LengthLimit(lane_tokens=MAX - 1).most_bytes(FakeTokenizer())
    rows = [{"text": "ab"}, {"text": 'a"\n,x' * most}, {"text": "cd"}]
    content = {"jsonl": jsonl(rows), "array": json.dumps(rows).encode(), "csv": table([r | {"id": ""} for r in rows])}
    for how in ("skip", "truncate"):
        loaded = load(content[form], too_long=how)
        assert [len(e) for e in loaded.units] == [2, 2]
        assert "1 of 3 is longer" in loaded.note
    assert "bytes, more than the" in refusal(load, content[form])


def test_records_of_a_list_take_the_same_choice():
    limit = LengthLimit(lane_tokens=MAX - 1, too_long="skip")
    loaded = load_records(MIXED, FakeTokenizer(), limit=limit, loss="cross_entropy")
    assert (len(loaded.units), "(examples 1, 3)" in loaded.note) == (3, True)
