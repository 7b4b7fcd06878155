"""One server's belongings: its database, `data`, `adapters` and bucket know whose they are, and one process has them.

    data locked ─▶ database ─▶ all that have an identity agree ─▶ claim ─▶ lease ─▶ the new epoch is written to all

Whoever starts with a database that is new, of another server or an older copy is refused before anything is changed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import uuid
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from jaxlora.checkpoints.load import Opened
from jaxlora.config.serving import BlobsSection, ServeConfig
from jaxlora.core.atomic_files import disk_errors, lock_folder, replace_file
from jaxlora.core.errors import StateInvalid, StorageFailed
from jaxlora.storage.checkpoints import read_meta
from jaxlora.storage.disk_cache import DiskCopies, Remote
from jaxlora.storage.lease import Lease, place_of
from jaxlora.storage.object_store import Blobs
from serve.db.database import Database
from serve.db.instance import Claim, Identity, StoredInstance
from serve.db.jobs import StoredJobs
from serve.db.models import JsonObject

LOG = logging.getLogger("serve")
RECORD = "instance.json"  # in each folder, and in the bucket
LOCK = ".server.lock"  # in `data`, which may be the store's folder too
UPLOADS = ("files", "jobs/states", "tuned")  # of `data`: what the database knows, or nobody
OBJECTS = ("files/", "jobs/", "tuned/", "adapters/")
BASE = "base"  # key of the fact which base the last start had


@dataclass(frozen=True, kw_only=True, slots=True)
class Instance:
    """What a server has alone, or what it reads of another's."""

    database: Database
    remote: Remote | None
    adapters: Path  # the folder of the adapter store, or of this process's copies of another's
    reads: bool = False  # it changes nothing
    epoch: int = 0  # start of the server; 0 where it reads


