"""Uploaded files: their bytes in a folder, all else in the database; checked in the background.  Pure.

ROOT/.incoming/…   uploads under way, and what a killed server left of them: emptied at the start
ROOT/TENANT/ID     whole files.  One that the database does not know was being added or removed, or the database is a wrong
                   one: it is removed at a start when it has not been known for `keep_days`

With object storage that is where the bytes are, under files/TENANT/ID, and the folder holds copies.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxlora.config.serving import LimitsSection
from jaxlora.config.training import TooLong
from jaxlora.core.atomic_files import disk_errors, sha256_of, sync
from jaxlora.core.errors import JaxLoraError, NotFound, Unavailable
from jaxlora.core.tenant_threads import TenantThreads
from jaxlora.storage.disk_cache import Remote
from serve.db.files import StoredFiles
from serve.db.models import FileRecord, FileStatus, Page, new_id
from train.data.load import Loaded

LOG = logging.getLogger("serve")
FINE_TUNE = "fine-tune"  # purpose of what clients upload
INCOMING = ".incoming"  # no tenant's name begins with a dot
FILES = "files/"  # in object storage
CHECK_THREADS = 2  # of which a tenant has one
MAX_DETAILS = 2000  # characters of what is wrong with a file


class FileStore:
    """All tenants' files.  From any thread; every call may wait for the disk and the database."""

    def __init__(
        self,
        stored: StoredFiles,
        root: Path,
        *,
        load: Callable[[Path, TooLong], Loaded],
        limits: LimitsSection,
        remote: Remote | None = None,
    ):
        """load: reads a file of examples, and raises DataInvalid for a bad one; called on a thread of ours.  What it says of
        examples that are too long becomes the details of the file.

        Removes what a server before left behind, and checks what it had not checked.  Raises StorageFull, StorageFailed,
        Unavailable.
        """
        self._stored, self._root, self._load, self._limits, self._remote = stored, root, load, limits, remote
        self._checks = TenantThreads(CHECK_THREADS, "file-check")
        self._sweeps = ThreadPoolExecutor(1, thread_name_prefix="file-sweep")
        with disk_errors("the folder of files"):
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            shutil.rmtree(root / INCOMING, ignore_errors=True)
            (root / INCOMING).mkdir()
        self._compare(stored.known(), set() if remote is None else set(remote.blobs.list(FILES)))
        self.sweep()
        for record in stored.unchecked():
            self._checks.submit(record.tenant, self._check, record)

    def _compare(self, known: set[str], there: set[str]) -> None:
        """Removes what the database has long not known; has object storage, which holds `there`, hold all it knows."""
        here = {self._key(path): path for path in self._root.glob("[!.]*/*")}
        unknown = {key for key in here.keys() | there if key.rsplit("/", 1)[-1] not in known}
        if unknown:
            LOG.warning(
                "the database does not know %d files; they stay for %s days", len(unknown), self._limits.keep_days
            )
        overdue = self._stored.overdue(unknown, now_s=time.time(), keep_s=self._limits.keep_s)
        with disk_errors("a deletion"):
            for key in overdue & here.keys():
                here[key].unlink()
        if self._remote is None:
            return
        self._remote.blobs.delete(sorted(overdue & there))
        for key in here.keys() - unknown:
            if key not in there:  # this server had no object storage before
                self._remote.blobs.put(key, here[key])
            self._remote.copies.add(here[key], _unlink)

    def close(self) -> None:
        """Ends the checks; those that have not begun are done at the next start."""
        self._checks.shutdown()
        self._sweeps.shutdown(cancel_futures=True)

    def staging(self) -> Path:
        """An empty folder for one upload, the caller's to remove.  Raises StorageFull, StorageFailed."""
        folder = self._root / INCOMING / uuid.uuid4().hex
        with disk_errors("the upload"):
            folder.mkdir()
        return folder

    def room(self, tenant: str) -> int | None:
        """Bytes that a tenant's next file may have; None: any number."""
        most = self._limits.of(tenant).file_bytes
        return None if most is None else max(most - self._stored.used_bytes(tenant), 0)

    def add(
        self, tenant: str, path: Path, filename: str, *, purpose: str = FINE_TUNE, expires_after_s: float | None = None
    ) -> FileRecord:
        """Adds a file of the tenant by moving one on the same disk.  It is checked soon.

        Raises QuotaExceeded, StorageFull, StorageFailed, Unavailable.
        """
        now_s = time.time()
        with disk_errors("the file"):
            record = FileRecord(
                id=new_id("file-"),
                tenant=tenant,
                filename=filename,
                purpose=purpose,
                size_bytes=path.stat().st_size,
                sha256=sha256_of(path),
                created_s=now_s,
                expires_s=None if expires_after_s is None else now_s + expires_after_s,
                status="uploaded" if purpose == FINE_TUNE else "processed",
            )
            sync(path)
            target = self.path(record)
            target.parent.mkdir(exist_ok=True)
            path.rename(target)
            sync(target.parent)
        try:
            if self._remote is not None:
                self._remote.blobs.put(self._key(target), target)
            self._stored.insert(record, most_bytes=self._limits.of(tenant).file_bytes)
        except BaseException:
            target.unlink(missing_ok=True)
            if self._remote is not None:
                with contextlib.suppress(JaxLoraError):  # else a later start removes it
                    self._remote.blobs.delete([self._key(target)])
            raise
        if self._remote is not None:
            self._remote.copies.add(target, _unlink)
        if record.status == "uploaded":
            self._checks.submit(record.tenant, self._check, record)
        return record

    def keep(self, tenant: str, filename: str, purpose: str, content: bytes) -> FileRecord:
        """Adds a file of the server's own making.  Raises as `add` does."""
        folder = self.staging()
        try:
            with disk_errors("the file"):
                (folder / "content").write_bytes(content)
            return self.add(tenant, folder / "content", filename, purpose=purpose)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def get(self, id: str, sees: str | None) -> FileRecord:
        """One file.  Raises NotFound, Unavailable."""
        return self._stored.get(id, sees, time.time())

    def find(self, id: str, sees: str | None) -> tuple[FileRecord, Path]:
        """Returns a file and the path of its bytes, which is valid inside `here`.  Raises NotFound, Unavailable."""
        record = self.get(id, sees)
        return record, self.path(record)

    def page(
        self, sees: str | None, *, after: str | None, limit: int, purpose: str | None, oldest_first: bool
    ) -> Page[FileRecord]:
        """Files of the list, newest first.  Raises InvalidRequest for an unknown `after`, Unavailable."""
        return self._stored.page(
            sees, time.time(), after=after, limit=limit, purpose=purpose, oldest_first=oldest_first
        )

    def delete(self, id: str, sees: str | None) -> FileRecord:
        """Removes the file and returns its record.  Raises NotFound, Unavailable; StateInvalid when a job still needs it."""
        record = self._stored.delete(id, sees, time.time())
        if self._remote is None:
            self.sweep()
        else:  # nobody waits for the network; a server that ends first sweeps when it starts
            self._sweeps.submit(self.sweep)
        return record

    def sweep(self) -> None:
        """Removes the bytes of files that are deleted or past their time."""
        for record in self._stored.removable(time.time()):
            path = self.path(record)
            with disk_errors("a deletion"):
                path.unlink(missing_ok=True)
            if self._remote is not None:
                self._remote.copies.forget(path)
                try:
                    self._remote.blobs.delete([self._key(path)])
                except JaxLoraError as error:  # nobody sees it; the next sweep tries again
                    LOG.warning("file %s is not removed yet: %s", record.id, error.message)
                    continue
            self._stored.forget(record.id)

    def path(self, record: FileRecord) -> Path:
        """The path of its bytes, which is valid inside `here`."""
        return self._root / record.tenant / record.id

    @contextlib.contextmanager
    def here(self, path: Path) -> Generator[None]:
        """Inside, the bytes of a file are at its path; they are brought first if need be.

        Raises NotFound for one that was deleted, Unavailable, StorageFull, StorageFailed.
        """
        if self._remote is None:
            if not path.is_file():
                raise NotFound(f"there is no file {path.name!a}", param="id")
            yield
            return
        with self._remote.copies.using(path, self._bring):
            yield

    def load(self, path: Path, too_long: TooLong) -> Loaded:
        """The examples of a file.  Raises DataInvalid for a bad one, and as `here`."""
        with self.here(path):
            return self._load(path, too_long)

    def _bring(self, path: Path) -> None:
        assert self._remote is not None
        record = self._stored.get(path.name, None, time.time())
        self._remote.blobs.get(self._key(path), path, self._root / INCOMING, sha256=record.sha256)
        self._remote.copies.add(path, _unlink)

    def _key(self, path: Path) -> str:
        return FILES + path.relative_to(self._root).as_posix()

    def _check(self, record: FileRecord) -> None:
        """Reads a file as a job would, and keeps what is wrong with it, or too long in it."""
        path = self.path(record)
        status: FileStatus = "error"
        details: str | None
        try:
            # A job decides what becomes of examples that are too long; the others must be good.
            loaded = self.load(path, "skip")
            status, details = "processed", None
            if loaded.note is not None:
                details = f'{loaded.note}.  A job needs too_long = "skip" or "truncate" to train with this file'
        except Unavailable as error:
            LOG.warning("file %s is not checked before the next start: %s", record.id, error.message)
            return
        except JaxLoraError as error:
            # A path of ours is nobody's business.
            details = error.message.replace(str(path), record.filename)[:MAX_DETAILS]
        except Exception:
            LOG.exception("file %s could not be checked", record.id)
            details = "the server could not read the file; upload it again"
        try:
            self._stored.judge(record.id, status, details)
        except JaxLoraError as error:
            LOG.error("what is wrong with file %s could not be kept: %s", record.id, error.message)


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)
