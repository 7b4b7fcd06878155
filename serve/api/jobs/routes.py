"""The fine-tuning wire: OpenAI's jobs, their events and checkpoints, with pause and resume, and events that are followed."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse
from starlette.types import Receive, Scope, Send

from jaxlora.core.errors import InvalidRequest, JaxLoraError
from serve.access.caller import caller_of
from serve.access.places import Places
from serve.access.rate_limit import Limiter
from serve.access.worker_pool import WorkerPool
from serve.api.jobs.follow import Feeds
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
from serve.http.strict_json import JsonRoute
from serve.jobs.service import JobService
from train.jobs.status import JobStatus

LIMIT, CHECKPOINTS_LIMIT = 20, 10  # of a list without `limit`
MAX_FOLLOWERS = 512  # streams of events at once
CHANGE_S = 60.0  # more than a change that waits for database and device takes: one that was given up may be done yet
JOBS = "/v1/fine_tuning/jobs"


class JobsRoutes:
    """The routes, over one service."""

    def __init__(self, service: JobService, once: Once, limiter: Limiter):
        self._service, self._once, self._limiter = service, once, limiter
        self._feeds, self._followers = Feeds(service.stored), Places("streams of job events", MAX_FOLLOWERS)
        self._ask = service.stored.database.ask
        # Not on the database's threads: these wait for the device too, and for files.
        self._changing = WorkerPool("jobs", threads=4, waiting=64, timeout_s=CHANGE_S)

    def router(self) -> APIRouter:
        """All routes of this wire."""
        router = APIRouter(responses=ERRORS, route_class=JsonRoute)
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
            caller = caller_of(request)
            return self._object(await self._changing.run(caller.owner, lambda: self._service.create(caller, spec)))

        return await self._once.answer(request, asked, make)

    async def list(self, request: Request, query: Annotated[JobsQuery, Query()]) -> Response:
        """The caller's jobs, newest first."""
        page = await self._ask(
            self._service.stored.page,
            caller_of(request).sees,
            after=query.after,
            limit=query.limit or LIMIT,
            metadata=query.metadata,
        )
        return JSONResponse(list_object([self._object(r) for r in page.records], more=page.more))

    async def read(self, request: Request, id: str) -> Response:
        """One job."""
        return self._answer(await self._ask(self._service.stored.shown, id, caller_of(request).sees))

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
        """What happened to a job, newest first; with stream=true oldest first, from after `after`, and on until the job ends.

        A stream also ends, with [DONE], when the request's time is over: whoever goes on names the last event in `after`.
        """
        caller, stored = caller_of(request), self._service.stored
        sees = caller.sees
        if query.stream:
            if query.limit is not None:
                raise InvalidRequest("a stream has all events; leave out limit", param="stream")
            with contextlib.ExitStack() as held:
                held.enter_context(self._followers.held(caller.owner, self._limiter.of(caller.owner).followers))
                seen = await self._ask(stored.seq, id, sees, query.after)
                return Followed(self._events(id, seen, request.state.deadline), held.pop_all())
        page = await self._ask(stored.events, id, sees, after=query.after, limit=query.limit or LIMIT)
        return JSONResponse(list_object([event_object(e) for e in page.records], more=page.more))

    async def checkpoints(self, request: Request, id: str, query: Annotated[LimitedQuery, Query()]) -> Response:
        """The versions of a job that can be asked, newest first."""
        page = await self._ask(
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
        caller = caller_of(request)
        return self._answer(await self._changing.run(caller.owner, lambda: self._service.move(caller, id, to)))

    async def _events(self, id: str, seen: int, deadline: float) -> AsyncGenerator[bytes]:
        """The bytes of a stream of events."""
        try:
            async with contextlib.aclosing(self._feeds.follow(id, seen, deadline)) as news:
                async for events in news:
                    for event in events:
                        yield sse(event_object(event))
                    if not events:
                        yield KEEPALIVE_COMMENT
        except JaxLoraError as error:
            yield sse(error_body(error)[1])
        yield DONE

    def _object(self, record: JobRecord) -> JobObject:
        service = self._service
        return job_object(record, service.names, service.size(record), service.slot_bytes(record))

    def _answer(self, record: JobRecord) -> Response:
        return JSONResponse(self._object(record))


class Followed(EventSourceResponse):
    """A stream of events, which gives its place back when it ends, even before the first byte."""

    def __init__(self, events: AsyncGenerator[bytes], held: contextlib.ExitStack):
        super().__init__(events, headers={"Cache-Control": "no-cache"})
        self._events, self._held = events, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them."""
        with self._held:
            async with contextlib.aclosing(self._events):
                await super().__call__(scope, receive, send)
