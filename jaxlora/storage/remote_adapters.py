"""Copies of a store's versions in object storage; its folders on disk are then a cache, and versions not yet sent.

    adapters/TENANT/NAME/VERSION_CREATED_RANK_BYTES.zip    a version
    deleted/TENANT/NAME/NUMBER                             this and all lower versions of the name are deleted
    deleted/TENANT/NAME/VERSION.only                       this one is
    changes                                                see change_log.py; for those who follow

Two listings at the start describe all of ten thousand adapters; afterwards nothing is listed.  Versions are sent
by one thread, in order; a failed one is retried until it is sent.
"""

from __future__ import annotations

import itertools
import logging
import re
import shutil
import threading
import time
from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from jaxlora.core.atomic_files import to_trash
from jaxlora.core.errors import StorageAway
from jaxlora.core.lora import AdapterRef
from jaxlora.storage.adapter_files import About, describe
from jaxlora.storage.change_log import ChangeObject
from jaxlora.storage.disk_cache import DiskCopies
from jaxlora.storage.object_store import FOLDER_SUFFIX, Blobs

LOG = logging.getLogger("jaxlora")
VERSIONS, DELETED, CHANGES = "adapters/", "deleted/", "changes"
KEY_PATTERN = re.compile(r"adapters/([^/]+)/([^/]+)/([1-9][0-9]*)_([0-9.e+]+)_([1-9][0-9]*)_([0-9]+)\.zip")
DELETED_PATTERN = re.compile(r"deleted/([^/]+)/([^/]+)/([1-9][0-9]*)(\.only)?")
RETRY_S = 20.0
TELL_S = 0.25  # between two writings of the changes, while there is more to do
FLUSH_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """What object storage holds of a store."""

    known: Mapping[AdapterRef, About]
    floors: Mapping[tuple[str, str], int]  # the newest deletion of all versions of a name
    deleted: Set[AdapterRef]  # one by one
    leftovers: Sequence[str]  # keys of what is deleted and still there

    def is_deleted(self, ref: AdapterRef) -> bool:
        """Returns whether the version is marked as deleted, alone or with all of its name."""
        return ref in self.deleted or ref.version <= self.floors.get((ref.tenant, ref.name), 0)


def listed(blobs: Blobs) -> Listing:
    """Lists a store's versions.  Raises StorageAway, StorageFailed."""
    floors: dict[tuple[str, str], int] = {}
    deleted: set[AdapterRef] = set()
    for key in blobs.list(DELETED):
        if (match := DELETED_PATTERN.fullmatch(key)) and match[4]:
            deleted.add(AdapterRef(match[1], match[2], int(match[3])))
        elif match:
            owner = match[1], match[2]
            floors[owner] = max(floors.get(owner, 0), int(match[3]))
    known, leftovers = dict[AdapterRef, About](), list[str]()
    marks = Listing(known=known, floors=floors, deleted=deleted, leftovers=leftovers)
    for key in blobs.list(VERSIONS):
        if (named := parsed(key)) is not None and marks.is_deleted(named[0]):
            leftovers.append(key)
        elif named is not None:
            known[named[0]] = named[1]
    return marks


def parsed(key: str) -> tuple[AdapterRef, About] | None:
    """Returns the version that an object is, and its description; None for another object."""
    if (match := KEY_PATTERN.fullmatch(key)) is None:
        return None
    return AdapterRef(match[1], match[2], int(match[3])), (float(match[4]), int(match[5]), int(match[6]))


class VersionCopies:
    """Versions as folders on this disk, fetched from object storage when they are used.  Thread-safe."""

    def __init__(self, blobs: Blobs, copies: DiskCopies):
        self._blobs, self._copies = blobs, copies

    def _place(self, adapters: Path, trash: Path) -> None:
        """Sets the folders of all versions and of what is being fetched or removed."""
        self._adapters, self._trash = adapters, trash

    def about(self, ref: AdapterRef) -> About | None:
        """Returns the description of a version in object storage, None when it is not there."""
        raise NotImplementedError

    def here(self, ref: AdapterRef) -> AbstractContextManager[None]:
        """Keeps the version's folder on this disk inside the block, fetching it if missing.

        Raises NotFound, StorageAway, StorageFull, StorageFailed.
        """
        return self._copies.using(self._folder(ref), lambda folder: self._bring(ref, folder))

    def drop_copy(self, ref: AdapterRef) -> bool:
        """Removes the folder of a version that can be fetched again.  Returns False where it cannot."""
        if self.about(ref) is None:
            return False
        self._copies.forget(self._folder(ref))
        self._discard(self._folder(ref))
        return True

    def _bring(self, ref: AdapterRef, folder: Path) -> None:
        about = self.about(ref)
        if about is not None:  # else it is being written to the disk, or was damaged there: the reader will raise
            self._blobs.get_folder(key_of(ref, about), folder, self._trash)
            self._copies.add(folder, self._discard)

    def _discard(self, folder: Path) -> None:
        """Removes a folder completely."""
        if (out := to_trash(folder, self._trash)) is not None:
            shutil.rmtree(out, ignore_errors=True)

    def _folder(self, ref: AdapterRef) -> Path:
        return self._adapters / ref.tenant / ref.name / str(ref.version)


