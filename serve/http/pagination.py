"""Lists in pages: the query's cursor, a page of what is in memory, and the JSON around a page.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypedDict

from pydantic import BaseModel, ConfigDict, with_config

from jaxlora.core.errors import InvalidRequest
from serve.db.models import Page
from serve.http.schema import CLOSED, Text


class PageQuery(BaseModel):
    """The query of a list: text, so not strict, but an unknown parameter is refused."""

    model_config = ConfigDict(extra="forbid")
    after: Text | None = None  # id of the last entry of the page before


class Identified(TypedDict):
    id: str


@with_config(CLOSED)
class Listed[Item: Identified](TypedDict):
    """One page of a list."""

    object: Literal["list"]
    data: list[Item]
    has_more: bool
    first_id: str | None
    last_id: str | None


def page_after[Entry](
    entries: Sequence[Entry], id_of: Callable[[Entry], str], *, after: str | None, limit: int, kind: str
) -> Page[Entry]:
    """Up to `limit` entries after the one with the id `after`.  kind: of the entries, with an article, for the message.

    Raises InvalidRequest where no entry has that id.
    """
    if after is not None:
        index = next((i for i, entry in enumerate(entries) if id_of(entry) == after), None)
        if index is None:
            raise InvalidRequest(f"after must be the id of {kind} in this list", param="after")
        entries = entries[index + 1 :]
    return Page(records=list(entries[:limit]), more=len(entries) > limit)


def list_object[Item: Identified](items: Sequence[Item], *, more: bool) -> Listed[Item]:
    """The JSON of a page.  more: whether the list goes on after it."""
    return {
        "object": "list",
        "data": list(items),
        "has_more": more,
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
    }
