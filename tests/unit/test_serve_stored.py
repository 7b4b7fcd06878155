"""What the database keeps of keys, files, jobs, Gradient's adapters and answers, and who sees it."""

import json
import time
from dataclasses import replace

import pytest
from database_world import checkpoint_record, event, file_record, gradient_record, job_record, key_record
from sqlalchemy import inspect

from jaxlora.core.errors import InvalidRequest, NotFound, QuotaExceeded, StateInvalid, Unavailable
from jaxlora.core.lora import AdapterRef, LoraSpec
from serve.db import idempotency
from serve.db.files import StoredFiles
from serve.db.gradient import StoredGradient
from serve.db.idempotency import CLAIM_S, StoredAnswers
from serve.db.job_spec import EarlyStopping, Hyperparameters, JobSpec, LoraChoice, Resolved
from serve.db.jobs import StoredJobs
from serve.db.keys import StoredKeys
from serve.db.models import StoredAnswer
from train.jobs.status import JobStatus

pytest_plugins = ["database_fixtures"]
NOW = 100.0


@pytest.fixture
def files(database):
    return StoredFiles(database)


@pytest.fixture
def jobs(database):
    return StoredJobs(database)


def ids(page):
    return [r.id for r in page.records]


class TestKeys:
    def test_are_kept_whole_and_revoked_once(self, database):
        keys = StoredKeys(database)
        keys.insert(key_record("key-1"))
        keys.insert(key_record("key-2", created_s=0.5, role="admin"))
        assert keys.all() == [key_record("key-2", created_s=0.5, role="admin"), key_record("key-1")]
        assert keys.counts() == (2, 0)
        revoked = keys.revoke("key-1", NOW)
        assert revoked == replace(key_record("key-1"), revoked_s=NOW)
        assert keys.revoke("key-1", NOW + 1) == revoked
        assert keys.counts() == (2, 1)

    @pytest.mark.parametrize("id", ["key-none", "", "\x00", "\ud800", "a" * 5000], ids=ascii)
    def test_no_id_is_more_than_unknown(self, database, id):
        with pytest.raises(NotFound):
            StoredKeys(database).revoke(id, NOW)


