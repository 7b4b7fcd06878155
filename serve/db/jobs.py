"""Fine-tuning jobs in the database, with their events and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy.sql import ColumnElement
from sqlmodel import Session, SQLModel, col, func, select

from jaxlora.core.errors import InvalidRequest, QuotaExceeded
from serve.db.database import Database
from serve.db.files import FILES, there
from serve.db.models import (
    ENDED,
    ID,
    CheckpointRecord,
    CheckpointRow,
    EventRecord,
    EventRow,
    JobFileRow,
    JobRecord,
    JobRow,
    NewEvent,
    Objects,
    Page,
    new_id,
    to_record,
    to_row,
)

JOBS = Objects("job", JobRow, JobRecord)
# What a job is and what it was asked never changes; all else does.
CHANGING = ("adapter", "resolved", "status", "started_s", "finished_s", "progress", "error")
SCAN = 500  # rows read at a time where metadata is looked through


@dataclass(frozen=True, slots=True)
class StoredJobs:
    """Jobs as tenants see them.  All raise Unavailable."""

    database: Database

    def insert(
        self, record: JobRecord, *, files: Sequence[str] = (), most: int | None = None, events: Sequence[NewEvent] = ()
    ) -> None:
        """One more, with its first events.  files: that it reads, of its tenant.  most: jobs of it that have not ended.

        Raises NotFound for a file that is not there, QuotaExceeded, StorageFull.
        """

        def work(session: Session) -> None:
            if most is not None and unfinished(session, record.tenant) >= most:
                raise QuotaExceeded(f"you may have {most} jobs that have not ended; cancel one, or wait for one to end")
            for file in files:
                FILES.find(session, file, record.tenant, *there(record.created_s))
            row = to_row(JobRow, record)
            session.add(row)
            session.flush()
            session.add_all(JobFileRow(job=record.id, file=file) for file in dict.fromkeys(files))
            add_events(session, row, events)

        self.database.write(work)

    def get(self, id: str, sees: str | None) -> JobRecord:
        """One job.  Raises NotFound."""
        return self.database.read(lambda s: to_record(JobRecord, JOBS.find(s, id, sees)))

    def page(
        self, sees: str | None, *, after: str | None, limit: int, metadata: Mapping[str, str] | None = None
    ) -> Page[JobRecord]:
        """Jobs of the list, newest first.  metadata: only those with all of these.  Raises InvalidRequest for an unknown `after`."""
        wanted = dict(metadata or {}).items()
        if not wanted:
            return self.database.read(lambda s: JOBS.page(s, sees, after=after, limit=limit))

        def work(session: Session) -> Page[JobRecord]:
            found: list[JobRecord] = []
            at = after
            while len(found) <= limit:
                page = JOBS.page(session, sees, after=at, limit=SCAN)
                found += [r for r in page.records if wanted <= r.metadata.items()]
                if not page.more:
                    break
                at = page.records[-1].id
            return Page(records=found[:limit], more=len(found) > limit)

        return self.database.read(work)

    def unfinished(self) -> list[JobRecord]:
        """Jobs of all tenants that have not ended, oldest first: what a server that starts goes on with."""
        asked = select(JobRow).where(col(JobRow.status).not_in(ENDED)).order_by(col(JobRow.created_s), col(JobRow.id))
        return self.database.read(lambda s: [to_record(JobRecord, row) for row in s.exec(asked)])

    def history(self) -> list[tuple[JobRecord, list[CheckpointRecord]]]:
        """Every job of every tenant, oldest first, with its checkpoints, oldest first."""

        def work(session: Session) -> list[tuple[JobRecord, list[CheckpointRecord]]]:
            jobs = session.exec(select(JobRow).order_by(col(JobRow.created_s), col(JobRow.id)))
            found = {row.id: (to_record(JobRecord, row), list[CheckpointRecord]()) for row in jobs}
            for row in session.exec(select(CheckpointRow).order_by(col(CheckpointRow.version))):
                found[row.job][1].append(to_record(CheckpointRecord, row))
            return list(found.values())

        return self.database.read(work)

    def files(self, id: str) -> list[str]:
        """Ids of the files that a job reads."""
        return self.database.read(lambda s: list(s.exec(select(JobFileRow.file).where(col(JobFileRow.job) == id))))

    def save(
        self,
        record: JobRecord,
        *,
        events: Sequence[NewEvent] = (),
        checkpoints: Sequence[CheckpointRecord] = (),
    ) -> list[EventRecord]:
        """The events as they were numbered; state, events and checkpoints are there together or not at all.

        A checkpoint of a step that has one, done again after a crash, takes its place under the same id.
        Raises NotFound, StorageFull.
        """

        def work(session: Session) -> list[EventRecord]:
            row = JOBS.find(session, record.id, record.tenant, lock=True)
            for name in CHANGING:
                setattr(row, name, getattr(record, name))
            for checkpoint in checkpoints:
                keep_checkpoint(session, checkpoint)
            return add_events(session, row, events)

        return self.database.write(work)

    def append(self, id: str, events: Sequence[NewEvent]) -> list[EventRecord]:
        """The events as they were numbered.  Raises NotFound, StorageFull."""
        return self.database.write(lambda s: add_events(s, JOBS.find(s, id, None, lock=True), events))

    def delete(self, id: str, sees: str | None) -> None:
        """Removes a job with all that belongs to it.  Raises NotFound."""
        self.database.write(lambda s: s.delete(JOBS.find(s, id, sees)))

    def events(self, id: str, sees: str | None, *, after: str | None, limit: int) -> Page[EventRecord]:
        """Events of a job, newest first.  Raises NotFound; InvalidRequest for an unknown `after`."""

        def work(session: Session) -> Page[EventRecord]:
            JOBS.find(session, id, sees)
            where = [col(EventRow.job) == id]
            if after is not None:
                where.append(col(EventRow.seq) < beyond(session, EventRow, after, id, "event").seq)
            asked = select(EventRow).where(*where).order_by(col(EventRow.seq).desc())
            return cut(EventRecord, session.exec(asked.limit(limit + 1)).all(), limit)

        return self.database.read(work)

    def events_since(self, id: str, sees: str | None, seq: int, *, limit: int) -> list[EventRecord]:
        """Events whose number is above `seq`, oldest first: what one who follows has not seen.  Raises NotFound."""

        def work(session: Session) -> list[EventRecord]:
            JOBS.find(session, id, sees)
            asked = select(EventRow).where(col(EventRow.job) == id, col(EventRow.seq) > seq)
            return [to_record(EventRecord, r) for r in session.exec(asked.order_by(col(EventRow.seq)).limit(limit))]

        return self.database.read(work)

    def checkpoints(self, id: str, sees: str | None, *, after: str | None, limit: int) -> Page[CheckpointRecord]:
        """Checkpoints of a job, newest first.  Raises NotFound; InvalidRequest for an unknown `after`."""

        def work(session: Session) -> Page[CheckpointRecord]:
            JOBS.find(session, id, sees)
            where: list[ColumnElement[bool]] = [col(CheckpointRow.job) == id]
            if after is not None:
                where.append(
                    col(CheckpointRow.version) < beyond(session, CheckpointRow, after, id, "checkpoint").version
                )
            asked = select(CheckpointRow).where(*where).order_by(col(CheckpointRow.version).desc())
            return cut(CheckpointRecord, session.exec(asked.limit(limit + 1)).all(), limit)

        return self.database.read(work)


def unfinished(session: Session, tenant: str) -> int:
    """Jobs of a tenant that have not ended."""
    asked = select(func.count()).select_from(JobRow)
    return session.exec(asked.where(col(JobRow.tenant) == tenant, col(JobRow.status).not_in(ENDED))).one()


def keep_checkpoint(session: Session, checkpoint: CheckpointRecord) -> None:
    """Adds it, or puts it in the place of the same step's."""
    where = col(CheckpointRow.job) == checkpoint.job, col(CheckpointRow.step) == checkpoint.step
    known = session.exec(select(CheckpointRow).where(*where)).first()
    if known is None:
        session.add(to_row(CheckpointRow, checkpoint))
    else:
        known.version, known.metrics = checkpoint.version, dict(checkpoint.metrics)


def add_events(session: Session, row: JobRow, events: Sequence[NewEvent]) -> list[EventRecord]:
    """Numbers the events on from the job's last."""
    records = [
        EventRecord(
            id=new_id("ftevent-"),
            job=row.id,
            seq=row.next_seq + i,
            time_s=event.time_s,
            level=event.level,
            kind=event.kind,
            message=event.message,
            data=event.data,
        )
        for i, event in enumerate(events)
    ]
    row.next_seq += len(events)
    session.add_all(to_row(EventRow, r) for r in records)
    return records


def beyond[Row: EventRow | CheckpointRow](session: Session, row: type[Row], after: str, job: str, kind: str) -> Row:
    """The row that a page begins behind.  Raises InvalidRequest for one that is not of this job."""
    found = session.get(row, after) if ID.fullmatch(after) else None
    if found is None or found.job != job:
        raise InvalidRequest(f"after must be the id of a {kind} in this list", param="after")
    return found


def cut[Record](record: type[Record], rows: Sequence[SQLModel], limit: int) -> Page[Record]:
    """A page of rows of which one more than the limit was asked for."""
    return Page(records=[to_record(record, r) for r in rows[:limit]], more=len(rows) > limit)
