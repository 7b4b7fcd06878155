"""Adapters of the Gradient API in the database."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sqlalchemy.orm import Session

from serve.db.database import Database
from serve.db.models import GradientRecord, Objects, Page

ADAPTERS = Objects("adapter", GradientRecord)


@dataclass(frozen=True, slots=True)
class StoredGradient:
    """Gradient's adapters as tenants see them.  All raise Unavailable."""

    database: Database

    def insert(self, record: GradientRecord) -> None:
        """One more.  Raises StorageFull."""
        self.database.write(lambda session: session.add(replace(record)))

    def get(self, id: str, sees: str | None) -> GradientRecord:
        """One adapter.  Raises NotFound."""
        return self.database.read(lambda s: ADAPTERS.find(s, id, sees))

    def page(self, sees: str | None, *, after: str | None, limit: int) -> Page[GradientRecord]:
        """Adapters of the list, newest first.  Raises InvalidRequest for an unknown `after`."""
        return self.database.read(lambda s: ADAPTERS.page(s, sees, after=after, limit=limit))

    def trained(self, id: str, sees: str | None, now_s: float) -> GradientRecord:
        """The adapter after one more call of fine_tune.  Raises NotFound, StorageFull."""

        def work(session: Session) -> GradientRecord:
            row = ADAPTERS.find(session, id, sees)
            row.calls, row.updated_s = row.calls + 1, now_s
            return row

        return self.database.write(work)

    def delete(self, id: str, sees: str | None) -> GradientRecord:
        """The adapter that was removed.  Raises NotFound."""

        def work(session: Session) -> GradientRecord:
            row = ADAPTERS.find(session, id, sees)
            session.delete(row)
            return row

        return self.database.write(work)
