"""JSON bodies as any route may get them: RFC 8259 to the letter, of bounded depth, and parsed off the event loop if large.

Python's own parser also takes NaN, 1e400, half a surrogate pair and any depth, each of which something behind it cannot hold.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Coroutine
from typing import NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from jaxlora.core.errors import InvalidRequest
from serve.http.errors import dotted

MAX_DEPTH = 100  # of objects and lists in each other
LARGE_BYTES = 2**16  # parsed by a thread: a larger body would hold up the tokens of others
MAX_DIGITS = 300  # of a whole number: what a float can hold, too


def parse(body: bytes) -> object:
    """The value that the body is.  Raises InvalidRequest, which names the field, or JSONDecodeError for what is no JSON."""
    try:
        text = body.decode("utf-8-sig")
        value = json.loads(text, parse_int=_whole, parse_float=_finite, parse_constant=_refuse_number)
    except UnicodeDecodeError:
        raise InvalidRequest("the body must be JSON in UTF-8") from None
    except RecursionError:
        raise _too_deep(None) from None
    if _is_deeper(value, MAX_DEPTH):
        fields = value.items() if isinstance(value, dict) else ()
        raise _too_deep(next((name for name, inner in fields if _is_deeper(inner, MAX_DEPTH - 1)), None))
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        _refuse_half_pairs((), value)
    return value


def _whole(digits: str) -> int:
    return int(digits) if len(digits) <= MAX_DIGITS else _refuse_number(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refuse_number(digits)


def _refuse_number(digits: str) -> NoReturn:
    raise InvalidRequest(
        f"the body has {digits[:20]}, which is no number that JSON or this server can hold; leave it out"
    )


def _is_deeper(value: object, most: int) -> bool:
    """Whether more than `most` objects and lists lie in each other."""
    level = [value]
    for _ in range(most + 1):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
        ]
        if not level:
            return False
    return True


def _too_deep(name: str | None) -> InvalidRequest:
    param = None if name is None else dotted((name,))
    return InvalidRequest(f"{param or 'the body'} is nested deeper than {MAX_DEPTH} levels; flatten it", param=param)


def _refuse_half_pairs(path: tuple[str | int, ...], value: object) -> None:
    """Raises InvalidRequest for the first lone surrogate in a text or in a key."""
    try:
        for text in value if isinstance(value, dict) else [value] if isinstance(value, str) else ():
            text.encode()
    except UnicodeEncodeError:
        name = dotted(path) or None
        what = "a field name" if isinstance(value, dict) else name or "the body"
        raise InvalidRequest(f"{what} must be Unicode text, without lone surrogates", param=name) from None
    for at, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        _refuse_half_pairs((*path, at), inner)


class JsonRequest(Request):
    """A request whose JSON is parsed as here."""

    async def json(self) -> object:
        """The parsed body.  Raises as `parse`."""
        body = await self.body()
        return parse(body) if len(body) < LARGE_BYTES else await asyncio.to_thread(parse, body)


class JsonRoute(APIRoute):
    """A route whose JSON body is parsed as here."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[object, object, Response]]:
        """Returns the handler of a request."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(JsonRequest(request.scope, request.receive))
            except HTTPException as error:  # FastAPI makes one of any error of a body
                if isinstance(error.__cause__, InvalidRequest):
                    raise error.__cause__ from None
                raise

        return handle
