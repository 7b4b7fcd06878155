"""GET and POST /v1/tuning: the settings that may change while the server runs, and a change of the quantum."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, replace
from typing import Annotated, Literal, get_type_hints

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, create_model

from jaxlora.config.serving import Tuning
from serve.access.caller import caller_of
from serve.http.errors import ERRORS, WRITE_ERRORS
from serve.http.schema import CLOSED, Strict, ok
from serve.http.strict_json import JsonRoute
from serve.runtime.device_thread import DeviceThread

PATH = "/v1/tuning"
TuningObject = create_model(
    "TuningObject", __config__=CLOSED, object=Literal["server.tuning"], **get_type_hints(Tuning)
)


class TuningBody(Strict):
    """What changes; all else stays as it is."""

    quantum_ms: Annotated[float, Field(gt=0)]


class TuningRoutes:
    """The two routes, over one runner."""

    def __init__(self, runner: DeviceThread):
        self._runner = runner

    def router(self) -> APIRouter:
        """Both routes."""
        router = APIRouter(responses=ERRORS, route_class=JsonRoute)
        for method, handler, more in (("GET", self.read, {}), ("POST", self.change, WRITE_ERRORS)):
            router.add_api_route(
                PATH, handler, methods=[method], response_model=None, responses=ok(TuningObject) | more
            )
        return router

    async def read(self, request: Request) -> Response:
        """The settings as they are now; needs a key of the role admin."""
        caller_of(request).need_admin("reading the server's tuning")
        return self._answer()

    async def change(self, request: Request, body: TuningBody) -> Response:
        """Changes them from the next step on, until the server's file is read again; needs a key of the role admin."""
        caller_of(request).need_admin("tuning the server")
        runner = self._runner

        def tune() -> None:  # on the device thread, where pins change too
            runner.tune(replace(runner.tuning, quantum_ms=body.quantum_ms))

        await asyncio.to_thread(runner.call, tune)
        return self._answer()

    def _answer(self) -> Response:
        return JSONResponse({"object": "server.tuning", **asdict(self._runner.tuning)})
