"""Answers to requests with an Idempotency-Key, so that a repeated request is done once.

A request that is being answered is a claim: a row without a status, whose body names its owner and whose time its owner
renews.  One that is not renewed is dead, whoever made it, and the next request with its key takes it over.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import delete, or_, update
from sqlalchemy.orm import Session
from sqlalchemy.sql import ColumnElement

from jaxlora.core.errors import InvalidRequest, StateInvalid, Unavailable
from serve.db.database import Database, clock_s
from serve.db.models import AnswerRecord, StoredAnswer

KEPT_S = 24 * 3600.0
CLAIM_S = 30.0  # a claim lives so long after it was made or renewed, by the database's clock
MAX_KEY = 255


@dataclass(frozen=True, slots=True)
class StoredAnswers:
    """`claim` before the work, `renew` during it, then `settle` or `release`.  All raise Unavailable."""

    database: Database

    def claim(self, tenant: str, route: str, key: str, request_sha256: str, owner: str) -> StoredAnswer | None:
        """What this request was answered before; None: it is new, and the caller's to answer.

        owner: a text of this claim alone.
        Raises StateInvalid for a key that came with another request, Unavailable while the first one is being answered,
        InvalidRequest for a key that is no such text.
        """
        if not 1 <= len(key) <= MAX_KEY or not (key.isascii() and key.isprintable()):
            raise InvalidRequest(f"Idempotency-Key must be 1 to {MAX_KEY} printable ASCII characters")

        def work(session: Session) -> StoredAnswer | None:
            row, now_s = session.get(AnswerRecord, {"tenant": tenant, "route": route, "key": key}), clock_s(session)
            if row is not None and row.created_s < now_s - (CLAIM_S if row.status is None else KEPT_S):
                session.delete(row)
                session.flush()
                row = None
            if row is None:
                record = AnswerRecord(
                    tenant=tenant, route=route, key=key, request_sha256=request_sha256, created_s=now_s, body=owner
                )
                session.add(record)
                return None
            if row.request_sha256 != request_sha256:
                raise StateInvalid("this Idempotency-Key came with another request before; take a new one")
            if row.status is None or row.body is None:
                raise Unavailable("the first request with this Idempotency-Key is not answered yet; ask again")
            return StoredAnswer(status=row.status, body=row.body)

        return self.database.write(work)

    def renew(self, tenant: str, route: str, key: str, owner: str) -> None:
        """The claim lives on, if it is still this owner's."""
        mine = held(tenant, route, key, owner)
        self.database.write(lambda s: s.execute(update(AnswerRecord).where(*mine).values(created_s=clock_s(s))))

    def settle(self, tenant: str, route: str, key: str, owner: str, answer: StoredAnswer) -> None:
        """From now on the request is answered so, if the claim is still this owner's.  Raises StorageFull."""
        mine, said = held(tenant, route, key, owner), {"status": answer.status, "body": answer.body}
        self.database.write(lambda s: s.execute(update(AnswerRecord).where(*mine).values(said)))

    def release(self, tenant: str, route: str, key: str, owner: str) -> None:
        """The work failed: the next request with this key is a new one."""
        mine = held(tenant, route, key, owner)
        self.database.write(lambda s: s.execute(delete(AnswerRecord).where(*mine)))

    def tidy(self) -> None:
        """Forgets old answers, and requests that a server which is gone had begun.  Of a server that starts."""

        def work(session: Session) -> None:
            old = AnswerRecord.created_s < clock_s(session) - KEPT_S
            session.execute(delete(AnswerRecord).where(or_(AnswerRecord.status.is_(None), old)))

        self.database.write(work)


def held(tenant: str, route: str, key: str, owner: str) -> tuple[ColumnElement[bool], ...]:
    """The condition that a row is this owner's claim."""
    row = AnswerRecord
    return row.tenant == tenant, row.route == route, row.key == key, row.status.is_(None), row.body == owner
