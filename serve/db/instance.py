"""Which server a database is of, and which process of all servers may write to it.

A server has an id, given at its first start, and an epoch, which counts its starts.  The process that holds the claim renews
it by the database's clock; each transaction that writes looks at the epoch, so one that was taken over writes nothing more.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass

from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from jaxlora.core.errors import JaxLoraError, StateInvalid, Unavailable
from serve.db.database import Database, clock_s
from serve.db.models import FactRecord, FileRecord, GradientRecord, JobRecord, JsonObject

LOG = logging.getLogger("serve")
SERVER, HOLDER = "server", "holder"  # keys of facts: the identity, and who has claimed the database until when
SPAN_S = 30.0
POLL_S = 1.0  # between two looks at a claim that may end


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """The server that something belongs to."""

    id: str
    epoch: int  # starts of it

    def to_json(self) -> JsonObject:
        """As it is stored."""
        return {"id": self.id, "epoch": self.epoch}

    @staticmethod
    def from_json(found: JsonObject) -> Identity:
        """Raises KeyError, TypeError, ValueError for what is none."""
        return Identity(id=str(found["id"]), epoch=int(str(found["epoch"])))


@dataclass(frozen=True, slots=True)
class StoredInstance:
    """What the database knows of its server.  All raise Unavailable."""

    database: Database

    def identity(self) -> Identity | None:
        """The server; None before its first start."""
        found = self.fact(SERVER)
        return None if found is None else Identity.from_json(found)

    def is_empty(self) -> bool:
        """Whether the database knows no file, job or adapter of anybody."""
        tables = (FileRecord, JobRecord, GradientRecord)
        return not any(self.database.read(lambda s, t=t: s.scalar(select(exists(select(t.id))))) for t in tables)

    def fact(self, key: str) -> JsonObject | None:
        """What was kept under this key."""
        found = self.database.read(lambda s: s.get(FactRecord, key))
        return None if found is None else found.value

    def keep(self, key: str, value: JsonObject) -> None:
        """Keeps a fact in place of the one before.  Raises StorageFull."""
        self.database.write(lambda s: put(s, key, value))

    def overdue(self, kind: str, names: Collection[str], *, now_s: float, keep_s: float) -> set[str]:
        """Which of these names, all that the database does not know, it has not known for `keep_s`.

        A name that is missing next time has been found again.  Raises StorageFull.
        """
        before = self.fact(kind) or {}
        since = {name: float(str(before.get(name, now_s))) for name in names}
        if since != before:
            self.keep(kind, dict(since))
        return {name for name, since_s in since.items() if now_s - since_s >= keep_s}


class Claim:
    """The right of this process to write to a database.  Thread-safe."""

    def __init__(
        self,
        database: Database,
        place: str,
        *,
        id: str,
        epoch: int,
        waiting: Callable[[str], None] = lambda who: None,
    ):
        """Takes the claim; waits for one that ends soon.

        place: where this process has excluded all others, so that one who claimed from there has ended.  id: of the
        server.  epoch: that its next is to exceed.  waiting: called with who has the claim.  Raises StateInvalid when
        another goes on, Unavailable, StorageFull.
        """
        self._database, self._place = database, place
        self._owner = f"{socket.gethostname()} (process {os.getpid()}, {uuid.uuid4().hex[:8]})"
        seen: JsonObject | None = None
        while not isinstance(took := database.write(lambda s: self._take(s, id, epoch)), Identity):
            if seen is None:
                waiting(str(took["owner"]))
            elif took != seen:
                raise StateInvalid(
                    f"the database {database.name} is in use by {took['owner']}; stop that server, or name another "
                    "database"
                )
            seen = took
            time.sleep(POLL_S)
        self.identity = took
        database.may_write = self.check
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="claim", daemon=True)
        self._thread.start()

    def check(self, session: Session) -> None:
        """Raises Unavailable when another process has taken over."""
        found = session.get(FactRecord, SERVER)
        if found is None or found.value != self.identity.to_json():
            raise Unavailable("another server has taken over the database; this one writes nothing more")

    def close(self) -> None:
        """Gives the claim back, where it is still this process's."""
        self._end.set()
        self._thread.join()
        try:
            self._database.write(lambda s: put(s, HOLDER, {"owner": self._owner, "place": self._place, "until_s": 0}))
        except JaxLoraError as error:
            LOG.warning("the claim to the database was not given back and ends by itself: %s", error)

    def _take(self, session: Session, id: str, epoch: int) -> Identity | JsonObject:
        """The claim, or who has it."""
        holder, known = session.get(FactRecord, HOLDER), session.get(FactRecord, SERVER)
        now_s = clock_s(session)
        if holder is not None and holder.value["place"] != self._place and now_s < float(str(holder.value["until_s"])):
            return holder.value
        before = epoch if known is None else max(epoch, Identity.from_json(known.value).epoch)
        taken = Identity(id=id, epoch=before + 1)
        put(session, SERVER, taken.to_json())
        self._extend(session)
        return taken

    def _extend(self, session: Session) -> None:
        until_s = clock_s(session) + SPAN_S
        put(session, HOLDER, {"owner": self._owner, "place": self._place, "until_s": until_s})

    def _run(self) -> None:
        while not self._end.wait(SPAN_S / 3):
            try:
                self._database.write(self._extend)
            except JaxLoraError as error:
                LOG.error("the claim to the database is not renewed: %s", error)


def put(session: Session, key: str, value: JsonObject) -> None:
    """Keeps a fact, in a transaction that writes."""
    row = session.get(FactRecord, key)
    if row is None:
        session.add(FactRecord(key=key, value=value))
    else:
        row.value = value
