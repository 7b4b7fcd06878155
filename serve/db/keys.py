"""API keys in the database."""

from __future__ import annotations

from sqlmodel import Session, col, func, select

from serve.db.database import Database
from serve.db.models import KeyRecord, KeyRow, Objects, to_record, to_row

KEYS = Objects("key", KeyRow, KeyRecord)


class StoredKeys:
    """Keys are added and revoked, never removed: who was let in once stays known."""

    def __init__(self, database: Database):
        self._database = database

    def insert(self, record: KeyRecord) -> None:
        """One more.  Raises Unavailable, StorageFull."""

        def work(session: Session) -> None:
            session.add(to_row(KeyRow, record))

        self._database.write(work)

    def all(self) -> list[KeyRecord]:
        """Every key, revoked ones too, oldest first.  Raises Unavailable."""

        def work(session: Session) -> list[KeyRecord]:
            rows = session.exec(select(KeyRow).order_by(col(KeyRow.created_s), col(KeyRow.id)))
            return [to_record(KeyRecord, row) for row in rows]

        return self._database.read(work)

    def counts(self) -> tuple[int, int]:
        """(all keys, revoked ones): whoever knows these two numbers knows whether any key has changed.  Raises Unavailable."""

        def work(session: Session) -> tuple[int, int]:
            return session.exec(select(func.count(), func.count(col(KeyRow.revoked_s))).select_from(KeyRow)).one()

        return self._database.read(work)

    def revoke(self, id: str, now_s: float) -> KeyRecord:
        """The key, revoked now or before.  Raises NotFound, Unavailable."""

        def work(session: Session) -> KeyRecord:
            row = KEYS.find(session, id, None)
            if row.revoked_s is None:
                row.revoked_s = now_s
            return to_record(KeyRecord, row)

        return self._database.write(work)
