"""What every request body is made of: strict JSON types, no unknown field, and fields that are known but not built.

A field is honoured or refused, never ignored.  `Only(…)` marks a field that the API knows and we have not built: it may
be absent, null or one of the values that ask for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, GetJsonSchemaHandler, JsonValue, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from jaxlora.core.errors import UnsupportedParameter

MAX_FIELDS = 100  # of one object


@dataclass(frozen=True)
class Only:
    """Marks a field that is not built: these values change nothing and pass, all others are refused."""

    values: tuple[JsonValue, ...] = ()
    instead: str = "leave it out"

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The field in the served document: one of the values, and null where that says the same as nothing."""
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
    """Raises UnsupportedParameter, naming the field, where the body asks for something that is not built."""
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
