"""What the database keeps, as it goes in and comes out: frozen, without SQL.  Times are seconds since 1970, UTC.  Pure.

The database's tables, and how a row becomes a record and back.  migrations.py makes them; a test holds the two equal.

Only types that every SQL database has: text, whole numbers, double floats.  JSON is text."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from sqlalchemy import BigInteger, Dialect, Double, Index, Text, UniqueConstraint
from sqlalchemy.sql import ColumnElement
from sqlalchemy.types import TypeDecorator
from sqlmodel import Field, Session, SQLModel, and_, col, or_, select

from jaxlora.core.errors import InvalidRequest, NotFound

type Json = bool | int | float | str | list[Json] | dict[str, Json] | None
type JsonObject = dict[str, Json]

Role = Literal["admin", "tenant"]
FileStatus = Literal["uploaded", "processed", "error"]
JobStatus = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
ENDED: tuple[JobStatus, ...] = ("succeeded", "failed", "cancelled")


def new_id(prefix: str) -> str:
    """An id that nobody has and nobody guesses: the prefix and 32 hex digits."""
    return prefix + secrets.token_hex(16)


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRecord:
    """An API key, but for the key itself."""

    id: str
    tenant: str
    role: Role
    label: str
    digest: str  # hex sha256 of the key
    created_s: float
    revoked_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """An uploaded file.  Its bytes lie in the server's folder of files."""

    id: str  # file-…
    tenant: str
    filename: str
    purpose: str
    size_bytes: int
    sha256: str  # hex
    created_s: float
    expires_s: float | None = None
    status: FileStatus = "uploaded"
    status_details: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRecord:
    """A fine-tuning job.  `request` is what the API got, `resolved` the same with all values filled in."""

    id: str  # ftjob-…
    tenant: str
    adapter: str  # name of what it makes
    request: JsonObject
    resolved: JsonObject
    metadata: dict[str, str]
    created_s: float
    status: JobStatus = "validating_files"
    started_s: float | None = None
    finished_s: float | None = None
    progress: JsonObject = field(default_factory=dict)
    error: JsonObject | None = None
    next_seq: int = 1  # of its next event; the database counts it


@dataclass(frozen=True, kw_only=True, slots=True)
class NewEvent:
    """Something that happened to a job, before the database has numbered it."""

    time_s: float
    level: Literal["info", "warn", "error"]
    kind: str  # such as "message" or "metrics"
    message: str
    data: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class EventRecord:
    """Something that happened to a job.  `seq` counts from 1 without gaps within its job."""

    id: str  # ftevent-…
    job: str
    seq: int
    time_s: float
    level: Literal["info", "warn", "error"]
    kind: str
    message: str
    data: JsonObject


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointRecord:
    """A version that a job published."""

    id: str  # ftckpt-…
    job: str
    step: int
    version: int  # of the job's adapter
    metrics: JsonObject
    created_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientRecord:
    """An adapter as the Gradient API knows it."""

    id: str
    tenant: str
    workspace: str  # the name it was given there
    adapter: str  # its name in the store
    base: str
    settings: JsonObject
    created_s: float
    updated_s: float
    calls: int = 0  # of fine_tune


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredAnswer:
    """What a request with an Idempotency-Key was answered."""

    status: int
    body: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Page[Record]:
    """Some records in the order of the list, and whether more come after them."""

    records: list[Record]
    more: bool


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
