"""Transactions, migrations and what goes wrong, on SQLite and (`-m postgres`) on PostgreSQL."""

import asyncio
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from database_world import event, file_record, gradient_record, job_record, key_record
from sqlalchemy import Pool, inspect, select, text
from sqlalchemy.event import listen, remove

from jaxlora.core.errors import ConfigInvalid, NotFound, StorageFailed, StorageFull, Unavailable
from serve.db.database import Database, open_engine, parse
from serve.db.files import StoredFiles
from serve.db.gradient import StoredGradient
from serve.db.jobs import StoredJobs
from serve.db.keys import StoredKeys
from serve.db.migrations import REVISIONS, migrate
from serve.db.models import FileRecord, Table

pytest_plugins = ["database_fixtures"]


def some_row(id, filename="f"):
    return replace(file_record(id), filename=filename)


def sqlite_file(database_url):
    return database_url.removeprefix("sqlite:///")


class TestMigrations:
    def test_make_the_tables_that_the_code_names(self, database):
        def differences(session):
            return compare_metadata(MigrationContext.configure(session.connection()), Table.metadata)

        assert database.read(differences) == []

    def test_a_missing_column_would_be_found(self, database):
        """The comparison above can fail."""

        def differences(session):
            session.connection().execute(text("ALTER TABLE files DROP COLUMN status_details"))
            return compare_metadata(MigrationContext.configure(session.connection()), Table.metadata)

        assert [d[0] for d in database.write(differences)] == ["add_column"]

    @pytest.mark.fault("C11")
    def test_down_and_up_again_keeps_what_the_older_tables_hold(self, database):
        files, adapters = StoredFiles(database), StoredGradient(database)
        files.insert(file_record(), most_bytes=None)
        StoredJobs(database).insert(job_record(), files=["file-1"], events=[event("made")])
        adapters.insert(gradient_record())
        database.write(lambda s: migrate(s.connection(), to=1))
        tables = database.read(lambda s: set(inspect(s.connection()).get_table_names()))
        assert "gradient_adapters" not in tables
        database.write(lambda s: migrate(s.connection()))
        assert files.get("file-1", "acme", 2.0) == file_record()
        assert StoredJobs(database).get("ftjob-1", "acme").request == job_record().request
        assert adapters.page(None, after=None, limit=9).records == []
        adapters.insert(gradient_record())

    def test_down_to_nothing_and_up(self, database):
        database.write(lambda s: migrate(s.connection(), to=0))
        tables = database.read(lambda s: set(inspect(s.connection()).get_table_names()))
        assert tables == {"alembic_version"}
        database.write(lambda s: migrate(s.connection()))
        StoredFiles(database).insert(file_record(), most_bytes=None)

    def test_opening_again_changes_nothing(self, database, database_url):
        StoredKeys(database).insert(key_record())
        with closing(Database(database_url)) as again:
            assert StoredKeys(again).all() == [key_record()]

    def test_a_newer_database_is_refused(self, database, database_url):
        database.write(lambda s: s.connection().execute(text("UPDATE alembic_version SET version_num = '9999'")))
        with pytest.raises(ConfigInvalid, match=r"9999.*0003"):
            Database(database_url)

    def test_a_step_that_fails_leaves_nothing(self, database, database_url, monkeypatch):
        def half(op):
            op.execute("CREATE TABLE half (id INTEGER)")
            raise RuntimeError("power cut")

        database.write(lambda s: migrate(s.connection(), to=1))
        broken = (REVISIONS[0], type(REVISIONS[1])(id="0002", upgrade=half, downgrade=half))
        monkeypatch.setattr("serve.db.migrations.REVISIONS", broken)
        with pytest.raises(RuntimeError):
            Database(database_url)
        monkeypatch.undo()
        with closing(Database(database_url)) as again:
            assert "half" not in again.read(lambda s: inspect(s.connection()).get_table_names())
            StoredGradient(again).insert(gradient_record())


