"""AdapterStore: every version of every tenant's adapter.  In host RAM at once, on disk a moment later.

    put ──▶ RAM (pinned) ──background──▶ disk        get ◀── RAM, least recently used leaves first ◀── disk

A version never changes and its number is never used again, also not after delete and restart.

    root/adapters/TENANT/NAME/VERSION    see adapter_files.py
    root/counters/TENANT/NAME.json       last number minted, last number deleted
    root/trash/…                         deleted adapters on their way out

Locks are taken in this order: disk (saves and deletes, slow), counters, state (never held over a disk read or write).
"""

from __future__ import annotations

import builtins
import json
import queue
import shutil
import threading
import time
import uuid
from collections import OrderedDict
from concurrent.futures import Future
from pathlib import Path

from jaxlora.adapter_files import load_version, read_meta, save_version, scan
from jaxlora.durable import replace_file, sync
from jaxlora.errors import AdapterNotFound, AlreadyExists, StateInvalid, StorageFailed
from jaxlora.lora import Adapter, AdapterRef, LoraSpec, check_name

COUNTER_FORMAT = 1


class AdapterStore:
    """Immutable adapter versions under one folder; safe to call from any thread.  One store per folder.

    `host_bytes` bounds the weights held in RAM; versions not yet on disk are held in any case.
    """

    def __init__(self, root: Path, *, host_bytes: int) -> None:
        """Raises StorageFailed when the folder cannot be made."""
        self._root = root = root.absolute()  # Orbax takes no other
        self._host_bytes = host_bytes
        try:
            for name in ("adapters", "counters", "trash"):
                (root / name).mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise StorageFailed(f"the adapter store {root} cannot be made ({e.strerror}); choose another folder") from e
        self._counter: dict[tuple[str, str], tuple[int, int]] = {}  # as on disk, for names touched
        self._disk = threading.Lock()
        self._counters = threading.Lock()
        self._state = threading.Condition()
        self._versions = scan(root / "adapters")  # what is visible
        self._held: OrderedDict[AdapterRef, Adapter] = OrderedDict()  # least recently used first
        self._held_bytes = 0
        self._created: dict[AdapterRef, float] = {}
        self._rank: dict[AdapterRef, int] = {}  # largest of the version
        self._unsaved: set[AdapterRef] = set()  # pinned in RAM
        self._failed: dict[AdapterRef, BaseException] = {}  # unsaved, and the last try failed
        self._loading: dict[AdapterRef, Future[Adapter]] = {}
        self._work: queue.Queue[AdapterRef | Path | None] = queue.Queue()
        self._open_work = 0
        self._closed = False  # no more puts
        self._ended = False  # no more work: the thread is gone or going
        for leftover in (root / "trash").iterdir():
            self._enqueue(leftover)
        self._thread = threading.Thread(target=self._run, name="adapter-store", daemon=True)
        self._thread.start()

    # Versions

    def mint(self, tenant: str, name: str) -> AdapterRef:
        """The next version of this adapter: a number that was never given before.  On disk before it is returned."""
        check_name(tenant, "tenant")
        check_name(name, "adapter name")
        with self._counters:
            minted, deleted = self._read_counter(tenant, name)
            self._write_counter(tenant, name, minted + 1, deleted)
            return AdapterRef(tenant, name, minted + 1)

    def latest(self, tenant: str, name: str) -> AdapterRef | None:
        """The newest version that can be loaded, or None."""
        with self._state:
            versions = self._versions.get((tenant, name))
            return AdapterRef(tenant, name, max(versions)) if versions else None

    def versions(self, tenant: str, name: str) -> builtins.list[AdapterRef]:
        """Every version that can be loaded, oldest first."""
        with self._state:
            return [AdapterRef(tenant, name, v) for v in sorted(self._versions.get((tenant, name), ()))]

    def list(self, tenant: str | None) -> builtins.list[AdapterRef]:
        """The newest version of each adapter of a tenant, or of all tenants, by name."""
        with self._state:
            return sorted(AdapterRef(t, n, max(v)) for (t, n), v in self._versions.items() if tenant in (None, t))

    def created(self, ref: AdapterRef) -> float:
        """When the version was put, epoch seconds.  Raises AdapterNotFound, or StorageFailed when it is damaged."""
        with self._state:
            self._check_visible(ref)
            if ref in self._created:
                return self._created[ref]
        try:
            created = float(read_meta(self._folder(ref.tenant, ref.name), ref)["created"])
        except StorageFailed:
            with self._state:
                self._check_visible(ref)  # deleted meanwhile
            raise
        with self._state:
            self._check_visible(ref)
            return self._created.setdefault(ref, created)

    def rank(self, ref: AdapterRef) -> int:
        """The version's largest rank, without reading its weights.

        Raises AdapterNotFound, or StorageFailed when it is damaged.
        """
        with self._state:
            self._check_visible(ref)
            if ref in self._rank:
                return self._rank[ref]
        try:
            rank = LoraSpec.from_json(read_meta(self._folder(ref.tenant, ref.name), ref)["spec"]).max_rank
        except (KeyError, TypeError, ValueError, StorageFailed) as e:
            with self._state:
                self._check_visible(ref)  # deleted meanwhile
            if isinstance(e, StorageFailed):
                raise
            raise StorageFailed(f"{ref}: its description on disk is not a LoRA specification") from e
        with self._state:
            self._check_visible(ref)
            return self._rank.setdefault(ref, rank)

    def in_memory(self, ref: AdapterRef) -> bool:
        """Whether `get` needs no disk.  False for a version that does not exist."""
        with self._state:
            return ref in self._held

    # Weights

    def put(self, adapter: Adapter) -> None:
        """Makes a minted version available now and saves it in the background: this call waits for no disk.

        The store takes the arrays over and marks them read-only.  Raises AlreadyExists for a version that was put
        before, StateInvalid for one that was never minted or is deleted, AdapterNotFinite for NaN or infinity.
        """
        adapter.check_finite()
        ref = adapter.ref
        with self._counters:
            minted, deleted = self._read_counter(ref.tenant, ref.name)
            with self._state:
                if self._closed:
                    raise StateInvalid("the adapter store is closed")
                if ref.version > minted:
                    raise StateInvalid(f"{ref} was never minted: call mint() and put the version it returns")
                if ref.version in self._versions.get((ref.tenant, ref.name), ()):
                    raise AlreadyExists(f"{ref} exists; a version never changes, mint a new one")
                if ref.version <= deleted:
                    raise StateInvalid(f"{ref} was deleted; mint a new version")
                for pair in adapter.weights.values():
                    for value in pair:
                        value.setflags(write=False)
                self._versions.setdefault((ref.tenant, ref.name), set()).add(ref.version)
                self._created[ref], self._rank[ref] = time.time(), adapter.spec.max_rank
                self._unsaved.add(ref)
                self._hold(adapter)
        self._enqueue(ref)

    def get(self, ref: AdapterRef) -> Adapter:
        """The adapter, from RAM or else from disk with its checksum verified; many askers cause one load.

        Raises AdapterNotFound, or StorageFailed when the version on disk is damaged.
        """
        with self._state:
            self._check_visible(ref)
            if ref in self._held:
                self._held.move_to_end(ref)
                return self._held[ref]
            future = self._loading.get(ref)
            mine = future is None
            if mine:
                future = self._loading[ref] = Future()
        if mine:
            try:
                future.set_result(self._load(ref))
            except BaseException as e:
                future.set_exception(e)
            finally:
                with self._state:
                    self._loading.pop(ref)
        return future.result()

    def delete(self, tenant: str, name: str) -> None:
        """Removes every version: gone from memory and listing now, from disk names before this returns.

        Waits for at most one save under way.  Raises AdapterNotFound when there is no such adapter.
        """
        check_name(tenant, "tenant")
        check_name(name, "adapter name")
        trash = self._root / "trash" / uuid.uuid4().hex
        with self._disk, self._counters:
            with self._state:
                versions = self._versions.pop((tenant, name), None)
                if versions is None:
                    raise AdapterNotFound(f"no adapter named {name!r}", param="name")
                for ref in [AdapterRef(tenant, name, v) for v in versions]:
                    self._unsaved.discard(ref)
                    self._failed.pop(ref, None)
                    self._created.pop(ref, None)
                    self._rank.pop(ref, None)
                    self._drop(ref)
            minted, _ = self._read_counter(tenant, name, versions)
            self._write_counter(tenant, name, minted, minted)
            folder = self._folder(tenant, name)
            if folder.exists():
                folder.rename(trash)
                sync(folder.parent)
        self._enqueue(trash)

    # Persistence

    @property
    def last_error(self) -> BaseException | None:
        """The error of the last save that failed and has not succeeded since, or None."""
        with self._state:
            return next(reversed(self._failed.values()), None)

    def flush(self) -> None:
        """Waits until all is on disk; tries failed saves once more.  Raises StorageFailed, naming what is not saved."""
        with self._state:
            again = [] if self._ended else list(self._failed)
            for ref in again:
                del self._failed[ref]
        for ref in again:
            self._enqueue(ref)
        with self._state:
            self._state.wait_for(lambda: self._open_work == 0)
            failed = dict(self._failed)
        if failed:
            names = ", ".join(str(ref) for ref in list(failed)[:5])
            last = list(failed.values())[-1]
            raise StorageFailed(f"{len(failed)} versions are not on disk ({names}): {last}") from last

    def close(self) -> None:
        """Flushes and ends the background thread; later puts are refused.  Raises what flush raises, after ending."""
        with self._state:
            self._closed = True
        try:
            self.flush()
        finally:
            self._ended = True
            self._work.put(None)
            self._thread.join()

    def _enqueue(self, item: AdapterRef | Path) -> None:
        with self._state:
            self._open_work += 1
        self._work.put(item)

    def _run(self) -> None:
        """The background thread: saves versions and empties the trash, one at a time, in order."""
        while (item := self._work.get()) is not None:
            try:
                if isinstance(item, Path):
                    shutil.rmtree(item, ignore_errors=True)  # what stays is tried again at the next start
                else:
                    self._save(item)
            except Exception as e:
                with self._state:
                    if item in self._unsaved:
                        self._failed[item] = e
            finally:
                with self._state:
                    self._open_work -= 1
                    self._state.notify_all()

    def _save(self, ref: AdapterRef) -> None:
        with self._disk:
            with self._state:
                if ref not in self._unsaved:
                    return  # deleted meanwhile
                adapter, created = self._held[ref], self._created[ref]
            save_version(self._folder(ref.tenant, ref.name), adapter, created)
            with self._state:
                self._unsaved.discard(ref)
                self._evict()

    def _load(self, ref: AdapterRef) -> Adapter:
        try:
            adapter, created = load_version(self._folder(ref.tenant, ref.name), ref)
        except StorageFailed:
            with self._state:
                self._check_visible(ref)  # deleted meanwhile
            raise
        for pair in adapter.weights.values():
            for value in pair:
                value.setflags(write=False)
        with self._state:
            self._check_visible(ref)
            self._created[ref], self._rank[ref] = created, adapter.spec.max_rank
            self._hold(adapter)
        return adapter

    # Memory; all of these are called with the state lock held

    def _hold(self, adapter: Adapter) -> None:
        self._held[adapter.ref] = adapter
        self._held_bytes += adapter.nbytes
        self._evict()

    def _drop(self, ref: AdapterRef) -> None:
        adapter = self._held.pop(ref, None)
        if adapter is not None:
            self._held_bytes -= adapter.nbytes

    def _evict(self) -> None:
        for ref in list(self._held):
            if self._held_bytes <= self._host_bytes:
                return
            if ref not in self._unsaved:
                self._drop(ref)

    def _check_visible(self, ref: AdapterRef) -> None:
        if ref.version not in self._versions.get((ref.tenant, ref.name), ()):
            raise AdapterNotFound(f"no adapter {ref.name!r} of version {ref.version}", param="name")

    # Counters; called with the counter lock held

    def _folder(self, tenant: str, name: str) -> Path:
        return self._root / "adapters" / tenant / name

    def _counter_path(self, tenant: str, name: str) -> Path:
        return self._root / "counters" / tenant / f"{name}.json"

    def _read_counter(self, tenant: str, name: str, gone: set[int] | None = None) -> tuple[int, int]:
        """(last minted, last deleted) version; never below a version that exists, should the file be lost."""
        if (tenant, name) in self._counter:
            return self._counter[tenant, name]
        path = self._counter_path(tenant, name)
        minted = deleted = 0
        if path.exists():
            try:
                data = json.loads(path.read_bytes())
                found, minted, deleted = data["format"], int(data["minted"]), int(data["deleted"])
            except (ValueError, KeyError, TypeError) as e:
                raise StorageFailed(f"the version counter of {tenant}/{name} is damaged: {e}") from e
            if found != COUNTER_FORMAT:
                raise StorageFailed(
                    f"the version counter of {tenant}/{name} has format {found!r}; this build reads {COUNTER_FORMAT}"
                )
        with self._state:
            visible = gone or self._versions.get((tenant, name), ())
        self._counter[tenant, name] = max([minted, *visible]), deleted
        return self._counter[tenant, name]

    def _write_counter(self, tenant: str, name: str, minted: int, deleted: int) -> None:
        data = {"format": COUNTER_FORMAT, "minted": minted, "deleted": deleted}
        replace_file(self._counter_path(tenant, name), json.dumps(data).encode())
        self._counter[tenant, name] = minted, deleted
