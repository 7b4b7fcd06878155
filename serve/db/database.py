"""One database, SQLite or PostgreSQL: transactions that are all there or not at all, and what goes wrong with them.

SQLite: a write-ahead log, one writer at a time, on disk before a write is answered.  PostgreSQL: serializable writes.
Either way a transaction may be run again, so what it does must be in the database alone.  stored_*.py say what is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from jaxlora.core.errors import ConfigInvalid, StorageAway, StorageFailed, StorageFull
from serve.db.migrations import migrate

BUSY_S = 1.0  # SQLite itself waits so long for another writer
CONNECT_S = 2  # PostgreSQL's driver waits so long for a connection; its least
KEEPALIVES = 3  # of TCP, CONNECT_S apart, before PostgreSQL's connection is given up
PAUSE_S = 0.05  # before a transaction is run again
THREADS = 8  # of `ask`: their waits for a slow database block nobody else

Verdict = Literal["again", "down", "full", "damaged", "ours"]

# SQLite's primary result codes, and PostgreSQL's SQLSTATEs.
SQLITE_VERDICTS: dict[int, Verdict] = {
    sqlite3.SQLITE_BUSY: "again",
    sqlite3.SQLITE_LOCKED: "again",
    sqlite3.SQLITE_FULL: "full",
    sqlite3.SQLITE_IOERR: "down",
    sqlite3.SQLITE_CANTOPEN: "down",
    sqlite3.SQLITE_READONLY: "down",
    sqlite3.SQLITE_CORRUPT: "damaged",
    sqlite3.SQLITE_NOTADB: "damaged",
}
POSTGRES_VERDICTS: dict[str, Verdict] = {
    "40001": "again",  # serialization failure
    "40P01": "again",  # deadlock
    "53100": "full",
}
POSTGRES_AWAY = ("08", "57")  # classes: no connection; the server stops or starts
CLOCKS = {
    "sqlite": "SELECT (julianday('now') - 2440587.5) * 86400.0",
    "postgresql": "SELECT CAST(extract(epoch FROM clock_timestamp()) AS double precision)",
}


class NotConnected(Exception):
    """No connection was made, so nothing was done."""


class Damaged(StorageAway):
    """The database's file is damaged: what fails for it may be done once its operator has put a backup in its place."""


