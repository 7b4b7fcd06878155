"""The database's tables, one class each: a row is the record that the rest of the server reads.

Times are seconds since 1970, UTC.  Only types that every SQL database has: text, whole numbers, double floats; JSON is text.
migrations.py makes the tables; a test holds the two equal.

A record outlives its session with all its columns loaded.  Nobody assigns to one outside of a session: `dataclasses.replace`
makes the next, and a session is given such a copy, because a transaction may run again.  Pure.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from sqlalchemy import (
    BigInteger,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Select,
    String,
    Text,
    UniqueConstraint,
    and_,
    or_,
    select,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, Session, mapped_column
from sqlalchemy.sql import ColumnElement
from sqlalchemy.types import TypeDecorator

from jaxlora.core.errors import InvalidRequest, NotFound
from serve.db.job_spec import JobSpec, Resolved
from train.jobs.status import JobStatus

type Json = bool | int | float | str | list[Json] | dict[str, Json] | None
type JsonObject = dict[str, Json]

Role = Literal["admin", "tenant"]
FileStatus = Literal["uploaded", "processed", "error"]
Level = Literal["info", "warn", "error"]
ID = re.compile(r"[A-Za-z0-9_.:-]{1,100}")  # what no database chokes on; no other text can be an id of ours


def new_id(prefix: str) -> str:
    """An id that nobody has and nobody guesses: the prefix and 32 hex digits."""
    return prefix + secrets.token_hex(16)


class Encoded[Value](TypeDecorator[Value]):
    """A value as text."""

    impl = Text
    cache_ok = True

    def __init__(self, encode: Callable[[Value], str], decode: Callable[[str], Value]):
        """encode, decode: each other's inverse."""
        super().__init__()
        self.encode, self.decode = encode, decode

    def process_bind_param(self, value: Value | None, dialect: Dialect) -> str | None:
        """To the database."""
        return None if value is None else self.encode(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Value | None:
        """From it."""
        return None if value is None else self.decode(value)


class Word[Value](Encoded[Value]):
    """A value as a short text."""

    impl = String
    cache_ok = True


def to_json(value: Json) -> str:
    """ASCII, as PostgreSQL holds neither NUL nor lone surrogates otherwise."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def to_object(text: str) -> dict:
    """What `to_json` made of an object.  Raises ValueError for any other text."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object was stored, and now it is {type(value).__name__}")
    return value


class Table(MappedAsDataclass, DeclarativeBase, kw_only=True):
    """A table whose rows are dataclasses."""

    type_annotation_map: ClassVar = {
        float: Double,
        JsonObject: Encoded(to_json, to_object),
        dict[str, str]: Encoded(to_json, to_object),
        Role: String,
        FileStatus: String,
        JobStatus: Word(str, JobStatus),
        JobSpec: Encoded(lambda spec: to_json(spec.to_json()), lambda text: JobSpec.from_json(json.loads(text))),
        Resolved: Encoded(lambda value: to_json(value.to_json()), lambda text: Resolved.from_json(json.loads(text))),
        Level: String,
    }


class Owned(Table):
    """What every table of tenants' objects has."""

    __abstract__ = True

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    created_s: Mapped[float]


class KeyRecord(Owned):
    """An API key, but for the key itself."""

    __tablename__ = "api_keys"

    role: Mapped[Role]
    label: Mapped[str]
    digest: Mapped[str] = mapped_column(unique=True)  # hex sha256 of the key
    revoked_s: Mapped[float | None] = mapped_column(default=None)


class FileRecord(Owned):
    """An uploaded file, file-….  Its bytes lie in the server's folder of files."""

    __tablename__ = "files"
    __table_args__ = (Index("files_in_order", "tenant", "created_s", "id"),)

    filename: Mapped[str] = mapped_column(Text)
    purpose: Mapped[str]
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]  # hex
    expires_s: Mapped[float | None] = mapped_column(default=None)
    status: Mapped[FileStatus] = mapped_column(default="uploaded")
    status_details: Mapped[str | None] = mapped_column(Text, default=None)
    deleted_s: Mapped[float | None] = mapped_column(default=None)  # gone for clients; its bytes may still be there


class JobRecord(Owned):
    """A fine-tuning job, ftjob-….  `request` is what a client asked, `resolved` what the server decided."""

    __tablename__ = "jobs"
    __table_args__ = (Index("jobs_in_order", "tenant", "created_s", "id"),)

    adapter: Mapped[str]  # name of what it makes
    request: Mapped[JobSpec]
    resolved: Mapped[Resolved]
    labels: Mapped[dict[str, str]] = mapped_column("metadata")  # a client's own; `metadata` is SQLAlchemy's on a table
    status: Mapped[JobStatus] = mapped_column(index=True, default=JobStatus.VALIDATING_FILES)
    started_s: Mapped[float | None] = mapped_column(default=None)
    finished_s: Mapped[float | None] = mapped_column(default=None)
    progress: Mapped[JsonObject] = mapped_column(default_factory=dict)
    error: Mapped[JsonObject | None] = mapped_column(default=None)
    next_seq: Mapped[int] = mapped_column(default=1)  # of its next event; the database counts it


class JobFileRecord(Table):
    """That a job reads a file."""

    __tablename__ = "job_files"

    job: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    file: Mapped[str] = mapped_column(primary_key=True, index=True)  # it may be gone once the job has ended