@dataclass(frozen=True, slots=True)
class _Folder:
    """A folder of this server."""

    path: Path
    own: tuple[str, ...]  # folders in it that only a server of the same database fills

    @property
    def name(self) -> str:
        return str(self.path)

    def read(self) -> bytes | None:
        file = self.path / RECORD
        return file.read_bytes() if file.exists() else None

    def write(self, data: bytes) -> None:
        with disk_errors("the server's identity"):
            replace_file(self.path / RECORD, data)

    def is_used(self) -> bool:
        return any(next((self.path / name).glob("[!.]*/*"), None) is not None for name in self.own)


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Object storage."""

    blobs: Blobs

    @property
    def name(self) -> str:
        return self.blobs.url

    def read(self) -> bytes | None:
        return self.blobs.get_bytes(RECORD)

    def write(self, data: bytes) -> None:
        self.blobs.put_bytes(RECORD, data)

    def is_used(self) -> bool:
        return any(self.blobs.list(folder) for folder in OBJECTS)


type _Place = _Folder | _Bucket


@contextlib.contextmanager
def opened_instance(config: ServeConfig, *, adopt: bool = False) -> Generator[Instance]:
    """Opens what this server keeps, and excludes every other process from it.

    adopt: takes over folders and a bucket of another server or a newer start; what the database does not know then stays
    for `limits.keep_days`.  Raises StateInvalid for those otherwise and when another process goes on; ConfigInvalid,
    Unavailable, StorageFailed, StorageFull.
    """
    with contextlib.ExitStack() as stack:
        with disk_errors(f"the folder {config.data}"):
            config.data.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = lock_folder(config.data, name=LOCK)
        if lock is None:
            raise StateInvalid(
                f"{config.data} is in use by another server; stop that one, or name another folder as data"
            )
        stack.callback(os.close, lock)
        database = Database(config.database_url)
        stack.callback(database.close)
        places: list[_Place] = [_Folder(config.data, UPLOADS), _Folder(config.adapters, ())]
        blobs = None if config.blobs is None else Blobs(config.blobs.url, timeout_s=config.blobs.timeout_s)
        if blobs is not None:
            places.append(_Bucket(blobs))
        stored = StoredInstance(database)
        mine, theirs = stored.identity(), [_identity(place) for place in places]
        if not adopt:
            _check(database.name, mine, stored.is_empty(), list(zip(places, theirs, strict=True)))
        claim = Claim(
            database,
            place_of(config.data),
            id=uuid.uuid4().hex if mine is None else mine.id,
            epoch=max((found.epoch for found in theirs if found is not None), default=0),
            waiting=lambda who: _tell_waiting("the database", who),
        )
        stack.callback(claim.close)
        remote = None
        if config.blobs is not None and blobs is not None:
            lease = Lease(blobs, config.data, waiting=lambda who: _tell_waiting("object storage", who))
            stack.callback(lease.close)
            remote = _remote(config.blobs, blobs)
        record = json.dumps({"format": 1} | claim.identity.to_json()).encode()
        for place in places:
            place.write(record)
        yield Instance(database=database, remote=remote, adapters=config.adapters, epoch=claim.identity.epoch)


@contextlib.contextmanager
def followed_instance(config: ServeConfig) -> Generator[Instance]:
    """Opens what the server of the same settings keeps, to read it while that one changes it.

    Raises StateInvalid while that server has not started; ConfigInvalid, Unavailable, StorageFailed.
    """

    def refuse(session: object) -> NoReturn:
        raise StateInvalid("this server only reads; another one of its cluster changes the database")

    with contextlib.ExitStack() as stack:
        database = stack.enter_context(contextlib.closing(Database(config.database_url)))
        database.may_write = refuse
        place: _Place = _Folder(config.adapters, ())
        remote, adapters = None, config.adapters
        if config.blobs is not None:
            blobs = Blobs(config.blobs.url, timeout_s=config.blobs.timeout_s, reads=True)
            place, remote = _Bucket(blobs), _remote(config.blobs, blobs)
            adapters = stack.enter_context(_own_folder(config.adapters.with_name(f"{config.adapters.name}.copies")))
        mine, its = StoredInstance(database).identity(), _identity(place)
        if mine is None or its is None or its.id != mine.id:
            raise StateInvalid(f"the server that keeps {place.name} and the database {database.name} must start first")
        yield Instance(database=database, remote=remote, adapters=adapters, reads=True)


@contextlib.contextmanager
def _own_folder(several: Path) -> Generator[Path]:
    """Yields a folder of several that no other process has while it is entered."""
    for number in itertools.count():
        folder = several / str(number)
        with disk_errors(f"the folder {folder}"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = lock_folder(folder, name=LOCK)
        if lock is not None:
            try:
                yield folder
            finally:
                os.close(lock)
            return


def _remote(config: BlobsSection, blobs: Blobs) -> Remote:
    most_bytes = None if config.disk_gb is None else int(config.disk_gb * 1e9)
    return Remote(blobs=blobs, copies=DiskCopies(most_bytes))


def followed_base(database: Database, opened: Opened) -> Opened:
    """Returns the base under the hash that the server's adapters name, as `same_base` does for the server itself.

    Raises StateInvalid when that server has another base; Unavailable.
    """
    known = StoredInstance(database).fact(f"{BASE}/{opened.weights_hash}")
    if known is None:
        raise StateInvalid(f"the server that keeps {database.name} has not started with the base {opened.path}")
    return replace(opened, base_hash=str(known["hash"]))


def _tell_waiting(what: str, who: str) -> None:
    print(f"{what} was in use by {who} a moment ago; waiting until that is over", flush=True)


def _identity(place: _Place) -> Identity | None:
    """Returns whose a place is; None where nobody has said."""
    data = place.read()
    try:
        return None if data is None else Identity.from_json(json.loads(data))
    except (ValueError, KeyError, TypeError) as error:
        raise StorageFailed(
            f"{RECORD} in {place.name} is damaged ({type(error).__name__}); remove it and start with --adopt if that is "
            "this server's"
        ) from error


def _check(
    database: str, mine: Identity | None, is_empty: bool, found: Sequence[tuple[_Place, Identity | None]]
) -> None:
    """Raises StateInvalid where the database is not the one that belongs to what is in a place."""
    what_to_do = "--adopt takes over what is there, which may lose what this database does not know"
    for place, its in found:
        if its is None:  # of an older version, or a first start that was cut short
            is_another = is_empty if mine is None else mine.epoch > 1
            if is_another and place.is_used():
                whose = "is new" if mine is None else f"is of server {mine.id}"
                raise StateInvalid(
                    f"the database {database} {whose}, but {place.name} holds files of a server without a name; name "
                    f"that server's database, or another place; {what_to_do}"
                )
        elif mine is None and is_empty:
            raise StateInvalid(
                f"the database {database} is new, but {place.name} belongs to server {its.id}; put its database back, or "
                f"name another place; {what_to_do}"
            )
        elif mine is not None and its.id != mine.id:
            raise StateInvalid(
                f"the database {database} is of server {mine.id}, but {place.name} belongs to server {its.id}; name "
                f"what belongs together; {what_to_do}"
            )
        elif mine is None or its.epoch > mine.epoch:
            raise StateInvalid(
                f"the database {database} is older than {place.name}, which saw start {its.epoch} of its server, the "
                f"database {0 if mine is None else mine.epoch}; put the newest one back; {what_to_do}"
            )


def same_base(database: Database, config: ServeConfig, opened: Opened, *, take: bool = False) -> Opened:
    """Returns the base under the hash that this server's adapters and checkpoints name: the one of its first template.

    take: goes on although the base or its chat template is another than that of unfinished jobs, which may fail then;
    their checkpoints stay for `limits.keep_days`.  Raises StateInvalid for those otherwise; Unavailable, StorageFull.
    """
    stored = StoredInstance(database)
    known, before = stored.fact(f"{BASE}/{opened.weights_hash}"), stored.fact(BASE)
    now: JsonObject = {"whole": opened.base_hash, "weights": opened.weights_hash}
    hash_ = opened.base_hash if known is None else str(known["hash"])
    unfinished = [record.id for record in StoredJobs(database).unfinished()]
    changed = ""
    if before is None and any(_base_of(config, id) not in (None, hash_) for id in unfinished):
        changed = "base model or its chat template"
    elif before is not None and before["weights"] != now["weights"]:
        changed = "base model"
    elif before is not None and before["whole"] != now["whole"]:
        changed = "chat template"
    if changed and unfinished and not take:
        raise StateInvalid(
            f"the {changed} of {opened.path} is not the one with which {len(unfinished)} unfinished jobs began "
            f"({unfinished[0]}, …); put the old one back, or start with --new-base, and those that it does not fit fail"
        )
    if changed:
        LOG.warning("the %s of %s has changed since the last start", changed, opened.path)
    stored.keep(f"{BASE}/{opened.weights_hash}", {"hash": hash_})
    stored.keep(BASE, now)
    return replace(opened, base_hash=hash_)


def _base_of(config: ServeConfig, job: str) -> str | None:
    """Returns the base of a job's newest checkpoint on this disk, None without a readable one."""
    try:
        meta = read_meta((config.data / "jobs" / "states" / job).absolute())
    except StorageFailed:
        return None
    return None if meta is None else str(meta.get("base"))
