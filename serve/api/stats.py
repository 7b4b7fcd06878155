"""GET /v1/stats: the server at this moment as JSON, a Snapshot and a few fields, for `jaxlora top` and for people."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal, get_type_hints

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import create_model

from serve.access.caller import caller_of
from serve.http.errors import ERRORS
from serve.http.request_log import STATS_PATH
from serve.http.schema import CLOSED, ok
from serve.runtime.backend import Backend
from serve.runtime.snapshot import Snapshot
from serve.runtime.watchdog import Rates, Watch

StatsObject = create_model(  # for the document: a Snapshot, but for its clock's time
    "StatsObject",
    __config__=CLOSED,
    object=Literal["server.stats"],
    model=str,
    health=str,
    age_s=float,
    tokens_per_s=Rates,
    **{name: kind for name, kind in get_type_hints(Snapshot).items() if name != "at_s"},
)


class StatsRoutes:
    """The one route, over what the device thread has left to read."""

    def __init__(self, backend: Backend, watch: Watch):
        self._backend, self._watch = backend, watch

    def router(self) -> APIRouter:
        """The one route."""
        router = APIRouter(responses=ERRORS)
        router.add_api_route(STATS_PATH, self.read, methods=["GET"], response_model=None, responses=ok(StatsObject))
        return router

    async def read(self, request: Request) -> Response:
        """Slots, lines, memory, tokens a second and jobs of all tenants, so it needs a key of the role admin."""
        caller_of(request).need_admin("reading the server's state")
        snapshot = asdict(self._watch.snapshot)
        snapshot["age_s"] = self._watch.age_s()
        del snapshot["at_s"]
        return JSONResponse(
            {
                "object": "server.stats",
                "model": self._backend.base_name,
                "health": self._backend.health(),
                "tokens_per_s": asdict(self._watch.rates()),
                **snapshot,
            }
        )
