"""Errors of the Gradient API, {"type", "message", "payload"?}: the shape of every error under /api."""

from __future__ import annotations

import json

from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from jaxlora.core.errors import (
    AdapterNotFinite,
    AdapterNotFound,
    ContextLengthExceeded,
    InvalidRequest,
    JaxLoraError,
    NotFound,
)
from serve.http.errors import error_headers, error_message, error_status, invalid_request

API = "/api"
BODY_ERROR, QUERY_ERROR = "bodyParsingError", "queryOrPathParsingError"
GRADIENT_STATUSES = {
    400: "a field is wrong, or cannot be trained on",
    401: "no valid key",
    404: "no such model, or not one of yours",
    413: "the body is too large",
    422: "over the context length",
    429: "over your limit; see Retry-After",
    503: "overloaded; see Retry-After",
    504: "it took longer than x-request-timeout-s, or than this server allows",
}
GRADIENT_SCHEMA = {
    "type": "object",
    "required": ["type", "message"],
    "properties": {
        "type": {"type": "string"},
        "message": {"type": "string", "minLength": 1},
        "payload": {"type": "object"},
    },
}
# "default" also keeps FastAPI from documenting its own 422.
GRADIENT_ERRORS: dict[int | str, dict] = {
    status: {"description": text, "content": {"application/json": {"schema": GRADIENT_SCHEMA}}}
    for status, text in [*GRADIENT_STATUSES.items(), ("default", "any other error")]
}


class UnknownBase(AdapterNotFound):
    """No base model of that id."""


class UnknownCollection(NotFound):
    """No RAG collection of that id: this server has none."""


class NotTrainable(InvalidRequest):
    """A base model, or an adapter of a server that does not train, cannot be fine-tuned."""


def gradient_type(error: Exception, status: int) -> str:
    """Gradient's word for an error."""
    for kind, word in (
        (UnknownBase, "unknownBaseModel"),
        (UnknownCollection, "unknownRagCollection"),
        (AdapterNotFound, "unknownModelAdapter"),
        (NotTrainable, "modelIncapableOfFineTuning"),
        (AdapterNotFinite, "nanLoss"),
        (ContextLengthExceeded, "unprocessableContent"),
    ):
        if isinstance(error, kind):
            return word
    if isinstance(error, RequestValidationError):
        in_body = all(finding["loc"][:1] == ("body",) for finding in error.errors())
        return BODY_ERROR if in_body else QUERY_ERROR
    return BODY_ERROR if status == 400 and isinstance(error, JaxLoraError) else "failed"


def gradient_response(error: Exception) -> Response:
    """The HTTP answer to an error of our tree, of the framework, or of nobody's."""
    if isinstance(error, RequestValidationError):
        message, status = invalid_request(error.errors(), error.body).message, 400
    else:
        status, message = error_status(error), error_message(error)
    if isinstance(error, ContextLengthExceeded):
        status = 422
    kind = gradient_type(error, status)
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        message = f"{message} is not supported by this server"
    body: dict[str, object] = {"type": kind, "message": message}
    if kind in (BODY_ERROR, QUERY_ERROR):
        body["payload"] = {"formattedValidationError": message}
    return Response(
        json.dumps(body), status_code=status, headers=error_headers(error, status), media_type="application/json"
    )
