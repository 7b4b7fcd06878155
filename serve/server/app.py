"""create_app(backend, config): the wires joined over one backend, behind one gate."""

from __future__ import annotations

import socket
from collections.abc import Callable
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from jaxlora.core.errors import JaxLoraError, Unavailable
from serve.api.openai.generation import Admission
from serve.api.openai.routes import OpenAIRoutes
from serve.api.openai.schemas import Status, Version
from serve.api.responses.routes import ResponsesRoutes
from serve.http.errors import ERRORS, ErrorShapes
from serve.http.json_bodies import JsonBodies
from serve.http.request_log import HEALTH_PATH, READY_PATH
from serve.http.schema import DOCUMENT_PATH, documented, ok
from serve.runtime.backend import Backend
from serve.runtime.device_thread import DeviceThread
from serve.server.gate import AppConfig, Gate
from serve.server.pages import pages
from serve.server.uvicorn import HttpServer, config_on, http_over

MOST_VALUES, CONTEXTS = 2**18, 8  # of a JSON body: so many, or the ids of so many whole contexts


def most_values(backend: Backend) -> int:
    """Returns how many values a JSON body may have."""
    return max(MOST_VALUES, CONTEXTS * backend.context)


def create_app(backend: Backend, config: AppConfig) -> FastAPI:
    """The server's HTTP application.  It sends no CORS headers, so no other page's script may read it."""
    shapes = ErrorShapes(config.error_shapes)
    # FastAPI's pages load scripts from elsewhere; ours are in serve/server/pages.py.
    app = FastAPI(
        title="jaxlora",
        version=version("jaxlora"),
        docs_url=None,
        redoc_url=None,
        openapi_url=DOCUMENT_PATH,
        redirect_slashes=False,
    )
    app.openapi = documented(app)
    admission = Admission(backend, config.ping_s, config.limiter)
    own = [routes(backend, admission, config.default_max_tokens).router() for routes in (OpenAIRoutes, ResponsesRoutes)]
    for router in (*own, *config.routers):
        app.include_router(router)

    def check_health() -> None:
        config.drain.check_started()
        state = backend.health()
        if state != "ok":
            raise Unavailable(state)

    def check_ready() -> None:
        config.drain.check()
        check_health()

    @app.get(HEALTH_PATH, response_model=None, responses=ERRORS | ok(Status))
    async def health() -> Response:
        """Whether the server can serve; needs no key."""
        check_health()
        return JSONResponse(Status(status="ok"))

    @app.get(READY_PATH, response_model=None, responses=ERRORS | ok(Status))
    async def ready() -> Response:
        """Whether the server takes requests, or what it waits for; needs no key."""
        check_ready()
        return JSONResponse(Status(status="ok"))

    app.include_router(pages(app.openapi, check_ready), include_in_schema=False)

    @app.get("/version", response_model=None, responses=ERRORS | ok(Version))
    async def read_version() -> Response:
        """The server's version."""
        return JSONResponse(Version(version=version("jaxlora")))

    for kind in (JaxLoraError, HTTPException, RequestValidationError, ClientDisconnect):
        app.add_exception_handler(kind, shapes.handle)
    if config.limiter is not None:
        app.add_middleware(
            JsonBodies,
            rate=config.limiter.bodies,
            uploads=config.body_limits.keys(),
            most_values=most_values(backend),
        )
    app.add_middleware(Gate, config=config, shapes=shapes)
    return app


def make_http(
    runner: DeviceThread,
    config: AppConfig,
    *,
    listening: socket.socket,
    grace_s: float,
    ending: Callable[[int], None] = lambda inside: None,
) -> HttpServer:
    """The runner behind HTTP on a socket that is bound already, whose address says which hosts requests may name.

    grace_s: for open requests to finish when the server ends.  ending: see DrainingServer.
    """
    config = config_on(listening, config)
    return http_over(
        create_app(runner, config),
        config,
        listening=listening,
        grace_s=grace_s,
        end_open=runner.end_all,
        end_error=runner.end_error,
        is_lost=lambda: runner.lost,
        ending=ending,
    )
