"""The forms and queries of the files' wire."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal, NotRequired

from pydantic import Field

from jaxlora.core.errors import InvalidRequest
from serve.api.document import Closed, form_body
from serve.api.files.service import FINE_TUNE
from serve.db.models import FileStatus
from serve.http.multipart import Form
from serve.http.pagination import Listed, PageQuery
from serve.http.schema import Responses

MAX_NAME = 255  # characters of a file's name
LEAST_EXPIRY_S, MOST_EXPIRY_S = 3600, 2_592_000
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"
FORM_FIELDS = ("purpose", ANCHOR, SECONDS)
FORM_BODY = form_body(
    {
        "purpose": {"type": "string", "enum": [FINE_TUNE]},
        ANCHOR: {"type": "string", "enum": ["created_at"]},
        SECONDS: {"type": "integer", "minimum": LEAST_EXPIRY_S, "maximum": MOST_EXPIRY_S},
        "file": {"type": "string", "format": "binary", "description": "JSONL, a JSON array, CSV, TSV or Parquet"},
    },
    required=["purpose", "file"],
)


Purpose = Literal["fine-tune", "fine-tune-results"]


class File(Closed):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: Purpose
    status: FileStatus
    status_details: str | None
    expires_at: NotRequired[int]


FileList = Listed[File]


class DeletedFile(Closed):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


CONTENT: Responses = {
    200: {
        "description": "the bytes, as they came",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
    206: {
        "description": "ranges of them",
        "content": {
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "multipart/byteranges": {"schema": {"type": "string"}},
        },
    },
}


class FilesQuery(PageQuery):
    """Query of GET /v1/files."""

    limit: Annotated[int, Field(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"
    purpose: Purpose | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class UploadForm:
    """What came with a file."""

    filename: str
    expires_after_s: int | None


def upload_form(form: Form) -> UploadForm:
    """The fields of a form, checked.  Raises InvalidRequest."""
    fields = form.fields
    if "purpose" not in fields:
        raise InvalidRequest("purpose is required", param="purpose")
    if fields["purpose"] != FINE_TUNE:
        raise InvalidRequest(f"purpose must be {FINE_TUNE}, got {fields['purpose'][:40]!a}", param="purpose")
    if not form.files:
        raise InvalidRequest("file is required", param="file")
    # Some clients send a path; what stands before the name is theirs alone.
    name = re.split(r"[/\\]", form.files[0].filename)[-1]
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        raise InvalidRequest(f"the file's name must be 1 to {MAX_NAME} printable characters", param="file")
    return UploadForm(filename=name, expires_after_s=expires_after(fields.get(ANCHOR), fields.get(SECONDS)))


def expires_after(anchor: str | None, seconds: str | None) -> int | None:
    """Seconds after which a file goes; None: it stays.  Raises InvalidRequest."""
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequest(f"{ANCHOR} must be created_at", param=ANCHOR)
    known = seconds is not None and re.fullmatch(r"[0-9]{1,9}", seconds) is not None
    if seconds is None or not known or not LEAST_EXPIRY_S <= int(seconds) <= MOST_EXPIRY_S:
        raise InvalidRequest(f"{SECONDS} must be a whole number in [{LEAST_EXPIRY_S}, {MOST_EXPIRY_S}]", param=SECONDS)
    return int(seconds)
