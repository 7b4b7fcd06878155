"""What the served document says of answers and forms, beside what a wire's own schemas say.  Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from pydantic import with_config

from serve.http.schema import CLOSED


@with_config(CLOSED)
class Closed(TypedDict):
    """The base of every answer: it has no other fields than those it declares."""


def form_body(properties: Mapping[str, dict], required: list[str]) -> dict:
    """The `openapi_extra` of a route whose form is read as it arrives, so that FastAPI does not see it."""
    form = {"type": "object", "required": required, "additionalProperties": False, "properties": dict(properties)}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}}}