class TestTransactions:
    def test_what_raises_leaves_nothing(self, database):
        def work(session):
            session.add(some_row("x"))
            session.flush()
            raise NotFound("no")

        with pytest.raises(NotFound):
            database.write(work)
        assert database.read(lambda s: s.scalars(select(FileRecord)).all()) == []

    def test_ten_threads_write(self, database, database_url):
        """Two connections pools, as a server and a command have, and a counter that all of them raise."""
        StoredJobs(database).insert(job_record())
        errors = []

        def work(jobs):
            try:
                for _ in range(20):
                    jobs.save(job_record(), events=[event("one"), event("two")])
            except Exception as error:
                errors.append(error)

        with (
            closing(Database(database_url, patience_s=30)) as other,
            closing(Database(database_url, patience_s=30)) as mine,
        ):
            threads = [threading.Thread(target=work, args=(StoredJobs(d),)) for d in [mine, other] * 5]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert errors == []
        events = StoredJobs(database).events_since("ftjob-1", None, 0, limit=1000)
        assert [e.seq for e in events] == list(range(1, 401))

    def test_ask_answers_on_the_event_loop(self, database):
        keys = StoredKeys(database)

        async def ask():
            await database.ask(keys.insert, key_record())
            return await database.ask(keys.all)

        assert asyncio.run(ask()) == [key_record()]

    def test_ask_gives_up_on_a_database_that_hangs(self, database, monkeypatch):
        monkeypatch.setattr(database, "_patience_s", 0.01)
        monkeypatch.setattr("serve.db.database.BUSY_S", 0.01)
        done = threading.Event()
        with pytest.raises(Unavailable):
            asyncio.run(database.ask(done.wait, 5))
        done.set()

    def test_a_connection_in_use_while_it_is_closed_is_closed_after_it(self, database):
        """Else Python warns of it whenever it is collected."""
        begun, go_on, closed = threading.Event(), threading.Event(), []

        def heard(connection, record):
            closed.append(connection)

        def work(session):
            begun.set()
            assert go_on.wait(10)
            return session.connection().connection.dbapi_connection

        listen(Pool, "close", heard)
        try:
            with ThreadPoolExecutor() as threads:
                answer = threads.submit(database.read, work)
                assert begun.wait(10)
                database.close()
                go_on.set()
                used = answer.result()
            assert any(used is connection for connection in closed)
        finally:
            remove(Pool, "close", heard)

    @pytest.mark.parametrize(
        "url",
        ["", "nonsense", "mysql://u:secret@h/d", "sqlite://", "sqlite:///:memory:"],
    )
    def test_a_url_it_cannot_use_is_refused_without_its_password(self, url):
        with pytest.raises(ConfigInvalid) as caught:
            parse(url)
        assert "secret" not in caught.value.message


@pytest.mark.postgres
class TestPostgres:
    @pytest.fixture
    def keys(self, database):
        if database.read(lambda s: s.get_bind().dialect.name) != "postgresql":
            pytest.skip("of PostgreSQL alone")
        return StoredKeys(database)

    def test_a_server_that_was_started_anew_is_asked_again(self, keys):
        keys.insert(key_record())

        def end_all_others(session):
            others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid != pg_backend_pid()"
            session.connection().execute(text(others + " AND datname = current_database()"))

        hold = threading.Event()
        threads = [
            threading.Thread(target=keys._database.read, args=(lambda s: (s.connection(), hold.wait(5)),))
            for _ in "123"
        ]
        for thread in threads:
            thread.start()
        hold.set()
        for thread in threads:
            thread.join()
        keys._database.write(end_all_others)
        for _ in range(5):
            assert keys.all() == [key_record()]

    def test_one_that_hangs_is_given_up(self, database_url, keys):
        """As a lock that somebody else keeps, or a paused server, would have it."""
        release, held = threading.Event(), threading.Event()

        def hold(session):
            session.connection().execute(text("LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE"))
            held.set()
            release.wait(10)

        thread = threading.Thread(target=keys._database.write, args=(hold,))
        thread.start()
        held.wait(5)
        with closing(Database(database_url, patience_s=0.5)) as impatient:
            with pytest.raises(Unavailable):
                StoredKeys(impatient).all()
            with pytest.raises(Unavailable):
                asyncio.run(impatient.ask(StoredKeys(impatient).all))
            release.set()
            thread.join()
            assert StoredKeys(impatient).all() == []

    def test_nobody_there_is_told_in_time(self):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        start = time.monotonic()
        with pytest.raises(Unavailable):
            Database(f"postgresql://nobody@127.0.0.1:{port}/nothing", patience_s=0.3)
        assert time.monotonic() - start < 5


