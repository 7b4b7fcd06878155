"""What jobs tell is stored when it is true: a job succeeds when its version is saved, and one that kills servers is paused."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
from database_world import job_record
from jobs_api_world import Server

from jaxlora.core.adapter_size import AdapterSize
from jaxlora.core.errors import NotFound
from jaxlora.core.lora import AdapterRef
from serve.db.jobs import StoredJobs
from serve.jobs import recorder as module
from serve.jobs.live_jobs import JobNews, Published
from serve.jobs.recorder import DEATHS, JobRecorder
from serve.jobs.service import MAX_DEATHS, JobService
from serve.runtime.job_names import JobNames
from train.jobs.job import JobEvent, JobView, Progress
from train.jobs.status import JobStatus

pytest_plugins = ["database_fixtures", "serve_fixtures"]


@pytest.fixture
def told(database, monkeypatch):
    """A recorder of the running jobs ftjob-1 and ftjob-2, and a disk that takes no version while it is `broken`."""
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    names, stored, disk = JobNames("org/base"), StoredJobs(database), SimpleNamespace(broken=set())

    def saved(ref, timeout_s):
        if ref.version in disk.broken:
            raise OSError("no room")

    recorder = JobRecorder(stored, names, saved)
    ended = []
    recorder.start(published=lambda record, version: None, ended=lambda record: ended.append(record.id))
    for id in ("ftjob-1", "ftjob-2"):
        record = job_record(id, status=JobStatus.RUNNING)
        stored.insert(record)
        names.add(id, "acme", "support", "")
        recorder.register(record)
    yield SimpleNamespace(recorder=recorder, stored=stored, disk=disk, ended=ended, names=names)
    recorder.close()


def news(id: str, state: JobStatus, *events: JobEvent) -> JobNews:
    told = {"code": None, "reason": None, "started_s": 1.0, "finished_s": None, "progress": Progress(step=4)}
    return JobNews(job=JobView(id=id, state=state, numbers={}, **told), events=events)


def version(id: str, number: int, *, final: bool) -> Published:
    ref = AdapterRef("acme", "support", number)
    return Published(
        job_id=id,
        step=4,
        ref=ref,
        time_s=1.0,
        checkpoint=True,
        final=final,
        size=AdapterSize(trainable_parameters=25, all_parameters=1000, nbytes=128),
        numbers={"loss": float(number)},
    )


def status(told, id: str) -> JobStatus:
    return told.stored.get(id, None).status


def checkpoints(told, id: str) -> list[int]:
    return [c.version for c in told.stored.checkpoints(id, None, after=None, limit=9).records]


def test_a_job_succeeds_when_its_version_is_saved_and_others_do_not_wait(told):
    told.disk.broken = {7}
    for id, number in (("ftjob-1", 7), ("ftjob-2", 8)):
        told.recorder.job_published(version(id, number, final=True))
        told.recorder.job_changed(news(id, JobStatus.SUCCEEDED))
    told.recorder.flush()
    assert (status(told, "ftjob-1"), status(told, "ftjob-2")) == (JobStatus.RUNNING, JobStatus.SUCCEEDED)
    late = told.stored.get("ftjob-1", None)
    assert late.error is not None
    assert late.error["code"] == "storage_failed"
    assert "final_version" not in late.progress
    assert told.ended == ["ftjob-2"], "the other's checkpoints are kept"
    messages = [e.message for e in told.stored.events_since("ftjob-1", None, 0, limit=9)]
    assert messages == ["version 7 is not saved yet: OSError; it is tried again"]
    told.disk.broken = set()
    until(lambda: status(told, "ftjob-1") is JobStatus.SUCCEEDED)
    assert told.stored.get("ftjob-1", None).progress["final_version"] == 7
    assert told.stored.get("ftjob-1", None).error is None
    assert checkpoints(told, "ftjob-1") == [7]


def test_who_is_told_of_a_model_or_of_an_end_may_use_it_at_once(told, monkeypatch):
    """Whoever reads the database the moment that it is written."""
    record = job_record("ftjob-0123456789ab", status=JobStatus.RUNNING)
    id, save, read = record.id, StoredJobs.save, []
    told.stored.insert(record)
    told.names.add(id, "acme", "seen", "")
    told.recorder.register(record)

    def then_read(self, record, **how):
        save(self, record, **how)
        name = told.names.full(record.id)
        read.append((told.names.find("acme", name) is not None, told.names.makes("acme", "seen")))

    monkeypatch.setattr(StoredJobs, "save", then_read)
    told.recorder.job_published(version(id, 8, final=False))
    told.recorder.job_published(version(id, 9, final=True))
    told.recorder.job_changed(news(id, JobStatus.SUCCEEDED))
    told.recorder.flush()
    assert read == [(True, True), (True, True), (True, False)]


def test_a_checkpoint_that_is_not_saved_is_not_listed_and_its_job_goes_on(told):
    told.disk.broken = {1}
    told.recorder.job_published(version("ftjob-1", 1, final=False))
    told.recorder.job_changed(news("ftjob-1", JobStatus.PAUSED))
    told.recorder.flush()
    assert status(told, "ftjob-1") is JobStatus.PAUSED
    assert checkpoints(told, "ftjob-1") == []
    told.disk.broken = set()
    until(lambda: checkpoints(told, "ftjob-1") == [1])


def test_a_success_that_was_never_saved_is_not_stored_at_the_end_either(told):
    told.disk.broken = {7}
    told.recorder.job_published(version("ftjob-1", 7, final=True))
    told.recorder.job_changed(news("ftjob-1", JobStatus.SUCCEEDED))
    told.recorder.close()
    assert status(told, "ftjob-1") is JobStatus.QUEUED, "the next start goes on with it"
    assert told.ended == []


def test_a_job_whose_version_is_late_can_be_cancelled(told):
    told.disk.broken = {7}
    told.recorder.job_published(version("ftjob-1", 7, final=True))
    told.recorder.job_changed(news("ftjob-1", JobStatus.SUCCEEDED))
    told.recorder.change("ftjob-1", lambda now: module.replace(now, status=JobStatus.CANCELLED))
    told.disk.broken = set()
    until(lambda: not told.recorder._late)
    assert status(told, "ftjob-1") is JobStatus.CANCELLED


def test_a_clean_end_says_that_running_jobs_wait(told):
    told.recorder.close()
    assert status(told, "ftjob-1") is JobStatus.QUEUED


# ---- a job that kills servers


def test_a_job_that_ran_at_three_deaths_of_the_server_is_paused_and_others_go_on(
    world, tmp_path, database_url, monkeypatch
):
    begun: list[str] = []
    monkeypatch.setattr(JobService, "_begin", lambda self, record: begun.append(record.id))
    server = Server(world, tmp_path, database=database_url)
    stored = server.host.service.stored
    for id, state in (("ftjob-pill", JobStatus.RUNNING), ("ftjob-line", JobStatus.QUEUED)):
        stored.insert(job_record(id, status=state))
    deaths = []
    for _ in range(MAX_DEATHS):
        server.stop(hard=True)
        server = Server(world, tmp_path, database=database_url)
        server.host.service.restart()
        stored = server.host.service.stored
        record = stored.get("ftjob-pill", None)
        deaths.append((record.status, record.progress[DEATHS]))
    assert deaths == [(JobStatus.RUNNING, 1), (JobStatus.RUNNING, 2), (JobStatus.PAUSED, 0)]
    assert record.error == {
        "code": "server_died",
        "message": "the server died 3 times while this job ran; resume it to try again",
        "param": None,
    }
    assert stored.get("ftjob-line", None).status is JobStatus.QUEUED
    assert sorted(begun) == ["ftjob-line"] * 3 + ["ftjob-pill"] * 2
    server.stop(hard=True)


def test_a_checkpoint_clears_the_deaths_of_a_job(told):
    record = told.stored.get("ftjob-1", None)
    told.recorder.register(module.replace(record, progress={DEATHS: 2}))
    told.recorder.job_changed(news("ftjob-1", JobStatus.RUNNING))
    told.recorder.flush()
    assert told.stored.get("ftjob-1", None).progress[DEATHS] == 2
    saved = JobEvent(seq=1, time_s=1.0, level="info", kind="checkpoint", message="step 4 is saved", data={"step": 4})
    told.recorder.job_changed(news("ftjob-1", JobStatus.RUNNING, saved))
    told.recorder.flush()
    assert told.stored.get("ftjob-1", None).progress[DEATHS] == 0


@pytest.mark.parametrize("column", ["request", "resolved", "metadata", "progress", "status"])
@pytest.mark.parametrize("text", ["", "{", "[]", '{"seed": "x"}', "\\ud800"])
def test_a_damaged_row_is_left_out_and_all_others_are_found(told, database, column, text):
    def damage(session):
        session.connection().exec_driver_sql(f"UPDATE jobs SET {column} = '{text}' WHERE id = 'ftjob-1'")

    database.write(damage)
    found = [record.id for record in told.stored.unfinished()]
    assert found in (["ftjob-2"], ["ftjob-1", "ftjob-2"])
    assert "ftjob-2" in [record.id for record, _ in told.stored.history()]
    if text == "{":
        assert found == ["ftjob-2"]
        with pytest.raises((ValueError, NotFound)):
            told.stored.get("ftjob-1", None)


def until(done) -> None:
    ends = time.monotonic() + 20
    while not done():
        assert time.monotonic() < ends
        threading.Event().wait(0.005)
