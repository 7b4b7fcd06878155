"""What the database forgets while the server runs: old answers, events of jobs that ended long ago, and jobs that made nothing."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from jaxlora.config.serving import RetentionSection
from jaxlora.core.errors import JaxLoraError
from serve.db.database import Database
from serve.db.idempotency import KEPT_S
from serve.db.models import AnswerRecord, CheckpointRecord, EventRecord, JobRecord, Table
from train.jobs.status import ENDED

LOG = logging.getLogger("serve")
DAY_S = 24 * 3600.0
PERIOD_S = 3600.0
MOST = 500  # rows of one transaction, for which other writers wait


class Retention:
    """A thread that deletes what was kept long enough, once in a while."""

    def __init__(self, database: Database, keep: RetentionSection):
        self._database, self._keep = database, keep
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends after the present transaction."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                if deleted := prune(self._database, self._keep, time.time(), self._closing):
                    LOG.info("the database forgot %d old rows", deleted)
            except JaxLoraError as error:
                LOG.warning("old rows are not deleted: %s", error)
            except Exception:
                LOG.exception("old rows are not deleted")
            self._closing.wait(PERIOD_S)


def prune(database: Database, keep: RetentionSection, now_s: float, closing: threading.Event | None = None) -> int:
    """Deletes in small transactions, until `closing`.  Returns the number of rows.  Raises Unavailable."""

    def answers(session: Session) -> int:
        old = select(AnswerRecord).where(AnswerRecord.created_s < now_s - KEPT_S)
        return delete_all(session, session.scalars(old.limit(MOST)).all())

    ended_s = func.coalesce(JobRecord.finished_s, JobRecord.created_s)

    def events(session: Session) -> int:
        quiet = select(JobRecord.id).where(JobRecord.status.in_(ENDED), ended_s < now_s - keep.job_events_days * DAY_S)
        return delete_all(
            session, session.scalars(select(EventRecord).where(EventRecord.job.in_(quiet)).limit(MOST)).all()
        )

    def jobs(session: Session) -> int:
        old = select(JobRecord).where(
            JobRecord.status.in_(ENDED),
            ended_s < now_s - keep.jobs_days * DAY_S,
            JobRecord.id.not_in(select(CheckpointRecord.job)),
        )
        # The others' rows give models their names.
        return delete_all(session, [job for job in session.scalars(old) if "version" not in job.progress][:MOST])

    deleted = 0
    for some in (answers, events, jobs):
        while (closing is None or not closing.is_set()) and (count := database.write(some)):
            deleted += count
    return deleted


def delete_all(session: Session, rows: Sequence[Table]) -> int:
    """Deletes the rows and returns how many they are."""
    for row in rows:
        session.delete(row)
    return len(rows)
