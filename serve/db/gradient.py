"""Adapters of the Gradient API in the database."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from jaxlora.core.errors import QuotaExceeded
from serve.db.database import Database
from serve.db.models import GradientRecord, JsonObject, Objects, Page

ADAPTERS = Objects("adapter", GradientRecord)


@dataclass(frozen=True, slots=True)
class StoredGradient:
    """Gradient's adapters as tenants see them.  All raise Unavailable."""

    database: Database

    def insert(self, record: GradientRecord, *, most: int | None = None) -> None:
        """One more.  most: of its tenant.  Raises QuotaExceeded, StorageFull."""

        def work(session: Session) -> None:
            owned = select(func.count()).select_from(GradientRecord).where(GradientRecord.tenant == record.tenant)
            if most is not None and session.scalars(owned).one() >= most:
                raise QuotaExceeded(f"you may have {most} adapters; delete one")
            session.add(replace(record))

        self.database.write(work)

    def get(self, id: str, sees: str | None) -> GradientRecord:
        """One adapter.  Raises NotFound."""
        return self.database.read(lambda s: ADAPTERS.find(s, id, sees))

    def page(self, sees: str | None, *, after: str | None, limit: int) -> Page[GradientRecord]:
        """Adapters of the list, newest first.  Raises InvalidRequest for an unknown `after`."""
        return self.database.read(lambda s: ADAPTERS.page(s, sees, after=after, limit=limit))

    def all(self) -> list[GradientRecord]:
        """Every tenant's, oldest first: what a server that starts goes on with."""
        asked = select(GradientRecord).order_by(GradientRecord.created_s, GradientRecord.id)
        return self.database.read(lambda s: list(s.scalars(asked)))

    def trained(self, id: str, sees: str | None, now_s: float, settings: JsonObject | None = None) -> GradientRecord:
        """The adapter after one more call of fine_tune; settings: new ones, if any.  Raises NotFound, StorageFull."""

        def work(session: Session) -> GradientRecord:
            row = ADAPTERS.find(session, id, sees)
            row.calls, row.updated_s = row.calls + 1, now_s
            if settings is not None:
                row.settings = settings
            return row

        return self.database.write(work)

    def delete(self, id: str, sees: str | None) -> GradientRecord:
        """The adapter that was removed.  Raises NotFound."""

        def work(session: Session) -> GradientRecord:
            row = ADAPTERS.find(session, id, sees)
            session.delete(row)
            return row

        return self.database.write(work)
