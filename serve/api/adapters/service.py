"""Adapters of a running server: import, list, export, pin, delete.  No HTTP here.

    upload or server folder ─import_peft─▶ AdapterWeights ─add─▶ store, on disk ─announce─▶ pins and followers go on to it

Everything that is checked is checked before anything changes, so a load that fails changes nothing and evicts nobody.
All of it blocks, and is called on worker threads: the device thread runs closures only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import uuid
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jaxlora.core.atomic_files import disk_errors
from jaxlora.core.errors import (
    AdapterInvalid,
    AdapterNotFound,
    InvalidRequest,
    QuotaExceeded,
    StateInvalid,
    StorageFailed,
)
from jaxlora.core.lora import HEAD_TARGET, AdapterRef, check_name
from jaxlora.core.model_config import ModelConfig
from jaxlora.peft.archive import FILES, UploadLimits, file_name, unpack, upload_limits
from jaxlora.peft.folder import ImportReport, export_peft, import_peft
from serve.access.adapter_quota import AdapterQuota
from serve.access.caller import Caller
from serve.api.adapters.server_folder import copy_inside
from serve.db.models import Page
from serve.http.pagination import page_after
from serve.runtime.backend import ModelCard
from serve.runtime.catalog import names_version
from serve.runtime.device_thread import DeviceThread

LOG = logging.getLogger("serve")
MAX_VERSIONS = 1000  # of one adapter that come in over HTTP; a tenant's quota counts names


@dataclass(frozen=True, slots=True)
class Imported:
    """A version that came in."""

    ref: AdapterRef
    report: ImportReport
    left_out: tuple[str, ...] = ()  # files of the upload that were not read


@dataclass(frozen=True, slots=True)
class Exported:
    """A zip of a PEFT folder.  It has no name on disk any more: closing it frees it."""

    filename: str
    file: BinaryIO
    nbytes: int


class AdapterService:
    """What may be done with adapters, over one runner.  Of any thread but the device's.

    read_head: the base's head [V, D], which a file may hold a copy of.  staging: a folder for uploads and downloads under
    way, emptied now.  roots: folders that a server folder must lie in.  deleted: called with the tenant
    and name of an adapter of which nothing is left.
    """

    def __init__(
        self,
        runner: DeviceThread,
        *,
        config: ModelConfig,
        read_head: Callable[[], np.ndarray],
        staging: Path,
        roots: Sequence[Path],
        quota: AdapterQuota,
        deleted: Callable[[str, str], None],
    ):
        self.runner, self._config, self._read_head = runner, config, read_head
        self._staging, self._quota, self._deleted = staging, quota, deleted
        self._roots = [root.resolve() for root in roots]
        self._store = runner.engine.store
        self._changes = threading.Lock()  # one at a time: who counts adapters, and who pins
        self.limits: UploadLimits = upload_limits(config, runner.engine.pool_spec.rank)
        shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
        staging.mkdir(parents=True)

    # ---- what is there ----------------------------------------------------------------------------------------------

    def find(self, sees: str | None, model: str) -> AdapterRef:
        """The version that NAME, NAME@VERSION or TENANT/NAME means.  Raises AdapterNotFound, also for the base."""
        ref = self.runner.resolve(sees, model)
        if ref is None:
            raise AdapterNotFound(f"The model `{model}` does not exist.", param="model")
        return ref

    def card(self, sees: str | None, model: str) -> ModelCard:
        """One adapter.  Raises AdapterNotFound, StorageFailed for a damaged version."""
        self.find(sees, model)
        return self.runner.model(sees, model)

    def page(self, sees: str | None, *, prefix: str, after: str | None, limit: int) -> Page[ModelCard]:
        """Adapters whose id begins so, after the one of this id.  Reads each adapter from disk once.

        Raises InvalidRequest where `after` is not in the list.
        """
        refs = self._store.list(sees)
        owners = Counter(ref.name for ref in refs)
        named = ((ref.name if owners[ref.name] == 1 else f"{ref.tenant}/{ref.name}", ref) for ref in refs)
        return self._page([(id, ref) for id, ref in named if id.startswith(prefix)], after, limit)

    def versions(self, sees: str | None, model: str, *, after: str | None, limit: int) -> Page[ModelCard]:
        """The versions of an adapter.  Raises AdapterNotFound, InvalidRequest where `after` is not in the list."""
        ref = self.find(sees, model)
        path = f"{ref.tenant}/{ref.name}" if model.startswith("ft:") else model.partition("@")[0]
        refs = self._store.versions(ref.tenant, ref.name)
        return self._page([(f"{path}@{r.version}", r) for r in refs], after, limit)

    def _page(self, named: Sequence[tuple[str, AdapterRef]], after: str | None, limit: int) -> Page[ModelCard]:
        """The entries after the one of this id, each an id and what it means."""
        dated = []
        for id, ref in named:
            try:
                dated.append((-int(self._store.created(ref)), -ref.version, id, ref))
            except AdapterNotFound:
                pass  # deleted meanwhile
            except StorageFailed as error:
                LOG.error("not listed: %s", error.message)
        dated.sort()
        page = page_after(dated, lambda entry: entry[2], after=after, limit=limit, kind="an entry")
        cards = []
        for _, _, id, ref in page.records:
            with contextlib.suppress(AdapterNotFound, StorageFailed):  # deleted or damaged meanwhile
                cards.append(replace(self.runner.model(None, str(ref)), id=id))
        return Page(records=cards, more=page.more)

    def is_pinned(self, tenant: str, name: str) -> bool:
        """Whether the adapter keeps its slot, whoever waits."""
        return f"{tenant}/{name}" in self.runner.tuning.pin

    # ---- in ---------------------------------------------------------------------------------------------------------

    def place(self, caller: Caller, model: str) -> tuple[str, str]:
        """(tenant, name) of a new adapter that the caller calls NAME or TENANT/NAME.

        Raises InvalidRequest for a name that no adapter may have, StateInvalid for one that a job makes, Forbidden for
        another tenant's.
        """
        tenant, slash, name = model.rpartition("/")
        tenant = tenant if slash else caller.owner
        check_name(tenant, "tenant")
        check_name(name, "name")
        if tenant != caller.owner:
            caller.need_admin("naming another tenant's adapter")
        self.runner.catalog.check_name(tenant, name)
        if self.runner.catalog.jobs.makes(tenant, name):
            raise StateInvalid(f"a job trains {name}; give another name, or cancel the job first")
        return tenant, name

    @contextlib.contextmanager
    def staged(self) -> Generator[Path]:
        """A new folder that is removed afterwards, whatever happens.  Raises StorageFull where the disk is, StorageFailed."""
        folder = self._staging / uuid.uuid4().hex
        try:
            with disk_errors("the upload"):
                folder.mkdir()
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def add_upload(
        self, place: tuple[str, str], files: Sequence[tuple[str, Path]], folder: Path, *, any_base: bool
    ) -> Imported:
        """A new version out of uploaded files, (their own name, where they lie): one archive, or an adapter's files.

        folder: an empty one, where an archive may be unpacked.  Raises what `import_peft` does, QuotaExceeded, StorageFull.
        """
        names = [name.replace("\\", "/").rpartition("/")[2] for name, _ in files]
        if len(files) == 1 and names[0] not in FILES and not _is_adapter_file(names[0]):
            left_out = unpack(files[0][1], folder, self.limits)
        else:
            left_out = tuple(name[:80] for name in names if file_name(name) is None)
            for name, (_, path) in zip(names, files, strict=True):
                if (known := file_name(name)) is None:
                    continue
                if (folder / known).exists():
                    raise AdapterInvalid(f"{known} came twice; send each file once")
                if path.stat().st_size > self.limits.of(known):
                    raise AdapterInvalid(
                        f"{known} has more than {self.limits.of(known)} bytes, the most that this base takes"
                    )
                path.rename(folder / known)
        return replace(self.add(place, folder, any_base=any_base), left_out=left_out)

    def add_folder(self, place: tuple[str, str], path: str, *, in_place: bool, any_base: bool) -> Imported:
        """A new version out of a folder of this machine.  in_place: the name may be taken.

        Raises InvalidRequest for a name that is taken, and what `copy_inside` and `import_peft` raise.
        """
        if not in_place:
            self._check_free(place)
        with self.staged() as folder:
            copy_inside(path, self._roots, folder, self.limits)
            return self.add(place, folder, any_base=any_base, in_place=in_place)

    def add(self, place: tuple[str, str], folder: Path, *, any_base: bool = False, in_place: bool = True) -> Imported:
        """A new version out of a PEFT folder, on disk and served from now on.  Raises as `add_folder` does."""
        tenant, name = place
        engine = self.runner.engine
        weights, report = import_peft(
            folder,
            self._config,
            base_hash=engine.base_hash,
            base_name=self.runner.base_name,
            max_rank=engine.pool_spec.rank,
            head_supported=HEAD_TARGET in engine.pool_spec.targets,
            read_head=self._read_head,
            any_base=any_base,
        )
        with self._changes:
            if not in_place:
                self._check_free(place)
            known = self._store.versions(tenant, name)
            self._quota.check(tenant, weights.nbytes, another=not known)
            if len(known) >= MAX_VERSIONS:
                raise QuotaExceeded(f"{name} has {len(known)} versions; delete some, or the adapter")
            with disk_errors(f"adapter {name}"):
                ref = self._store.add(tenant, name, weights)
        self._announce(ref)
        return Imported(ref, report)

    def _announce(self, ref: AdapterRef) -> None:
        """Waits until the version is on disk, then has the server go on to it."""
        try:
            with disk_errors(f"adapter {ref.name}"):
                self._store.wait_saved(ref)
        except BaseException:
            with contextlib.suppress(AdapterNotFound):
                self._store.prune(ref)
            raise

        def go_on() -> None:
            if self._store.latest(ref.tenant, ref.name) == ref:  # else a newer one has come meanwhile: nobody goes back
                self.runner.engine.announce(ref)

        self.runner.call(go_on)

    def _check_free(self, place: tuple[str, str]) -> None:
        if self._store.latest(*place) is not None:
            raise InvalidRequest(
                f"The lora adapter '{place[1]}' has already been loaded. If you want to load it anew, as its next "
                "version, set 'load_inplace' to true.",
                param="lora_name",
            )

    # ---- out --------------------------------------------------------------------------------------------------------

    def export(self, sees: str | None, model: str, dtype: str) -> Exported:
        """The version as a zip of a PEFT folder.  Raises AdapterNotFound, StorageFailed, AdapterInvalid for the dtype."""
        ref = self.find(sees, model)
        with self.staged() as folder:
            peft = folder / "peft"
            export_peft(self._store.get(ref), peft, self._config, base_name=self.runner.base_name, dtype=dtype)
            with zipfile.ZipFile(folder / "zip", "x", zipfile.ZIP_STORED) as archive:  # weights do not shrink
                for file in sorted(peft.iterdir()):
                    archive.write(file, file.name)
                    file.unlink()
            file = (folder / "zip").open("rb")
            return Exported(f"{ref.name}-{ref.version}.zip", file, os.fstat(file.fileno()).st_size)

    # ---- away -------------------------------------------------------------------------------------------------------

    def delete(self, sees: str | None, model: str) -> None:
        """Removes an adapter, or the one version that its name means: gone from every list now, its name free at once.

        Requests that use it end as if nothing had happened.  Raises AdapterNotFound, InvalidRequest for the base,
        StateInvalid while a job makes the adapter.
        """
        if self.runner.resolve(sees, model) is None:
            raise InvalidRequest(
                f"{self.runner.base_name} is the base model, which stays; name an adapter", param="model"
            )
        ref = self.find(sees, model)
        alone = names_version(model)
        if not alone and self.runner.catalog.jobs.makes(ref.tenant, ref.name):
            raise StateInvalid(f"a job still trains {ref.name}; cancel the job first")
        refs = [ref] if alone else self._store.versions(ref.tenant, ref.name)
        with disk_errors(f"adapter {ref.name}"):  # without the lock, as it waits for the network
            if alone:
                self._delete_version(ref)
            else:
                self._store.delete(ref.tenant, ref.name)
        with self._changes:
            if self.is_pinned(ref.tenant, ref.name):
                self._tune_pins(lambda pins: pins)
            if self._store.latest(ref.tenant, ref.name) is None:
                self._deleted(ref.tenant, ref.name)
        self.runner.call(lambda: [self.runner.engine.release(r) for r in refs])

    def _delete_version(self, ref: AdapterRef) -> None:
        if not self.runner.call(lambda: self.runner.engine.release(ref)):
            with contextlib.suppress(StorageFailed):  # who uses it may have to load it again: it must be in memory
                self._store.get(ref)
        self._store.delete_version(ref)

    # ---- pins -------------------------------------------------------------------------------------------------------

    def pin(self, sees: str | None, model: str) -> ModelCard:
        """The adapter keeps a slot from now on, in its newest version, also of those to come.

        Raises AdapterNotFound, InvalidRequest for a version, and where no slot would be left to share.
        """
        ref = self._pinnable(sees, model)
        with self._changes:
            self._tune_pins(lambda pins: (*pins, f"{ref.tenant}/{ref.name}"))
        return self.card(sees, model)

    def unpin(self, sees: str | None, model: str) -> ModelCard:
        """The adapter takes its turns again.  Raises AdapterNotFound, InvalidRequest for a version."""
        ref = self._pinnable(sees, model)
        with self._changes:
            self._tune_pins(lambda pins: [p for p in pins if p != f"{ref.tenant}/{ref.name}"])
        return self.card(sees, model)

    def _pinnable(self, sees: str | None, model: str) -> AdapterRef:
        ref = self.find(sees, model)
        if names_version(model):
            raise InvalidRequest("a pin holds an adapter's newest version; name the adapter alone", param="name")
        return ref

    def _tune_pins(self, change: Callable[[Collection[str]], Collection[str]]) -> None:
        """Tunes the server with other pins, between two steps; those of adapters that are gone fall away."""

        def work() -> None:
            tuning = self.runner.tuning
            there = [p for p in tuning.pin if self._store.latest(*p.split("/")) is not None]
            self.runner.tune(replace(tuning, pin=tuple(dict.fromkeys(change(there)))))

        self.runner.call(work)


def _is_adapter_file(name: str) -> bool:
    """Whether a single file is meant as one of an adapter's, and not as an archive: it is then checked by its name."""
    return name.endswith((".safetensors", ".json", ".bin", ".pt", ".pth", ".pkl"))
