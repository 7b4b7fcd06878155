"""A lease that lets one process at a time write to object storage; a process that loses it stops writing by itself.

The object records the owner, the place that it runs at, and an epoch that grows by one whenever another process takes it.
It is created only if absent, and replaced only in the version that was read: of two processes that take it at once, one gets
it.  It is renewed three times in its span.  Nobody's clock is compared with another's: who would take it over watches it for
a whole span, in which its owner would have renewed it; the owner stops CLOCK_S before its own span is over.
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

from jaxlora.core.errors import JaxLoraError, StateInvalid, StorageAway
from jaxlora.storage.object_store import Blobs, Version

LOG = logging.getLogger("jaxlora")
LEASE = "lease"
SPAN_S = 60.0
CLOCK_S = 5.0
LOOKS = 20  # at somebody else's lease, in a span
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # goes on while the machine sleeps, where there is one


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """The lease object as it was read."""

    owner: str = ""  # empty: nobody
    place: str = ""
    epoch: int = 0
    held: bool = False  # not given back
    version: Version | None = None  # None: the object does not exist


class Lease:
    """The right to write under one URL.  Thread-safe."""

    def __init__(self, blobs: Blobs, folder: Path, *, waiting: Callable[[str], None] = lambda who: None):
        """Takes the lease; watches one that another has not given back until it is over.

        folder: this server's own, which this process has locked: whoever took the lease from there has ended.
        waiting: called with the owner it waits for.  Raises StateInvalid if another has it, StorageAway, StorageFailed.
        """
        self._blobs, self._place = blobs, place_of(folder)
        self._owner = f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}"
        self._until = self._until_wall = 0.0
        self._lost = ""
        self._end = threading.Event()
        self.epoch = self._take(waiting)
        blobs.may_write, blobs.epoch = self.check, self.epoch
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises StateInvalid when another server has taken over, StorageAway while the owner is unknown.

        Any tenant may read the message; the log names the server.
        """
        if self._lost:
            raise StateInvalid("object storage was taken over by another server; this one writes nothing more")
        if time.clock_gettime(CLOCK) > self._until or time.time() > self._until_wall:
            raise StorageAway("the lease of object storage could not be renewed; try again later")

    def close(self) -> None:
        """Releases the lease where it is still this server's, which writes nothing more in any case."""
        self._end.set()
        self._thread.join()
        self._until = 0.0
        try:
            found = self._read()
            if found.owner == self._owner:
                self._replace(found, self.epoch, held=False)
        except JaxLoraError as error:
            LOG.warning("the lease of %s was not given back and ends by itself: %s", self._blobs.url, error)

    def _take(self, waiting: Callable[[str], None]) -> int:
        """Returns the epoch under which this process has the lease."""
        found = self._read()
        if not self._is_free(found):
            waiting(found.owner)
            found = self._watched(found)
        epoch = found.epoch + 1
        if not self._renew(found, epoch):
            raise self._in_use(self._read())
        return epoch

    def _watched(self, found: _Found) -> _Found:
        """Returns the lease of another once it is over.  Raises StateInvalid when it is renewed."""
        ends = time.clock_gettime(CLOCK) + SPAN_S + CLOCK_S
        while time.clock_gettime(CLOCK) < ends:
            time.sleep(SPAN_S / LOOKS)
            now = self._read()
            if self._is_free(now):
                return now
            if now.version != found.version:
                raise self._in_use(now)
        return found

    def _is_free(self, found: _Found) -> bool:
        """Whether the process that had it has given it back, or must have ended."""
        return not found.held or found.place == self._place

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
        while (found := self._read()).owner in ("", self._owner):
            if self._renew(found, self.epoch):
                return
        self._lost = found.owner
        LOG.error("%s was taken over by %s; this server writes nothing more", self._blobs.url, self._lost)

    def _renew(self, found: _Found, epoch: int) -> bool:
        """Extends the lease by another span; returns False where another server replaced what was found."""
        began, wall = time.clock_gettime(CLOCK), time.time()
        renewed = self._replace(found, epoch, held=True)
        if renewed:
            self._until, self._until_wall = began + SPAN_S - CLOCK_S, wall + SPAN_S - CLOCK_S
        return renewed

    def _read(self) -> _Found:
        read = self._blobs.get_with_version(LEASE)
        if read is None:
            return _Found()
        data, version = read
        try:
            found = json.loads(data)
            return _Found(
                owner=str(found["owner"]),
                place=str(found.get("place", "")),
                epoch=int(found.get("epoch", 0)),
                held=float(found["until"]) > 0,
                version=version,
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            return _Found(version=version)

    def _replace(self, found: _Found, epoch: int, *, held: bool) -> bool:
        until = time.time() + SPAN_S if held else 0.0  # for people, and for older versions
        data = json.dumps({"owner": self._owner, "place": self._place, "epoch": epoch, "until": until}).encode()
        if self._blobs.put_if(LEASE, data, found.version) is not None:
            return True
        return self._blobs.get_bytes(LEASE) == data  # ours: the reply was lost, and a retry failed


def place_of(folder: Path) -> str:
    """Returns a name for a folder of this machine since it was booted, which no copy of the folder has."""
    folder.mkdir(parents=True, exist_ok=True)
    boot = BOOT_ID.read_text().strip() if BOOT_ID.exists() else uuid.uuid4().hex
    found = folder.stat()
    return f"{boot}/{found.st_dev}-{found.st_ino}"
