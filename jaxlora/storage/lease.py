"""A lease that lets one process at a time write to object storage; a process that loses it stops writing by itself.

The object records the owner and the end of the lease.  It is created only if absent, and replaced only in the version
that was read: of two processes that take it at once, one gets it.  It is renewed three times in its span; a process
whose span ends without that stops writing until it renews, so another may take over.  Clocks may differ by CLOCK_S.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jaxlora.core.atomic_files import replace_file
from jaxlora.core.errors import JaxLoraError, StateInvalid, StorageAway
from jaxlora.storage.object_store import Blobs, Version

LOG = logging.getLogger("jaxlora")
LEASE = "lease"
SPAN_S = 60.0
CLOCK_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """The lease object as it was read."""

    owner: str | None  # None: no owner
    until: float  # epoch seconds
    version: Version | None  # None: the object does not exist


class Lease:
    """The right to write under one URL.  Thread-safe."""

    def __init__(self, blobs: Blobs, folder: Path, *, waiting: Callable[[str], None] = lambda who: None):
        """Takes the lease, waits for one that ends soon.  folder: this server's own; its owner may resume at once.

        waiting: called with the owner it waits for.  Raises StateInvalid if another has it, StorageAway, StorageFailed.
        """
        self._blobs, self._owner = blobs, _owner(folder)
        self._until = 0.0
        self._lost = ""
        self._end = threading.Event()
        self._take(waiting)
        blobs.may_write = self.check
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises StateInvalid when another server has taken over, StorageAway while the owner is unknown.

        Any tenant may read the message; the log names the server.
        """
        if self._lost:
            raise StateInvalid("object storage was taken over by another server; this one writes nothing more")
        if time.time() > self._until:
            raise StorageAway("the lease of object storage could not be renewed; try again later")

    def close(self) -> None:
        """Releases the lease where it is still this server's, which writes nothing more in any case."""
        self._end.set()
        self._thread.join()
        self._until = 0.0
        try:
            found = self._read()
            if found.owner == self._owner:
                self._replace(found, until=0.0)
        except JaxLoraError as error:
            LOG.warning("the lease of %s was not given back and ends by itself: %s", self._blobs.url, error)

    def _take(self, waiting: Callable[[str], None]) -> None:
        found = self._read()
        if (left_s := self._left_s(found)) > 0:
            waiting(str(found.owner))
            time.sleep(min(left_s, SPAN_S + CLOCK_S))
            before, found = found, self._read()
            if found.version != before.version and self._left_s(found) > 0:
                raise self._in_use(found)
        if not self._renew(found):
            raise self._in_use(self._read())

    def _left_s(self, found: _Found) -> float:
        """Returns the seconds for which another server still has it; 0 where this server may take it."""
        return 0.0 if found.owner in (None, self._owner) else max(0.0, found.until + CLOCK_S - time.time())

    def _in_use(self, found: _Found) -> StateInvalid:
        return StateInvalid(
            f"{self._blobs.url} is in use by {found.owner}; stop that server, or name another URL", param="blobs.url"
        )

    def _run(self) -> None:
        while not self._lost and not self._end.wait(SPAN_S / 3):
            try:
                self._keep()
            except JaxLoraError as error:
                LOG.error("the lease of %s is not renewed: %s", self._blobs.url, error)

    def _keep(self) -> None:
        """Renews the lease, or finds out who has it."""
        while (found := self._read()).owner in (None, self._owner):
            if self._renew(found):
                return
        self._lost = str(found.owner)
        LOG.error("%s was taken over by %s; this server writes nothing more", self._blobs.url, self._lost)

    def _renew(self, found: _Found) -> bool:
        """Extends the lease by another span; returns False where another server replaced what was found."""
        until = time.time() + SPAN_S
        renewed = self._replace(found, until=until)
        if renewed:
            self._until = until
        return renewed

    def _read(self) -> _Found:
        read = self._blobs.get_with_version(LEASE)
        if read is None:
            return _Found(owner=None, until=0.0, version=None)
        data, version = read
        try:
            found = json.loads(data)
            return _Found(owner=str(found["owner"]), until=float(found["until"]), version=version)
        except (ValueError, KeyError, TypeError):
            return _Found(owner=None, until=0.0, version=version)

    def _replace(self, found: _Found, *, until: float) -> bool:
        data = json.dumps({"owner": self._owner, "until": until}).encode()
        if self._blobs.put_if(LEASE, data, found.version) is not None:
            return True
        return self._blobs.get_bytes(LEASE) == data  # ours: the reply was lost, and a retry failed


def _owner(folder: Path) -> str:
    """Returns the name of the server whose data is in this folder: the same after a restart."""
    path = folder / "lease-owner"
    if not path.exists():
        replace_file(path, f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}".encode())
    return path.read_text()
