"""API keys in the database."""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from serve.db.database import Database
from serve.db.models import KeyRecord, Objects

KEYS = Objects("key", KeyRecord)


class StoredKeys:
    """Keys are added and revoked, never removed: who was let in once stays known."""

    def __init__(self, database: Database):
        self._database = database

    def insert(self, record: KeyRecord) -> None:
        """One more.  Raises Unavailable, StorageFull."""
        self._database.write(lambda session: session.add(replace(record)))

    def all(self) -> list[KeyRecord]:
        """Every key, revoked ones too, oldest first.  Raises Unavailable."""
        asked = select(KeyRecord).order_by(KeyRecord.created_s, KeyRecord.id)
        return self._database.read(lambda session: list(session.scalars(asked)))

    def counts(self) -> tuple[int, int]:
        """(all keys, revoked ones): whoever knows these two numbers knows whether any key has changed.  Raises Unavailable."""
        asked = select(func.count(), func.count(KeyRecord.revoked_s)).select_from(KeyRecord)
        every, revoked = self._database.read(lambda session: session.execute(asked).one())
        return every, revoked

    def revoke(self, id: str, now_s: float) -> KeyRecord:
        """The key, revoked now or before.  Raises NotFound, Unavailable."""

        def work(session: Session) -> KeyRecord:
            row = KEYS.find(session, id, None)
            if row.revoked_s is None:
                row.revoked_s = now_s
            return row

        return self._database.write(work)
