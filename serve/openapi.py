"""The served OpenAPI document: what each route takes, answers and refuses, and nothing that it never does."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

DOCUMENT_PATH = "/openapi.json"
FRAMEWORK_ERROR = "HTTPValidationError"  # FastAPI's own 422, which our handlers replace
Responses = dict[int | str, dict]


def ok(answer: object, *, events: str | None = None) -> Responses:
    """The documented 200 of a route.  answer: a TypedDict of its JSON.  events: of a stream, what they are."""
    return {200: {"model": answer, "description": "the answer", "content": {} if events is None else stream(events)}}


def ok_as(content: Mapping[str, dict]) -> Responses:
    """The documented 200 of a route that answers no JSON alone: media type → its schema.  With `response_class=Response`."""
    return {200: {"description": "the answer", "content": dict(content)}}


def stream(events: str) -> dict[str, dict]:
    """Server-sent events as content.  events: what they are."""
    fields = {"data": {"type": "string"}, "event": {"type": "string"}}
    item = {"type": "object", "required": ["data"], "properties": fields, "description": events}
    return {"text/event-stream": {"itemSchema": item}}


def documented(app: FastAPI) -> Callable[[], dict]:
    """Makes the app's document, once."""

    def openapi() -> dict:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for operations in made["paths"].values():
                for operation in operations.values():
                    if FRAMEWORK_ERROR in str(operation["responses"].get("422")):
                        del operation["responses"]["422"]
            schemas = made.get("components", {}).get("schemas", {})
            for name in (FRAMEWORK_ERROR, "ValidationError"):
                schemas.pop(name, None)
            made["components"] = {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
            made["security"] = [{"key": []}, {}]  # a server without keys asks for none
            app.openapi_schema = made
        return app.openapi_schema

    return openapi
