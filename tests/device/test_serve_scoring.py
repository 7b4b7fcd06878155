"""The scorer's line: of each job the newest version waits, and tenants take turns."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from database_world import job_record

from jaxlora.core.errors import DataInvalid
from jaxlora.core.lora import AdapterRef
from serve.db.job_spec import Evaluation
from serve.jobs import scoring
from serve.jobs.live_jobs import Published
from serve.jobs.scoring import Task, Turns

LINE = b'{"prompt": "say a", "completion": "a"}\n'
ASKED = Evaluation(file="file-1", metrics=("exact_match",))


def task(tenant: str, job: str, version: int) -> Task:
    record = replace(job_record(f"ftjob-{job}", tenant))
    ref = AdapterRef(tenant, "bot", version)
    published = Published(
        job_id=record.id, step=version, ref=ref, time_s=0.0, checkpoint=False, final=False, numbers={}
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


def test_a_line_of_an_evaluation_file_is_measured_before_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "LINE_BYTES", len(LINE))
    path = tmp_path / "held.jsonl"
    path.write_bytes(LINE + b"\n" + LINE.replace(b"say a", b"say aa") + LINE)
    tokens: list[str] = []

    def encode(text: str) -> list[int]:
        tokens.append(text)
        return [1]

    assert len(scoring.questions(path, lambda turns: [1], encode, 1)) == 1
    with pytest.raises(DataInvalid, match=f"line 3 of the evaluation file has more than {len(LINE)} bytes"):
        scoring.questions(path, lambda turns: [1], encode, 9)
    assert tokens == ["say a"] * 2
