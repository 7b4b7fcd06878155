"""Requests with an Idempotency-Key: what makes something is done once, however often it is requested.  Pure."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Mapping

from fastapi import Request
from fastapi.responses import Response

from serve.access.caller import caller_of
from serve.db.database import Database
from serve.db.idempotency import StoredAnswers
from serve.db.models import StoredAnswer

HEADER = "idempotency-key"
# For `openapi_extra` of a route: the header in the served document.
KEY_PARAMETER = {"parameters": [{"name": HEADER, "in": "header", "schema": {"type": "string"}}]}


class Once:
    """Answers a repeated request as the first time, for a day."""

    def __init__(self, database: Database):
        """Forgets what a server that has ended had begun.  Raises Unavailable, StorageFull."""
        self._answers, self._ask = StoredAnswers(database), database.ask
        self._answers.tidy(time.time())

    async def answer(
        self,
        request: Request,
        content: Mapping[str, object] | str,
        make: Callable[[], Awaitable[Mapping[str, object]]],
        *,
        route: str | None = None,
    ) -> Response:
        """Answers with what `make` returns, or returned to the first request with this key; without a key it is called.

        content: of the request; another with the same key raises StateInvalid.  route: within which a tenant's keys are
        unique; None: method and path.  Raises Unavailable while the first request is being answered, InvalidRequest for
        an impossible key, and what `make` raises, after which the key is new.
        """
        key = request.headers.get(HEADER)
        if key is None:
            return json_response(json.dumps(await make()))
        claim = caller_of(request).owner, route or f"{request.method} {request.url.path}", key
        text = content if isinstance(content, str) else json.dumps(content, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        known = await self._ask(self._answers.claim, *claim, digest, time.time())
        if known is not None:
            return json_response(known.body)
        first = asyncio.ensure_future(self._first(claim, make))
        return json_response(await asyncio.shield(first))  # a client that leaves does not stop it half-way

    async def _first(self, claim: tuple[str, str, str], make: Callable[[], Awaitable[Mapping[str, object]]]) -> str:
        try:
            body = json.dumps(await make())
        except BaseException:
            await self._ask(self._answers.release, *claim)
            raise
        await self._ask(self._answers.settle, *claim, StoredAnswer(status=200, body=body))
        return body


def json_response(body: str) -> Response:
    """The answer, in ASCII: a client's text may hold what UTF-8 cannot."""
    return Response(body, media_type="application/json")
