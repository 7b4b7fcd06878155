"""Objects under one URL (file, s3, gs, az): complete or absent, verified when read, through obstore.

    URL/KEY            a file, as it is
    URL/KEY.zip        a folder, not compressed: one object, so that all of it appears at once
    URL/lease          which process may write, see lease.py

obstore retries a failed request after a random wait that doubles.  A call that does not return (a file system without
its server) is abandoned here: its thread ends when the system lets it.  Only `list` lists, and only at the start.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import threading
import time
import uuid
import zipfile
import zlib
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, cast

from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotModifiedError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, from_url

from jaxlora.core.atomic_files import disk_errors, lock_folder, sha256_of
from jaxlora.core.errors import ConfigInvalid, JaxLoraError, NotFound, StateInvalid, StorageAway, StorageFailed

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult, ObjectMeta, PutResult, UpdateVersion
    from obstore.store import ClientConfig, ObjectStore

type Version = UpdateVersion  # of an object, by which a store detects whether it was replaced

LOG = logging.getLogger("jaxlora")
FOLDER_SUFFIX = ".zip"
ATTEMPTS = 4
FIRST_WAIT_S = 0.25  # approximate wait before the second attempt
AT_ONCE = 32  # most calls in progress, those that hang included
SLOWEST_BYTES_S = 2**20  # slowest transfer that is not treated as hanging
ENVIRONMENT = {"s3": "AWS_", "s3a": "AWS_", "gs": "GOOGLE_"}
CLIENT_SETTINGS = ("allow_http", "allow_invalid_certificates", "connect_timeout", "proxy_url", "root_certificate")
PART_BYTES, PARTS_AT_ONCE = 5 * 2**20, 4  # of an upload
NEVER_BETTER = (PermissionError, PermissionDeniedError, UnauthenticatedError, NotSupportedError)
CHANGED = (AlreadyExistsError, NotModifiedError, PreconditionError)


class Blobs:
    """The objects under one URL.  Thread-safe; every call waits for the network.

    Any tenant may read an error's message, so it names no object; the log does.
    """

    def __init__(self, url: str, *, timeout_s: float, store: ObjectStore | None = None, reads: bool = False):
        """timeout_s: of one attempt, besides the time its bytes take.  store: the store of the URL; None: opens it.

        Writes, replaces, lists and removes an object.  reads: does not, and refuses to write.  Raises ConfigInvalid for an
        URL that obstore does not open, StorageAway when it does not respond, StorageFailed when it may not be written or
        excludes no second writer.
        """
        self.url, self._timeout_s = url, timeout_s
        try:
            self._store = _open(url, timeout_s) if store is None else store
        except (BaseError, OSError, ValueError) as error:
            raise ConfigInvalid(
                f"blobs.url: {url} cannot be opened ({_first_line(error)}); name an URL such as s3://BUCKET/PREFIX, gs://, "
                "az://, file:///FOLDER, or a folder",
                param="blobs.url",
            ) from error
        self._busy = threading.BoundedSemaphore(AT_ONCE)
        self.may_write: Callable[[], None] = lambda: None  # raises when this process may no longer write
        self.epoch = 0  # of the lease: objects that are written again under their name have it in the name
        if reads:
            self.may_write = refuse
            return
        try:
            self._probe()
        except NotFound as error:
            raise ConfigInvalid(f"blobs.url: {url}: there is no such bucket; make it", param="blobs.url") from error

    def _probe(self) -> None:
        key = f"probe/{uuid.uuid4().hex}"
        first = self.put_if(key, b"1", None)
        second = None if first is None else self.put_if(key, b"22", first)
        if second is None or self.put_if(key, b"3", first) or self.put_if(key, b"3", None):
            raise StorageFailed(f"{self.url} does not keep a second writer out (conditional put); choose another place")
        if self.list("probe/").get(key) != 2:
            raise StorageFailed(f"{self.url} does not list what was written to it; choose another place for blobs")
        self.delete([key])

    # ---- files ----------------------------------------------------------------------------------------------------

    def put_bytes(self, key: str, data: bytes) -> None:
        """Writes or replaces a small object.  Raises StorageAway, StorageFailed."""
        self.may_write()
        self._write(f"{key} was not written", len(data), lambda: self._store.put(key, data))

    def get_bytes(self, key: str) -> bytes | None:
        """Returns a small object, None when it does not exist.  Raises StorageAway, StorageFailed."""
        found = self.get_with_version(key)
        return None if found is None else found[0]

    def get_with_version(self, key: str) -> tuple[bytes, Version] | None:
        """Returns a small object and its version for `put_if`; None when absent.  Raises StorageAway, StorageFailed."""

        def read() -> tuple[bytes, Version]:
            result = self._store.get(key)
            return bytes(result.bytes()), _version(result.meta)

        try:
            return self._call(f"{key} was not read", 0, read)
        except NotFound:
            return None

    def get_if_changed(self, key: str, version: Version | None) -> tuple[bytes, Version] | None:
        """Returns a small object and its version; None while it has this one.  Raises NotFound, StorageAway, StorageFailed."""
        e_tag = None if version is None else version.get("e_tag")
        options: GetOptions = {} if e_tag is None else {"if_none_match": e_tag}

        def read() -> tuple[bytes, Version]:
            result = self._store.get(key, options=options)
            return bytes(result.bytes()), _version(result.meta)

        try:
            return self._call(f"{key} was not read", 0, read)
        except NotModifiedError:
            return None

    def put_if(self, key: str, data: bytes, version: Version | None) -> Version | None:
        """Writes a small object if it still has this version (None: if it is absent); skips `may_write`.

        Returns its new version; None where another has changed it, or this call has, in an attempt without a reply.
        Raises StorageAway, StorageFailed.
        """
        try:
            return _version(self._call(f"{key} was not written", len(data), lambda: self._put_if(key, data, version)))
        except CHANGED:
            return None
        except NotFound:
            if version is None:  # the bucket does not exist
                raise
            return None

    def _put_if(self, key: str, data: bytes, version: Version | None) -> PutResult:
        if version is None:
            return self._store.put(key, data, mode="create")
        if not isinstance(self._store, LocalStore):
            return self._store.put(key, data, mode=version)
        assert self._store.prefix is not None, "it was opened with one"
        lock = lock_folder(self._store.prefix, wait=True)  # a file system has no conditional replace
        assert lock is not None, "it was waited for"
        try:
            if _version(self._store.head(key)) != version:
                raise PreconditionError(key)
            return self._store.put(key, data)
        finally:
            os.close(lock)

    def put(self, key: str, path: Path) -> None:
        """Writes or replaces an object with the bytes of a file.  Raises StorageAway, StorageFailed."""
        self.may_write()
        self._write(
            f"{key} was not written",
            path.stat().st_size,
            lambda: self._store.put(key, path, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE),
        )

    def get(self, key: str, path: Path, temporary: Path, *, sha256: str | None = None) -> None:
        """Fetches an object to `path`, by a rename out of the folder `temporary` of the same disk.

        Raises NotFound, StorageAway, StorageFull, and StorageFailed when its sha256 is not this one.
        """

        def check(copy: Path) -> None:
            if sha256 is not None and sha256_of(copy) != sha256:
                raise ValueError("its sha256 is another")

        with self._brought(key, temporary, check) as copy, disk_errors("what is brought back"):
            path.parent.mkdir(parents=True, exist_ok=True)
            copy.rename(path)

    # ---- folders --------------------------------------------------------------------------------------------------

    def put_folder(self, key: str, folder: Path, temporary: Path) -> None:
        """Writes a folder as one object, KEY.zip, by way of a file in `temporary`.

        Raises StorageAway, StorageFailed, StorageFull; FileNotFoundError when the folder does not exist.
        """
        packed = temporary / uuid.uuid4().hex
        try:
            with disk_errors("what is sent"), zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
                for path in sorted(folder.rglob("*")):
                    archive.write(path, path.relative_to(folder))
            self.put(key + FOLDER_SUFFIX, packed)
        finally:
            packed.unlink(missing_ok=True)

    def get_folder(self, key: str, folder: Path, temporary: Path) -> None:
        """Fetches a folder, by a rename out of the folder `temporary` of the same disk.

        Raises NotFound, StorageAway, StorageFull, and StorageFailed when its bytes are damaged.
        """
        unpacked = temporary / uuid.uuid4().hex

        def unpack(copy: Path) -> None:
            shutil.rmtree(unpacked, ignore_errors=True)
            with zipfile.ZipFile(copy) as archive:
                archive.extractall(unpacked)  # verifies each member's CRC, and writes no path outside

        try:
            with self._brought(key + FOLDER_SUFFIX, temporary, unpack), disk_errors("what is brought back"):
                folder.parent.mkdir(parents=True, exist_ok=True)
                unpacked.rename(folder)
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)

    @contextlib.contextmanager
    def _brought(self, key: str, temporary: Path, check: Callable[[Path], None]) -> Generator[Path]:
        """Yields an object's bytes in a temporary file.  `check` raises ValueError or similar for wrong ones."""
        copy = temporary / uuid.uuid4().hex
        ends = time.monotonic() + ATTEMPTS * self._timeout_s  # of all of it, besides the time its bytes take
        try:
            for attempt in range(2):  # bytes may be damaged in transit
                result = self._call(f"{key} was not found", 0, lambda: self._store.get(key), ends=ends)
                size = result.meta["size"]
                ends += size / SLOWEST_BYTES_S
                self._call(f"{key} was not read", size, lambda result=result: _save(result, copy), ends=ends)
                try:
                    if copy.stat().st_size != size:
                        raise EOFError(f"{copy.stat().st_size} of {size} bytes")
                    with disk_errors("what is brought back"):
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

    # ---- all ------------------------------------------------------------------------------------------------------

    def delete(self, keys: Sequence[str]) -> None:
        """Removes objects; a missing one is not an error.  Raises StorageAway, StorageFailed."""
        self.may_write()

        def remove() -> None:
            try:
                self._store.delete(list(keys))
            except FileNotFoundError:  # one is missing; then each by itself
                for key in keys:
                    with contextlib.suppress(FileNotFoundError):
                        self._store.delete(key)

        self._write("an object was not removed", 0, remove)

    def list(self, prefix: str) -> dict[str, int]:
        """Returns key → bytes of each object in a folder such as "adapters/".  Raises StorageAway, StorageFailed."""

        def find() -> dict[str, int]:
            found = {o["path"]: o["size"] for batch in self._store.list(prefix) for o in batch}
            return {key: size for key, size in found.items() if not key.rpartition("/")[2].startswith(".")}  # a lock

        return self._call("the objects were not listed", 0, find)

    # ---- one call -------------------------------------------------------------------------------------------------

    def _write[T](self, failed: str, nbytes: int, call: Callable[[], T]) -> T:
        """Returns the result of a call that changes something, if this process may still write when its turn has come."""

        def checked() -> T:
            self.may_write()
            return call()

        return self._call(failed, nbytes, checked)

    def _call[T](self, failed: str, nbytes: int, call: Callable[[], T], *, ends: float = math.inf) -> T:
        """Returns the result of an obstore call, or raises our error; two of its errors report an object's state.

        ends: at the latest, monotonic.
        """
        limit_s = min(ATTEMPTS * (self._timeout_s + nbytes / SLOWEST_BYTES_S), ends - time.monotonic())
        try:
            return self._within(max(limit_s, 0.0), call)
        except (JaxLoraError, *CHANGED):
            raise
        except FileNotFoundError as error:
            raise NotFound("object storage has no such object") from error
        except NEVER_BETTER as error:
            LOG.error("object storage: %s: %s", failed, _first_line(error))
            raise StorageFailed("object storage refuses the server; tell its operator") from error
        except (BaseError, OSError) as error:
            LOG.warning("object storage: %s: %s", failed, _first_line(error))
            raise StorageAway("object storage does not answer; try again later") from error

    def _within[T](self, limit_s: float, call: Callable[[], T]) -> T:
        """Returns the result of a call, on a thread that may be abandoned.  Raises TimeoutError."""
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


