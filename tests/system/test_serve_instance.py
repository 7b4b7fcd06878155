"""Whose a database, a data folder, a store and a bucket are: what does not belong together is refused, and nothing is deleted."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from database_world import checkpoint_record, event, file_record, job_record, key_record
from files_world import opened as opened_files
from serve_world import MODEL
from small_world import FIXTURES, tiny_path
from sqlalchemy import text
from test_house_kill import server
from typer.testing import CliRunner
from whole_world import whole_config

from jaxlora.checkpoints.load import Opened, base_hashes
from jaxlora.config.serving import BlobsSection, LimitsSection
from jaxlora.core.errors import ConfigInvalid, StateInvalid, StorageFailed, Unavailable
from serve.cli import main as cli
from serve.db import instance as claims
from serve.db.database import Database
from serve.db.files import StoredFiles
from serve.db.instance import Claim
from serve.db.jobs import StoredJobs
from serve.db.keys import StoredKeys
from serve.server.instance import RECORD, opened_instance, same_base
from train.jobs.status import JobStatus

pytest_plugins = ["database_fixtures"]
DAY_S = 86400.0


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(claims, "SPAN_S", 4.0)
    monkeypatch.setattr(claims, "POLL_S", 0.05)


@pytest.fixture
def settings(tmp_path):
    return replace(whole_config(tmp_path), blobs=BlobsSection(url=f"file://{tmp_path}/bucket"))


def started(settings, **how):
    """What a start wrote to the data folder."""
    with opened_instance(settings, **how):
        return json.loads((settings.data / RECORD).read_text())


def files_below(*folders: Path) -> dict[str, bytes]:
    """All bytes below the folders, but those of databases, locks and probes."""
    found = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
    return {str(p): p.read_bytes() for p in found if "sqlite" not in p.name and not p.name.startswith(".")}


def fill(settings) -> None:
    """A file that the database knows, on disk and in the bucket, and a checkpoint of a job."""
    with opened_instance(settings) as it:
        StoredFiles(it.database).insert(file_record(), most_bytes=None)
        for folder in (settings.data / "files/acme", settings.data / "jobs/states/ftjob-1/5"):
            folder.mkdir(parents=True)
        (settings.data / "files/acme/file-1").write_bytes(b"precious")
        (settings.data / "jobs/states/ftjob-1/5/meta").write_bytes(b"learned")
        assert it.remote is not None
        it.remote.blobs.put("files/acme/file-1", settings.data / "files/acme/file-1")


class TestWhatBelongsTogether:
    def test_each_start_is_written_to_all_places(self, settings, tmp_path):
        first, second = started(settings), started(settings)
        assert (first["id"], first["epoch"] + 1) == (second["id"], second["epoch"])
        for folder in (settings.adapters, tmp_path / "bucket"):
            assert json.loads((folder / RECORD).read_text()) == second

    @pytest.mark.parametrize("keep", [("data",), ("store",), ("bucket",), ("data", "store", "bucket")], ids="-".join)
    @pytest.mark.parametrize("old", [False, True], ids=["", "of-todays-version"])
    def test_an_empty_database_on_what_is_a_servers_is_refused_and_deletes_nothing(self, settings, tmp_path, keep, old):
        fill(settings)
        for path in settings.data.glob("*.sqlite*"):
            path.unlink()
        for name in {"data", "store", "bucket"} - set(keep):
            shutil.rmtree(tmp_path / name)
        if old:
            for path in tmp_path.rglob(RECORD):
                path.unlink()
            if keep == ("store",):  # which `jaxlora train` fills, too
                started(settings)
                return
        before = files_below(tmp_path)
        for _ in range(3):  # no number of starts makes it right
            with pytest.raises(StateInvalid, match=r"is new, but .* --adopt") as caught, opened_instance(settings):
                pass
            assert "\n" not in caught.value.message
        assert files_below(tmp_path) == before

    def test_a_database_of_keys_alone_is_new(self, settings):
        fill(settings)
        for path in settings.data.glob("*.sqlite*"):
            path.unlink()
        with contextlib.closing(Database(settings.database_url)) as database:
            StoredKeys(database).insert(key_record())
        with pytest.raises(StateInvalid, match="is new"), opened_instance(settings):
            pass

    def test_another_servers_database_is_refused(self, settings, tmp_path):
        fill(settings)
        other = replace(whole_config(tmp_path / "other"))
        started(other)
        before = files_below(tmp_path)
        with (
            pytest.raises(StateInvalid, match=r"is of server .* belongs to server"),
            opened_instance(replace(settings, database=other.database_url)),
        ):
            pass
        assert files_below(tmp_path) == before

    def test_a_folder_of_todays_version_is_refused_to_a_server_that_has_a_name(self, settings, tmp_path):
        for _ in range(2):
            started(settings)
        other = replace(settings, data=tmp_path / "other", database=settings.database_url, blobs=None)
        (tmp_path / "other/files/acme").mkdir(parents=True)
        (tmp_path / "other/files/acme/file-9").write_bytes(b"precious")
        with pytest.raises(StateInvalid, match=r"server without a name; .* --adopt"), opened_instance(other):
            pass

    def test_an_older_database_is_refused(self, settings, tmp_path):
        started(settings)
        shutil.copy(settings.data / "jaxlora.sqlite", tmp_path / "backup")
        fill(settings)
        shutil.copy(tmp_path / "backup", settings.data / "jaxlora.sqlite")
        before = files_below(tmp_path)
        for _ in range(3):
            with (
                pytest.raises(StateInvalid, match=r"is older than .* start 2 .* database 1"),
                opened_instance(settings),
            ):
                pass
        assert files_below(tmp_path) == before
        assert started(settings, adopt=True)["epoch"] == 3

    def test_a_copied_data_folder_is_refused_once_the_other_has_started(self, settings, tmp_path):
        """Both have the database; the bucket knows which of them is behind."""
        started(settings)
        shutil.copytree(settings.data, tmp_path / "copy")
        shutil.copytree(settings.adapters, tmp_path / "copied-store")
        copy = replace(settings, data=tmp_path / "copy", adapters=tmp_path / "copied-store")
        started(copy)  # a move to another machine
        with pytest.raises(StateInvalid, match="is older than file://"), opened_instance(settings):
            pass

    def test_adopting_keeps_what_the_database_does_not_know_for_days(self, settings, tmp_path, monkeypatch):
        fill(settings)
        for path in settings.data.glob("*.sqlite*"):
            path.unlink()
        here, there = settings.data / "files/acme/file-1", tmp_path / "bucket/files/acme/file-1"
        now_s = time.time()
        for days, is_there in ((0, True), (6.9, True), (7.1, False)):
            monkeypatch.setattr(time, "time", lambda days=days: now_s + days * DAY_S)
            with (
                opened_instance(settings, adopt=days == 0) as it,
                opened_files(it.database, settings.data / "files", remote=it.remote),
            ):
                assert (here.exists(), there.exists()) == (is_there, is_there)

    def test_a_file_that_is_known_again_is_no_longer_counted_out(self, database, tmp_path, monkeypatch):
        path = tmp_path / "files/acme/file-1"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"precious")
        now_s, stored = time.time(), StoredFiles(database)
        for days, known in ((0, False), (5, True), (9, False), (15, False)):
            monkeypatch.setattr(time, "time", lambda days=days: now_s + days * DAY_S)
            stored.forget("file-1")
            if known:
                stored.insert(file_record(), most_bytes=None)
                stored.judge("file-1", "processed", None)
            with opened_files(database, tmp_path / "files", limits=LimitsSection(keep_days=7)):
                assert path.exists()

    def test_data_of_todays_version_opens_and_is_ours_from_then_on(self, tmp_path):
        with tarfile.open(FIXTURES / "data_before_move/server.tar.xz") as packed:
            packed.extractall(tmp_path, filter="data")
        settings = whole_config(tmp_path)
        assert started(settings)["id"] == started(settings)["id"]


class TestOneProcess:
    def test_a_second_server_on_the_data_folder_is_refused(self, settings):
        with (
            opened_instance(settings),
            pytest.raises(StateInvalid, match="in use by another server; stop that one"),
            opened_instance(settings),
        ):
            pass
        started(settings)

    def test_a_second_server_on_the_database_is_refused_while_the_first_goes_on(self, database, database_url):
        told = []
        first = Claim(database, "one", id="x", epoch=0)
        with contextlib.closing(Database(database_url)) as other:
            with pytest.raises(StateInvalid, match=r"in use by .*; stop that server"):
                Claim(other, "two", id="x", epoch=0, waiting=told.append)
            assert len(told) == 1
            first.close()
            second = Claim(other, "two", id="x", epoch=0)
            assert second.identity.epoch == 2
            second.close()

    def test_a_server_that_was_taken_over_writes_nothing_more(self, database, database_url, monkeypatch):
        """It slept; the second took its job over, which the first then would have said to have failed."""
        monkeypatch.setattr(claims, "SPAN_S", 0.5)
        jobs, first = StoredJobs(database), Claim(database, "one", id="x", epoch=0)
        jobs.insert(job_record())
        first._end.set()
        first._thread.join()
        with contextlib.closing(Database(database_url)) as other:
            second = Claim(other, "two", id="x", epoch=0)
            running = replace(job_record(), status=JobStatus.RUNNING)
            StoredJobs(other).save(running)
            failed = replace(job_record(), status=JobStatus.FAILED)
            for write in (
                lambda: jobs.save(failed, events=[event("failed")], checkpoints=[checkpoint_record(1)]),
                lambda: StoredFiles(database).insert(file_record(), most_bytes=None),
            ):
                with pytest.raises(Unavailable, match="taken over the database"):
                    write()
            first.close()
            assert jobs.get("ftjob-1", None).status is JobStatus.RUNNING
            StoredJobs(other).save(running)
            second.close()

    def test_a_claim_lasts_longer_than_its_span_and_ends_with_its_process(self, database, database_url):
        first = Claim(database, "one", id="x", epoch=0)
        time.sleep(claims.SPAN_S + 0.2)
        with contextlib.closing(Database(database_url)) as other:
            with pytest.raises(StateInvalid):
                Claim(other, "two", id="x", epoch=0)
            again = Claim(other, "one", id="x", epoch=0)  # the place is locked, so the first has ended
            assert again.identity.epoch == 2
            again.close()
        first.close()

    def test_of_ten_that_claim_at_once_one_has_it(self, database, database_url):
        won, lost, met = [], [], threading.Barrier(10)

        def contend(number: int) -> None:
            with contextlib.closing(Database(database_url, patience_s=30)) as own:
                met.wait(30)
                try:
                    won.append(Claim(own, f"place {number}", id="x", epoch=0).identity.epoch)
                    gate.wait(30)
                except StateInvalid:
                    lost.append(number)
                if len(lost) == 9:
                    gate.set()

        gate = threading.Event()
        threads = [threading.Thread(target=contend, args=(n,)) for n in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (won, len(lost)) == ([1], 9)


class TestDamage:
    def test_a_damaged_page_is_told_before_anything_is_written(self, tmp_path):
        url = f"sqlite:///{tmp_path}/x.sqlite"
        with contextlib.closing(Database(url)) as database:
            for i in range(200):
                StoredKeys(database).insert(key_record(f"key-{i}"))
        path = tmp_path / "x.sqlite"
        data = bytearray(path.read_bytes())
        for page in range(2, len(data) // 4096):
            data[4096 * page : 4096 * page + 8] = b"\xff" * 8
        path.write_bytes(data)
        with pytest.raises(StorageFailed, match=r"x\.sqlite is damaged .* backup in its place") as caught:
            Database(url)
        assert "\n" not in caught.value.message
        assert path.read_bytes() == data

    def test_what_breaks_while_it_runs_is_not_told_to_be_tried_again(self, tmp_path):
        with contextlib.closing(Database(f"sqlite:///{tmp_path}/x.sqlite")) as database:

            def read(session):
                raise sqlite3_error(sqlite3.SQLITE_CORRUPT)

            with pytest.raises(Unavailable, match="damaged; tell its operator"):
                database.read(read)

    def test_another_programs_database_is_refused(self, tmp_path):
        with contextlib.closing(sqlite3.connect(tmp_path / "x.sqlite")) as other:
            other.execute("CREATE TABLE jobs (id INTEGER)")
        with pytest.raises(ConfigInvalid, match=r"another program \(jobs\)"):
            Database(f"sqlite:///{tmp_path}/x.sqlite")

    def test_a_damaged_identity_is_told(self, settings):
        started(settings)
        (settings.data / RECORD).write_text("{}")
        with pytest.raises(StorageFailed, match=r"is damaged .* remove it"), opened_instance(settings):
            pass


def sqlite3_error(code: int) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError("database disk image is malformed")
    error.sqlite_errorcode = code
    return error


@pytest.fixture
def base(tmp_path):
    """A copy of the tiny base, whose files may change."""
    return Path(shutil.copytree(tiny_path(MODEL), tmp_path / "base"))


def opened_at(path: Path) -> Opened:
    """An opened base without its weights."""
    whole, weights = base_hashes(path)
    return Opened(name="tiny", path=path, base=None, base_hash=whole, weights_hash=weights, mesh=None, tokenizer=None)


def change_template(path: Path) -> None:
    file = path / "chat_template.jinja"
    file.write_text(file.read_text() + " ")


class TestBase:
    def test_a_template_changes_one_hash_and_anything_else_both(self, base):
        first = base_hashes(base)
        change_template(base)
        second = base_hashes(base)
        config = json.loads((base / "tokenizer_config.json").read_text())
        (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "x"}, sort_keys=True))
        third = base_hashes(base)
        assert len({first[0], second[0], third[0]}) == 3
        assert first[1] == second[1] == third[1]
        for name, changed in (("tokenizer_config.json", json.dumps(config | {"eos_token": "x"})), ("config.json", " ")):
            (base / name).write_text(changed)
            assert base_hashes(base)[1] not in {first[1], third[1]}

    def test_a_changed_template_is_refused_while_jobs_are_unfinished(self, base, database, tmp_path):
        settings, jobs = whole_config(tmp_path), StoredJobs(database)
        first = same_base(database, settings, opened_at(base))
        jobs.insert(job_record())
        change_template(base)
        for _ in range(2):
            with pytest.raises(StateInvalid, match=r"chat template .* 1 unfinished jobs .* --new-base"):
                same_base(database, settings, opened_at(base))
        assert same_base(database, settings, opened_at(base), take=True).base_hash == first.base_hash
        assert same_base(database, settings, opened_at(base)).base_hash == first.base_hash, "said once"

    def test_a_changed_template_alone_is_noted_and_what_is_stored_still_fits(self, base, database, tmp_path, caplog):
        settings = whole_config(tmp_path)
        first = same_base(database, settings, opened_at(base))
        change_template(base)
        opened = opened_at(base)
        assert opened.base_hash != first.base_hash
        assert same_base(database, settings, opened).base_hash == first.base_hash
        assert "chat template" in caplog.text

    def test_another_base_is_refused_and_going_back_finds_all_as_it_was(self, base, database, tmp_path):
        settings = whole_config(tmp_path)
        first = same_base(database, settings, opened_at(base))
        StoredJobs(database).insert(job_record())
        other = opened_at(tiny_path("tiny-qwen2"))
        with pytest.raises(StateInvalid, match="the base model of"):
            same_base(database, settings, other)
        assert same_base(database, settings, other, take=True).base_hash == other.base_hash
        change_template(base)
        assert same_base(database, settings, opened_at(base), take=True).base_hash == first.base_hash

    def test_checkpoints_of_todays_version_with_another_template_are_noticed(self, base, tmp_path):
        """The first start with identities: the database knows no base yet, the checkpoint does."""
        with tarfile.open(FIXTURES / "data_before_move/server.tar.xz") as packed:
            packed.extractall(tmp_path, filter="data")
        settings = whole_config(tmp_path)
        with opened_instance(settings) as it:
            change_template(base)
            with pytest.raises(StateInvalid, match="unfinished jobs"):
                same_base(it.database, settings, opened_at(base))
            same_base(it.database, settings, opened_at(tiny_path(MODEL)))


class TestCheckpointsOfJobsThatEnded:
    def test_failed_and_unknown_ones_stay_for_days_and_others_go(self, database):
        jobs, ids = StoredJobs(database), {"failed", "cancelled", "running", "unknown"}
        for id, status in (("failed", "failed"), ("cancelled", "cancelled"), ("running", "running")):
            jobs.insert(replace(job_record(id), status=JobStatus(status), finished_s=1000.0))
        over = [jobs.need_no_states(ids, now_s=1000 + days * DAY_S, keep_s=7 * DAY_S) for days in (0, 6.9, 7.1)]
        assert over == [{"cancelled"}, {"cancelled"}, {"cancelled", "failed", "unknown"}]


def serve(*arguments: str):
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["serve", *arguments])


@pytest.mark.parametrize("wrong", ["new", "damaged", "newer", "base"])
def test_the_command_ends_with_2_and_one_line_that_says_what_to_do(wrong, base, tmp_path, monkeypatch):
    """`jaxlora serve` itself; it ends before it compiles anything."""
    monkeypatch.chdir(tmp_path)
    settings = replace(whole_config(tmp_path), adapters=tmp_path / "adapters")
    with opened_instance(settings) as it:
        StoredJobs(it.database).insert(job_record())
        same_base(it.database, settings, opened_at(base))
    path = settings.data / "jaxlora.sqlite"
    match wrong:
        case "new":
            path.unlink()
        case "damaged":
            path.write_bytes(b"SQLite format 3\0" + path.read_bytes()[16:50])
        case "newer":
            with contextlib.closing(Database(settings.database_url)) as database:
                database.write(
                    lambda s: s.connection().execute(text("UPDATE alembic_version SET version_num = '9999'"))
                )
        case "base":
            change_template(base)
    before = files_below(tmp_path)
    result = serve("--model", str(base), "--port", "0")
    says = {"new": "--adopt", "damaged": "backup", "newer": "newer one", "base": "--new-base"}[wrong]
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("jaxlora: ")]
    assert says in line
    kept = {name: data for name, data in files_below(tmp_path).items() if name in before and RECORD not in name}
    assert kept == {name: data for name, data in before.items() if RECORD not in name}


@pytest.mark.slow
def test_a_second_process_is_refused_and_a_lost_database_deletes_nothing(tmp_path):
    """Real processes: one serves, one is refused; after a kill one with an empty database is refused, and then all is as it was."""

    def refused() -> str:
        command = [sys.executable, "-m", "serve.cli.main", "serve", str(tmp_path / "serve.toml")]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 2, ended.stderr
        (line,) = [line for line in ended.stderr.splitlines() if line.startswith("jaxlora: ")]
        return line

    content = b'{"prompt": "2+2=", "completion": "4"}\n'
    with server(tmp_path) as (process, client):
        file = client.files.create(file=("a.jsonl", content), purpose="fine-tune")
        assert "in use by another server; stop that one" in refused()
        assert client.files.retrieve(file.id).id == file.id
        process.send_signal(signal.SIGKILL)
    aside = tmp_path / "aside"
    aside.mkdir()
    for path in (tmp_path / "data").glob("*.sqlite*"):
        path.rename(aside / path.name)
    assert "is new, but" in refused()
    for path in (tmp_path / "data").glob("*.sqlite*"):
        path.unlink()
    for path in aside.iterdir():
        path.rename(tmp_path / "data" / path.name)
    with server(tmp_path) as (_, client):
        assert client.files.content(file.id).content == content
