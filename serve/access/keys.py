"""API keys: who may come in, and as whom.

A key is 256 random bits, so its plain sha256 is all that is kept of it.  The server knows the keys by heart and asks the
database, twice a second and in the background, whether any changed: a revocation by another process holds within a
second, and a database that is away shuts nobody out.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.requests import HTTPConnection

from jaxlora.config.serving import ServeConfig
from jaxlora.core.errors import ConfigInvalid, InvalidRequest, JaxLoraError, Unauthorized
from jaxlora.core.lora import check_name
from serve.access.caller import LOCAL, Caller, is_loopback
from serve.db.keys import StoredKeys
from serve.db.models import KeyRecord, Role, new_id

LOG = logging.getLogger("serve")
REFRESH_S = 0.4  # between two looks at the database
MAX_LABEL = 100
PREFIX = "jl-"


def digest(key: str) -> str:
    """Hex sha256 of a key."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def create_key(stored: StoredKeys, tenant: str, *, role: Role = "tenant", label: str = "") -> tuple[KeyRecord, str]:
    """(what is kept of a new key, the key itself, which nobody can tell again).

    Raises InvalidRequest for an impossible tenant or label, Unavailable, StorageFull.
    """
    check_name(tenant, "tenant")
    if len(label) > MAX_LABEL or not label.isprintable():
        raise InvalidRequest(f"label must be at most {MAX_LABEL} printable characters", param="label")
    key = PREFIX + secrets.token_urlsafe(32)
    record = KeyRecord(
        id=new_id("key-"), tenant=tenant, role=role, label=label, digest=digest(key), created_s=time.time()
    )
    stored.insert(record)
    return record, key


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """All keys at one moment."""

    counts: tuple[int, int] = (0, 0)  # all, revoked
    valid: dict[str, KeyRecord] = field(default_factory=dict)  # by the first half of the digest
    ids: frozenset[str] = frozenset()  # of the valid ones

    @property
    def any(self) -> bool:
        """Whether there has ever been a key."""
        return self.counts[0] > 0


def needs_keys(config: ServeConfig) -> bool:
    """Whether nobody may come in without a key."""
    return config.keys == "required" or not is_loopback(config.host)


HALF = 32  # hex digits of a digest that keys are looked up by; the other half is compared in constant time


class Keys:
    """The callers' keys, followed in the background from `start` to `close`.

    Once there has been a key nobody comes in without one, whatever becomes of the database.
    """

    def __init__(self, stored: StoredKeys, *, needed: bool = False):
        """The keys as they are now.  needed: whether nobody may ever come in without one.

        Raises Unavailable; ConfigInvalid where a key is needed and there is none.
        """
        self._stored = stored
        self._known = Known()
        self._needed = needed
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._refresh(ended=None)
        if needed and not self._known.any:
            raise ConfigInvalid(
                'without keys a server may listen on this machine only, and with keys = "required" not at all; make a key '
                "with `jaxlora keys create TENANT`, or listen on 127.0.0.1"
            )

    def start(self, ended: Callable[[str | None], None]) -> None:
        """From now on changes are noticed.

        ended: called, on a thread of ours, with the id of every key that is revoked, and with None when the first key
        shuts out those who have none.
        """
        self._thread = threading.Thread(target=self._follow, args=(ended,), name="jaxlora-keys", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No more."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def keyless(self) -> bool:
        """Whether anyone may do everything."""
        return not self._needed

    def caller_of(self, connection: HTTPConnection) -> Caller:
        """Who asks.  Raises Unauthorized without a valid key, once there has ever been one."""
        known = self._known
        if self.keyless:
            return LOCAL
        scheme, _, key = connection.headers.get("authorization", "").partition(" ")
        record = self._find(known, digest(key.strip())) if scheme.lower() == "bearer" else None
        if record is None:
            raise Unauthorized("give a valid API key, as in Authorization: Bearer jl-…")
        return Caller(owner=record.tenant, admin=record.role == "admin", key_id=record.id)

    @staticmethod
    def _find(known: Known, given: str) -> KeyRecord | None:
        record = known.valid.get(given[:HALF])
        return record if record is not None and hmac.compare_digest(record.digest, given) else None

    def _refresh(self, ended: Callable[[str | None], None] | None) -> None:
        """Looks at the database.  Raises Unavailable."""
        before, keyless = self._known, self.keyless
        if self._stored.counts() == before.counts:
            return
        records = self._stored.all()
        valid = [r for r in records if r.revoked_s is None]
        self._needed |= bool(records)
        self._known = Known(
            counts=(len(records), len(records) - len(valid)),
            valid={r.digest[:HALF]: r for r in valid},
            ids=frozenset(r.id for r in valid),
        )
        if before.any and not self._known.any:
            LOG.error("the database has no API keys any more; nobody is let in until it has")
        if ended is not None:
            for id in before.ids - self._known.ids:
                ended(id)
            if keyless and not self.keyless:
                ended(None)

    def _follow(self, ended: Callable[[str | None], None]) -> None:
        away = False
        while not self._stop.wait(REFRESH_S):
            try:
                self._refresh(ended)
                away = False
            except JaxLoraError as error:
                if not away:
                    LOG.warning("API keys stay as they were: %s", error.message)
                away = True
