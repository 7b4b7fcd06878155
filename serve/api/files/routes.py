"""The files' wire: OpenAI's uploads of training data, written straight to disk, and their records."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, cast

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.responses import MalformedRangeHeader, RangeNotSatisfiable
from starlette.types import Receive, Scope, Send

from jaxlora.core.atomic_files import disk_errors, sha256_of
from serve.access.caller import caller_of
from serve.access.places import Places
from serve.access.rate_limit import Limiter
from serve.api.files.schemas import (
    CONTENT,
    FORM_BODY,
    FORM_FIELDS,
    DeletedFile,
    File,
    FileList,
    FilesQuery,
    Purpose,
    upload_form,
)
from serve.api.files.service import FileStore
from serve.db.database import Database
from serve.db.files import over_quota
from serve.db.models import FileRecord
from serve.http.errors import ERRORS, RANGE_ERRORS, WRITE_ERRORS
from serve.http.idempotency import HEADER, Once
from serve.http.multipart import Form, FormRules, receive_form
from serve.http.pagination import list_object
from serve.http.schema import ok

FILES = "/v1/files"
MAX_UPLOADS = 16  # at once


class FilesRoutes:
    """The routes, over one store."""

    def __init__(self, files: FileStore, database: Database, once: Once, limiter: Limiter, *, max_file_bytes: int):
        """database: runs the store's work on its threads."""
        self._once, self._limiter = once, limiter
        self._files, self._ask, self._run = files, database.ask, database.run
        self._max_file_bytes = max_file_bytes
        self._uploads = Places("uploads", MAX_UPLOADS)

    @property
    def body_limits(self) -> dict[str, int]:
        """For the gate: path → bytes of a file."""
        return {FILES: self._max_file_bytes}

    def router(self) -> APIRouter:
        """All routes of this wire."""
        router = APIRouter(responses=ERRORS)
        for method, path, handler, responses, openapi in (
            ("POST", FILES, self.create, ok(File), FORM_BODY),
            ("GET", FILES, self.list, ok(FileList), None),
            ("GET", FILES + "/{id}", self.read, ok(File), None),
            ("DELETE", FILES + "/{id}", self.delete, ok(DeletedFile), None),
            ("GET", FILES + "/{id}/content", self.content, CONTENT | RANGE_ERRORS, None),
        ):
            router.add_api_route(
                path,
                handler,
                methods=[method],
                response_model=None,
                response_class=JSONResponse if "model" in responses[200] else Response,
                responses=responses | ({} if method == "GET" else WRITE_ERRORS),
                openapi_extra=openapi,
            )
        return router

    async def create(self, request: Request) -> Response:
        """Adds a file, which is checked soon."""
        tenant = caller_of(request).owner
        self._limiter.admit(tenant, tokens=0)
        with self._uploads.held(tenant, self._limiter.of(tenant).uploads):
            room = await self._ask(self._files.room, tenant)
            folder = await self._ask(self._files.staging)
            try:
                form = await self._receive(request, folder, room)
                about, path = upload_form(form), form.files[0].path
                content = {**form.fields, "filename": about.filename}
                if HEADER in request.headers:
                    content["sha256"] = await self._run(sha256_of, path)

                async def make() -> File:
                    add, expires_after_s = self._files.add, about.expires_after_s
                    # Not on the database's threads: object storage may take a while.
                    record = await asyncio.to_thread(add, tenant, path, about.filename, expires_after_s=expires_after_s)
                    return file_object(record)

                return await self._once.answer(request, content, make)
            finally:
                await self._run(shutil.rmtree, folder, ignore_errors=True)

    async def _receive(self, request: Request, folder: Path, room: int | None) -> Form:
        most = self._max_file_bytes if room is None else min(self._max_file_bytes, room)
        rules = FormRules(fields=FORM_FIELDS, files=("file",), max_files=1, max_file_bytes=most)
        try:
            with disk_errors("the upload"):
                return await receive_form(request, folder, rules)
        except HTTPException as error:
            if error.status_code == 413 and room is not None and room == most:
                raise over_quota(room) from None
            raise

    async def list(self, request: Request, query: Annotated[FilesQuery, Query()]) -> Response:
        """The caller's files, newest first unless order is asc."""
        page = await self._ask(
            self._files.page,
            caller_of(request).sees,
            after=query.after,
            limit=query.limit,
            purpose=query.purpose,
            oldest_first=query.order == "asc",
        )
        return JSONResponse(list_object([file_object(r) for r in page.records], more=page.more))

    async def read(self, request: Request, id: str) -> Response:
        """One file, but for its bytes."""
        return JSONResponse(file_object(await self._ask(self._files.get, id, caller_of(request).sees)))

    async def delete(self, request: Request, id: str) -> Response:
        """Removes a file that no job needs."""
        record = await self._ask(self._files.delete, id, caller_of(request).sees)
        return JSONResponse(DeletedFile(id=record.id, object="file", deleted=True))

    async def content(self, request: Request, id: str) -> Response:
        """The bytes of a file, as they came; or ranges of them."""
        caller = caller_of(request)
        self._limiter.admit(caller.owner, tokens=0)
        record, path = await self._ask(self._files.find, id, caller.sees)
        return _FileHere(self._files.here(path), path, record.filename)


class _FileHere(FileResponse):
    """Sends the bytes of a file, which is fetched first and stays until they are sent.

    Ranges are as RFC 9110, section 14.2, has them: a header that is none is ignored, where Starlette answers 400, and
    416 is for one of which no range begins in the file.
    """

    def __init__(self, here: AbstractContextManager[None], path: Path, filename: str):
        super().__init__(path, media_type="application/octet-stream", filename=filename)
        self._here = here

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.ExitStack() as stack:
            await asyncio.to_thread(stack.enter_context, self._here)
            await super().__call__(scope, receive, send)

    @classmethod
    def _parse_range_header(cls, http_range: str, file_size: int) -> list[tuple[int, int]]:
        try:
            return super()._parse_range_header(http_range, file_size)
        except MalformedRangeHeader:
            return []
        except RangeNotSatisfiable as e:
            message = f"the file has {file_size} bytes, and the Range header asks for none of them"
            raise HTTPException(416, message, headers={"Content-Range": f"bytes */{file_size}"}) from e

    @classmethod
    def _parse_ranges(cls, range_: str, file_size: int) -> list[tuple[int, int]]:
        ranges = super()._parse_ranges(range_, file_size)
        if len(ranges) < sum(bool(part.strip()) for part in range_.split(",")):
            raise MalformedRangeHeader  # in part, which Starlette passes over
        return [(start, end) for start, end in ranges if start < file_size] or ranges


def file_object(record: FileRecord) -> File:
    """A file as OpenAI's clients read it."""
    shown: File = {
        "id": record.id,
        "object": "file",
        "bytes": record.size_bytes,
        "created_at": int(record.created_s),
        "filename": record.filename,
        "purpose": cast(Purpose, record.purpose),
        "status": record.status,
        "status_details": record.status_details,
    }
    if record.expires_s is not None:
        shown["expires_at"] = int(record.expires_s)
    return shown
