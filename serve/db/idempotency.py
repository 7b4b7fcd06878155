"""Answers to requests with an Idempotency-Key, so that a repeated request is done once."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import delete, or_, update
from sqlalchemy.orm import Session

from jaxlora.core.errors import InvalidRequest, StateInvalid, Unavailable
from serve.db.database import Database
from serve.db.models import AnswerRecord, StoredAnswer

KEPT_S = 24 * 3600.0
MAX_KEY = 255


@dataclass(frozen=True, slots=True)
class StoredAnswers:
    """`claim` before the work, then `settle` or `release`.  All raise Unavailable."""

    database: Database

    def claim(self, tenant: str, route: str, key: str, request_sha256: str, now_s: float) -> StoredAnswer | None:
        """What this request was answered before; None: it is new, and the caller's to answer.

        Raises StateInvalid for a key that came with another request, Unavailable while the first one is being answered,
        InvalidRequest for a key that is no such text.
        """
        if not 1 <= len(key) <= MAX_KEY or not (key.isascii() and key.isprintable()):
            raise InvalidRequest(f"Idempotency-Key must be 1 to {MAX_KEY} printable ASCII characters")

        def work(session: Session) -> StoredAnswer | None:
            row = session.get(AnswerRecord, {"tenant": tenant, "route": route, "key": key})
            if row is not None and row.created_s < now_s - KEPT_S:
                session.delete(row)
                session.flush()
                row = None
            if row is None:
                session.add(
                    AnswerRecord(tenant=tenant, route=route, key=key, request_sha256=request_sha256, created_s=now_s)
                )
                return None
            if row.request_sha256 != request_sha256:
                raise StateInvalid("this Idempotency-Key came with another request before; take a new one")
            if row.status is None or row.body is None:
                raise Unavailable("the first request with this Idempotency-Key is not answered yet; ask again")
            return StoredAnswer(status=row.status, body=row.body)

        return self.database.write(work)

    def settle(self, tenant: str, route: str, key: str, answer: StoredAnswer) -> None:
        """From now on the request is answered so.  Raises StorageFull."""
        claimed = update(AnswerRecord).filter_by(tenant=tenant, route=route, key=key)
        self.database.write(lambda s: s.execute(claimed.values(status=answer.status, body=answer.body)))

    def release(self, tenant: str, route: str, key: str) -> None:
        """The work failed: the next request with this key is a new one."""
        claimed = delete(AnswerRecord).filter_by(tenant=tenant, route=route, key=key, status=None)
        self.database.write(lambda s: s.execute(claimed))

    def tidy(self, now_s: float) -> None:
        """Forgets old answers, and requests that a server which is gone had begun.  Of a server that starts."""
        gone = or_(AnswerRecord.status.is_(None), AnswerRecord.created_s < now_s - KEPT_S)
        self.database.write(lambda s: s.execute(delete(AnswerRecord).where(gone)))
