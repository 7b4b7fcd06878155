"""The served OpenAPI document: what each route takes, answers and refuses, and nothing that it never does.

What every request body is made of: strict JSON types, no unknown field, and fields that are known but not built.

A field is honoured or refused, never ignored.  `Only(…)` marks a field that the API knows and we have not built: it may
be absent, null or one of the values that change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import AfterValidator, BaseModel, ConfigDict, GetJsonSchemaHandler, JsonValue, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from jaxlora.core.errors import UnsupportedParameter

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
            made["security"] = [{"key": []}, {}]  # a server without keys needs none
            app.openapi_schema = made
        return app.openapi_schema

    return openapi


MAX_FIELDS = 100  # of one object
CLOSED = ConfigDict(extra="forbid")  # of a TypedDict that an answer is: it has no other fields


@dataclass(frozen=True)
class Only:
    """Marks a field that is not built: these values change nothing and pass, all others are refused."""

    values: tuple[JsonValue, ...] = ()
    instead: str = "leave it out"

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The field in the served document: one of the values, and null where it means the same as an absent field."""
        return {"enum": [*([] if schema["type"] == "str" else [None]), *self.values]}


def few_fields(value: object) -> object:
    """The value, unless it is an object of very many fields: each bad one costs an error, and 4 MiB of them seconds."""
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        raise PydanticCustomError("fields", "must not have over {most} fields", {"most": MAX_FIELDS})
    return value


class Strict(BaseModel):
    """No unknown field, no coercion, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: object) -> object:
        return few_fields(value)


def refuse_unbuilt(body: Strict, prefix: str = "") -> None:
    """Raises UnsupportedParameter, naming the field, where the body uses something that is not built."""
    for name, field in type(body).model_fields.items():
        if name not in body.model_fields_set:
            continue
        value = getattr(body, name)
        for rule in field.metadata:
            if isinstance(rule, Only) and value is not None and value not in rule.values:
                hint = f"only {', '.join(map(repr, rule.values))} is" if rule.values else "it is not"
                raise UnsupportedParameter(
                    f"{prefix}{name} is not supported as given ({hint} supported here); {rule.instead}",
                    param=prefix + name,
                )
        for i, item in enumerate(value if isinstance(value, list) else []):
            if isinstance(item, Strict):
                refuse_unbuilt(item, f"{prefix}{name}[{i}].")
        if isinstance(value, Strict):
            refuse_unbuilt(value, f"{prefix}{name}.")


def unicode_text(value: str) -> str:
    """The text, if UTF-8 can hold it: JSON can name half a surrogate pair, which no answer could repeat."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("text", "must be Unicode text, without lone surrogates") from None
    return value


Text = Annotated[str, AfterValidator(unicode_text)]
Unbuilt = Annotated[JsonValue, Only()]
