"""Objects under one URL of fsspec (file, s3, gs, …): whole or not there, checked when they come back, tried again.

    URL/KEY            a file, as it is
    URL/KEY.zip        a folder, not compressed: one object, so that all of it appears at once
    URL/lease          which process may write, see lease.py

No call lists but `list`, which is for the start.  A call that fails is tried again after a random wait that doubles (full
jitter), and one that does not come back is given up: its thread ends when the library lets it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import random
import shutil
import threading
import time
import uuid
import zipfile
import zlib
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from pathlib import Path

import fsspec
import fsspec.core
from fsspec.implementations.local import LocalFileSystem

from jaxlora.durable import is_full, sha256_of, told_of_disk
from jaxlora.errors import ConfigInvalid, JaxLoraError, NotFound, StorageAway, StorageFailed

LOG = logging.getLogger("jaxlora")
OBSTORE = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "azure")
LEASE = "lease"
FOLDER_SUFFIX = ".zip"
ATTEMPTS = 4
FIRST_WAIT_S = 0.25  # at most, before the second attempt
AT_ONCE = 32  # calls under way, those that hang included
SLOWEST_BYTES_S = 2**20  # of a transfer that still counts as one
REMOVED_AT_ONCE = 500
NEVER_BETTER = (PermissionError, NotImplementedError, ImportError)


class Blobs:
    """The objects under one URL.  From any thread; every call waits for the network.

    Messages of errors may reach any tenant and name no object; the log does.
    """

    def __init__(self, url: str, *, timeout_s: float):
        """timeout_s: of one attempt, besides the time its bytes take.

        Writes, reads and removes an object.  Raises ConfigInvalid for an URL that no installed library opens, StorageAway
        when nobody answers, StorageFailed when it may not be written.
        """
        self.url, self._timeout_s = url, timeout_s
        try:
            if (protocol := url.partition("://")[0]) in OBSTORE:
                _use_obstore(protocol)
            self._fs, self._root = fsspec.core.url_to_fs(url, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            raise ConfigInvalid(
                f"blobs.url: {url} cannot be opened ({error}); name an URL such as s3://BUCKET/PREFIX, with the extra "
                "`blobs` for s3, gs and az, or fsspec's library for others",
                param="blobs.url",
            ) from error
        self._root = self._root.rstrip("/")
        self._busy = threading.BoundedSemaphore(AT_ONCE)
        self.may_write: Callable[[], None] = lambda: None  # raises when this process may not, any more
        try:
            self._probe()
        except NotFound as error:
            raise ConfigInvalid(f"blobs.url: {url}: there is no such bucket; make it", param="blobs.url") from error

    def _probe(self) -> None:
        key, data = f"probe/{uuid.uuid4().hex}", b"jaxlora"
        self.put_bytes(key, data)
        if self.list("probe/").get(key) != len(data):
            raise StorageFailed(f"{self.url} does not list what was written to it; choose another place for blobs")
        self.delete([key])

    # ---- files ----------------------------------------------------------------------------------------------------

    def put_bytes(self, key: str, data: bytes) -> None:
        """Writes or replaces a small object.  Raises StorageAway, StorageFailed."""
        self.may_write()
        self._put_bytes(key, data)

    def get_bytes(self, key: str) -> bytes | None:
        """A small object, None when it is not there.  Raises StorageAway, StorageFailed."""
        try:
            return self._try(f"{key} was not read", 0, lambda: self._fs.cat_file(f"{self._root}/{key}"))
        except NotFound:
            return None

    def lease(self, data: bytes | None) -> None:
        """Writes or, with None, removes the object that says who may write."""
        if data is None:
            self._delete([LEASE])
        else:
            self._put_bytes(LEASE, data)

    def _put_bytes(self, key: str, data: bytes) -> None:
        self._try(
            f"{key} was not written", len(data), lambda: self._replace(key, lambda to: self._fs.pipe_file(to, data))
        )

    def put(self, key: str, path: Path) -> None:
        """Writes or replaces an object with the bytes of a file.  Raises StorageAway, StorageFailed."""
        self.may_write()
        size, source = path.stat().st_size, str(path)
        self._try(f"{key} was not written", size, lambda: self._replace(key, lambda to: self._fs.put_file(source, to)))

    def get(self, key: str, path: Path, temporary: Path, *, sha256: str | None = None) -> None:
        """Brings an object to `path`, by a rename out of the folder `temporary` of the same disk.

        Raises NotFound, StorageAway, StorageFull, and StorageFailed when what comes is not of this sha256.
        """
        with self._brought(key, temporary, _same_bytes(sha256)) as copy, told_of_disk("what is brought back"):
            path.parent.mkdir(parents=True, exist_ok=True)
            copy.rename(path)

    # ---- folders --------------------------------------------------------------------------------------------------

    def put_folder(self, key: str, folder: Path, temporary: Path) -> None:
        """Writes a folder as one object, KEY.zip, by way of a file in `temporary`.

        Raises StorageAway, StorageFailed, StorageFull; FileNotFoundError when the folder is not there.
        """
        packed = temporary / uuid.uuid4().hex
        try:
            with told_of_disk("what is sent"), zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
                for path in sorted(folder.rglob("*")):
                    archive.write(path, path.relative_to(folder))
            self.put(key + FOLDER_SUFFIX, packed)
        finally:
            packed.unlink(missing_ok=True)

    def get_folder(self, key: str, folder: Path, temporary: Path) -> None:
        """Brings a folder back, by a rename out of the folder `temporary` of the same disk.

        Raises NotFound, StorageAway, StorageFull, and StorageFailed when its bytes are damaged.
        """
        unpacked = temporary / uuid.uuid4().hex

        def unpack(copy: Path) -> None:
            shutil.rmtree(unpacked, ignore_errors=True)
            with zipfile.ZipFile(copy) as archive:
                archive.extractall(unpacked)  # compares each member with its CRC, and leaves no path outside

        try:
            with self._brought(key + FOLDER_SUFFIX, temporary, unpack), told_of_disk("what is brought back"):
                folder.parent.mkdir(parents=True, exist_ok=True)
                unpacked.rename(folder)
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)

    # ---- all ------------------------------------------------------------------------------------------------------

    def delete(self, keys: Sequence[str]) -> None:
        """Removes objects; those that are not there are no error.  Raises StorageAway, StorageFailed."""
        self.may_write()
        self._delete(keys)

    def _delete(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), REMOVED_AT_ONCE):
            paths = [f"{self._root}/{key}" for key in keys[start : start + REMOVED_AT_ONCE]]
            self._try("an object was not removed", 0, lambda paths=paths: self._remove(paths))

    def list(self, prefix: str) -> dict[str, int]:
        """Key → bytes of every object whose key begins with this folder, as "adapters/".  Raises StorageAway, StorageFailed."""
        folder = f"{self._root}/{prefix.rstrip('/')}"

        def find() -> dict[str, int]:
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(folder, detail=True)
            except FileNotFoundError:
                return {}
            assert isinstance(found, dict)
            sizes = {path: int(info["size"] or 0) for path, info in found.items() if info["type"] == "file"}
            return {path[path.index(self._root) + len(self._root) + 1 :]: size for path, size in sizes.items()}

        return {k: v for k, v in self._try("the objects were not listed", 0, find).items() if not _is_partial(k)}

    # ---- one call -------------------------------------------------------------------------------------------------

    def _replace(self, key: str, write: Callable[[str], object]) -> None:
        """An object store shows an object when its last byte is there; a file system needs a rename for that."""
        path = f"{self._root}/{key}"
        if not isinstance(self._fs, LocalFileSystem):
            write(path)
            return
        folder, name = path.rsplit("/", 1)
        partial = f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"
        self._fs.makedirs(folder, exist_ok=True)
        try:
            write(partial)
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                self._fs.rm_file(partial)
            raise

    def _size(self, path: str) -> int:
        self._fs.invalidate_cache()  # of listings that are old
        return int(self._fs.info(path)["size"])

    def _remove(self, paths: Sequence[str]) -> None:
        try:
            self._fs.rm(list(paths))
        except FileNotFoundError:  # of one of them; then each for itself
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(path)

    @contextlib.contextmanager
    def _brought(self, key: str, temporary: Path, check: Callable[[Path], None]) -> Generator[Path]:
        """The bytes of an object in a file that is gone afterwards.  `check` raises ValueError and the like for wrong ones."""
        path, copy = f"{self._root}/{key}", temporary / uuid.uuid4().hex
        try:
            size = self._try(f"{key} was not found", 0, lambda: self._size(path))
            for attempt in range(2):  # bytes may go wrong on their way
                self._try(f"{key} was not read", size, lambda: self._fs.get_file(path, str(copy)))
                try:
                    if copy.stat().st_size != size:
                        raise EOFError(f"{copy.stat().st_size} of {size} bytes")
                    with told_of_disk("what is brought back"):
                        check(copy)
                    break
                except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                    if attempt:
                        LOG.error("%s came back damaged from object storage: %s", key, error)
                        raise StorageFailed(f"what object storage gave is damaged: {error}") from error
                    LOG.warning("%s came back damaged from object storage, and is read again: %s", key, error)
            yield copy
        finally:
            copy.unlink(missing_ok=True)

    def _try[T](self, failed: str, nbytes: int, call: Callable[[], T]) -> T:
        """The result of a call, tried again while there is hope."""
        limit_s = self._timeout_s + nbytes / SLOWEST_BYTES_S
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(random.uniform(0, FIRST_WAIT_S * 2**attempt))
            try:
                return self._within(limit_s, call)
            except JaxLoraError:
                raise
            except FileNotFoundError as error:
                raise NotFound("object storage has no such object") from error
            except NEVER_BETTER as error:
                LOG.error("object storage: %s: %s", failed, _said(error))
                raise StorageFailed("object storage refuses the server; tell its operator") from error
            except Exception as error:
                if is_full(error):
                    with told_of_disk("what is brought back"):
                        raise
                last = error
                LOG.warning("object storage, attempt %d of %d: %s: %s", attempt + 1, ATTEMPTS, failed, _said(error))
        raise StorageAway("object storage does not answer; try again later") from last

    def _within[T](self, limit_s: float, call: Callable[[], T]) -> T:
        """The result of a call, on a thread that may be left behind.  Raises TimeoutError."""
        if not self._busy.acquire(timeout=limit_s):
            raise TimeoutError(f"{AT_ONCE} calls hang")
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            finally:
                self._busy.release()

        threading.Thread(target=run, name="blobs", daemon=True).start()
        return future.result(limit_s)


@functools.cache
def _use_obstore(protocol: str) -> None:
    """Has fsspec open URLs of this protocol with obstore, which needs no library of a cloud.  Raises ImportError."""
    importlib.import_module("obstore.fsspec").register(protocol)


def _same_bytes(sha256: str | None) -> Callable[[Path], None]:
    def check(copy: Path) -> None:
        if sha256 is not None and sha256_of(copy) != sha256:
            raise ValueError("its sha256 is another")

    return check


def _is_partial(key: str) -> bool:
    """Whether this is what a killed writer left."""
    return key.rsplit("/", 1)[-1].startswith(".")


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300] if str(error) else type(error).__name__
