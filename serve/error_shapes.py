"""Every error in the shape of the wire whose path was asked, whoever noticed it: a handler, the framework or the gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fastapi import Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Scope

from jaxlora.core.errors import JaxLoraError
from serve.answered import note_refused
from serve.openai_errors import LOG, error_code, error_response

Shape = Callable[[Exception], Response]  # takes our tree, the framework's HTTPException and RequestValidationError, any


class ErrorShapes:
    """Which wire shapes which path's errors; OpenAI's where none is named."""

    def __init__(self, shapes: Mapping[str, Shape]):
        """shapes: of a path and all below it."""
        self._shapes = dict(shapes)

    def response(self, scope: Scope, error: Exception) -> Response:
        """The answer to an error."""
        note_refused(scope, error_code(error))
        path = scope["path"] + "/"
        shape = next((s for root, s in self._shapes.items() if path.startswith(root + "/")), error_response)
        return shape(error)

    async def handle(self, request: Request, error: Exception) -> Response:
        """The app's exception handler, for our tree and for the framework's own errors."""
        if isinstance(error, ClientDisconnect):
            return Response(status_code=499)  # nobody reads it; it is for the access log
        if isinstance(error, HTTPException) and error.detail in ("Not Found", "Method Not Allowed"):
            shown = ascii(request.url.path)[:200]
            error = HTTPException(error.status_code, f"{error.detail}: {request.method} {shown}", error.headers)
        if isinstance(error, JaxLoraError) and error.status == 500:
            LOG.error("request failed", exc_info=error)
        return self.response(request.scope, error)
