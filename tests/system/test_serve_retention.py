"""What a running server's database forgets, and what it must keep, on SQLite and (`-m postgres`) on PostgreSQL."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace

import pytest
from database_world import checkpoint_record, event, job_record
from sqlalchemy import func, select, update

from jaxlora.config.serving import RetentionSection
from jaxlora.core.errors import NotFound
from serve.db import retention
from serve.db.database import Database
from serve.db.idempotency import KEPT_S, StoredAnswers
from serve.db.jobs import StoredJobs
from serve.db.models import AnswerRecord, EventRecord, JobFileRecord, StoredAnswer
from serve.db.retention import DAY_S, Retention, prune
from train.jobs.status import JobStatus

pytest_plugins = ["database_fixtures"]
KEEP = RetentionSection(job_events_days=3, jobs_days=10)
NOW_S = 1000 * DAY_S


def count(database, record) -> int:
    return database.read(lambda s: s.scalars(select(func.count()).select_from(record)).one())


def add(jobs: StoredJobs, id: str, *, days_ago: float | None, status=JobStatus.FAILED, events=3, **changes) -> None:
    """A job that ended so long ago; None: it has not ended."""
    finished_s = None if days_ago is None else NOW_S - days_ago * DAY_S
    record = replace(job_record(id, created_s=1.0, **changes), status=status, finished_s=finished_s)
    jobs.insert(record, events=[event(f"{i}") for i in range(events)])


def test_events_of_a_job_go_days_after_its_end_and_its_row_later(database):
    jobs = StoredJobs(database)
    add(jobs, "ftjob-new", days_ago=1)
    add(jobs, "ftjob-quiet", days_ago=4)
    add(jobs, "ftjob-old", days_ago=11)
    add(jobs, "ftjob-runs", days_ago=None, status=JobStatus.RUNNING)
    add(jobs, "ftjob-paused", days_ago=400, status=JobStatus.PAUSED)
    assert prune(database, KEEP, NOW_S) == 3 + 3 + 1
    left = {id: len(jobs.events_since(id, None, 0, limit=9)) for id in ("ftjob-new", "ftjob-quiet", "ftjob-runs")}
    assert left == {"ftjob-new": 3, "ftjob-quiet": 0, "ftjob-runs": 3}
    assert jobs.get("ftjob-paused", None).status is JobStatus.PAUSED
    with pytest.raises(NotFound):
        jobs.get("ftjob-old", None)
    assert prune(database, KEEP, NOW_S) == 0


def test_a_job_that_made_a_version_is_never_forgotten(database):
    """Its row gives the model its name."""
    jobs = StoredJobs(database)
    add(jobs, "ftjob-1", days_ago=500, status=JobStatus.SUCCEEDED, events=1)
    add(jobs, "ftjob-2", days_ago=500, status=JobStatus.CANCELLED, events=1)
    jobs.save(jobs.get("ftjob-1", None), checkpoints=[checkpoint_record(1)])
    latest = jobs.get("ftjob-2", None)
    jobs.save(replace(latest, progress={**latest.progress, "version": 4}))
    prune(database, KEEP, NOW_S)
    assert {r.id for r, _ in jobs.history()} == {"ftjob-1", "ftjob-2"}
    assert count(database, EventRecord) == 0


def test_what_belongs_to_a_forgotten_job_goes_with_it(database):
    jobs = StoredJobs(database)
    add(jobs, "ftjob-1", days_ago=11)
    database.write(lambda s: s.add(JobFileRecord(job="ftjob-1", file="file-1")))
    prune(database, KEEP, NOW_S)
    assert count(database, JobFileRecord) == 0


def age(database: Database, created_s: float) -> None:
    """All answers are of that time."""
    database.write(lambda s: s.execute(update(AnswerRecord).values(created_s=created_s)))


def test_answers_go_after_a_day_in_transactions_of_a_few_rows(database, monkeypatch):
    monkeypatch.setattr(retention, "MOST", 2)
    answers = StoredAnswers(database)
    for i in range(7):
        answers.claim("acme", "POST /x", f"old-{i}", "", "me")
        answers.settle("acme", "POST /x", f"old-{i}", "me", StoredAnswer(status=200, body="{}"))
    age(database, NOW_S - KEPT_S - 1)
    answers.claim("acme", "POST /x", "new", "", "me")
    largest, write = 0, database.write

    def watched(work):
        nonlocal largest
        largest = max(largest, result := write(work))
        return result

    monkeypatch.setattr(database, "write", watched)
    assert prune(database, KEEP, NOW_S) == 7
    assert largest == 2
    assert count(database, AnswerRecord) == 1


def test_a_running_server_forgets_without_being_started_again(database, monkeypatch):
    monkeypatch.setattr(retention, "PERIOD_S", 0.01)
    with closing(Retention(database, KEEP)):
        time.sleep(0.03)  # it has looked, and there was nothing
        StoredAnswers(database).claim("acme", "POST /x", "key", "", "me")
        age(database, time.time() - KEPT_S - 1)
        ends = time.monotonic() + 10
        while count(database, AnswerRecord):
            assert time.monotonic() < ends
            time.sleep(0.01)
