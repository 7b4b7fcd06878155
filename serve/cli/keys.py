"""`jaxlora keys …`: the API keys of a server."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from jaxlora.core.errors import ConfigInvalid

keys = typer.Typer(
    help="The API keys of a server; changes hold within a second, also while it runs.", no_args_is_help=True
)

Config = Annotated[Path | None, typer.Option(metavar="CONFIG.toml", help="The server's settings.", show_default=False)]
Data = Annotated[Path | None, typer.Option(help="The server's folder of data (default: ./data).", show_default=False)]


@keys.command(epilog="Example:  jaxlora keys create acme --label laptop")
def create(
    tenant: Annotated[str, typer.Argument(help="Whose objects it sees; a new name is a new tenant.")],
    role: Annotated[str, typer.Option(help="tenant, or admin: sees every tenant's objects.")] = "tenant",
    label: Annotated[str, typer.Option(help="For yourself: who has it, what for.", show_default=False)] = "",
    config: Config = None,
    data: Data = None,
) -> None:
    """Print a new key.  The first one shuts out everyone who has none."""
    from serve.cli import main as cli  # which imports this file

    with cli.clean_exit():
        if role not in ("tenant", "admin"):
            raise ConfigInvalid(f"--role must be tenant or admin, got {role}")
        remark = functools.partial(typer.echo, err=True)
        cli.resolve("serve.cli.key_commands:create")(
            tenant, role=role, label=label, config=config, data=data, say=typer.echo, remark=remark
        )


@keys.command("list", epilog="Example:  jaxlora keys list --json")
def show(
    config: Config = None,
    data: Data = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Show all keys, but for the keys themselves, which nobody knows."""
    from serve.cli import main as cli  # which imports this file

    with cli.clean_exit():
        cli.resolve("serve.cli.key_commands:show")(config=config, data=data, as_json=as_json, say=typer.echo)


@keys.command(epilog="Example:  jaxlora keys revoke key-0123…")
def revoke(
    id: Annotated[str, typer.Argument(help="Of the list, not the key itself.")],
    config: Config = None,
    data: Data = None,
) -> None:
    """Let nobody in with a key any more; its open requests end with an error."""
    from serve.cli import main as cli  # which imports this file

    with cli.clean_exit():
        cli.resolve("serve.cli.key_commands:revoke")(
            id, config=config, data=data, remark=functools.partial(typer.echo, err=True)
        )
