"""`jaxlora keys`: makes, shows and revokes API keys in the database, whether or not a server runs on it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Generator
from dataclasses import asdict
from pathlib import Path

from jaxlora.config.serving import ServeConfig, database_in
from jaxlora.config.training import load
from jaxlora.core.errors import ConfigInvalid
from serve.access.keys import create_key
from serve.db.database import Database
from serve.db.keys import StoredKeys
from serve.db.models import KeyRecord, Role

type Say = Callable[[str], None]


@contextlib.contextmanager
def opened(config: Path | None, data: Path | None, *, new: bool) -> Generator[StoredKeys]:
    """The keys of a server, by its settings or its folder.  new: the database may be made now.

    Raises ConfigInvalid, Unavailable.
    """
    if config is not None and data is not None:
        raise ConfigInvalid("give --config or --data, not both: the file names the folder")
    if config is not None:
        settings = load(config, ServeConfig)
        url, where = settings.database_url, settings.data
    else:
        where = Path("data") if data is None else data
        url = database_in(where)
    if not new and url == database_in(where) and not Path(url.removeprefix("sqlite:///")).exists():
        raise ConfigInvalid(f"there is no database in {where}; name the server's --config or --data, or create a key")
    database = Database(url)
    try:
        yield StoredKeys(database)
    finally:
        database.close()


def create(
    tenant: str, *, role: Role, label: str, config: Path | None, data: Path | None, say: Say, remark: Say
) -> None:
    """Says a new key, and nothing else; what there is to know about it is a remark."""
    with opened(config, data, new=True) as stored:
        record, key = create_key(stored, tenant, role=role, label=label)
    say(key)
    remark(f"{record.id} of {record.tenant} ({record.role}); the key is not shown again")


def show(*, config: Path | None, data: Path | None, as_json: bool, say: Say) -> None:
    """Says all keys, oldest first, but for the keys themselves."""
    with opened(config, data, new=False) as stored:
        records = stored.all()
    for record in records:
        say(json.dumps(public(record)) if as_json else line(record))


def revoke(id: str, *, config: Path | None, data: Path | None, remark: Say) -> None:
    """From now on, within a second, nobody comes in with this key."""
    with opened(config, data, new=False) as stored:
        record = stored.revoke(id, time.time())
    remark(f"{record.id} of {record.tenant} is revoked")


def public(record: KeyRecord) -> dict[str, str | float | None]:
    """What may be shown of a key."""
    return {name: value for name, value in asdict(record).items() if name != "digest"}


def line(record: KeyRecord) -> str:
    """A key in one line for people."""
    made = time.strftime("%Y-%m-%d", time.gmtime(record.created_s))
    state = "valid" if record.revoked_s is None else "revoked"
    return f"{record.id}  {state:7}  {record.role:6}  {record.tenant:20}  {made}  {record.label}".rstrip()
