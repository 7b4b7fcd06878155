"""`jaxlora keys …`: makes, shows and revokes API keys in the database, whether or not a server runs on it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxlora.core.errors import ConfigInvalid
from serve.cli.options import Json

if TYPE_CHECKING:
    from serve.db.keys import StoredKeys
    from serve.db.models import KeyRecord

keys = typer.Typer(
    help="The API keys of a server; changes hold within a second, also while it runs.", no_args_is_help=True
)

Config = Annotated[Path | None, typer.Option(metavar="CONFIG.toml", help="The server's settings.", show_default=False)]
Data = Annotated[Path | None, typer.Option(help="The server's folder of data (default: ./data).", show_default=False)]


@contextlib.contextmanager
def opened(config: Path | None, data: Path | None, *, new: bool) -> Generator[StoredKeys]:
    """The keys of a server, by its settings or its folder.  new: the database may be made now.

    Raises ConfigInvalid, Unavailable.
    """
    from jaxlora.config.serving import ServeConfig, database_in
    from jaxlora.config.training import load
    from serve.db.database import Database
    from serve.db.keys import StoredKeys

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
    with contextlib.closing(Database(url)) as database:
        yield StoredKeys(database)


@keys.command(epilog="Example:  jaxlora keys create acme --label laptop")
def create(
    tenant: Annotated[str, typer.Argument(help="Whose objects it sees; a new name is a new tenant.")],
    role: Annotated[str, typer.Option(help="tenant, or admin: sees every tenant's objects.")] = "tenant",
    label: Annotated[str, typer.Option(help="For yourself: who has it, what for.", show_default=False)] = "",
    config: Config = None,
    data: Data = None,
) -> None:
    """Print a new key.  The first one shuts out everyone who has none."""
    from serve.access.keys import create_key

    if role != "tenant" and role != "admin":
        raise ConfigInvalid(f"--role must be tenant or admin, got {role}")
    with opened(config, data, new=True) as stored:
        record, key = create_key(stored, tenant, role=role, label=label)
    typer.echo(key)
    typer.echo(f"{record.id} of {record.tenant} ({record.role}); the key is not shown again", err=True)


@keys.command("list", epilog="Example:  jaxlora keys list --json")
def show(config: Config = None, data: Data = None, as_json: Json = False) -> None:
    """Show all keys, but for the keys themselves, which nobody knows."""
    with opened(config, data, new=False) as stored:
        records = stored.all()
    for record in records:
        typer.echo(json.dumps(public(record)) if as_json else line(record))


@keys.command(epilog="Example:  jaxlora keys revoke key-0123…")
def revoke(
    id: Annotated[str, typer.Argument(help="Of the list, not the key itself.")],
    config: Config = None,
    data: Data = None,
) -> None:
    """Let nobody in with a key any more; its open requests end with an error."""
    with opened(config, data, new=False) as stored:
        record = stored.revoke(id, time.time())
    typer.echo(f"{record.id} of {record.tenant} is revoked", err=True)


def public(record: KeyRecord) -> dict[str, str | float | None]:
    """The fields of a key that may be shown."""
    return {name: value for name, value in asdict(record).items() if name != "digest"}


def line(record: KeyRecord) -> str:
    """A key in one line for people."""
    made = time.strftime("%Y-%m-%d", time.gmtime(record.created_s))
    state = "valid" if record.revoked_s is None else "revoked"
    return f"{record.id}  {state:7}  {record.role:6}  {record.tenant:20}  {made}  {record.label}".rstrip()
