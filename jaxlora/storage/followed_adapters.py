"""A store's versions in object storage for a process that only reads them, with copies on a disk of its own.

It lists them once, and from then on reads one small object that says what has changed; see change_log.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

from jaxlora.core.errors import NotFound, StateInvalid
from jaxlora.core.lora import AdapterRef
from jaxlora.storage.adapter_files import About
from jaxlora.storage.change_log import Change, lines_after
from jaxlora.storage.disk_cache import DiskCopies
from jaxlora.storage.object_store import FOLDER_SUFFIX, Blobs, Version
from jaxlora.storage.remote_adapters import CHANGES, VersionCopies, listed, parsed


class FollowedVersions(VersionCopies):
    """The versions, as `RemoteVersions` of another process changes them.  Thread-safe; call `start` first."""

    def __init__(self, blobs: Blobs, copies: DiskCopies):
        """blobs: opened to be read."""
        super().__init__(blobs, copies)
        self._lock = threading.Lock()
        self._known: dict[AdapterRef, About] = {}
        self._seen: tuple[bytes, Version | None] = b"", None  # the changes, as they were read last

    def start(self, adapters: Path, trash: Path, local: Iterable[AdapterRef]) -> None:
        """Reads which versions there are.  adapters, trash: folders of this process; local: copies in the first.

        Raises StateInvalid where no server has kept adapters yet, StorageAway, StorageFailed.
        """
        self._place(adapters, trash)
        self.news()
        for ref in local:
            if ref in self._known:
                self._copies.add(self._folder(ref), self._discard)
            else:
                self._discard(self._folder(ref))

    def known(self) -> dict[AdapterRef, About]:
        """Returns all versions, as they were at the last call of `news`."""
        with self._lock:
            return dict(self._known)

    def news(self) -> list[Change] | None:
        """Returns what has changed since the last call, oldest first; None: `known` says.  Waits for the network.

        Raises StateInvalid where no server has kept adapters yet, StorageAway, StorageFailed.
        """
        before, version = self._seen
        try:
            found = self._blobs.get_if_changed(CHANGES, version)
        except NotFound as error:
            raise StateInvalid(f"no server keeps adapters in {self._blobs.url} yet") from error
        if found is None:
            return []
        lines = lines_after(before, found[0])
        if lines is None:
            known = dict(listed(self._blobs).known)  # later than what was read: its next lines may be known already
            with self._lock:
                self._known = known
            self._seen = found
            return None
        changes = []
        with self._lock:
            for line in lines:
                if (named := parsed(line[1:] + FOLDER_SUFFIX)) is not None:
                    self._known[named[0]] = named[1]
                    changes.append((True, named[0]))
                else:
                    tenant, name, number = line[1:].split("/")
                    ref = AdapterRef(tenant, name, int(number))
                    if self._known.pop(ref, None) is not None:
                        changes.append((False, ref))
        self._seen = found
        return changes

    def about(self, ref: AdapterRef) -> About | None:
        """Returns the description of a version, None when it is not there."""
        with self._lock:
            return self._known.get(ref)