class RemoteVersions(VersionCopies):
    """The versions of one store in object storage.  Thread-safe; call `start` first."""

    def __init__(self, blobs: Blobs, copies: DiskCopies):
        super().__init__(blobs, copies)
        self._changed = threading.Condition()
        self._known: dict[AdapterRef, About] = {}  # sent
        self._floors: dict[tuple[str, str], int] = {}  # number of the newest deletion of all versions
        self._deleted: set[AdapterRef] = set()  # one by one
        self._sending: dict[AdapterRef, None] = {}  # an ordered set
        self._removing: dict[str, None] = {}  # keys, an ordered set
        self._errors: dict[AdapterRef | str, Exception] = {}  # of the last attempt
        self._found: list[Path] = []  # copies that existed at the start
        self._changes, self._untold = ChangeObject(), True  # whether it is to be written
        self._told_s = 0.0  # when it was, monotonic
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="adapter-sender", daemon=True)

    def start(self, adapters: Path, trash: Path, local: Mapping[tuple[str, str], set[int]]) -> dict[AdapterRef, About]:
        """Returns all versions in object storage.  adapters, trash: folders of the store; local: versions on this disk.

        Those of `local` that are missing there are sent soon; those of a deleted adapter are moved to the trash.
        Raises StorageAway, StorageFailed.
        """
        self._place(adapters, trash)
        there = listed(self._blobs)
        self._known, self._floors, self._deleted = dict(there.known), dict(there.floors), set(there.deleted)
        self._removing = dict.fromkeys(there.leftovers)
        for (tenant, name), versions in local.items():
            for version in sorted(versions):
                ref = AdapterRef(tenant, name, version)
                if self.is_deleted(ref):
                    self._discard(self._folder(ref))
                elif ref in self._known:
                    self._found.append(self._folder(ref))
                else:
                    self._sending[ref] = None
        self._thread.start()
        return dict(self._known)

    def floor(self, tenant: str, name: str) -> int:
        """Returns the highest number that was deleted with all versions of the name; 0 when it never was."""
        with self._changed:
            return self._floors.get((tenant, name), 0)

    def is_deleted(self, ref: AdapterRef) -> bool:
        """Returns whether the version is marked as deleted, alone or with all of its name."""
        return ref in self._deleted or ref.version <= self._floors.get((ref.tenant, ref.name), 0)

    def about(self, ref: AdapterRef) -> About | None:
        """Returns the description of a version in object storage, None when it is not there."""
        with self._changed:
            return self._known.get(ref)

    def send(self, ref: AdapterRef) -> None:
        """Queues a version that is on disk for sending."""
        with self._changed:
            self._sending[ref] = None
            self._changed.notify_all()

    def wait_sent(self, ref: AdapterRef, timeout_s: float | None) -> None:
        """Waits until the version is sent, or deleted.

        Raises what the last attempt to send it raised, StorageAway after `timeout_s`.
        """

        def decided() -> bool:
            return ref not in self._sending or ref in self._errors or self._ended

        with self._changed:
            if not self._changed.wait_for(decided, timeout_s):
                raise StorageAway(f"{ref} is still on its way to object storage")
            if ref in self._errors:
                raise self._errors[ref]

    def retire(self, tenant: str, name: str, minted: int) -> None:
        """Marks all versions of a name up to `minted` as deleted.  The mark is stored on return; removal follows.

        Raises StorageAway, StorageFailed.
        """
        self._blobs.put_bytes(f"{DELETED}{tenant}/{name}/{minted}", b"deleted")
        with self._changed:
            before, self._floors[tenant, name] = self._floors.get((tenant, name)), minted
            if before not in (None, minted):
                self._remove(f"{DELETED}{tenant}/{name}/{before}")
            for ref in [r for r in self._deleted if (r.tenant, r.name) == (tenant, name) and r.version <= minted]:
                self._deleted.discard(ref)
                self._remove(_mark(ref))
            for ref in [r for r in self._known if (r.tenant, r.name) == (tenant, name) and r.version <= minted]:
                self._tell(f"-{ref.tenant}/{ref.name}/{ref.version}")

    def retire_version(self, ref: AdapterRef) -> None:
        """Marks one version as deleted, for good.  The mark is stored on return; removal follows.

        Raises StorageAway, StorageFailed.
        """
        self._blobs.put_bytes(_mark(ref), b"deleted")
        with self._changed:
            self._deleted.add(ref)
            self._tell(f"-{ref.tenant}/{ref.name}/{ref.version}")

    def forget(self, ref: AdapterRef) -> None:
        """Stops sending a deleted version, and removes it soon."""
        self._copies.forget(self._folder(ref))
        with self._changed:
            self._sending.pop(ref, None)
            self._errors.pop(ref, None)
            about = self._known.pop(ref, None)
            if about is not None:
                self._tell(f"-{ref.tenant}/{ref.name}/{ref.version}")
                self._remove(key_of(ref, about) + FOLDER_SUFFIX)
            self._changed.notify_all()

    def flush(self) -> dict[AdapterRef, Exception]:
        """Retries once what failed, waits at most FLUSH_S, and returns what is still not sent and why."""
        with self._changed:
            self._errors.clear()
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended or self._due() is None, FLUSH_S)
            slow = StorageAway("object storage is too slow; it is sent after the next start")
            return {ref: self._errors.get(ref, slow) for ref in self._sending}

    def close(self) -> None:
        """Ends the thread, or abandons it in a hanging call; unsent versions are on disk and sent after a restart."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join(FLUSH_S)

    # ---- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        for folder in self._found:  # reading their sizes takes a while
            self._copies.add(folder, self._discard)
        while (item := self._next()) is not None:
            error: Exception | None = None
            try:
                if item == CHANGES:
                    self._write_changes()
                elif isinstance(item, str):
                    self._blobs.delete([item])
                else:
                    self._send(item)
            except Exception as e:
                error = e
                LOG.error("object storage: %s: %s; tried again in %.0f s", item, e, RETRY_S)
            with self._changed:
                if error is not None:
                    self._errors[item] = error
                elif isinstance(item, str):
                    self._removing.pop(item, None)
                else:
                    self._sending.pop(item, None)
                self._changed.notify_all()

    def _next(self) -> AdapterRef | str | None:
        """Returns the next task, waiting for one.  None at the end."""
        with self._changed:
            while not self._ended:
                if (item := self._due()) is not None:
                    return item
                if not self._changed.wait(RETRY_S if self._errors else None):
                    self._errors.clear()
            return None

    def _due(self) -> AdapterRef | str | None:
        """Returns the first task that did not just fail: the changes several times a second, and when all else is done."""
        untold = [CHANGES] if self._untold else []
        is_time = time.monotonic() >= self._told_s + TELL_S
        items = itertools.chain(untold if is_time else [], self._sending, self._removing, untold)
        return next((item for item in items if item not in self._errors), None)

    def _write_changes(self) -> None:
        with self._changed:
            data, self._told_s = self._changes.data(), time.monotonic()
        self._blobs.put_bytes(CHANGES, data)
        with self._changed:
            self._untold = self._changes.data() != data

    def _tell(self, line: str) -> None:
        """Queues a line for those who follow.  Called with the lock held."""
        self._changes.add(line)
        self._untold = True
        self._changed.notify_all()

    def _send(self, ref: AdapterRef) -> None:
        try:
            about = describe(self._folder(ref).parent, ref)
            key = key_of(ref, about)
            self._blobs.put_folder(key, self._folder(ref), self._trash)
        except Exception:
            with self._changed:
                if ref not in self._sending:
                    return  # deleted meanwhile, and its files are gone
            raise
        with self._changed:
            if ref in self._sending:
                self._known[ref] = about
                self._tell("+" + key)
            else:
                self._remove(key + FOLDER_SUFFIX)
                return
        self._copies.add(self._folder(ref), self._discard)

    def _remove(self, key: str) -> None:
        """Queues an object for removal.  Called with the lock held."""
        self._removing[key] = None
        self._changed.notify_all()


def key_of(ref: AdapterRef, about: About) -> str:
    """Returns what the object of a version is called, but for its ending."""
    created, rank, nbytes = about
    return f"{VERSIONS}{ref.tenant}/{ref.name}/{ref.version}_{created!r}_{rank}_{nbytes}"


def _mark(ref: AdapterRef) -> str:
    return f"{DELETED}{ref.tenant}/{ref.name}/{ref.version}.only"
