"""The scorer's line, in which of each job the newest version waits and tenants take turns; and what a file asks."""

from __future__ import annotations

import csv
import io
import json
import threading
from dataclasses import replace

import pytest
from database_world import job_record
from fake_tokenizer import FakeTokenizer

from jaxlora.core.adapter_size import AdapterSize
from jaxlora.core.errors import DataInvalid
from jaxlora.core.lora import AdapterRef
from serve.db.job_spec import Evaluation
from serve.jobs import scoring
from serve.jobs.live_jobs import Published
from serve.jobs.scoring import Task, Turns
from train.data.load import LengthLimit, load_file

pyarrow = pytest.importorskip("pyarrow", reason="the group `test` brings pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ASKED = Evaluation(file="file-1", metrics=("exact_match",))


def task(tenant: str, job: str, version: int) -> Task:
    record = replace(job_record(f"ftjob-{job}", tenant))
    ref = AdapterRef(tenant, "bot", version)
    published = Published(
        job_id=record.id,
        step=version,
        ref=ref,
        time_s=0.0,
        checkpoint=False,
        final=False,
        size=AdapterSize(trainable_parameters=1, all_parameters=2, nbytes=4),
        numbers={},
    )
    return Task(record, ASKED, published)


def taken(turns: Turns, count: int) -> list[tuple[str, str, int]]:
    out = []
    for _ in range(count):
        it = turns.take()
        assert it is not None
        out.append((it.record.tenant, it.record.id.removeprefix("ftjob-"), it.version.ref.version))
    return out


def test_a_tenant_with_many_jobs_waits_behind_one_version_of_another():
    turns = Turns()
    for job in range(50):
        turns.put(task("flood", str(job), 1))
    turns.put(task("quiet", "q", 1))
    assert taken(turns, 3) == [("flood", "0", 1), ("quiet", "q", 1), ("flood", "1", 1)]


def test_of_a_job_only_the_newest_version_waits():
    turns = Turns()
    for version in range(1, 1000):
        turns.put(task("acme", "a", version))
    turns.put(task("acme", "b", 1))
    assert taken(turns, 2) == [("acme", "a", 999), ("acme", "b", 1)]
    turns.put(task("acme", "a", 1000))
    assert taken(turns, 1) == [("acme", "a", 1000)]


def test_one_that_waits_hears_of_a_version_and_of_the_end():
    turns, got = Turns(), []
    thread = threading.Thread(target=lambda: got.extend([turns.take(), turns.take()]))
    thread.start()
    first = task("acme", "a", 1)
    turns.put(first)
    turns.close()
    thread.join(10)
    assert not thread.is_alive()
    assert got[-1] is None


ASK, ANSWER = "Say ä, b", ' "x"; y'
CHAT = {"messages": [{"role": "user", "content": ASK}, {"role": "assistant", "content": ANSWER}]}
SHARED = {"conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": ANSWER}]}
ALPACA = {"instruction": ASK, "output": ANSWER}
PLAIN = {"prompt": ASK, "completion": ANSWER}


def jsonl(*rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def csv_of(row: dict[str, str]) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out).writerows([row.keys(), row.values()])
    return out.getvalue().encode()


def parquet_of(row) -> bytes:
    out = io.BytesIO()
    pq.write_table(pyarrow.Table.from_pylist([row]), out)
    return out.getvalue()


@pytest.fixture
def questions(tmp_path):
    """The questions of a file of these bytes."""

    def questions(content: bytes, most: int = 9):
        (tmp_path / "held").write_bytes(content)
        limit = LengthLimit(lane_tokens=200)
        loaded = load_file(tmp_path / "held", FakeTokenizer(), limit=limit, loss=None, name="the file")  # ty: ignore[invalid-argument-type]
        return scoring.questions(loaded, FakeTokenizer(), most)

    return questions


@pytest.mark.parametrize(
    "content",
    [
        jsonl(CHAT),
        b"\xef\xbb\xbf" + json.dumps([CHAT], indent=1).encode(),
        jsonl(ALPACA),
        csv_of(ALPACA),
        jsonl(SHARED),
        parquet_of(SHARED),
        parquet_of(CHAT),
    ],
    ids=["chat", "array", "alpaca", "csv", "sharegpt", "parquet-sharegpt", "parquet-chat"],
)
def test_a_conversation_asks_the_same_in_every_format(questions, content):
    (found,) = questions(content)
    assert found.prompt == tuple(FakeTokenizer().chat(CHAT["messages"][:1])), "as serving would prompt"
    assert found.wanted == ANSWER


@pytest.mark.parametrize("content", [jsonl(PLAIN), csv_of(PLAIN), parquet_of(PLAIN)], ids=["jsonl", "csv", "parquet"])
def test_a_completion_asks_the_same_in_every_format(questions, content):
    (found,) = questions(content)
    assert (found.prompt, found.wanted) == (tuple(FakeTokenizer().encode(ASK)), ANSWER)


def test_the_last_trained_turn_is_the_answer(questions):
    turns = [*CHAT["messages"], {"role": "user", "content": "and"}, {"role": "assistant", "content": "more"}]
    muted = [*turns[:3], turns[3] | {"weight": 0}]
    last, before = questions(jsonl({"messages": turns}, {"messages": muted}))
    assert (last.prompt, last.wanted) == (tuple(FakeTokenizer().chat(turns[:3])), "more")
    assert (before.prompt, before.wanted) == (tuple(FakeTokenizer().chat(turns[:1])), ANSWER)


def test_the_first_examples_are_asked(questions):
    assert [q.wanted for q in questions(jsonl(*[PLAIN | {"completion": str(i)} for i in range(5)]), most=2)] == [
        "0",
        "1",
    ]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([PLAIN, {"prompt": 3, "completion": "x"}], r"the file is not valid:\nline 2, prompt: must be a string"),
        ([PLAIN, CHAT | {"x": 1}], r"the file is not valid:\nline 2, x: unknown key"),
        ([{"text": ASK}], "example 1 of the evaluation file has no prompt with an answer; give conversations"),
        (
            [{"input_ids": [4, 5], "weights": [0, 1]}],
            "example 1 of the evaluation file has no prompt with an answer",
        ),
        ([{"prompt": ASK, "chosen": "a", "rejected": "b"}], "example 1 of the evaluation file has no prompt with an"),
    ],
    ids=["field", "key", "text", "no-end", "preference"],
)
def test_a_file_that_asks_nothing_says_so(questions, rows, says):
    with pytest.raises(DataInvalid, match=says):
        questions(jsonl(*rows))
