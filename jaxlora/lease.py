"""Which process may write to object storage: one at a time, and one that lost its right stops by itself.

The object says who has it and until when.  It is renewed three times in that span; a process whose span is over without that
writes no more until it knows better, so another may take over after it.  Clocks of the machines may differ by CLOCK_S.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from jaxlora.blobs import LEASE, Blobs
from jaxlora.durable import replace_file
from jaxlora.errors import JaxLoraError, StateInvalid, StorageAway

LOG = logging.getLogger("jaxlora")
SPAN_S = 60.0
CLOCK_S = 5.0
SETTLE_S = 1.0  # after which one of two that take it at once sees the other


class Lease:
    """The right to write under one URL.  From any thread."""

    def __init__(self, blobs: Blobs, folder: Path, *, waiting: Callable[[str], None] = lambda who: None):
        """Waits for one that is over soon.  folder: this server's own; who has it may go on at once after a crash.

        waiting: told whom it waits for.  Raises StateInvalid when another server renews it, StorageAway, StorageFailed.
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
        """Raises StateInvalid when another server has taken over, StorageAway while nobody knows.

        Any tenant may read the message; the log says which server.
        """
        if self._lost:
            raise StateInvalid("object storage was taken over by another server; this one writes nothing more")
        if time.time() > self._until:
            raise StorageAway("the lease of object storage could not be renewed; try again later")

    def close(self) -> None:
        """Gives it back."""
        self._end.set()
        self._thread.join()
        if not self._lost:
            try:
                self._blobs.lease(None)
            except JaxLoraError as error:
                LOG.warning("the lease of %s was not given back and ends by itself: %s", self._blobs.url, error)

    def _take(self, waiting: Callable[[str], None]) -> None:
        first = self._read()
        if first is not None and first[0] != self._owner:
            left_s = first[1] + CLOCK_S - time.time()
            if left_s > 0:
                waiting(first[0])
                time.sleep(min(left_s, SPAN_S + CLOCK_S))
                self._expect(lambda now: now[1] == first[1])
        self._renew()
        if first is None or first[0] != self._owner:
            time.sleep(SETTLE_S)
            self._expect(lambda now: now[0] == self._owner)

    def _expect(self, good: Callable[[tuple[str, float]], bool]) -> None:
        if (now := self._read()) is not None and not good(now):
            raise StateInvalid(
                f"{self._blobs.url} is in use by {now[0]}; stop that server, or name another URL", param="blobs.url"
            )

    def _run(self) -> None:
        while not self._end.wait(SPAN_S / 3):
            try:
                found = self._read()
                if found is not None and found[0] != self._owner:
                    self._lost = found[0]
                    LOG.error("%s was taken over by %s; this server writes nothing more", self._blobs.url, self._lost)
                    return
                self._renew()
            except JaxLoraError as error:
                LOG.error("the lease of %s is not renewed: %s", self._blobs.url, error)

    def _read(self) -> tuple[str, float] | None:
        """(who has it, until when)."""
        data = self._blobs.get_bytes(LEASE)
        if data is None:
            return None
        try:
            found = json.loads(data)
            return str(found["owner"]), float(found["until"])
        except (ValueError, KeyError, TypeError):  # nobody's
            return None

    def _renew(self) -> None:
        until = time.time() + SPAN_S
        self._blobs.lease(json.dumps({"owner": self._owner, "until": until}).encode())
        self._until = until


def _owner(folder: Path) -> str:
    """The name of the server whose data lie in this folder: the same after it has started again."""
    path = folder / "lease-owner"
    if not path.exists():
        replace_file(path, f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}".encode())
    return path.read_text()
