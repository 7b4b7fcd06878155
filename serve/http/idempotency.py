"""Requests with an Idempotency-Key: what makes something is done once, however often it is asked.  Pure."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable

from fastapi import Request
from fastapi.responses import Response

from serve.access.caller import caller_of
from serve.db.database import Database
from serve.db.idempotency import StoredAnswers
from serve.db.models import JsonObject, StoredAnswer

HEADER = "idempotency-key"


class Once:
    """Answers a repeated request as the first time, for a day."""

    def __init__(self, database: Database):
        """What a server that is gone had begun is forgotten.  Raises Unavailable, StorageFull."""
        self._answers, self._ask = StoredAnswers(database), database.ask
        self._answers.tidy(time.time())

    async def answer(self, request: Request, asked: JsonObject, make: Callable[[], Awaitable[JsonObject]]) -> Response:
        """What `make` gives, or gave to the first request with this key.  Without a key, it is made.

        asked: what the request says; another with the same key raises StateInvalid.  Raises Unavailable while the first
        one is being answered, InvalidRequest for an impossible key, and what `make` raises, after which the key is new.
        """
        key = request.headers.get(HEADER)
        if key is None:
            return answered(await make())
        claim = caller_of(request).owner, f"{request.method} {request.url.path}", key
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        before = await self._ask(self._answers.claim, *claim, digest, time.time())
        if before is not None:
            return answered(json.loads(before.body))
        first = asyncio.ensure_future(self._first(claim, make))
        return answered(await asyncio.shield(first))  # a client that goes does not stop it half-way

    async def _first(self, claim: tuple[str, str, str], make: Callable[[], Awaitable[JsonObject]]) -> JsonObject:
        try:
            made = await make()
        except BaseException:
            await self._ask(self._answers.release, *claim)
            raise
        await self._ask(self._answers.settle, *claim, StoredAnswer(status=200, body=json.dumps(made)))
        return made


def answered(made: JsonObject) -> Response:
    """The answer, in ASCII: a text of the client's may hold what UTF-8 cannot."""
    return Response(json.dumps(made), media_type="application/json")
