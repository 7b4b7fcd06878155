"""The adapters' wire: vLLM's two routes for folders of the server, and ours for uploads, lists, downloads, pins, deletion.

Every object is found through what its caller sees, so another tenant's is the same 404 as one that never was.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, cast

import fastapi
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from jaxlora.core.errors import DeadlineExceeded, InvalidRequest, Overloaded
from serve.access.caller import Caller, caller_of
from serve.access.rate_limit import Limiter
from serve.api.adapters.schemas import (
    UPLOAD_BODY,
    UPLOAD_FIELDS,
    UPLOAD_FILES,
    AdapterList,
    AdapterObject,
    DeletedAdapter,
    DeletedModel,
    DownloadQuery,
    ImportedObject,
    ListQuery,
    LoadBody,
    UnloadBody,
    VersionsQuery,
)
from serve.api.adapters.service import AdapterService, Exported, Imported
from serve.db.models import Page
from serve.http.errors import ERRORS, WRITE_ERRORS
from serve.http.multipart import Form, FormRules, receive_form
from serve.http.pagination import list_object
from serve.http.schema import ok, ok_as, refuse_unbuilt
from serve.http.strict_json import JsonRoute
from serve.runtime.backend import ModelCard

UPLOAD_PATH = "/v1/adapters"
MAX_TRANSFERS = 16  # uploads and downloads at once: each may hold an adapter on disk
MAX_TRANSFERS_OF_TENANT = 4
MAX_AT_WORK = 2  # that are read, checked or packed at once: each holds an adapter in memory
MAX_FILES = 8  # of an adapter that comes file by file, what is left out included
CHUNK_BYTES = 2**18


class AdaptersRoutes:
    """The routes, over one service."""

    def __init__(self, service: AdapterService, limiter: Limiter):
        self._service, self._limiter = service, limiter
        self._transfers: Counter[str] = Counter()  # of each tenant, under way; of the event loop's thread
        self._work = asyncio.Semaphore(MAX_AT_WORK)

    @property
    def body_limits(self) -> dict[str, int]:
        """For the gate: path → bytes of an adapter."""
        return {UPLOAD_PATH: self._service.limits.total_bytes}

    def router(self) -> APIRouter:
        """All routes of this wire."""
        router = APIRouter(responses=ERRORS, route_class=JsonRoute)
        text, zipped = (ok_as({media: {"schema": {"type": "string"}}}) for media in ("text/plain", "application/zip"))
        # A name may hold a slash, so what stands behind it comes first.
        for method, path, handler, responses in (
            ("POST", "/v1/load_lora_adapter", self.load, text),
            ("POST", "/v1/unload_lora_adapter", self.unload, text),
            ("GET", UPLOAD_PATH, self.list_adapters, ok(AdapterList)),
            ("POST", UPLOAD_PATH, self.upload, ok(ImportedObject)),
            ("GET", UPLOAD_PATH + "/{name:path}/versions", self.list_versions, ok(AdapterList)),
            ("GET", UPLOAD_PATH + "/{name:path}/download", self.download, zipped),
            ("POST", UPLOAD_PATH + "/{name:path}/pin", self.pin, ok(AdapterObject)),
            ("POST", UPLOAD_PATH + "/{name:path}/unpin", self.unpin, ok(AdapterObject)),
            ("GET", UPLOAD_PATH + "/{name:path}", self.read, ok(AdapterObject)),
            ("DELETE", UPLOAD_PATH + "/{name:path}", self.delete, ok(DeletedAdapter)),
            ("DELETE", "/v1/models/{model:path}", self.delete_model, ok(DeletedModel)),
        ):
            router.add_api_route(
                path,
                handler,
                methods=[method],
                response_model=None,
                response_class=JSONResponse if "model" in responses[200] else Response,
                responses=responses | ({} if method == "GET" else WRITE_ERRORS),
                openapi_extra=UPLOAD_BODY if handler == self.upload else None,
            )
        return router

    # ---- vLLM's -----------------------------------------------------------------------------------------------------

    async def load(self, request: Request, body: LoadBody) -> Response:
        """A folder of the server as a new adapter, or with load_inplace as the next version of one."""
        caller = caller_of(request)
        caller.need_admin("loading from a folder of the server")
        refuse_unbuilt(body)
        if not body.lora_name or not body.lora_path:
            raise InvalidRequest("Both 'lora_name' and 'lora_path' must be provided.", param="lora_name")
        place = self._service.place(caller, body.lora_name)
        with self._transfer(caller):
            await self._at_work(
                lambda: self._service.add_folder(
                    place, body.lora_path, in_place=body.load_inplace, any_base=body.allow_base_mismatch
                )
            )
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(self, request: Request, body: UnloadBody) -> Response:
        """Deletes the adapter with all its versions; its folder on the server stays."""
        caller = caller_of(request)
        caller.need_admin("unloading an adapter")
        refuse_unbuilt(body)
        if not body.lora_name:
            raise InvalidRequest("'lora_name' must be provided.", param="lora_name")
        if "@" in body.lora_name:
            raise InvalidRequest("lora_name must be an adapter's name, without @VERSION", param="lora_name")
        await asyncio.to_thread(self._service.delete, caller.sees, body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    # ---- ours -------------------------------------------------------------------------------------------------------

    async def list_adapters(self, request: Request, query: Annotated[ListQuery, fastapi.Query()]) -> Response:
        """The caller's adapters, the newest first."""
        sees = caller_of(request).sees
        return self._list(
            await asyncio.to_thread(self._service.page, sees, prefix=query.prefix, after=query.after, limit=query.limit)
        )

    async def list_versions(
        self, request: Request, name: str, query: Annotated[VersionsQuery, fastapi.Query()]
    ) -> Response:
        """The versions of one adapter, the newest first."""
        sees = caller_of(request).sees
        return self._list(
            await asyncio.to_thread(self._service.versions, sees, name, after=query.after, limit=query.limit)
        )

    async def read(self, request: Request, name: str) -> Response:
        """One adapter, or one version of it."""
        return JSONResponse(self._object(await asyncio.to_thread(self._service.card, caller_of(request).sees, name)))

    async def upload(self, request: Request) -> Response:
        """A new adapter out of a PEFT folder's files, or the next version of one."""
        with self._transfer(caller_of(request)), self._service.staged() as folder:
            name, imported = await self._receive(request, folder)
        card = await asyncio.to_thread(self._service.card, None, str(imported.ref))
        card = replace(card, id=f"{name}@{imported.ref.version}")
        return JSONResponse(imported_object(self._object(card), imported))

    async def _receive(self, request: Request, folder: Path) -> tuple[str, Imported]:
        """Returns (the name as the caller wrote it, the import)."""
        caller = caller_of(request)
        rules = FormRules(
            fields=UPLOAD_FIELDS,
            files=UPLOAD_FILES,
            max_files=MAX_FILES,
            max_file_bytes=self._service.limits.total_bytes,
        )
        form: Form = await receive_form(request, folder, rules)
        if "name" not in form.fields:
            raise InvalidRequest("name is required", param="name")
        if not form.files:
            raise InvalidRequest("file is required: a zip or tar of a PEFT folder, or its files", param="file")
        any_base = form.fields.get("allow_base_mismatch", "false")
        if any_base not in ("true", "false"):
            raise InvalidRequest("allow_base_mismatch must be true or false", param="allow_base_mismatch")
        if any_base == "true":
            caller.need_admin("loading an adapter of another base")
        place = self._service.place(caller, form.fields["name"])
        files = [(file.filename, file.path) for file in form.files]

        def add() -> Imported:
            (folder / "adapter").mkdir()
            try:
                return self._service.add_upload(place, files, folder / "adapter", any_base=any_base == "true")
            finally:  # here, as a large file takes a while to remove
                shutil.rmtree(folder, ignore_errors=True)

        return form.fields["name"], await self._at_work(add)

    async def download(self, request: Request, name: str, query: Annotated[DownloadQuery, fastapi.Query()]) -> Response:
        """A version's PEFT folder as a zip."""
        caller = caller_of(request)
        with contextlib.ExitStack() as held:
            held.enter_context(self._transfer(caller))
            exported = await self._at_work(lambda: self._service.export(caller.sees, name, query.dtype))
            held.enter_context(exported.file)
            return ZipStream(exported, request.state.deadline, held.pop_all())

    async def pin(self, request: Request, name: str) -> Response:
        """Pins the adapter to its slot."""
        caller = caller_of(request)
        caller.need_admin("pinning an adapter")
        return JSONResponse(self._object(await asyncio.to_thread(self._service.pin, caller.sees, name)))

    async def unpin(self, request: Request, name: str) -> Response:
        """Unpins the adapter, which takes its turns again."""
        caller = caller_of(request)
        caller.need_admin("unpinning an adapter")
        return JSONResponse(self._object(await asyncio.to_thread(self._service.unpin, caller.sees, name)))

    async def delete(self, request: Request, name: str) -> Response:
        """Deletes an adapter, or one version of it."""
        await asyncio.to_thread(self._service.delete, caller_of(request).sees, name)
        return JSONResponse(DeletedAdapter(id=name, object="adapter", deleted=True))

    async def delete_model(self, request: Request, model: str) -> Response:
        """Deletes the same, by the route of OpenAI's clients."""
        await asyncio.to_thread(self._service.delete, caller_of(request).sees, model)
        return JSONResponse(DeletedModel(id=model, object="model", deleted=True))

    # ---- rendering ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _transfer(self, caller: Caller) -> Generator[None]:
        """Counts one more transfer.  Raises Overloaded when there are as many as may be, of this tenant or of all; RateLimited."""
        if self._transfers[caller.owner] >= MAX_TRANSFERS_OF_TENANT:
            raise Overloaded(f"{MAX_TRANSFERS_OF_TENANT} of your adapters are on their way in or out; retry later")
        if self._transfers.total() >= MAX_TRANSFERS:
            raise Overloaded(f"{MAX_TRANSFERS} adapters are on their way in or out already; retry later")
        self._limiter.admit(caller.owner, tokens=0)
        self._transfers[caller.owner] += 1
        try:
            yield
        finally:
            self._transfers[caller.owner] -= 1
            if not self._transfers[caller.owner]:
                del self._transfers[caller.owner]

    async def _at_work[R](self, work: Callable[[], R]) -> R:
        """Returns the result of `work`, run on a worker thread when its turn has come."""
        async with self._work:
            return await asyncio.to_thread(work)

    def _object(self, card: ModelCard) -> AdapterObject:
        assert card.version is not None
        assert card.rank is not None
        assert card.parent is not None
        assert card.state != "base"
        return {
            "id": card.id,
            "object": "adapter",
            "created": card.created,
            "tenant": card.owned_by,
            "name": card.root,
            "version": card.version,
            "rank": card.rank,
            "base": card.parent,
            "state": card.state,
            "pinned": self._service.is_pinned(card.owned_by, card.root),
        }

    def _list(self, page: Page[ModelCard]) -> Response:
        return JSONResponse(list_object([self._object(card) for card in page.records], more=page.more))


def imported_object(adapter: AdapterObject, imported: Imported) -> ImportedObject:
    """The adapter, with what its import has read."""
    shown = {name: value for name, value in asdict(imported.report).items() if name != "base_name"}
    return cast(ImportedObject, {**adapter, **shown, "left_out": imported.left_out})


class ZipStream(StreamingResponse):
    """A zip, a piece at a time, until the request's deadline: then a slow client has what it has.

    held: left when the answer is over, however it ended.
    """

    def __init__(self, exported: Exported, deadline: float, held: contextlib.ExitStack):
        self._deadline, self._held = deadline, held
        headers = {
            "Content-Length": str(exported.nbytes),
            "Content-Disposition": f'attachment; filename="{exported.filename}"',
        }
        pieces = iter(lambda: exported.file.read(CHUNK_BYTES), b"")
        super().__init__(pieces, media_type="application/zip", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it.  Raises DeadlineExceeded when it took too long."""
        with self._held:
            try:
                async with asyncio.timeout_at(self._deadline):
                    await super().__call__(scope, receive, send)
            except TimeoutError as error:
                raise DeadlineExceeded("the download took longer than a request may") from error
