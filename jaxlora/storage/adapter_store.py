"""AdapterStore: every version of every tenant's adapter, in host RAM immediately and on disk shortly after.

    put ──▶ RAM (pinned) ──background──▶ disk        get ◀── RAM, which evicts the least recently used ◀── disk

One process writes; others may read the same folder and see what is on its disk, at their next question.  A version never
changes and its number is never reused, not even after a delete or a restart.

version_files.py implements the disk and the object storage behind it.

Locks are taken in this order: disk (saves and deletes, slow), counters, state (never held over a disk read or write).
"""

from __future__ import annotations

import builtins
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from jaxlora.core.errors import AdapterNotFound, AlreadyExists, StateInvalid, StorageAway, StorageFailed
from jaxlora.core.lora import Adapter, AdapterRef, AdapterWeights, check_name
from jaxlora.storage.adapter_files import About, is_damage
from jaxlora.storage.followed_adapters import FollowedVersions
from jaxlora.storage.host_cache import HostMemory, HostTier
from jaxlora.storage.remote_adapters import RemoteVersions
from jaxlora.storage.single_flight import SingleFlight
from jaxlora.storage.version_files import VersionFiles

LOG = logging.getLogger("jaxlora")
DTYPES = ("float32", "bfloat16")  # of weights in RAM: as they were put, and as they are served
RETRY_S, LONGEST_RETRY_S = 1.0, 60.0  # before a save that failed is tried again; twice as long after each failure


