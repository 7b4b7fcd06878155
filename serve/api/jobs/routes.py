"""The fine-tuning wire: OpenAI's jobs, their events and checkpoints, with pause and resume, and events that are followed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse

from jaxlora.core.errors import InvalidRequest, JaxLoraError
from serve.access.caller import caller_of
from serve.access.rate_limit import Limiter
from serve.api.jobs.render import checkpoint_object, event_object, job_object
from serve.api.jobs.schemas import (
    CheckpointList,
    EventList,
    EventsQuery,
    JobBody,
    JobList,
    JobObject,
    JobsQuery,
    LimitedQuery,
)
from serve.db.job_spec import JobSpec
from serve.db.models import JobRecord
from serve.http.errors import ERRORS, WRITE_ERRORS, error_body
from serve.http.idempotency import Once
from serve.http.pagination import list_object
from serve.http.schema import ok, refuse_unbuilt
from serve.http.sse import DONE, sse
from serve.jobs.service import JobService
from train.jobs.status import ENDED, JobStatus

LIMIT, CHECKPOINTS_LIMIT = 20, 10  # of a list without `limit`
FOLLOW_S = 0.25  # between two looks for new events
PING_S = 15.0
JOBS = "/v1/fine_tuning/jobs"


class JobsRoutes:
    """The routes, over one service."""

    def __init__(self, service: JobService, once: Once, limiter: Limiter):
        self._service, self._once, self._limiter = service, once, limiter

    def router(self) -> APIRouter:
        """All routes of this wire."""
        router = APIRouter(responses=ERRORS)
        for method, path, handler, responses in (
            ("POST", JOBS, self.create, ok(JobObject) | WRITE_ERRORS),
            ("GET", JOBS, self.list, ok(JobList)),
            ("GET", JOBS + "/{id}", self.read, ok(JobObject)),
            ("POST", JOBS + "/{id}/cancel", self.cancel, ok(JobObject) | WRITE_ERRORS),
            ("POST", JOBS + "/{id}/pause", self.pause, ok(JobObject) | WRITE_ERRORS),
            ("POST", JOBS + "/{id}/resume", self.resume, ok(JobObject) | WRITE_ERRORS),
            ("GET", JOBS + "/{id}/events", self.events, ok(EventList, events="the job's events, then [DONE]")),
            ("GET", JOBS + "/{id}/checkpoints", self.checkpoints, ok(CheckpointList)),
        ):
            router.add_api_route(path, handler, methods=[method], response_model=None, responses=responses)
        return router

    async def create(self, request: Request, body: JobBody) -> Response:
        """A new job."""
        refuse_unbuilt(body)
        self._limiter.admit(caller_of(request).owner, tokens=0)
        asked = body.model_dump(mode="json", exclude_unset=True)
        spec = JobSpec.from_json(asked)

        async def make() -> JobObject:
            return self._object(await asyncio.to_thread(self._service.create, caller_of(request), spec))

        return await self._once.answer(request, asked, make)

    async def list(self, request: Request, query: Annotated[JobsQuery, Query()]) -> Response:
        """The caller's jobs, newest first."""
        page = await asyncio.to_thread(
            self._service.stored.page,
            caller_of(request).sees,
            after=query.after,
            limit=query.limit or LIMIT,
            metadata=query.metadata,
        )
        return JSONResponse(list_object([self._object(r) for r in page.records], more=page.more))

    async def read(self, request: Request, id: str) -> Response:
        """One job."""
        return self._answer(await asyncio.to_thread(self._service.stored.get, id, caller_of(request).sees))

    async def cancel(self, request: Request, id: str) -> Response:
        """Ends a job; what it has learned stays."""
        return await self._move(request, id, JobStatus.CANCELLED)

    async def pause(self, request: Request, id: str) -> Response:
        """Has a job wait until it is resumed."""
        return await self._move(request, id, JobStatus.PAUSED)

    async def resume(self, request: Request, id: str) -> Response:
        """Has a paused job go on."""
        return await self._move(request, id, JobStatus.QUEUED)

    async def events(self, request: Request, id: str, query: Annotated[EventsQuery, Query()]) -> Response:
        """What happened to a job, newest first; with stream=true all of it, oldest first, and on until the job ends."""
        sees, stored = caller_of(request).sees, self._service.stored
        if query.stream:
            if query.after is not None or query.limit is not None:
                raise InvalidRequest("a stream has all events; leave out after and limit", param="stream")
            await asyncio.to_thread(stored.get, id, sees)
            return EventSourceResponse(self._follow(id, sees), headers={"Cache-Control": "no-cache"})
        page = await asyncio.to_thread(stored.events, id, sees, after=query.after, limit=query.limit or LIMIT)
        return JSONResponse(list_object([event_object(e) for e in page.records], more=page.more))

    async def checkpoints(self, request: Request, id: str, query: Annotated[LimitedQuery, Query()]) -> Response:
        """The versions of a job that can be asked, newest first."""
        page = await asyncio.to_thread(
            self._service.stored.checkpoints,
            id,
            caller_of(request).sees,
            after=query.after,
            limit=query.limit or CHECKPOINTS_LIMIT,
        )
        return JSONResponse(
            list_object([checkpoint_object(c, self._service.names) for c in page.records], more=page.more)
        )

    async def _move(self, request: Request, id: str, to: JobStatus) -> Response:
        return self._answer(await asyncio.to_thread(self._service.move, caller_of(request), id, to))

    async def _follow(self, id: str, sees: str | None) -> AsyncGenerator[bytes]:
        """Events as they come.  It ends when the job has, or when it is gone."""
        stored, seen, quiet_since = self._service.stored, 0, time.monotonic()
        while True:
            try:
                # Asked before the events: then the last ones are not missed.
                over = (await asyncio.to_thread(stored.get, id, sees)).status in ENDED
                events = await asyncio.to_thread(stored.events_since, id, sees, seen, limit=100)
            except JaxLoraError as error:
                yield sse(error_body(error)[1])
                break
            for event in events:
                yield sse(event_object(event))
                seen, quiet_since = event.seq, time.monotonic()
            if over and not events:
                break
            if time.monotonic() - quiet_since > PING_S:
                yield KEEPALIVE_COMMENT
                quiet_since = time.monotonic()
            await asyncio.sleep(0 if events else FOLLOW_S)
        yield DONE

    def _object(self, record: JobRecord) -> JobObject:
        return job_object(record, self._service.names)

    def _answer(self, record: JobRecord) -> Response:
        return JSONResponse(self._object(record))
