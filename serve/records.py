"""What the database keeps, as it goes in and comes out: frozen, without SQL.  Times are seconds since 1970, UTC.  Pure."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Literal

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
class Answer:
    """What a request with an Idempotency-Key was answered."""

    status: int
    body: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Page[Record]:
    """Some records in the order of the list, and whether more come after them."""

    records: list[Record]
    more: bool
