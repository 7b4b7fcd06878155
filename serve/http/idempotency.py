"""Requests with an Idempotency-Key: what makes something is done once, however often it is requested.  Pure."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping

from fastapi import Request
from fastapi.responses import Response

from jaxlora.core.errors import StorageFull, Unavailable
from serve.access.caller import caller_of
from serve.db.database import Database
from serve.db.idempotency import CLAIM_S, StoredAnswers
from serve.db.models import StoredAnswer

LOG = logging.getLogger("serve")
HEADER = "idempotency-key"
RETRY_S = 1.0  # before an answer that could not be stored is stored again
# For `openapi_extra` of a route: the header in the served document.
KEY_PARAMETER = {"parameters": [{"name": HEADER, "in": "header", "schema": {"type": "string"}}]}

type Claim = tuple[str, str, str]  # tenant, route, key
type Make = Callable[[], Awaitable[Mapping[str, object]]]


class Once:
    """Answers a repeated request as the first time, for a day.  On one event loop."""

    def __init__(self, database: Database):
        """Forgets what a server that has ended had begun.  Raises Unavailable, StorageFull."""
        self._answers, self._ask = StoredAnswers(database), database.ask
        self._under_way: set[Claim] = set()  # of this process; the database may be away when one ends
        self._settling: set[asyncio.Task[None]] = set()
        self._answers.tidy()

    async def answer(
        self, request: Request, content: Mapping[str, object] | str, make: Make, *, route: str | None = None
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
        digest, owner = hashlib.sha256(text.encode()).hexdigest(), uuid.uuid4().hex
        if claim in self._under_way:
            raise Unavailable("the first request with this Idempotency-Key is not answered yet; ask again")
        known = await self._ask(self._answers.claim, *claim, digest, owner)
        if known is not None:
            return json_response(known.body)
        first = asyncio.ensure_future(self._first(claim, owner, make))
        return json_response(await asyncio.shield(first))  # a client that leaves does not stop it half-way

    async def _first(self, claim: Claim, owner: str, make: Make) -> str:
        self._under_way.add(claim)
        renewing = asyncio.ensure_future(self._renew(claim, owner))
        try:
            body = json.dumps(await make())
        except BaseException:
            self._under_way.discard(claim)
            await self._ask(self._answers.release, *claim, owner)
            raise
        finally:
            renewing.cancel()
        answer = StoredAnswer(status=200, body=body)
        try:
            await self._ask(self._answers.settle, *claim, owner, answer)
        except (Unavailable, StorageFull):  # it is done, and must not be done again
            task = asyncio.ensure_future(self._settle(claim, owner, answer))
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)
            raise
        self._under_way.discard(claim)
        return body

    async def _renew(self, claim: Claim, owner: str) -> None:
        """Keeps a claim alive until it is cancelled."""
        while True:
            await asyncio.sleep(CLAIM_S / 3)
            try:
                await self._ask(self._answers.renew, *claim, owner)
            except (Unavailable, StorageFull) as error:
                LOG.warning("a claim of an Idempotency-Key is not renewed yet: %s", error)

    async def _settle(self, claim: Claim, owner: str, answer: StoredAnswer) -> None:
        """Stores an answer as soon as the database takes it."""
        while True:
            await asyncio.sleep(RETRY_S)
            try:
                await self._ask(self._answers.settle, *claim, owner, answer)
            except (Unavailable, StorageFull) as error:
                LOG.warning("the answer of an Idempotency-Key is not stored yet: %s", error)
            else:
                self._under_way.discard(claim)
                return


def json_response(body: str) -> Response:
    """The answer, in ASCII: a client's text may hold what UTF-8 cannot."""
    return Response(body, media_type="application/json")