class Database:
    """Runs functions of a session as transactions.  From any thread; from an event loop through `ask`."""

    def __init__(self, url: str, *, patience_s: float = 10.0):
        """Opens the database and brings its tables up to date.

        patience_s: how long one call tries again while others hold the database or it is away.
        Raises ConfigInvalid for a URL it cannot open, Unavailable, StorageFull, StorageFailed for a damaged file.
        """
        self._patience_s = patience_s
        self.may_write: Callable[[Session], None] = lambda session: None  # raises when another server writes here
        self._engine = open_engine(parse(url), statement_s=patience_s)
        # A database that is away is asked once a call, not for seconds, until it answers again.
        self._away = False
        self._closed = False
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="database")
        try:
            if self._engine.dialect.name == "sqlite":  # before anything is written to it
                self._run(check_pages, writes=False)
            self._run(lambda session: migrate(session.connection()), writes=True)
        except Damaged as error:
            self.close()
            found = " ".join(str(getattr(error.__cause__, "orig", error)).split())
            raise StorageFailed(
                f"the database {self.name} is damaged ({found}); nothing was changed: put its newest backup in its place"
            ) from error
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """The database's file, or its URL without a password."""
        url = self._engine.url
        return str(url.database) if url.get_backend_name() == "sqlite" else url.render_as_string(hide_password=True)

    def close(self) -> None:
        """Closes every connection, once what runs has ended; one that another thread still uses, when that ends."""
        self._threads.shutdown(cancel_futures=True)
        self._closed = True
        self._engine.pool.dispose()

    async def run[**P, Result](self, work: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
        """What `work` gives, called on one of the database's own threads, however long it takes."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: work(*args, **kwargs))

    async def ask[**P, Result](self, work: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
        """The same, soon.  Raises Unavailable when it takes too long, though the work may still be done."""
        try:
            async with asyncio.timeout(self._patience_s + 2 * BUSY_S):
                return await self.run(work, *args, **kwargs)
        except TimeoutError:
            raise away() from None

    def read[Result](self, work: Callable[[Session], Result]) -> Result:
        """What `work` reads, all of one moment.  Raises Unavailable."""
        return self._run(work, writes=False)

    def write[Result](self, work: Callable[[Session], Result]) -> Result:
        """What `work` gives, once all that it wrote is on disk; when it raises, nothing of it is.

        Raises Unavailable, also when another server has taken the database over, and StorageFull.
        """
        return self._run(work, writes=True)

    def _run[Result](self, work: Callable[[Session], Result], *, writes: bool) -> Result:
        ends = time.monotonic() + (0 if self._away else self._patience_s)
        while True:
            try:
                result = self._once(work, writes=writes)
                self._away = False
                return result
            except (NotConnected, SQLAlchemyError, sqlite3.Error) as error:
                verdict = judge(error)
                if verdict == "ours":
                    raise
                if verdict == "damaged":
                    raise Damaged("the server's database is damaged; tell its operator") from error
                if verdict == "full":
                    raise StorageFull("the server's disk is full; nothing was changed") from error
                # A connection that broke in the middle may have done its work: it is not for us to do it twice.
                if verdict == "down" and not isinstance(error, NotConnected):
                    self._away = True
                    raise away() from error
                if time.monotonic() >= ends:
                    self._away = verdict == "down"
                    raise away() from error
            time.sleep(PAUSE_S)

    def _once[Result](self, work: Callable[[Session], Result], *, writes: bool) -> Result:
        try:
            connection = self._engine.connect()
        except SQLAlchemyError as error:
            if self._engine.dialect.name == "sqlite":  # a file that is not there does not come back by itself
                raise
            raise NotConnected from error
        try:
            with connection:
                if writes:
                    connection = as_writer(connection)
                with connection.begin(), Session(connection, expire_on_commit=False) as session:
                    if writes:
                        self.may_write(session)
                    result = work(session)
                    session.flush()
                    return result
        finally:
            if self._closed:
                self._engine.pool.dispose()


def away() -> StorageAway:
    """The error of a database that does not answer."""
    return StorageAway("the server's database does not answer; try again later")


def parse(url: str) -> URL:
    """The URL of a database we can use.  Raises ConfigInvalid, which does not repeat it: it may hold a password."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        parsed = None
    backend = "" if parsed is None else parsed.get_backend_name()
    if parsed is None or backend not in ("sqlite", "postgresql"):
        raise ConfigInvalid(
            "database must be a URL such as sqlite:///data/jaxlora.sqlite or postgresql://user@host/name"
        )
    if backend == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigInvalid("database must name a file, as in sqlite:///data/jaxlora.sqlite")
    return parsed.set(drivername="postgresql+psycopg") if backend == "postgresql" else parsed


def open_engine(url: URL, *, statement_s: float) -> Engine:
    """A pool of connections.  statement_s: for which PostgreSQL may be at one statement.

    Raises ConfigInvalid when SQLite's folder or PostgreSQL's driver is missing.
    """
    if url.get_backend_name() == "postgresql":
        settings = {
            "connect_timeout": CONNECT_S,
            "options": f"-c statement_timeout={round(statement_s * 1000)}",
            # A host that is gone is noticed within statement_s, or keepalives in vain.
            "tcp_user_timeout": round(statement_s * 1000),
            "keepalives_idle": CONNECT_S,
            "keepalives_interval": CONNECT_S,
            "keepalives_count": KEEPALIVES,
        }
        try:
            return create_engine(url, pool_pre_ping=True, pool_size=THREADS, connect_args=settings)
        except ModuleNotFoundError as error:
            raise ConfigInvalid("PostgreSQL needs its driver; install jaxlora[postgres]") from error
    path = Path(str(url.database))
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigInvalid(f"cannot make the folder of the database {path} ({error.strerror})") from error
    keep_private(path)
    # Python would begin a transaction only at its first write, too late to wait for another writer.
    engine = create_engine(url, pool_size=THREADS, connect_args={"timeout": BUSY_S, "isolation_level": None})
    event.listen(engine, "connect", set_up_sqlite)
    event.listen(engine, "begin", begin_sqlite)
    return engine


def keep_private(path: Path) -> None:
    """Makes SQLite's file if there is none; lets nobody but its owner read it and those beside it, which take after it."""
    with contextlib.suppress(OSError):  # told when it is opened
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        for name in (path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")):
            if name.exists():
                name.chmod(0o600)


def set_up_sqlite(connection: sqlite3.Connection, record: object) -> None:
    """What each new connection needs."""
    for setting in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {setting}")


def check_pages(session: Session) -> None:
    """Raises Damaged when a page of SQLite's file is damaged."""
    found = session.connection().exec_driver_sql("PRAGMA quick_check(1)").scalar()
    if found != "ok":
        raise Damaged(str(found))


def as_writer(connection: Connection) -> Connection:
    """The connection, whose next transaction takes its turn among writers."""
    if connection.dialect.name == "sqlite":
        return connection.execution_options(begin="BEGIN IMMEDIATE")
    return connection.execution_options(isolation_level="SERIALIZABLE")


def begin_sqlite(connection: Connection) -> None:
    """Begins a transaction as `as_writer` has asked."""
    connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))


def judge(error: NotConnected | SQLAlchemyError | sqlite3.Error) -> Verdict:
    """What an error means: try again, the database is away or damaged, its disk is full, or the mistake is ours."""
    if isinstance(error, NotConnected):
        return "down"
    if isinstance(error, PoolTimeout):
        return "again"
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return "down"
    cause = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(cause, sqlite3.Error):
        return SQLITE_VERDICTS.get(getattr(cause, "sqlite_errorcode", 0) & 0xFF, "ours")
    state = getattr(cause, "sqlstate", None)
    if state is None:
        return "down" if isinstance(error, OperationalError) else "ours"
    return "down" if state[:2] in POSTGRES_AWAY else POSTGRES_VERDICTS.get(state, "ours")


def clock_s(session: Session) -> float:
    """Seconds since 1970 by the database's clock."""
    connection = session.connection()
    return float(connection.execute(text(CLOCKS[connection.dialect.name])).scalar_one())
