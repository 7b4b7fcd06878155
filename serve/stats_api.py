"""GET /v1/stats: the server at this moment as JSON, for `jaxlora top` and for people."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from serve.auth import caller_of
from serve.house import House
from serve.openai_errors import ERRORS
from serve.openapi import ok
from serve.stats_types import StatsObject
from serve.watch import Watch

STATS_PATH = "/v1/stats"


class StatsWire:
    """The one route, over what the device thread has left to read."""

    def __init__(self, house: House, watch: Watch):
        self._house, self._watch = house, watch

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
                "model": self._house.base_name,
                "health": self._house.health(),
                "tokens_per_s": asdict(self._watch.rates()),
                **snapshot,
            }
        )