def refuse() -> None:
    """Raises StateInvalid: this process only reads."""
    raise StateInvalid("object storage is only read here; another server of the cluster writes to it")


def _open(url: str, timeout_s: float) -> ObjectStore:
    """Opens the store of an URL, or of a folder's path, creating it.  Raises BaseError, OSError, ValueError."""
    if "://" not in url:
        return LocalStore(url, mkdir=True)
    if url.startswith("file://"):
        return LocalStore.from_url(url, mkdir=True)
    silence_s = timeout_s + PARTS_AT_ONCE * PART_BYTES / SLOWEST_BYTES_S  # an upload gets no reply until its last byte
    options: dict[str, object] = {
        "read_timeout": timedelta(seconds=silence_s),
        "timeout": timedelta(days=1),  # limit of a request with all its bytes, which may be many
    }
    prefix = ENVIRONMENT.get(url.partition("://")[0], "AZURE_")  # obstore reads the variable, but not beside options
    options |= {n: os.environ[prefix + n.upper()] for n in CLIENT_SETTINGS if prefix + n.upper() in os.environ}
    return from_url(
        url,
        client_options=cast("ClientConfig", options),
        retry_config={"max_retries": ATTEMPTS - 1, "backoff": {"init_backoff": timedelta(seconds=FIRST_WAIT_S)}},
    )


def _save(result: GetResult, copy: Path) -> None:
    with disk_errors("what is brought back"), copy.open("wb") as file:
        for chunk in result.stream():
            file.write(chunk)


def _version(found: PutResult | ObjectMeta) -> Version:
    """Returns what `put` takes as a version: a store identifies it by one of the two, or both."""
    version: Version = {}
    if found["e_tag"] is not None:
        version["e_tag"] = found["e_tag"]
    if found["version"] is not None:
        version["version"] = found["version"]
    return version


def _first_line(error: BaseException) -> str:
    """Returns the first line of an error's message."""
    first = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first}"[:300] if first else type(error).__name__