class AdapterStore:
    """Immutable adapter versions under one folder.  Thread-safe.

    `host_bytes` limits the weights in RAM, including those being read and those of `set_aside`; versions not yet
    on disk are held in any case.
    Only one store, of all processes, may write to a folder: two would give one number to two versions.
    """

    def __init__(
        self,
        root: Path,
        *,
        host_bytes: int,
        remote: RemoteVersions | FollowedVersions | None = None,
        reads: bool = False,
    ) -> None:
        """remote: object storage behind the folder, not started; the store starts and closes it.

        reads: follows the store of another process, and refuses every change; without `remote` in that one's folder.
        Raises StorageFailed when the folder cannot be made, StateInvalid, naming it, when another store has it open, or
        when it is to be read and none ever had; with `remote` StorageAway when object storage does not answer.
        """
        self._files, self._reads = VersionFiles(root, remote, reads=reads), reads
        self._disk = threading.Lock()
        self._counters = threading.Lock()
        self._state = threading.Condition()
        self._versions: dict[tuple[str, str], set[int]] = {}  # the visible versions
        self._tenants: dict[str, set[str]] = {}  # tenants of each name
        self._came: list[AdapterRef] = []  # of another process, until `take_news`
        for ref in self._files.found:
            self._show(ref)
        self._ram = HostTier(host_bytes)
        # Creation time, largest rank, bytes.
        self._about = {ref: about for ref, about in self._files.found.items() if about is not None}
        self._unsaved: set[AdapterRef] = set()  # pinned in RAM
        self._leaving: set[AdapterRef] = set()  # invisible, but still on disk
        self._failed: dict[AdapterRef, BaseException] = {}  # unsaved, and the last attempt failed
        self._retry_s, self._retry_at = RETRY_S, 0.0  # their next attempt, monotonic
        self._loads: SingleFlight[AdapterRef, Adapter] = SingleFlight()
        self._work: queue.Queue[AdapterRef | Path | None] = queue.Queue()
        self._open_work = 0
        self._closed = reads  # refuses changes
        self._ended = False  # the thread has ended or is ending
        self._released = False  # its folder is unlocked
        for leftover in self._files.leftovers:
            self._enqueue(leftover)
        self._thread = threading.Thread(target=self._run, name="adapter-store", daemon=True)
        self._thread.start()

    # Versions

    def mint(self, tenant: str, name: str) -> AdapterRef:
        """Returns the next version of this adapter: a number never given before, on disk before this returns.

        Raises StateInvalid when the store is closed, StorageFailed for a damaged counter, OSError from the disk.
        """
        check_name(tenant, "tenant")
        check_name(name, "adapter name")
        with self._counters:
            self._check_open()
            minted, deleted = self._read_counter(tenant, name)
            self._files.set_counter(tenant, name, minted + 1, deleted)
            return AdapterRef(tenant, name, minted + 1)

    def take_news(self) -> builtins.list[AdapterRef]:
        """Returns the versions that another process has made since the last call, for a store that reads.

        Raises StorageFailed, and with object storage StorageAway.
        """
        self._look(asks=True)
        with self._state:
            came, self._came = self._came, []
            return came

    def _look(self, *, asks: bool = False) -> None:
        """Takes in what the process that writes has changed.  A `stat` where it has changed nothing.

        asks: the network, where that must be asked.
        """
        if not self._reads or (self._files.asks_network and not asks):
            return
        with self._counters:
            changes = self._files.news()
            if changes == []:
                return
            with self._state:
                if changes is None:
                    known = {AdapterRef(t, n, v) for (t, n), versions in self._versions.items() for v in versions}
                    gone = [(False, ref) for ref in known - self._files.found.keys()]
                    changes = gone + [(True, ref) for ref in self._files.found if ref not in known]
                for came, ref in changes:
                    is_known = ref.version in self._versions.get((ref.tenant, ref.name), ())
                    if came and not is_known:
                        self._show(ref)
                        self._came.append(ref)
                    elif is_known and not came:
                        self._hide(ref)

    def latest(self, tenant: str, name: str) -> AdapterRef | None:
        """Returns the newest version that can be loaded, or None."""
        self._look()
        with self._state:
            versions = self._versions.get((tenant, name))
            return AdapterRef(tenant, name, max(versions)) if versions else None

    def versions(self, tenant: str, name: str) -> builtins.list[AdapterRef]:
        """Returns every version that can be loaded, oldest first."""
        self._look()
        with self._state:
            return [AdapterRef(tenant, name, v) for v in sorted(self._versions.get((tenant, name), ()))]

    def list(self, tenant: str | None) -> builtins.list[AdapterRef]:
        """Returns the newest version of each adapter of a tenant, or of all tenants, by name."""
        self._look()
        with self._state:
            return sorted(AdapterRef(t, n, max(v)) for (t, n), v in self._versions.items() if tenant in (None, t))

    def named(self, name: str, tenant: str | None) -> builtins.list[AdapterRef]:
        """Returns the newest version of each adapter of this name: one for each tenant that has it, or `tenant`'s."""
        self._look()
        with self._state:
            owners = sorted(self._tenants.get(name, ())) if tenant is None else [tenant]
            newest = [(t, self._versions.get((t, name))) for t in owners]
            return [AdapterRef(t, name, max(versions)) for t, versions in newest if versions]

    def created(self, ref: AdapterRef) -> float:
        """Returns the time of the version's `put`, epoch seconds.  Raises AdapterNotFound, StorageFailed if damaged."""
        return self._describe(ref)[0]

    def rank(self, ref: AdapterRef) -> int:
        """Returns the version's largest rank, without reading its weights.  Raises as `created` does."""
        return self._describe(ref)[1]

    def nbytes(self, ref: AdapterRef) -> int:
        """Returns the bytes of the version's weights, without reading them.  Raises as `created` does."""
        return self._describe(ref)[2]

    def _describe(self, ref: AdapterRef) -> About:
        """Returns (created, rank, nbytes), read from its metadata on disk the first time."""
        with self._state:
            self._check_visible(ref)
            if ref in self._about:
                return self._about[ref]
        try:
            about = self._files.describe(ref)
        except StorageFailed:
            with self._state:
                self._check_visible(ref)  # it may have been deleted meanwhile
            raise
        with self._state:
            self._check_visible(ref)
            return self._about.setdefault(ref, about)

    def in_memory(self, ref: AdapterRef) -> bool:
        """Returns whether `get` needs no disk.  False for a version that does not exist."""
        with self._state:
            return ref in self._ram

    def is_here(self, ref: AdapterRef) -> bool:
        """Returns whether `get` needs no network."""
        return self.in_memory(ref) or self._files.is_here(ref)

    def host_memory(self) -> HostMemory:
        """Returns the bytes of adapters in host memory, and their limit."""
        with self._state:
            return self._ram.memory()

    def set_aside(self, nbytes: int) -> None:
        """Adds bytes of adapters that others hold in host memory to the count; negative to subtract them."""
        with self._state:
            self._ram.set_aside(nbytes)

    # Weights

    def add(self, tenant: str, name: str, weights: AdapterWeights, *, after: AdapterRef | None = None) -> AdapterRef:
        """Makes the weights the next version of an adapter and saves it in the background.

        The store takes over the arrays and marks them read-only.  after: a version of it that must still exist.
        Raises AdapterNotFinite, which uses up no number, AdapterNotFound when `after` is deleted, and what `mint` raises.
        """
        weights.check_finite()
        ref = self.mint(tenant, name)
        self._put(weights.named(ref), after)
        return ref

    def put(self, adapter: Adapter) -> None:
        """Makes a minted version available now and saves it in the background: this call does not wait for a disk.

        The store takes over the arrays and marks them read-only.  Raises AlreadyExists for a version that was put
        before, StateInvalid for one that was never minted or is deleted and when the store is closed, AdapterNotFinite
        for NaN or infinity.
        """
        adapter.check_finite()
        self._put(adapter)

    def _put(self, adapter: Adapter, after: AdapterRef | None = None) -> None:
        ref = adapter.ref
        with self._counters:
            minted, deleted = self._read_counter(ref.tenant, ref.name)
            with self._state:
                self._check_open()
                if after is not None:
                    self._check_visible(after)
                if ref.version > minted:
                    raise StateInvalid(f"{ref} was never minted: call mint() and put the version it returns")
                if ref.version in self._versions.get((ref.tenant, ref.name), ()):
                    raise AlreadyExists(f"{ref} exists; a version never changes, mint a new one")
                if ref.version <= deleted or ref in self._leaving:
                    raise StateInvalid(f"{ref} was deleted; mint a new version")
                _read_only(adapter)
                self._show(ref)
                self._about[ref] = time.time(), adapter.spec.max_rank, adapter.nbytes
                self._unsaved.add(ref)
                self._ram.hold(adapter, keep=True)
                self._enqueue(ref)

    def get(self, ref: AdapterRef, dtype: str = "float32") -> Adapter:
        """Returns the adapter, from RAM, else from disk with its checksum verified; concurrent calls cause one load.

        dtype: float32, as it was put; bfloat16 is that, rounded, which RAM then holds in its place, in half of the bytes.
        Raises AdapterNotFound, StorageFailed when the version on disk is damaged, for bfloat16 AdapterNotFinite.
        """
        adapter = None
        while adapter is None or adapter.dtype != dtype:  # a load that others began may be of another dtype
            adapter = self._loads.get(ref, lambda: self._held(ref, dtype), lambda: self._made(ref, dtype))
        return adapter

    def _held(self, ref: AdapterRef, *dtypes: str) -> Adapter | None:
        """Returns the version in RAM, if it is there in one of these dtypes, or None.  Raises AdapterNotFound."""
        with self._state:
            found = self._ram.orphan(ref)
            if found is None or (
                found.dtype not in dtypes and found.dtype != "float32"
            ):  # what is asked for can be made of that
                self._check_visible(ref)
                found = self._ram.find(ref)
            return None if found is None or found.dtype not in dtypes else found

    def _made(self, ref: AdapterRef, dtype: str) -> Adapter:
        """Returns the version rounded, from RAM if it is there as it was put, else from disk."""
        exact = self._held(ref, "float32")
        if exact is None:
            return self._load(ref, dtype)
        rounded = _read_only(exact.rounded())
        with self._state:
            self._ram.exchange(rounded)
        return rounded

    def borrow(self, ref: AdapterRef) -> None:
        """Keeps the version for `get` until `give_back`, even if it is deleted meanwhile.  A borrower borrows once."""
        with self._state:
            self._ram.borrow(ref)

    def give_back(self, ref: AdapterRef) -> None:
        """Ends one `borrow` of the version."""
        with self._state:
            self._ram.give_back(ref)

    def delete(self, tenant: str, name: str) -> None:
        """Removes every version: from memory and listings now, from the names on disk before this returns.

        Borrowed versions stay in memory until they are given back.  Waits for at most one save in progress, and
        for loads in progress.  Raises AdapterNotFound when there is no such adapter, StateInvalid when
        the store is closed, StorageAway when object storage cannot be reached.
        """
        check_name(tenant, "tenant")
        check_name(name, "adapter name")
        for ref in self.versions(tenant, name):
            if self._ram.is_borrowed(ref):
                with contextlib.suppress(AdapterNotFound, StorageFailed):  # it will be in RAM, or it cannot be read
                    self._loads.get(ref, lambda r=ref: self._held(r, *DTYPES), lambda r=ref: self._load(r, "float32"))
        retired = None
        while retired is None or not self._delete_all(tenant, name, retired):
            with self._counters:
                self._check_open()
                retired, _ = self._read_counter(tenant, name)
            if self.versions(tenant, name):
                self._files.retire(tenant, name, retired)  # without a lock, as it waits for the network

    def _delete_all(self, tenant: str, name: str, retired: int) -> bool:
        """Deletes the versions of a name; returns False when there are some above `retired`, the highest marked one."""
        with self._disk, self._counters:
            with self._state:
                self._check_open()
                versions = set(self._versions.get((tenant, name), ()))
                if not versions:
                    raise AdapterNotFound(f"no adapter named {name!r}", param="name")
                if max(versions) > retired:
                    return False
                for version in versions:
                    self._hide(AdapterRef(tenant, name, version))
            minted, _ = self._read_counter(tenant, name, versions)
            self._files.set_counter(tenant, name, minted, minted)
            if (trash := self._files.delete_all(tenant, name, versions)) is not None:
                self._enqueue(trash)
            return True

    def delete_version(self, ref: AdapterRef) -> None:
        """Removes one version: from memory and listings now, from disk in the background, for good on return.

        Waits for a small file and, with object storage, for the network, but for no save.
        Raises AdapterNotFound when there is no such version, StateInvalid when the store is closed, StorageAway when
        object storage cannot be reached, OSError from the disk; then the version is as it was.
        """
        with self._state:
            self._check_open()
            self._check_visible(ref)
        self._files.promise_deletion(ref)
        self.prune(ref)

    def prune(self, ref: AdapterRef) -> None:
        """Removes one version that nobody asked to delete, as `delete_version` does, but waits for nothing.

        If the process ends too soon, the next start finds the version again.
        """
        with self._state:
            self._check_open()
            self._check_visible(ref)
            self._hide(ref)
            self._leaving.add(ref)
            self._enqueue(ref)

    # Persistence

    def flush(self) -> None:
        """Waits until all is stored; retries once what failed.  Raises StorageFailed, naming what is not saved."""
        with self._state:
            if not self._ended:
                self._retry()
            self._state.wait_for(lambda: self._open_work == 0)
            failed = dict(self._failed)
        failed |= self._files.flush()
        if failed:
            names = ", ".join(str(ref) for ref in list(failed)[:5])
            last = list(failed.values())[-1]
            raise StorageFailed(f"{len(failed)} versions are not stored ({names}): {last}") from last

    def wait_saved(self, ref: AdapterRef, timeout_s: float | None = None) -> None:
        """Waits until the version is on disk and, if configured, in object storage, or is deleted.

        Raises what the last attempt raised, StorageAway after `timeout_s`, twice that with object storage.
        """
        with self._state:
            if not self._state.wait_for(lambda: ref not in self._unsaved or ref in self._failed, timeout_s):
                raise StorageAway(f"{ref} is still on its way to the disk")
            if ref in self._failed:
                raise self._failed[ref]
        self._files.wait_sent(ref, timeout_s)

    def unsaved(self) -> int:
        """Returns how many versions are in memory alone because the last attempt to save them failed."""
        with self._state:
            return len(self._failed)

    def close(self) -> None:
        """Flushes, ends the background thread and unlocks the folder; RAM can still be read, changes are
        refused.  Raises what flush raises, after ending.
        """
        with self._state:
            self._closed = True
        try:
            self.flush()
        finally:
            with self._disk, self._counters, self._state:  # no change is in progress
                self._ended = True
                self._work.put(None)
            self._thread.join()
            with self._state:
                released, self._released = self._released, True
            if not released:
                self._files.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StateInvalid(f"the adapter store is {'only read here' if self._reads else 'closed'}")

    def _enqueue(self, item: AdapterRef | Path) -> None:
        """Queues work for the background thread: a version to save, or to remove when it is leaving; trash to empty."""
        with self._state:
            self._open_work += 1
            self._work.put(item)

    def _run(self) -> None:
        """Runs the background thread: saves versions and empties the trash, one at a time, in order."""
        while (item := self._next()) is not None:
            try:
                if isinstance(item, Path):
                    self._files.empty(item)
                elif item in self._leaving:
                    self._remove(item)
                else:
                    self._save(item)
            except Exception as e:
                with self._state:
                    LOG.error("adapter store: %s: %s; tried again in %.0f s", item, e, self._retry_s)
                    if isinstance(item, AdapterRef) and item in self._unsaved:
                        self._failed[item] = e
                    self._retry_at = time.monotonic() + self._retry_s
                    self._retry_s = min(2 * self._retry_s, LONGEST_RETRY_S)
            finally:
                with self._state:
                    self._open_work -= 1
                    self._state.notify_all()

    def _next(self) -> AdapterRef | Path | None:
        """Returns the next work, waiting for one; None at the end.  What failed is queued again when its time has come."""
        while True:
            with self._state:
                wait_s = max(self._retry_at - time.monotonic(), 0.0) if self._failed else None
                if wait_s == 0.0 and not self._ended:
                    self._retry()
                    wait_s = None
            with contextlib.suppress(queue.Empty):
                return self._work.get(timeout=wait_s)

    def _retry(self) -> None:
        """Queues again what failed.  Called with the state lock held."""
        self._retry_at = time.monotonic() + self._retry_s
        for ref in self._failed:
            self._enqueue(ref)

    def _save(self, ref: AdapterRef) -> None:
        with self._disk:
            with self._state:
                if ref not in self._unsaved:
                    return  # deleted meanwhile
                adapter, created = self._ram.find(ref), self._about[ref][0]
            assert adapter is not None, "what is not saved is kept"
            self._files.save(adapter, created)
            with self._state:
                self._unsaved.discard(ref)
                self._failed.pop(ref, None)
                self._retry_s = RETRY_S
                self._ram.let_go(ref)

    def _remove(self, ref: AdapterRef) -> None:
        """Removes a leaving version from disk.  Its number counts as deleted first, so that no put restores it."""
        with self._disk:
            with self._counters:
                minted, deleted = self._read_counter(ref.tenant, ref.name)
                self._files.set_counter(ref.tenant, ref.name, max(minted, ref.version), max(deleted, ref.version))
            trash = self._files.delete(ref)
        with self._state:
            self._leaving.discard(ref)
        if trash is not None:
            self._files.empty(trash)

    def _load(self, ref: AdapterRef, dtype: str) -> Adapter:
        room = 0

        def make_room(nbytes: int) -> None:
            nonlocal room
            if dtype != "float32":
                nbytes += nbytes // 2  # both are there for a moment
            with self._state:
                self._ram.end(room)  # of a first attempt
                room = 0
                self._state.wait_for(lambda: self._ram.begin(nbytes))
            room = nbytes

        def loaded() -> None:
            self._ram.end(room)
            self._state.notify_all()
            self._check_visible(ref)  # it may have been deleted meanwhile

        try:
            exact, created = self._files.load(ref, make_room)
            adapter = _read_only(exact if dtype == "float32" else exact.rounded())
        except BaseException as error:
            with self._state:
                loaded()
                if isinstance(error, StorageFailed) and is_damage(error):
                    self._give_way(ref, error)
            raise
        with self._state:
            loaded()
            self._about[ref] = created, exact.spec.max_rank, exact.nbytes
            if ref not in self._ram:
                self._ram.hold(adapter, keep=False)
        return adapter

    # Visible versions; these are called with the state lock held

    def _show(self, ref: AdapterRef) -> None:
        """Adds the version to listings."""
        self._versions.setdefault((ref.tenant, ref.name), set()).add(ref.version)
        self._tenants.setdefault(ref.name, set()).add(ref.tenant)

    def _hide(self, ref: AdapterRef) -> None:
        """Removes the version from listings and from memory, except for its borrowers."""
        key = ref.tenant, ref.name
        self._versions[key].discard(ref.version)
        if not self._versions[key]:
            del self._versions[key]
            self._tenants[ref.name].discard(ref.tenant)
            if not self._tenants[ref.name]:
                del self._tenants[ref.name]
        self._unsaved.discard(ref)
        self._failed.pop(ref, None)
        self._about.pop(ref, None)
        self._ram.delete(ref)

    def _give_way(self, ref: AdapterRef, error: StorageFailed) -> None:
        """Hides a damaged version, so that the one before is the newest, if there is one.  Its files remain."""
        versions = self._versions[ref.tenant, ref.name]
        if len(versions) > 1 and ref.version == max(versions):
            self._hide(ref)
            LOG.error("%s; version %d takes its place until the next start", error.message, max(versions))

    def _check_visible(self, ref: AdapterRef) -> None:
        if ref.version not in self._versions.get((ref.tenant, ref.name), ()):
            raise AdapterNotFound(f"no adapter {ref.name!r} of version {ref.version}", param="name")

    def _read_counter(self, tenant: str, name: str, gone: Iterable[int] = ()) -> tuple[int, int]:
        """Returns (last minted, last deleted) version.  Called with the counter lock held."""
        with self._state:
            visible = [*self._versions.get((tenant, name), ()), *gone]
        return self._files.counter(tenant, name, visible)


def _read_only(adapter: Adapter) -> Adapter:
    """Returns the adapter, whose arrays nobody can write from now on."""
    for pair in adapter.weights.values():
        for value in pair:
            value.setflags(write=False)
    return adapter
