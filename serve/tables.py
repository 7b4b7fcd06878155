"""The database's tables, and how a row becomes a record and back.  migrations.py makes them; a test holds the two equal.

Only types that every SQL database has: text, whole numbers, double floats.  JSON is text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

from sqlalchemy import BigInteger, Dialect, Double, Index, Text, UniqueConstraint
from sqlalchemy.sql import ColumnElement
from sqlalchemy.types import TypeDecorator
from sqlmodel import Field, Session, SQLModel, and_, col, or_, select

from jaxlora.core.errors import InvalidRequest, NotFound
from serve.records import Json, Page

ID = re.compile(r"[A-Za-z0-9_.:-]{1,100}")  # what no database chokes on; no other text can be an id of ours


class JsonText(TypeDecorator[Json]):
    """JSON in a text column: ASCII, as PostgreSQL holds neither NUL nor lone surrogates otherwise."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Json, dialect: Dialect) -> str | None:
        """To the database."""
        return None if value is None else json.dumps(value, allow_nan=False, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Dialect) -> Json:
        """From it."""
        return None if value is None else json.loads(value)


class Owned(SQLModel):
    """What every table of tenants' objects has."""

    id: str = Field(primary_key=True)
    tenant: str
    created_s: float = Field(sa_type=Double)


class KeyRow(Owned, table=True):
    __tablename__ = "api_keys"

    role: str
    label: str
    digest: str = Field(unique=True)
    revoked_s: float | None = Field(default=None, sa_type=Double)


class FileRow(Owned, table=True):
    __tablename__ = "files"
    __table_args__ = (Index("files_in_order", "tenant", "created_s", "id"),)

    filename: str = Field(sa_type=Text)
    purpose: str
    size_bytes: int = Field(sa_type=BigInteger)
    sha256: str
    expires_s: float | None = Field(default=None, sa_type=Double)
    status: str
    status_details: str | None = Field(default=None, sa_type=Text)
    deleted_s: float | None = Field(default=None, sa_type=Double)  # gone for clients; its bytes may still be there


class JobRow(Owned, table=True):
    __tablename__ = "jobs"
    __table_args__ = (Index("jobs_in_order", "tenant", "created_s", "id"),)

    adapter: str
    request: dict = Field(sa_type=JsonText)
    resolved: dict = Field(sa_type=JsonText)
    metadata_: dict = Field(sa_type=JsonText, sa_column_kwargs={"name": "metadata"})
    status: str = Field(index=True)
    started_s: float | None = Field(default=None, sa_type=Double)
    finished_s: float | None = Field(default=None, sa_type=Double)
    progress: dict = Field(sa_type=JsonText)
    error: dict | None = Field(default=None, sa_type=JsonText)
    next_seq: int


class JobFileRow(SQLModel, table=True):
    """That a job reads a file."""

    __tablename__ = "job_files"

    job: str = Field(primary_key=True, foreign_key="jobs.id", ondelete="CASCADE")
    file: str = Field(primary_key=True, index=True)  # of a file that may be gone once the job has ended


class EventRow(SQLModel, table=True):
    __tablename__ = "job_events"
    __table_args__ = (UniqueConstraint("job", "seq", name="job_events_in_order"),)

    id: str = Field(primary_key=True)
    job: str = Field(foreign_key="jobs.id", ondelete="CASCADE")
    seq: int
    time_s: float = Field(sa_type=Double)
    level: str
    kind: str
    message: str = Field(sa_type=Text)
    data: dict = Field(sa_type=JsonText)


class CheckpointRow(SQLModel, table=True):
    __tablename__ = "job_checkpoints"
    __table_args__ = (Index("job_checkpoints_in_order", "job", "version"),)

    id: str = Field(primary_key=True)
    job: str = Field(foreign_key="jobs.id", ondelete="CASCADE")
    step: int
    version: int
    metrics: dict = Field(sa_type=JsonText)
    created_s: float = Field(sa_type=Double)


class GradientRow(Owned, table=True):
    __tablename__ = "gradient_adapters"
    __table_args__ = (Index("gradient_adapters_in_order", "tenant", "created_s", "id"),)

    workspace: str = Field(sa_type=Text)
    adapter: str
    base: str
    settings: dict = Field(sa_type=JsonText)
    updated_s: float = Field(sa_type=Double)
    calls: int


class AnswerRow(SQLModel, table=True):
    """What a request with an Idempotency-Key was answered; without a status while it is being answered."""

    __tablename__ = "idempotency"

    tenant: str = Field(primary_key=True)
    route: str = Field(primary_key=True)
    key: str = Field(primary_key=True)
    request_sha256: str
    status: int | None = None
    body: str | None = Field(default=None, sa_type=Text)
    created_s: float = Field(sa_type=Double)


def to_row[Row: SQLModel](row: type[Row], record: object) -> Row:
    """A new row that holds this record."""
    # `metadata` is SQLAlchemy's on every row class.
    return row(**{RENAMED.get(f.name, f.name): getattr(record, f.name) for f in fields(record)})  # ty: ignore[invalid-argument-type]


def to_record[Record](record: type[Record], row: SQLModel) -> Record:
    """The record that a row holds."""
    return record(**{f.name: getattr(row, RENAMED.get(f.name, f.name)) for f in fields(record)})  # ty: ignore[invalid-argument-type]


RENAMED = {"metadata": "metadata_"}


@dataclass(frozen=True, slots=True)
class Objects[Row: Owned, Record]:
    """One table of objects that tenants own.  What a tenant may not see is told like what is not there."""

    kind: str  # of messages
    row: type[Row]
    record: type[Record]

    def find(self, session: Session, id: str, sees: str | None, *where: ColumnElement[bool], lock: bool = False) -> Row:
        """The row of this id.  sees: only of this tenant; None: of any.  lock: it is about to change.  Raises NotFound."""
        found = None
        if ID.fullmatch(id):
            asked = select(self.row).where(col(self.row.id) == id, *self.visible(sees), *where)
            # Else PostgreSQL would notice another change only when this one has been written, as any odd error.
            found = session.exec(asked.with_for_update() if lock else asked).one_or_none()
        if found is None:
            raise NotFound(f"there is no {self.kind} {id[:100]!a}", param="id")
        return found

    def visible(self, sees: str | None) -> list[ColumnElement[bool]]:
        """The condition that a row is this tenant's."""
        return [] if sees is None else [col(self.row.tenant) == sees]

    def page(
        self,
        session: Session,
        sees: str | None,
        *where: ColumnElement[bool],
        after: str | None,
        limit: int,
        oldest_first: bool = False,
    ) -> Page[Record]:
        """Up to `limit` of them after the one with the id `after`, newest first.  Raises InvalidRequest for an unknown `after`.

        Equal times are ordered by id, so pages neither repeat nor lose one.
        """
        created, id = col(self.row.created_s), col(self.row.id)
        asked = select(self.row).where(*self.visible(sees), *where)
        if after is not None:
            try:
                last = self.find(session, after, sees)
            except NotFound:
                raise InvalidRequest(f"after must be the id of a {self.kind} in this list", param="after") from None
            beyond = (
                (created > last.created_s, id > last.id) if oldest_first else (created < last.created_s, id < last.id)
            )
            asked = asked.where(or_(beyond[0], and_(created == last.created_s, beyond[1])))
        order = (created.asc(), id.asc()) if oldest_first else (created.desc(), id.desc())
        rows: Sequence[Row] = session.exec(asked.order_by(*order).limit(limit + 1)).all()
        return Page(records=[to_record(self.record, r) for r in rows[:limit]], more=len(rows) > limit)
