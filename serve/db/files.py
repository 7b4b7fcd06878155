"""Uploaded files in the database; their bytes lie elsewhere (serve/api/files/service.py)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.orm import Session
from sqlalchemy.sql import ColumnElement

from jaxlora.core.errors import QuotaExceeded, StateInvalid
from serve.db.database import Database
from serve.db.instance import StoredInstance
from serve.db.models import FileRecord, FileStatus, JobFileRecord, JobRecord, Objects, Page
from train.jobs.status import ENDED

FILES = Objects("file", FileRecord)


def there(now_s: float) -> list[ColumnElement[bool]]:
    """The condition that a file is neither deleted nor past its time."""
    return [
        FileRecord.deleted_s.is_(None),
        or_(FileRecord.expires_s.is_(None), FileRecord.expires_s > now_s),
    ]


def jobs_that_need(file: str) -> list[ColumnElement[bool]]:
    """The condition that a job reads this file and has not ended."""
    return [JobFileRecord.file == file, JobFileRecord.job == JobRecord.id, JobRecord.status.not_in(ENDED)]


@dataclass(frozen=True, slots=True)
class StoredFiles:
    """Files as tenants see them, and what is left of those they no longer see.  All raise Unavailable."""

    database: Database

    def insert(self, record: FileRecord, *, most_bytes: int | None) -> None:
        """One more.  most_bytes: of all files of its tenant, this one included.  Raises QuotaExceeded, StorageFull."""

        def work(session: Session) -> None:
            used = used_bytes(session, record.tenant)
            if most_bytes is not None and used + record.size_bytes > most_bytes:
                raise over_quota(max(most_bytes - used, 0))
            session.add(replace(record))

        self.database.write(work)

    def get(self, id: str, sees: str | None, now_s: float) -> FileRecord:
        """One file.  Raises NotFound."""
        return self.database.read(lambda s: FILES.find(s, id, sees, *there(now_s)))

    def page(
        self,
        sees: str | None,
        now_s: float,
        *,
        after: str | None,
        limit: int,
        purpose: str | None = None,
        oldest_first: bool = False,
    ) -> Page[FileRecord]:
        """Files of the list, newest first.  Raises InvalidRequest for an unknown `after`."""
        where = there(now_s)
        if purpose is not None:
            where.append(FileRecord.purpose == purpose)
        return self.database.read(
            lambda s: FILES.page(s, sees, *where, after=after, limit=limit, oldest_first=oldest_first)
        )

    def used_bytes(self, tenant: str) -> int:
        """Bytes of all its files."""
        return self.database.read(lambda s: used_bytes(s, tenant))

    def judge(self, id: str, status: FileStatus, details: str | None) -> None:
        """What the check of a file found.  Of one that is gone, nothing is kept."""
        judged = update(FileRecord).where(FileRecord.id == id).values(status=status, status_details=details)
        self.database.write(lambda s: s.execute(judged))

    def delete(self, id: str, sees: str | None, now_s: float) -> FileRecord:
        """The file, which nobody sees from now on.  Raises NotFound; StateInvalid when a job still needs it."""

        def work(session: Session) -> FileRecord:
            row = FILES.find(session, id, sees, *there(now_s))
            job = session.scalars(select(JobRecord.id).where(*jobs_that_need(id)).limit(1)).first()
            if job is not None:
                raise StateInvalid(f"job {job} still needs this file; cancel the job, or wait until it has ended")
            row.deleted_s = now_s
            return row

        return self.database.write(work)

    def unchecked(self) -> list[FileRecord]:
        """Files whose check was not done when the server ended."""
        return self._where(FileRecord.status == "uploaded", FileRecord.deleted_s.is_(None))

    def removable(self, now_s: float) -> list[FileRecord]:
        """Files that are deleted, or past their time and needed by no job: their bytes may go, then `forget` them."""
        needed = select(JobFileRecord.file).join(JobRecord, JobRecord.id == JobFileRecord.job)
        needed = needed.where(JobRecord.status.not_in(ENDED))
        return self._where(
            or_(FileRecord.deleted_s.is_not(None), FileRecord.expires_s <= now_s), FileRecord.id.not_in(needed)
        )

    def forget(self, id: str) -> None:
        """Nothing is left of this file."""
        self.database.write(lambda s: s.execute(delete(FileRecord).where(FileRecord.id == id)))

    def known(self) -> set[str]:
        """Ids of all files, also of those that nobody sees."""
        return self.database.read(lambda s: set(s.scalars(select(FileRecord.id))))

    def overdue(self, unknown: Collection[str], *, now_s: float, keep_s: float) -> set[str]:
        """Which of these files, which the database does not know, may go.  Raises StorageFull."""
        return StoredInstance(self.database).overdue("lost/files", unknown, now_s=now_s, keep_s=keep_s)

    def _where(self, *where: ColumnElement[bool]) -> list[FileRecord]:
        return self.database.read(lambda s: list(s.scalars(select(FileRecord).where(*where))))


def used_bytes(session: Session, tenant: str) -> int:
    """Bytes of all files of a tenant that are not deleted."""
    asked = select(func.coalesce(func.sum(FileRecord.size_bytes), 0))
    return int(session.scalars(asked.where(FileRecord.tenant == tenant, FileRecord.deleted_s.is_(None))).one())


def over_quota(room: int) -> QuotaExceeded:
    """The error of a file for which a tenant has no room."""
    return QuotaExceeded(f"your files may have {room} bytes more, which this one exceeds; delete some of them")
