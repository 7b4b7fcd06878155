"""A multipart/form-data body, taken apart as it arrives: fields stay in memory, files go to disk, nothing is held twice.

Starlette's own form reader puts files wherever the system keeps temporary ones, and has no limit on them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import Request

from jaxlora.core.errors import InvalidRequest
from serve.http.errors import UnknownParameter

MAX_FIELD_BYTES = 4096
MAX_PARTS = 32


@dataclass(frozen=True, slots=True)
class Upload:
    """One file of a form, on disk."""

    field: str
    filename: str  # as the client wrote it: never a path of ours
    path: Path
    nbytes: int


@dataclass(slots=True)
class Form:
    """A whole form."""

    fields: dict[str, str] = field(default_factory=dict)
    files: list[Upload] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class FormRules:
    """What a form may hold."""

    fields: Collection[str]  # of text, each at most once
    files: Collection[str]
    max_files: int
    max_file_bytes: int


async def receive_form(request: Request, folder: Path, rules: FormRules) -> Form:
    """The form of a request, with its files in `folder`, which exists and is the caller's to remove.

    Raises InvalidRequest for a body that is no such form, UnknownParameter for a field that the rules lack, HTTPException
    413 for a file over its limit, OSError when the disk refuses.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidRequest("the body must be a form; send it with Content-Type: multipart/form-data")
    try:
        reader = _FormReader(folder, rules, boundary)
        with contextlib.closing(reader):
            async for chunk in request.stream():
                if chunk:
                    await asyncio.to_thread(reader.feed, chunk)
            return reader.finish()
    except FormParserError as error:
        raise InvalidRequest(f"the body is no valid multipart form: {str(error)[:200]}") from error


class _FormReader:
    """Takes chunks, makes parts of them."""

    def __init__(self, folder: Path, rules: FormRules, boundary: bytes):
        self._folder, self._rules = folder, rules
        self._form = Form()
        self._whole = False
        self._parts = 0
        self._header: tuple[bytearray, bytearray] = bytearray(), bytearray()
        self._name, self._filename = "", None
        self._value: bytearray | None = None  # of a text field
        self._file: BinaryIO | None = None
        self._nbytes = 0
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_part_data": self._take_data,
                "on_part_end": self._end_part,
                "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin_data,
                "on_end": self._end,
            },
        )

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the body.  Writes to disk."""
        self._parser.write(chunk)

    def finish(self) -> Form:
        """The form.  Raises InvalidRequest when it was cut off."""
        if not self._whole:
            raise InvalidRequest("the form ends in the middle; send it whole")
        return self._form

    def close(self) -> None:
        """Closes what is open."""
        if self._file is not None:
            self._file.close()

    def _begin_part(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise InvalidRequest(f"the form has over {MAX_PARTS} parts")
        self._name, self._filename, self._value, self._file, self._nbytes = "", None, None, None, 0

    def _end_header(self) -> None:
        (name, value), self._header = self._header, (bytearray(), bytearray())
        if bytes(name).lower() == b"content-disposition":
            _, options = parse_options_header(value.decode("latin-1"))
            self._name = _text(options.get(b"name", b""), "a field's name")
            self._filename = _text(options[b"filename"], "a file's name") if b"filename" in options else None

    def _begin_data(self) -> None:
        name, rules = self._name, self._rules
        if name not in (*rules.fields, *rules.files):
            raise UnknownParameter(f"unknown parameter {name[:64]!a}; leave it out", param=name[:64])
        if name in rules.fields:
            if self._filename is not None or name in self._form.fields:
                raise InvalidRequest(f"{name} must be one text field", param=name)
            self._value = bytearray()
            return
        if self._filename is None:
            raise InvalidRequest(f"{name} must be a file, sent with its name", param=name)
        if len(self._form.files) >= rules.max_files:
            raise InvalidRequest(f"the form may have at most {rules.max_files} files", param=name)
        self._file = (self._folder / str(len(self._form.files))).open("xb")

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        self._nbytes += end - start
        if self._value is not None:
            if self._nbytes > MAX_FIELD_BYTES:
                raise InvalidRequest(f"{self._name} may have at most {MAX_FIELD_BYTES} bytes", param=self._name)
            self._value.extend(data[start:end])
        elif self._file is not None:
            if self._nbytes > self._rules.max_file_bytes:
                raise HTTPException(413, f"a file may have at most {self._rules.max_file_bytes} bytes here")
            self._file.write(memoryview(data)[start:end])

    def _end_part(self) -> None:
        if self._value is not None:
            self._form.fields[self._name] = _text(bytes(self._value), self._name)
        elif self._file is not None and self._filename is not None:
            self._file.close()
            path = self._folder / str(len(self._form.files))
            self._form.files.append(Upload(self._name, self._filename, path, self._nbytes))

    def _end(self) -> None:
        self._whole = True


def _text(value: bytes, what: str) -> str:
    """UTF-8 as text.  Raises InvalidRequest for other bytes."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"{what} must be UTF-8 text") from None