@dataclass(frozen=True, kw_only=True, slots=True)
class NewEvent:
    """Something that happened to a job, before the database has numbered it."""

    time_s: float
    level: Level
    kind: str  # such as "message" or "metrics"
    message: str
    data: JsonObject = field(default_factory=dict)


class EventRecord(Table):
    """Something that happened to a job.  `seq` counts from 1 without gaps within its job."""

    __tablename__ = "job_events"
    __table_args__ = (UniqueConstraint("job", "seq", name="job_events_in_order"),)

    id: Mapped[str] = mapped_column(primary_key=True)  # ftevent-…
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    seq: Mapped[int]
    time_s: Mapped[float]
    level: Mapped[Level]
    kind: Mapped[str]
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[JsonObject]


class CheckpointRecord(Table):
    """A version that a job published."""

    __tablename__ = "job_checkpoints"
    __table_args__ = (Index("job_checkpoints_in_order", "job", "version"),)

    id: Mapped[str] = mapped_column(primary_key=True)  # ftckpt-…
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    step: Mapped[int]
    version: Mapped[int]  # of the job's adapter
    metrics: Mapped[JsonObject]
    created_s: Mapped[float]


class GradientRecord(Owned):
    """An adapter as the Gradient API knows it."""

    __tablename__ = "gradient_adapters"
    __table_args__ = (Index("gradient_adapters_in_order", "tenant", "created_s", "id"),)

    workspace: Mapped[str] = mapped_column(Text)  # the name it was given there
    adapter: Mapped[str]  # its name in the store
    base: Mapped[str]
    settings: Mapped[JsonObject]
    updated_s: Mapped[float]
    calls: Mapped[int] = mapped_column(default=0)  # of fine_tune


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredAnswer:
    """What a request with an Idempotency-Key was answered."""

    status: int
    body: str


class AnswerRecord(Table):
    """A request with an Idempotency-Key and its answer; without a status while it is being answered."""

    __tablename__ = "idempotency"

    tenant: Mapped[str] = mapped_column(primary_key=True)
    route: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_sha256: Mapped[str]
    created_s: Mapped[float]
    status: Mapped[int | None] = mapped_column(default=None)
    body: Mapped[str | None] = mapped_column(Text, default=None)


class FactRecord(Table):
    """What a server knows of itself, by a name of its own."""

    __tablename__ = "instance"

    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[JsonObject]


@dataclass(frozen=True, kw_only=True, slots=True)
class Page[Record]:
    """Some records in the order of the list, and whether more come after them."""

    records: list[Record]
    more: bool


@dataclass(frozen=True, slots=True)
class Objects[Record: Owned]:
    """One table of objects that tenants own.  What a tenant may not see is told like what is not there."""

    kind: str  # of messages
    record: type[Record]

    def find(
        self, session: Session, id: str, sees: str | None, *where: ColumnElement[bool], lock: bool = False
    ) -> Record:
        """The record of this id.  sees: only of this tenant; None: of any.  lock: it is about to change.  Raises NotFound."""
        found = None
        if ID.fullmatch(id):
            asked = select(self.record).where(self.record.id == id, *self.visible(sees), *where)
            # Else PostgreSQL would notice another change only when this one has been written, as any odd error.
            found = session.scalars(asked.with_for_update() if lock else asked).one_or_none()
        if found is None:
            raise NotFound(f"there is no {self.kind} {id[:100]!a}", param="id")
        return found

    def visible(self, sees: str | None) -> list[ColumnElement[bool]]:
        """The condition that a record is this tenant's."""
        return [] if sees is None else [self.record.tenant == sees]

    def page(
        self,
        session: Session,
        sees: str | None,
        *where: ColumnElement[bool],
        after: str | None,
        limit: int,
        oldest_first: bool = False,
    ) -> Page[Record]:
        """Up to `limit` of them after the one with the id `after`, newest first.  Raises InvalidRequest for an unknown `after`."""
        asked = self.ordered(session, sees, *where, after=after, oldest_first=oldest_first)
        records = session.scalars(asked.limit(limit + 1)).all()
        return Page(records=list(records[:limit]), more=len(records) > limit)

    def ordered(
        self,
        session: Session,
        sees: str | None,
        *where: ColumnElement[bool],
        after: str | None,
        oldest_first: bool = False,
    ) -> Select[Record]:
        """The query of all of them after the one with the id `after`, newest first.  Raises InvalidRequest for an unknown `after`.

        Equal times are ordered by id, so pages neither repeat nor lose one.
        """
        created, id = self.record.created_s, self.record.id
        asked = select(self.record).where(*self.visible(sees), *where)
        if after is not None:
            known = select(created).where(id == after, *self.visible(sees))
            last_s = session.scalars(known).one_or_none() if ID.fullmatch(after) else None
            if last_s is None:
                raise InvalidRequest(f"after must be the id of a {self.kind} in this list", param="after")
            beyond = (created > last_s, id > after) if oldest_first else (created < last_s, id < after)
            asked = asked.where(or_(beyond[0], and_(created == last_s, beyond[1])))
        order = (created.asc(), id.asc()) if oldest_first else (created.desc(), id.desc())
        return asked.order_by(*order)
