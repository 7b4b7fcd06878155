"""The folder of one AdapterStore, and object storage behind it if configured.  The caller serialises changes.

root/adapters/TENANT/NAME/VERSION    see adapter_files.py; with object storage a copy, see remote_adapters.py
root/counters/TENANT/NAME.json       see adapter_files.Counters
root/deleted/TENANT/NAME/VERSION     see adapter_files.Tombstones
root/changes                         see change_log.py
root/trash/…                         files being written or deleted; at the start, what the last process left
root/.lock                           held by the process that has the store open
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from jaxlora.core.atomic_files import lock_folder, to_trash
from jaxlora.core.errors import AdapterNotFound, NotFound, StateInvalid, StorageFailed
from jaxlora.core.lora import Adapter, AdapterRef
from jaxlora.storage.adapter_files import (
    About,
    Counters,
    Tombstones,
    describe,
    is_damage,
    load_version,
    save_version,
    scan,
)
from jaxlora.storage.change_log import Change, ChangeLog, ChangeReader
from jaxlora.storage.followed_adapters import FollowedVersions
from jaxlora.storage.remote_adapters import RemoteVersions, VersionCopies

# After losing its counters a machine starts so far above the numbers in object storage: a version that was used but not
# sent yet had one of the numbers between.
GAP = 1000
CHANGES = "changes"


class VersionFiles:
    """Versions, counters and trash under one root, which no other process changes."""

    def __init__(self, root: Path, remote: RemoteVersions | FollowedVersions | None, *, reads: bool = False):
        """remote: not started.  reads: another process changes the store; only what changes nothing may be called.

        A store that is read from object storage has its folder alone, for copies; any other reads what the writer has.

        Raises StorageFailed when the folder cannot be made, StateInvalid, naming it, when another store has it open, or
        when it is to be read and none ever had; and what the start of `remote` raises.
        """
        self._root = root.absolute()  # Orbax needs an absolute path
        self._remote = remote if isinstance(remote, RemoteVersions) else None
        self._followed = remote if isinstance(remote, FollowedVersions) else None
        self._counters = Counters(self._root / "counters")
        self._tombstones = Tombstones(self._root / "deleted")
        self.found: dict[AdapterRef, About | None] = {}  # at the start; None: read its metadata
        self.leftovers: list[Path] = []  # to be passed to `empty`
        self._lock: int | None = None
        self._changes: ChangeLog | ChangeReader = ChangeReader(self._root / CHANGES)
        if self._followed is not None:
            self._follow(self._followed)
        elif reads:
            self.news()
        else:
            self._take()

    def _take_folder(self, *names: str) -> None:
        """Makes the folder and locks it."""
        root = self._root
        try:
            for name in names:
                (root / name).mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(root)
        except OSError as e:
            raise StorageFailed(f"the adapter store {root} cannot be made ({e.strerror}); choose another folder") from e
        if self._lock is None:
            raise StateInvalid(f"the adapter store {root} is in use; stop who uses it, or name another folder")

    def _follow(self, followed: FollowedVersions) -> None:
        self._take_folder("adapters", "trash")
        self.leftovers = list((self._root / "trash").iterdir())
        try:
            followed.start(self._root / "adapters", self._root / "trash", _refs(scan(self._root / "adapters")))
        except BaseException:
            self.close()
            raise
        self.found = dict(followed.known())

    def _take(self) -> None:
        """Locks the folder and completes what the last process had no time for."""
        self._take_folder("adapters", "counters", "trash")
        root, remote = self._root, self._remote
        for ref in self._tombstones.all():  # the last process had no time to delete them
            to_trash(self._folder(ref), root / "trash")
            self._tombstones.remove(ref)
        local = scan(root / "adapters")
        self.found = dict.fromkeys(_refs(local))
        if remote is not None:
            try:
                there = remote.start(root / "adapters", root / "trash", local)
            except BaseException:
                self._unlock()
                raise
            self.found = {r: a for r, a in self.found.items() if not remote.is_deleted(r)} | there
        self.leftovers = list((root / "trash").iterdir())
        self._changes = ChangeLog(root / CHANGES)

    @property
    def asks_network(self) -> bool:
        """Whether `news` waits for the network."""
        return self._followed is not None

    def news(self) -> list[Change] | None:
        """Returns what the process that writes has changed since the last call; None: `found` is read again.

        Raises Unavailable, StateInvalid when no store of this version ever had the folder open, StorageFailed.
        """
        if self._followed is not None:
            changes = self._followed.news()
            self.found = dict(self._followed.known()) if changes is None else self.found
            return changes
        assert isinstance(self._changes, ChangeReader), "it reads"
        try:
            changes = self._changes.news()
            if changes is None:
                promised = set(self._tombstones.all())
                self.found = dict.fromkeys(r for r in _refs(scan(self._root / "adapters")) if r not in promised)
            return changes
        except FileNotFoundError as error:
            raise StateInvalid(f"no server keeps the adapter store {self._root} yet") from error
        except OSError as error:
            raise StorageFailed(f"the adapter store {self._root} cannot be read ({error.strerror})") from error

    def _tell(self, refs: Iterable[AdapterRef], *, came: bool) -> None:
        assert isinstance(self._changes, ChangeLog), "it writes"
        self._changes.add(refs, came=came)

    def close(self) -> None:
        """Unlocks the folder.  Call it once; the files can still be read."""
        if self._remote is not None:
            self._remote.close()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)

    # ---- numbers --------------------------------------------------------------------------------------------------

    def counter(self, tenant: str, name: str, visible: Iterable[int]) -> tuple[int, int]:
        """Returns (last minted, last deleted) version; never below a version that exists or did, if the file was lost.

        Raises StorageFailed for a damaged file.
        """
        least = max(visible, default=0)
        if self._remote is not None and not self._counters.known(tenant, name):
            least = max(least, self._remote.floor(tenant, name))
            least += GAP if least else 0
        return self._counters.read(tenant, name, least)

    def set_counter(self, tenant: str, name: str, minted: int, deleted: int) -> None:
        """Writes the counter, which is on disk on return."""
        self._counters.write(tenant, name, minted, deleted)

    # ---- versions -------------------------------------------------------------------------------------------------

    def save(self, adapter: Adapter, created: float) -> None:
        """Writes a version, which is on disk on return, and sends it soon.  Raises what the file system raises."""
        save_version(self._folder(adapter.ref).parent, adapter, created, self._root / "trash")
        self._tell([adapter.ref], came=True)
        if self._remote is not None:
            self._remote.send(adapter.ref)

    def describe(self, ref: AdapterRef) -> About:
        """Describes a version that `found` has as None.  Raises StorageFailed."""
        about = None if self._followed is None else self._followed.about(ref)
        return describe(self._folder(ref).parent, ref) if about is None else about

    def load(self, ref: AdapterRef, make_room: Callable[[int], None]) -> tuple[Adapter, float]:
        """Returns (the adapter, its time of `put`), its checksum verified.  make_room: see load_version; may run twice.

        A copy that is damaged, or of a version that another machine has made since, is fetched again.
        Raises StorageFailed, StorageFull, StorageAway.
        """
        folder, remote = self._folder(ref).parent, self._remote or self._followed
        if remote is None:
            return load_version(folder, ref, make_room)
        try:
            return self._load_copy(ref, remote, make_room)
        except StorageFailed as error:
            if not is_damage(error) or not remote.drop_copy(ref):
                raise
            return self._load_copy(ref, remote, make_room)

    def _load_copy(
        self, ref: AdapterRef, remote: VersionCopies, make_room: Callable[[int], None]
    ) -> tuple[Adapter, float]:
        about = remote.about(ref)
        if about is None and self._followed is not None:
            raise AdapterNotFound(f"{ref} is deleted")
        try:
            with remote.here(ref):
                adapter, created = load_version(self._folder(ref).parent, ref, make_room)
        except NotFound as error:
            raise StorageFailed(f"{ref}: object storage has lost it; use another version") from error
        if about is not None and about[0] != created:
            raise StorageFailed(f"{ref}: the copy on disk is of another version")
        return adapter, created

    def promise_deletion(self, ref: AdapterRef) -> None:
        """Marks one version as deleted, also for the next start and for other machines; the marks are stored on return.

        Waits for the network.  Raises StorageAway, StorageFailed, OSError; then the version is as it was.
        """
        if self._remote is not None:
            self._remote.retire_version(ref)
        self._tombstones.add(ref)
        self._tell([ref], came=False)

    def delete(self, ref: AdapterRef) -> Path | None:
        """Removes one version from the disk's names and from object storage; returns what `empty` must remove."""
        out = to_trash(self._folder(ref), self._root / "trash")
        self._tell([ref], came=False)
        if self._remote is not None:
            self._remote.forget(ref)
        self._tombstones.remove(ref)
        return out

    def delete_all(self, tenant: str, name: str, versions: Collection[int]) -> Path | None:
        """Does the same for all versions of a name, after `retire` was called."""
        out = to_trash(self._root / "adapters" / tenant / name, self._root / "trash")
        self._tell([AdapterRef(tenant, name, version) for version in versions], came=False)
        if self._remote is not None:
            for version in versions:
                self._remote.forget(AdapterRef(tenant, name, version))
        return out

    def empty(self, trash: Path) -> None:
        """Removes what was deleted; the next start retries what remains."""
        shutil.rmtree(trash, ignore_errors=True)

    def _folder(self, ref: AdapterRef) -> Path:
        return self._root / "adapters" / ref.tenant / ref.name / str(ref.version)

    # ---- object storage -------------------------------------------------------------------------------------------

    def retire(self, tenant: str, name: str, minted: int) -> None:
        """Marks all versions up to `minted` deleted in object storage, if any.  Raises StorageAway, StorageFailed."""
        if self._remote is not None:
            self._remote.retire(tenant, name, minted)

    def wait_sent(self, ref: AdapterRef, timeout_s: float | None) -> None:
        """Waits until a saved version is in object storage, if any.

        Raises what the last attempt raised, StorageAway after `timeout_s`.
        """
        if self._remote is not None:
            self._remote.wait_sent(ref, timeout_s)

    def is_here(self, ref: AdapterRef) -> bool:
        """Returns whether the version is read without the network."""
        return (self._remote is None and self._followed is None) or self._folder(ref).is_dir()

    def flush(self) -> dict[AdapterRef, Exception]:
        """Retries once what was not sent; returns what still is not, and why."""
        return {} if self._remote is None else self._remote.flush()


def _refs(found: Mapping[tuple[str, str], Collection[int]]) -> Iterable[AdapterRef]:
    return (AdapterRef(t, n, v) for (t, n), versions in found.items() for v in versions)