class TestSqlite:
    @pytest.fixture
    def url(self, tmp_path):
        return f"sqlite:///{tmp_path}/data/jaxlora.sqlite"

    @pytest.fixture
    def keys(self, url):
        with closing(Database(url, patience_s=0.3)) as database:
            yield StoredKeys(database)

    def test_is_set_up_for_safety(self, keys):
        def settings(session):
            return [
                session.connection().exec_driver_sql(f"PRAGMA {name}").scalar()
                for name in ("journal_mode", "synchronous", "foreign_keys")
            ]

        assert keys._database.read(settings) == ["wal", 2, 1]

    def test_a_writer_waits_for_another_and_readers_do_not(self, keys, url):
        with closing(sqlite3.connect(sqlite_file(url), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert keys.all() == []
            with pytest.raises(Unavailable):
                keys.insert(key_record())
            other.execute("COMMIT")
        keys.insert(key_record())

    @pytest.mark.fault("C6")
    def test_a_lock_that_ends_in_time_is_not_noticed(self, url, monkeypatch):
        monkeypatch.setattr("serve.db.database.BUSY_S", 0.02)  # so that our own retries do it
        with closing(Database(url, patience_s=5)) as database:
            held, release = threading.Event(), threading.Event()

            def hold():
                with closing(sqlite3.connect(sqlite_file(url), isolation_level=None)) as other:
                    other.execute("BEGIN IMMEDIATE")
                    held.set()
                    release.wait(5)
                    other.execute("COMMIT")

            thread = threading.Thread(target=hold)
            thread.start()
            held.wait(5)
            threading.Timer(0.3, release.set).start()
            start = time.monotonic()
            StoredKeys(database).insert(key_record())
            assert time.monotonic() - start > 0.2
            thread.join()

    @pytest.mark.fault("R9")
    def test_a_full_disk_is_told_and_changes_nothing(self, keys):
        def fill(session):
            session.connection().exec_driver_sql("PRAGMA max_page_count = 1")
            for i in range(200):
                session.add(some_row(f"{i}", filename="f" * 4000))
            session.flush()

        with pytest.raises(StorageFull):
            keys._database.write(fill)
        assert keys._database.read(lambda s: s.scalars(select(FileRecord)).all()) == []

    def test_a_file_that_is_no_database_is_told(self, tmp_path):
        (tmp_path / "x.sqlite").write_bytes(b"not a database at all" * 100)
        with pytest.raises(StorageFailed, match=r"x\.sqlite is damaged .*; nothing was changed: put its newest backup"):
            Database(f"sqlite:///{tmp_path}/x.sqlite")
        assert (tmp_path / "x.sqlite").read_bytes() == b"not a database at all" * 100

    def test_a_row_that_belongs_to_no_job_is_refused(self, keys):
        with pytest.raises(NotFound):
            StoredJobs(keys._database).save(job_record("ftjob-none"), events=[event("x")])

    def test_the_folder_is_ours_alone(self, keys, tmp_path):
        assert (tmp_path / "data").stat().st_mode & 0o077 == 0


KILLED = """
import os, sys
from sqlalchemy.orm import Session
from serve.db.database import open_engine, parse
from database_world import file_record

with open_engine(parse(sys.argv[1]), statement_s=9).connect() as connection, connection.begin(), Session(connection) as session:
    session.add(file_record("half"))
    session.flush()
    os.kill(os.getpid(), 9)
"""


def test_killed_in_a_transaction_leaves_nothing(tmp_path):
    url = f"sqlite:///{tmp_path}/x.sqlite"
    with closing(Database(url)):
        pass
    path = os.pathsep.join([str(Path(__file__).parents[1] / "support"), str(Path(__file__).parents[2])])
    killed = subprocess.run([sys.executable, "-c", KILLED, url], env={**os.environ, "PYTHONPATH": path}, check=False)
    assert killed.returncode == -9
    with closing(Database(url)) as database:
        assert StoredFiles(database).known() == set()


def test_postgresql_is_given_up_by_the_client_too(monkeypatch):
    """A server whose host is gone answers nothing, so its own statement_timeout ends nothing."""
    asked = {}
    monkeypatch.setattr("serve.db.database.create_engine", lambda url, **how: asked.update(how))
    open_engine(parse("postgresql://host/x"), statement_s=10.0)
    settings = asked["connect_args"]
    assert settings["tcp_user_timeout"] == 10_000
    assert settings["keepalives_idle"] + settings["keepalives_count"] * settings["keepalives_interval"] <= 10
