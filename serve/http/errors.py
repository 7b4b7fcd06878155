"""Every error as OpenAI clients read it: {"error": {"message", "type", "param", "code"}}, with a status and headers.

One whose message does not say all mistakes has them one by one in "details", which is ours.

Errors outside our tree, and every 500, are written without details: those are in the log, under the request id.
ErrorShapes gives each error the shape of its path's wire, whether a handler, the framework or the gate raised it.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NotRequired, TypedDict

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import TypeAdapter, with_config
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Scope

from jaxlora.core.errors import InvalidRequest, JaxLoraError, NoReplica, QuotaExceeded, RateLimited
from serve.http.request_log import note_refused
from serve.http.schema import CLOSED

RETRY_AFTER_S = 1  # a client waits this long before it retries; one that reads 0 would hammer
LOG = logging.getLogger("serve")

TYPES = {401: "authentication_error", 403: "permission_error", 409: "conflict_error", 429: "rate_limit_error"}
HTTP_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    408: "body_timeout",
    413: "body_too_large",
    416: "range_not_satisfiable",
}
ERROR_STATUSES = {
    400: "a field is wrong, unknown or not supported; `param` names it",
    401: "no valid key",
    403: "the key's role may not do this, or the Host header names another machine",
    404: "no such object, or not one of yours",
    405: "the route does not take this method",
    408: "the body took too long to arrive",
    413: "the body is too large",
    429: "over your limit; see Retry-After",
    500: "internal error; the log has it under the request id",
    503: "starting, overloaded or stopping; see Retry-After",
    504: "it took longer than x-request-timeout-s, or than this server allows",
}
WRITE_STATUSES = {
    409: "what is there does not allow it; asked again, it would end alike",
    507: "the server's disk is full; nothing was changed",
}


@with_config(CLOSED)
class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str
    details: NotRequired[list[str]]  # every mistake, where the message does not say all


ErrorObject = dict[str, ErrorDetail]  # {"error": detail}
ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {"error": TypeAdapter(ErrorDetail).json_schema()},
}


def _documented(statuses: Mapping[int, str]) -> dict[int | str, dict]:
    content = {"application/json": {"schema": ERROR_SCHEMA}}
    return {status: {"description": text, "content": content} for status, text in statuses.items()}


# What any route may answer, for the served document; and a route that changes what is stored beside it.
ERRORS = _documented(ERROR_STATUSES)
WRITE_ERRORS = _documented(WRITE_STATUSES)
RANGE_ERRORS = _documented({416: "no byte of the file is in the Range header"})


class UnknownParameter(InvalidRequest):
    """The API has no field of that name."""

    code = "unknown_parameter"


def error_body(error: Exception) -> tuple[int, ErrorObject]:
    """(HTTP status, the JSON object) of an error."""
    if isinstance(error, RequestValidationError):
        error = invalid_request(error.errors(), error.body)
    status, param = error_status(error), error.param if isinstance(error, JaxLoraError) else None
    code, message = JaxLoraError.code if status == 500 else error_code(error), error_message(error)
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    detail: ErrorDetail = {"message": message, "type": kind, "param": param, "code": code}
    if isinstance(error, JaxLoraError) and error.details and status != 500:
        detail["details"] = list(error.details)
    return status, {"error": detail}


def error_status(error: Exception) -> int:
    """The HTTP status of an error; 500 for a stranger."""
    if isinstance(error, JaxLoraError):
        return error.status
    return error.status_code if isinstance(error, HTTPException) else 500


def error_message(error: Exception) -> str:
    """The message that a client gets, whatever the wire: no details of a failure of ours."""
    if isinstance(error, JaxLoraError) and error.status != 500:
        return error.message
    if isinstance(error, HTTPException):
        return str(error.detail)
    return "internal error; the log has it under the request id"


def error_response(error: Exception) -> Response:
    """The HTTP answer to an error."""
    status, body = error_body(error)
    # ASCII only: a message may quote a client's lone surrogate, which UTF-8 cannot hold.
    return Response(
        json.dumps(body), status_code=status, headers=error_headers(error, status), media_type="application/json"
    )


def error_headers(error: Exception, status: int) -> dict[str, str]:
    """The headers of an answer to an error, whatever its wire: they say whether a client should retry."""
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if isinstance(error, RateLimited | NoReplica):
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    elif status == 503:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    if status in (409, 504, 507) or isinstance(error, QuotaExceeded):  # a retry would end alike
        headers["x-should-retry"] = "false"
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def error_code(error: Exception) -> str:
    """One of a few words for what is wrong, whatever the wire: for counts and logs."""
    if isinstance(error, JaxLoraError):
        return error.code
    if isinstance(error, RequestValidationError):
        return InvalidRequest.code
    if isinstance(error, HTTPException):
        return HTTP_CODES.get(error.status_code, InvalidRequest.code)
    return JaxLoraError.code


def invalid_request(findings: Sequence[dict], body: object) -> InvalidRequest:
    """Returns one error for all that pydantic found: the deepest in the body, which the arms of a union explain best."""
    placed = [(place(f["loc"][1:], body if f["loc"][0] == "body" else None), f) for f in findings]
    depth = max(len(path) for path, _ in placed)
    path, finding = next((path, f) for path, f in placed if len(path) == depth)
    name = dotted(path) or None
    kind = finding["type"]
    if kind == "json_invalid":
        return InvalidRequest(f"the body is not JSON: {finding['ctx']['error']} at character {finding['loc'][1]}")
    if kind == "extra_forbidden":
        return UnknownParameter(f"unknown parameter {name!a}; leave it out", param=name)
    if kind == "missing" and name is None:
        return InvalidRequest("the request has no body; send a JSON object with Content-Type: application/json")
    if kind == "missing":
        return InvalidRequest(f"{name} is required", param=name)
    if kind == "string_unicode":
        return InvalidRequest(f"{name or 'a field name'} must be Unicode text, without lone surrogates", param=name)
    if name is None and kind == "fields":
        return InvalidRequest(f"the body {finding['msg']}")
    if name is None:
        return InvalidRequest("the body must be a JSON object, sent with Content-Type: application/json")
    messages = dict.fromkeys(f["msg"] for p, f in placed if p == path)
    return InvalidRequest(f"{name}: {', or '.join(messages)}; got {shown_type(finding['input'])}", param=name)


def place(loc: Sequence[str | int], body: object) -> tuple[str | int, ...]:
    """The part of a pydantic location that is a path into the body: arms of unions, which it also names, are left out."""
    path: list[str | int] = []
    value = body
    for i, step in enumerate(loc):
        if isinstance(value, dict) and (step in value or i == len(loc) - 1):
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        elif i:
            continue
        path.append(step)
    return tuple(path)


def dotted(path: Sequence[str | int]) -> str:
    """messages[0].content; long names and deep places are cut, for the client chose them."""
    steps = (f"[{s}]" if isinstance(s, int) else f".{s[:64]}" for s in path[:8])
    return "".join(steps).removeprefix(".")


def shown_type(value: object) -> str:
    """The JSON type of a value, and the value only where it cannot hold a person's text."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value}"[:60]
    return {str: "a string", list: "a list", dict: "an object"}.get(type(value), "something else")


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