class TestFiles:
    def test_round_trip(self, files):
        files.insert(file_record(size_bytes=2**40), most_bytes=None)
        assert files.get("file-1", "acme", NOW) == file_record(size_bytes=2**40)
        assert files.get("file-1", None, NOW) == file_record(size_bytes=2**40)

    def test_of_another_tenant_is_like_unknown(self, files):
        files.insert(file_record(), most_bytes=None)
        messages = []
        for call in (lambda id: files.get(id, "other", NOW), lambda id: files.delete(id, "other", NOW)):
            for id in ("file-1", "file-2"):
                with pytest.raises(NotFound) as caught:
                    call(id)
                messages.append(caught.value.message.replace(id, "ID"))
        assert len(set(messages)) == 1
        assert ids(files.page("other", NOW, after=None, limit=9)) == []
        with pytest.raises(InvalidRequest):
            files.page("other", NOW, after="file-1", limit=9)

    def test_pages_are_stable_over_equal_times(self, files):
        for i in range(7):
            files.insert(file_record(f"file-{i}", created_s=float(i // 3)), most_bytes=None)
        files.insert(file_record("file-other", "other", created_s=1.0), most_bytes=None)
        for oldest_first in (False, True):
            seen, after = [], None
            while True:
                page = files.page("acme", NOW, after=after, limit=2, oldest_first=oldest_first)
                seen += ids(page)
                after = seen[-1]
                if not page.more:
                    break
            newest_first = [f"file-{i}" for i in (6, 5, 4, 3, 2, 1, 0)]
            assert seen == (newest_first[::-1] if oldest_first else newest_first)

    def test_list_by_purpose(self, files):
        files.insert(file_record("file-1"), most_bytes=None)
        files.insert(file_record("file-2", purpose="fine-tune-results"), most_bytes=None)
        assert ids(files.page(None, NOW, after=None, limit=9, purpose="fine-tune-results")) == ["file-2"]

    def test_quota_counts_what_the_tenant_has(self, files):
        files.insert(file_record("file-1", size_bytes=60), most_bytes=100)
        files.insert(file_record("file-2", "other", size_bytes=60), most_bytes=100)
        with pytest.raises(QuotaExceeded, match="40 bytes more"):
            files.insert(file_record("file-3", size_bytes=60), most_bytes=100)
        files.insert(file_record("file-4", size_bytes=40), most_bytes=100)
        files.delete("file-1", "acme", NOW)
        assert files.used_bytes("acme") == 40

    def test_deleted_is_gone_for_clients_and_waits_for_its_bytes_to_go(self, files):
        files.insert(file_record(), most_bytes=None)
        deleted = replace(file_record(), deleted_s=NOW)
        assert files.delete("file-1", "acme", NOW) == deleted
        with pytest.raises(NotFound):
            files.get("file-1", "acme", NOW)
        with pytest.raises(NotFound):
            files.delete("file-1", "acme", NOW)
        assert files.removable(NOW) == [deleted]
        assert files.known() == {"file-1"}
        files.forget("file-1")
        assert files.removable(NOW) == []
        assert files.known() == set()

    def test_past_its_time_is_gone(self, files):
        files.insert(file_record(expires_s=50.0), most_bytes=None)
        assert files.get("file-1", "acme", 49.9).expires_s == 50.0
        assert files.removable(49.9) == []
        with pytest.raises(NotFound):
            files.get("file-1", "acme", 50.0)
        assert ids(files.page(None, 50.0, after=None, limit=9)) == []
        assert [f.id for f in files.removable(50.0)] == ["file-1"]

    def test_a_file_that_a_job_needs_stays(self, files, jobs):
        files.insert(file_record("file-1", expires_s=50.0), most_bytes=None)
        jobs.insert(job_record(), files=["file-1", "file-1"])
        with pytest.raises(StateInvalid, match="ftjob-1"):
            files.delete("file-1", "acme", 2.0)
        assert files.removable(50.0) == []
        jobs.save(replace(job_record(), status=JobStatus.CANCELLED))
        assert [f.id for f in files.removable(50.0)] == ["file-1"]
        files.delete("file-1", "acme", 2.0)

    def test_a_record_is_of_its_moment(self, files):
        """What was handed out or in is no row of a session: no later write reaches it."""
        given = file_record()
        files.insert(given, most_bytes=None)
        found = files.get("file-1", None, NOW)
        files.judge("file-1", "processed", None)
        assert (given.status, found.status) == ("uploaded", "uploaded")
        assert (inspect(given).transient, inspect(found).detached) == (True, True)
        assert inspect(found).unloaded == set()

    def test_check_is_kept_and_what_was_not_checked_is_known(self, files):
        files.insert(file_record("file-1"), most_bytes=None)
        files.insert(file_record("file-2"), most_bytes=None)
        files.judge("file-1", "error", "line 1: not JSON")
        files.judge("file-gone", "error", "x")
        found = files.get("file-1", None, NOW)
        assert (found.status, found.status_details) == ("error", "line 1: not JSON")
        assert [f.id for f in files.unchecked()] == ["file-2"]


class TestJobs:
    def test_round_trip_of_any_json(self, jobs):
        jobs.insert(job_record(metadata={"k": "v"}))
        assert jobs.get("ftjob-1", "acme") == job_record(metadata={"k": "v"})

    def test_needs_its_files(self, jobs, files):
        files.insert(file_record("file-theirs", "other"), most_bytes=None)
        for file in ("file-none", "file-theirs"):
            with pytest.raises(NotFound):
                jobs.insert(job_record(), files=[file])
        assert jobs.unfinished() == []

    def test_state_events_and_checkpoints_are_saved_together(self, jobs):
        jobs.insert(job_record(), events=[event("created")])
        running = replace(
            job_record(), status=JobStatus.RUNNING, started_s=2.0, progress={"step": 10}, error={"code": "x"}
        )
        made = jobs.save(running, events=[event("step"), event("best")], checkpoints=[checkpoint_record(1)])
        assert [e.seq for e in made] == [2, 3]
        assert jobs.get("ftjob-1", None) == replace(running, next_seq=4)
        assert jobs.events_since("ftjob-1", "acme", 1, limit=9) == made
        assert jobs.checkpoints("ftjob-1", "acme", after=None, limit=9).records == [checkpoint_record(1)]

    def test_a_save_that_fails_changes_nothing(self, jobs):
        jobs.insert(job_record())
        jobs.save(job_record(), checkpoints=[checkpoint_record(1)])
        before = jobs.get("ftjob-1", None)
        twin = replace(checkpoint_record(1), step=11)
        with pytest.raises(Exception, match=r"(?i)unique"):
            jobs.save(replace(before, status=JobStatus.RUNNING), events=[event("x")], checkpoints=[twin])
        assert jobs.get("ftjob-1", None) == before
        assert jobs.events_since("ftjob-1", None, 0, limit=9) == []

    def test_a_step_done_again_after_a_crash_has_one_checkpoint(self, jobs):
        jobs.insert(job_record())
        jobs.save(job_record(), checkpoints=[checkpoint_record(1), checkpoint_record(2)])
        again = replace(checkpoint_record(1), id="ftckpt-9", version=9)
        jobs.save(job_record(), checkpoints=[again])
        found = jobs.checkpoints("ftjob-1", "acme", after=None, limit=9).records
        assert found == [replace(again, id="ftckpt-1"), checkpoint_record(2)]

    def test_events_and_checkpoints_page_newest_first(self, jobs):
        jobs.insert(job_record(), events=[event(str(i)) for i in range(5)])
        jobs.save(job_record(), checkpoints=[checkpoint_record(v) for v in (1, 2, 3)])
        first = jobs.events("ftjob-1", "acme", after=None, limit=3)
        rest = jobs.events("ftjob-1", "acme", after=first.records[-1].id, limit=3)
        assert [e.message for e in first.records + rest.records] == ["4", "3", "2", "1", "0"]
        assert (first.more, rest.more) == (True, False)
        page = jobs.checkpoints("ftjob-1", "acme", after="ftckpt-3", limit=1)
        assert ids(page) == ["ftckpt-2"]
        assert page.more

    def test_of_another_tenant_is_like_unknown(self, jobs):
        jobs.insert(job_record(), events=[event("x")])
        jobs.insert(job_record("ftjob-2", "other"), events=[event("y")])
        theirs = jobs.events("ftjob-2", "other", after=None, limit=9).records[0].id
        for id in ("ftjob-1", "ftjob-none"):
            for call in (
                lambda id: jobs.get(id, "other"),
                lambda id: jobs.events(id, "other", after=None, limit=9),
                lambda id: jobs.events_since(id, "other", 0, limit=9),
                lambda id: jobs.checkpoints(id, "other", after=None, limit=9),
            ):
                with pytest.raises(NotFound, match=id):
                    call(id)
        with pytest.raises(InvalidRequest):
            jobs.events("ftjob-1", "acme", after=theirs, limit=9)

    def test_list_by_metadata(self, jobs, monkeypatch):
        monkeypatch.setattr("serve.db.jobs.SCAN", 2)
        for i in range(6):
            jobs.insert(job_record(f"ftjob-{i}", created_s=float(i), metadata={"team": "ab"[i % 2], "n": str(i)}))
        first = jobs.page("acme", after=None, limit=2, metadata={"team": "a"})
        assert (ids(first), first.more) == (["ftjob-4", "ftjob-2"], True)
        rest = jobs.page("acme", after="ftjob-2", limit=2, metadata={"team": "a"})
        assert (ids(rest), rest.more) == (["ftjob-0"], False)
        assert ids(jobs.page("acme", after=None, limit=9, metadata={"team": "a", "n": "3"})) == []
        assert ids(jobs.page("acme", after=None, limit=1)) == ["ftjob-5"]

    def test_quota_counts_those_that_have_not_ended(self, jobs):
        jobs.insert(job_record("ftjob-1"), most=1)
        jobs.insert(job_record("ftjob-2", "other"), most=1)
        with pytest.raises(QuotaExceeded):
            jobs.insert(job_record("ftjob-3"), most=1)
        assert [j.id for j in jobs.unfinished() if j.tenant == "acme"] == ["ftjob-1"]
        jobs.save(replace(job_record("ftjob-1"), status=JobStatus.FAILED))
        jobs.insert(job_record("ftjob-3", created_s=0.0), most=1)
        assert [j.id for j in jobs.unfinished()] == ["ftjob-3", "ftjob-2"]


ASKED = {  # as earlier programs stored a body: with its nulls, its "auto"s and what asks for nothing
    "model": "org/base",
    "training_file": "file-1",
    "validation_file": None,
    "method": {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": "auto", "batch_size": 4, "beta": 1}}},
    "lora": {"r": 8, "target_modules": "all-linear", "init": "default"},
    "betas": [0.9, 0.95],
    "integrations": [],
    "seed": 0,
    "early_stopping": {"metric": "valid_loss", "patience": 3},
    "metadata": {"mode": "auto"},
    "evaluation": {"file": "file-2", "metrics": ["regex"], "samples": None},
    "publish": False,
}
DECIDED = {
    **{"seed": 7, "start": ["acme", "support", 2], "method": "dpo", "beta": 0.1, "n_epochs": 3, "batch_size": 4},
    **{"learning_rate_multiplier": 1.0, "learning_rate": 1e-4, "lr_schedule": "linear", "warmup_steps": 0},
    **{"weight_decay": 0.0, "max_grad_norm": 1.0, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "total_steps": 30},
    **{"checkpoint_every": 10, "eval_every": None, "weight": 1.0, "publish": True, "patience": None},
    **{"min_delta": 0.0, "keep_best": False},
    "spec": {"rank": 2, "alpha": 4.0, "targets": ["q_proj"], "rslora": True, "dropout": 0.0, "exceptions": []},
}


class TestJobSpec:
    def test_what_was_asked_is_read(self):
        asked = JobSpec.from_json(ASKED)
        assert asked.method_name == "dpo"
        assert asked.numbers == Hyperparameters(batch_size=4, beta=1.0)
        assert asked.lora == LoraChoice(r=8)
        assert (asked.seed, asked.betas, asked.publish, asked.keep_best) == (0, (0.9, 0.95), False, None)
        assert asked.early_stopping == EarlyStopping(patience=3)
        assert asked.metadata == {"mode": "auto"}
        assert asked.files == {"training_file": "file-1", "evaluation.file": "file-2"}
        assert JobSpec.from_json(asked.to_json()) == asked

    def test_hyperparameters_in_their_old_place_are_read(self):
        asked = JobSpec.from_json({"model": "m", "training_file": "f", "hyperparameters": {"n_epochs": 2}})
        assert (asked.method_name, asked.numbers) == ("supervised", Hyperparameters(n_epochs=2))

    def test_what_was_decided_is_read_and_stored_as_it_was(self):
        found = Resolved.from_json(DECIDED)
        assert (found.seed, found.start) == (7, AdapterRef("acme", "support", 2))
        assert found.plan is not None
        assert (found.plan.spec, found.plan.total_steps) == (
            LoraSpec(rank=2, alpha=4.0, targets=("q_proj",), rslora=True, dropout=0.0),
            30,
        )
        assert json.loads(json.dumps(found.to_json())) == DECIDED
        assert Resolved.from_json({"seed": 7}) == Resolved(seed=7)


class TestGradient:
    def test_life_of_an_adapter(self, database):
        adapters = StoredGradient(database)
        mine, theirs = gradient_record(), gradient_record("b" * 50, "other", created_s=2.0)
        adapters.insert(mine)
        adapters.insert(theirs)
        assert adapters.page(None, after=None, limit=9).records == [theirs, mine]
        assert adapters.page("acme", after=None, limit=9).records == [mine]
        after = adapters.trained(mine.id, "acme", NOW)
        assert after == replace(mine, calls=1, updated_s=NOW)
        assert adapters.get(mine.id, "acme") == after
        for call in (adapters.get, adapters.delete):
            with pytest.raises(NotFound):
                call(mine.id, "other")
        assert adapters.delete(mine.id, "acme") == after
        assert adapters.page(None, after=None, limit=9).records == [theirs]


class TestAnswers:
    @pytest.fixture
    def clock(self, monkeypatch):
        """A list of the database's time."""
        now = [NOW]
        monkeypatch.setattr(idempotency, "clock_s", lambda session: now[0])
        return now

    def test_a_repeated_request_gets_the_first_answer(self, database):
        answers = StoredAnswers(database)
        claim = ("acme", "POST /v1/files", "k")
        assert answers.claim(*claim, "sha", "first") is None
        with pytest.raises(Unavailable):
            answers.claim(*claim, "sha", "second")
        answers.settle(*claim, "first", StoredAnswer(status=200, body="{}"))
        assert answers.claim(*claim, "sha", "second") == StoredAnswer(status=200, body="{}")
        with pytest.raises(StateInvalid):
            answers.claim(*claim, "another", "second")
        for other in (("other", *claim[1:]), ("acme", "POST /v1/jobs", "k"), (*claim[:2], "l")):
            assert answers.claim(*other, "another", "second") is None

    def test_a_failed_one_is_new_again(self, database):
        answers = StoredAnswers(database)
        answers.claim("acme", "r", "k", "sha", "first")
        answers.release("acme", "r", "k", "first")
        assert answers.claim("acme", "r", "k", "another", "second") is None

    def test_is_kept_for_a_day(self, database, clock):
        answers = StoredAnswers(database)
        answers.claim("acme", "r", "k", "sha", "first")
        answers.settle("acme", "r", "k", "first", StoredAnswer(status=200, body="x"))
        clock[0] += 24 * 3600 - 1
        assert answers.claim("acme", "r", "k", "sha", "second") == StoredAnswer(status=200, body="x")
        clock[0] += 2
        assert answers.claim("acme", "r", "k", "another", "second") is None

    def test_a_dead_claim_is_taken_over_and_its_owner_changes_nothing_any_more(self, database, clock):
        answers = StoredAnswers(database)
        answers.claim("acme", "r", "k", "sha", "first")
        clock[0] += CLAIM_S - 1
        answers.renew("acme", "r", "k", "first")
        clock[0] += CLAIM_S - 1
        with pytest.raises(Unavailable):
            answers.claim("acme", "r", "k", "sha", "second")
        clock[0] += 2
        assert answers.claim("acme", "r", "k", "sha", "second") is None
        answers.renew("acme", "r", "k", "first")
        answers.release("acme", "r", "k", "first")
        answers.settle("acme", "r", "k", "first", StoredAnswer(status=200, body="old"))
        with pytest.raises(Unavailable):
            answers.claim("acme", "r", "k", "sha", "third")
        answers.settle("acme", "r", "k", "second", StoredAnswer(status=200, body="new"))
        assert answers.claim("acme", "r", "k", "sha", "third") == StoredAnswer(status=200, body="new")

    def test_the_clock_is_the_database_s(self, database):
        before = time.time()
        assert before - 5 < database.read(idempotency.clock_s) < time.time() + 5

    def test_a_server_that_starts_tidies(self, database):
        answers = StoredAnswers(database)
        answers.claim("acme", "r", "begun", "sha", "first")
        answers.claim("acme", "r", "done", "sha", "first")
        answers.settle("acme", "r", "done", "first", StoredAnswer(status=200, body="x"))
        answers.tidy()
        assert answers.claim("acme", "r", "begun", "another", "second") is None
        assert answers.claim("acme", "r", "done", "sha", "second") == StoredAnswer(status=200, body="x")

    @pytest.mark.parametrize("key", ["", "a" * 256, "\x00", "é"], ids=ascii)
    def test_a_key_must_be_plain_text(self, database, key):
        with pytest.raises(InvalidRequest, match="Idempotency-Key"):
            StoredAnswers(database).claim("acme", "r", key, "sha", "first")
