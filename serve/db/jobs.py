"""Fine-tuning jobs in the database, with their events and checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session
from sqlalchemy.sql import ColumnElement

from jaxlora.core.errors import InvalidRequest, JaxLoraError, NotFound, QuotaExceeded, StorageFailed
from serve.db.database import Database
from serve.db.files import FILES, there
from serve.db.instance import StoredInstance
from serve.db.job_spec import JobSpec, Resolved
from serve.db.models import ID, CheckpointRecord, EventRecord, JobFileRecord, JobRecord, NewEvent, Objects, Page, new_id
from train.jobs.status import ENDED, JobStatus

JOBS = Objects("job", JobRecord)
# What a job is and what it was asked never changes; all else does.
CHANGING = ("adapter", "resolved", "status", "started_s", "finished_s", "progress", "error")
# What a row raises whose text is not what was written there.
DAMAGE = (JaxLoraError, ValueError, KeyError, TypeError, AttributeError)
LOG = logging.getLogger("serve")
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
            row = replace(record)
            session.add(row)
            session.flush()
            session.add_all(JobFileRecord(job=record.id, file=file) for file in dict.fromkeys(files))
            add_events(session, row, events)

        self.database.write(work)

    def get(self, id: str, sees: str | None) -> JobRecord:
        """One job.  Raises NotFound."""
        return self.database.read(lambda s: JOBS.find(s, id, sees))

    def shown(self, id: str, sees: str | None) -> JobRecord:
        """One job as its owner is shown it: a damaged one as `damaged_job` says.  Raises NotFound."""

        def work(session: Session) -> JobRecord:
            try:
                return JOBS.find(session, id, sees)
            except NotFound:
                raise
            except DAMAGE:
                return damaged_job(session, id)

        return self.database.read(work)

    def page(
        self, sees: str | None, *, after: str | None, limit: int, metadata: Mapping[str, str] | None = None
    ) -> Page[JobRecord]:
        """Jobs of the list as `shown`, newest first.  metadata: only those with all of these.

        Raises InvalidRequest for an unknown `after`.
        """
        wanted = dict(metadata or {}).items()
        if not wanted:
            return self.database.read(lambda s: page_of(s, sees, after, limit))

        def work(session: Session) -> Page[JobRecord]:
            found: list[JobRecord] = []
            at = after
            while len(found) <= limit:
                page = page_of(session, sees, at, SCAN)
                found += [r for r in page.records if wanted <= r.labels.items()]
                if not page.more:
                    break
                at = page.records[-1].id
            return Page(records=found[:limit], more=len(found) > limit)

        return self.database.read(work)

    def unfinished(self) -> list[JobRecord]:
        """Jobs of all tenants that have not ended, oldest first: what a server that starts goes on with."""
        asked = select(JobRecord).where(JobRecord.status.not_in(ENDED)).order_by(JobRecord.created_s, JobRecord.id)
        return self.database.read(lambda s: readable(s, JobRecord, asked))

    def need_no_states(self, ids: Set[str], *, now_s: float, keep_s: float) -> set[str]:
        """Which of these jobs need their checkpoints no more: those that have ended; that failed, or are not known, long ago.

        Raises StorageFull.
        """
        asked = select(JobRecord.id, JobRecord.status, JobRecord.finished_s)
        rows = self.database.read(lambda s: s.execute(asked.where(JobRecord.id.in_(ids))).all())
        known = {id: (status, at_s) for id, status, at_s in rows}
        unknown = StoredInstance(self.database).overdue("lost/jobs", ids - known.keys(), now_s=now_s, keep_s=keep_s)
        return unknown | {id for id in ids & known.keys() if is_over(*known[id], now_s - keep_s)}

    def history(self) -> list[tuple[JobRecord, list[CheckpointRecord]]]:
        """Every job of every tenant, oldest first, with its checkpoints, oldest first."""

        def work(session: Session) -> list[tuple[JobRecord, list[CheckpointRecord]]]:
            jobs = readable(session, JobRecord, select(JobRecord).order_by(JobRecord.created_s, JobRecord.id))
            found = {row.id: (row, list[CheckpointRecord]()) for row in jobs}
            checkpoints = select(CheckpointRecord).order_by(CheckpointRecord.version)
            for row in readable(session, CheckpointRecord, checkpoints):
                if row.job in found:
                    found[row.job][1].append(row)
            return list(found.values())

        return self.database.read(work)

    def named(self, short: str) -> tuple[JobRecord, list[CheckpointRecord]]:
        """The job whose id begins so, of any tenant, with its checkpoints.  Raises NotFound."""

        def work(session: Session) -> tuple[JobRecord, list[CheckpointRecord]]:
            first = f"ftjob-{short}"
            row = session.scalars(select(JobRecord).where(JobRecord.id.startswith(first, autoescape=True))).first()
            if row is None:
                raise NotFound(f"there is no job {first[:100]!a}", param="id")
            return row, list(session.scalars(select(CheckpointRecord).where(CheckpointRecord.job == row.id)))

        return self.database.read(work)

    def save(
        self, record: JobRecord, *, events: Sequence[NewEvent] = (), checkpoints: Sequence[CheckpointRecord] = ()
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

    def events(self, id: str, sees: str | None, *, after: str | None, limit: int) -> Page[EventRecord]:
        """Events of a job, newest first.  Raises NotFound; InvalidRequest for an unknown `after`."""

        def work(session: Session) -> Page[EventRecord]:
            JOBS.find(session, id, sees)
            where = [EventRecord.job == id]
            if after is not None:
                where.append(EventRecord.seq < beyond(session, EventRecord, after, id, "event").seq)
            asked = select(EventRecord).where(*where).order_by(EventRecord.seq.desc())
            return cut(session.scalars(asked.limit(limit + 1)).all(), limit)

        return self.database.read(work)

    def events_since(self, id: str, sees: str | None, seq: int, *, limit: int) -> list[EventRecord]:
        """Events whose number is above `seq`, oldest first: what one who follows has not seen.  Raises NotFound."""

        def work(session: Session) -> list[EventRecord]:
            JOBS.find(session, id, sees)
            asked = select(EventRecord).where(EventRecord.job == id, EventRecord.seq > seq)
            return list(session.scalars(asked.order_by(EventRecord.seq).limit(limit)))

        return self.database.read(work)

    def seq(self, id: str, sees: str | None, event: str | None) -> int:
        """The number of a job's event; None: 0.  Raises NotFound; InvalidRequest for an event that is not the job's."""

        def work(session: Session) -> int:
            JOBS.find(session, id, sees)
            return 0 if event is None else beyond(session, EventRecord, event, id, "event").seq

        return self.database.read(work)

    def checkpoints(self, id: str, sees: str | None, *, after: str | None, limit: int) -> Page[CheckpointRecord]:
        """Checkpoints of a job, newest first.  Raises NotFound; InvalidRequest for an unknown `after`."""

        def work(session: Session) -> Page[CheckpointRecord]:
            JOBS.find(session, id, sees)
            where: list[ColumnElement[bool]] = [CheckpointRecord.job == id]
            if after is not None:
                where.append(
                    CheckpointRecord.version < beyond(session, CheckpointRecord, after, id, "checkpoint").version
                )
            asked = select(CheckpointRecord).where(*where).order_by(CheckpointRecord.version.desc())
            return cut(session.scalars(asked.limit(limit + 1)).all(), limit)

        return self.database.read(work)


def page_of(session: Session, sees: str | None, after: str | None, limit: int) -> Page[JobRecord]:
    """A page of jobs, newest first, with damaged ones as `damaged_job` says."""
    asked = JOBS.ordered(session, sees, after=after).limit(limit + 1)
    try:
        return cut(session.scalars(asked).all(), limit)
    except DAMAGE:
        found = []
    for id in session.scalars(asked.with_only_columns(JobRecord.id)).all():
        try:
            found += session.scalars(select(JobRecord).where(JobRecord.id == id))
        except DAMAGE:
            found.append(damaged_job(session, id))
    return cut(found, limit)


def damaged_job(session: Session, id: str) -> JobRecord:
    """What can still be said of a job whose row is damaged: that it failed, and why.  Not to be stored."""
    whole = select(JobRecord.tenant, JobRecord.adapter, JobRecord.created_s).where(JobRecord.id == id)
    tenant, adapter, created_s = session.execute(whole).one()
    reason = "the server's record of this job is damaged, and it does not go on; create another, and tell the operator"
    return JobRecord(
        id=id,
        tenant=tenant,
        adapter=adapter,
        created_s=created_s,
        request=JobSpec(model="", training_file=""),
        resolved=Resolved(seed=0),
        labels={},
        status=JobStatus.FAILED,
        error={"code": StorageFailed.code, "message": reason, "param": None},
    )


def readable[Record: JobRecord | CheckpointRecord](
    session: Session, record: type[Record], asked: Select[Record]
) -> list[Record]:
    """The records of a query but for damaged ones, which the log names: one row keeps no server from starting."""
    try:
        return list(session.scalars(asked))
    except DAMAGE:
        found = []
    for id in session.scalars(asked.with_only_columns(record.id)).all():
        try:
            found += session.scalars(select(record).where(record.id == id))
        except DAMAGE as error:
            LOG.error("row %s of %s is damaged and left out: %s", id, record.__tablename__, type(error).__name__)
    return found


def is_over(status: JobStatus, finished_s: float | None, before_s: float) -> bool:
    """Whether a job has ended; if it failed, before this time."""
    return status in ENDED and (status is not JobStatus.FAILED or finished_s is None or finished_s <= before_s)


def unfinished(session: Session, tenant: str) -> int:
    """Jobs of a tenant that have not ended."""
    asked = select(func.count()).select_from(JobRecord)
    return session.scalars(asked.where(JobRecord.tenant == tenant, JobRecord.status.not_in(ENDED))).one()


def keep_checkpoint(session: Session, checkpoint: CheckpointRecord) -> None:
    """Adds it, or puts it in the place of the same step's."""
    where = CheckpointRecord.job == checkpoint.job, CheckpointRecord.step == checkpoint.step
    known = session.scalars(select(CheckpointRecord).where(*where)).first()
    if known is None:
        session.add(replace(checkpoint))
    else:
        known.version, known.metrics = checkpoint.version, dict(checkpoint.metrics)


def add_events(session: Session, row: JobRecord, events: Sequence[NewEvent]) -> list[EventRecord]:
    """Numbers the events on from the job's last."""
    records = [
        EventRecord(id=new_id("ftevent-"), job=row.id, seq=seq, **asdict(event))
        for seq, event in enumerate(events, row.next_seq)
    ]
    row.next_seq += len(events)
    session.add_all(records)
    return records


def beyond[Record: EventRecord | CheckpointRecord](
    session: Session, record: type[Record], after: str, job: str, kind: str
) -> Record:
    """The record that a page begins behind.  Raises InvalidRequest for one that is not of this job."""
    found = session.get(record, after) if ID.fullmatch(after) else None
    if found is None or found.job != job:
        raise InvalidRequest(f"after must be the id of a {kind} in this list", param="after")
    return found


def cut[Record](records: Sequence[Record], limit: int) -> Page[Record]:
    """A page of records of which one more than the limit was asked for."""
    return Page(records=list(records[:limit]), more=len(records) > limit)
