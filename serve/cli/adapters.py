"""`jaxlora adapters …`: the adapters of a running server; and `jaxlora import`, for a store that no server has open."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

adapters = typer.Typer(help="The adapters of a running server.", no_args_is_help=True)

Url = Annotated[str, typer.Option(help="Where the server answers.")]
Key = Annotated[str | None, typer.Option(help="An API key, if the server has any.", envvar="JAXLORA_KEY")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="NAME; with an admin's key also TENANT/NAME.")]
Version = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="The newest version where none is named.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
AnyBase = Annotated[
    bool, typer.Option("--any-base", help="Take a file that records another base, if names and shapes fit.")
]
HERE = "http://127.0.0.1:8000"
LOAD_EXAMPLES = """Example:  jaxlora adapters load support /srv/adapters/support

Example:  jaxlora adapters load acme/support /srv/adapters/support --in-place"""
IMPORT_EXAMPLES = """Example:  jaxlora import runs/x/acme/peft --name support --adapters adapters --model smollm2

Example:  jaxlora import support.zip --name acme/support --adapters adapters --model DIR"""


@adapters.command("list", epilog="Example:  jaxlora adapters list --prefix sup --json")
def show(
    url: Url = HERE,
    key: Key = None,
    prefix: Annotated[str, typer.Option(help="Names that begin so.")] = "",
    as_json: Json = False,
) -> None:
    """Show your adapters, the newest first; with an admin's key everybody's."""
    from serve.cli import main as cli  # which imports this file

    with cli.clean_exit():
        cli.resolve("serve.cli.adapters_client:show")(url=url, key=key, prefix=prefix, as_json=as_json, say=typer.echo)


@adapters.command(epilog="Example:  jaxlora adapters versions support")
def versions(name: Name, url: Url = HERE, key: Key = None, as_json: Json = False) -> None:
    """Show the versions of one adapter, the newest first."""
    from serve.cli import main as cli  # which imports this file

    with cli.clean_exit():
        cli.resolve("serve.cli.adapters_client:versions")(url=url, key=key, name=name, as_json=as_json, say=typer.echo)


@adapters.command(epilog="Example:  jaxlora adapters upload support runs/x/acme/peft")
def upload(
    name: Name,
    path: Annotated[Path, typer.Argument(help="A PEFT folder, or a zip, tar or tar.gz of one.")],
    any_base: AnyBase = False,
    url: Url = HERE,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Send a PEFT adapter to the server: a new adapter, or the next version of one."""
    from serve.cli import main as cli  # which imports this file

    with cli.clean_exit():
        cli.resolve("serve.cli.adapters_client:upload")(
            url=url, key=key, name=name, path=path, any_base=any_base, as_json=as_json, say=typer.echo
        )


@adapters.command(epilog="Example:  jaxlora adapters download support@3 --out support.zip")
def download(
    name: Version,
    out: Annotated[
        Path | None, typer.Option(help="File to write (default: NAME-VERSION.zip)", show_default=False)
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Fetch a version as a zip of a PEFT folder."""
    from serve.cli import main as cli  # which imports this file

    with cli.clean_exit():
        cli.resolve("serve.cli.adapters_client:download")(
            url=url, key=key, name=name, out=out, dtype=dtype, say=typer.echo
        )


@adapters.command(epilog="Example:  jaxlora adapters delete support@3")
def delete(name: Version, url: Url = HERE, key: Key = None, as_json: Json = False) -> None:
    """Delete an adapter with all its versions, or the one version that is named."""
    _change("delete", name, url, key, as_json)


@adapters.command(epilog="Example:  jaxlora adapters pin support")
def pin(name: Name, url: Url = HERE, key: Key = None, as_json: Json = False) -> None:
    """Keep an adapter on the device, in its newest version, whoever waits.  Needs an admin's key."""
    _change("pin", name, url, key, as_json)


@adapters.command(epilog="Example:  jaxlora adapters unpin support")
def unpin(name: Name, url: Url = HERE, key: Key = None, as_json: Json = False) -> None:
    """Let an adapter take its turns again.  Needs an admin's key."""
    _change("unpin", name, url, key, as_json)


def _change(action: str, name: str, url: str, key: str | None, as_json: bool) -> None:
    from serve.cli import main as cli  # which imports this file

    with cli.clean_exit():
        cli.resolve("serve.cli.adapters_client:change")(
            url=url, key=key, name=name, action=action, as_json=as_json, say=typer.echo
        )


@adapters.command(epilog=LOAD_EXAMPLES)
def load(
    name: Name,
    path: Annotated[str, typer.Argument(help="A PEFT folder on the server, inside its lora_roots.")],
    in_place: Annotated[bool, typer.Option("--in-place", help="As the next version, if the name is taken.")] = False,
    any_base: AnyBase = False,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Have the server load one of its own folders.  Needs an admin's key."""
    from serve.cli import main as cli  # which imports this file

    with cli.clean_exit():
        cli.resolve("serve.cli.adapters_client:load")(
            url=url, key=key, name=name, path=path, in_place=in_place, any_base=any_base, say=typer.echo
        )


@adapters.command(epilog="Example:  jaxlora adapters unload support")
def unload(name: Name, url: Url = HERE, key: Key = None) -> None:
    """Have the server forget an adapter, with all its versions.  Needs an admin's key."""
    from serve.cli import main as cli  # which imports this file

    with cli.clean_exit():
        cli.resolve("serve.cli.adapters_client:unload")(url=url, key=key, name=name, say=typer.echo)


def import_adapter(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A PEFT folder, or a zip, tar or tar.gz of one.")],
    name: Annotated[str, typer.Option(help="[TENANT/]NAME; the tenant is `local` where none is named.")],
    store: Annotated[Path, typer.Option("--adapters", help="Root of the adapter store.")],
    model: Annotated[str, typer.Option(help='The base: "smollm2", a directory, a .gguf file or a hub id.')],
    any_base: AnyBase = False,
) -> None:
    """Put a PEFT adapter into a store that no server has open, as the next version of its name."""
    from serve.cli import main as cli  # which imports this file

    with cli.clean_exit():
        cli.resolve("jaxlora.peft.ingest:main")(
            model=model, folder=folder, store=store, name=name, any_base=any_base, say=typer.echo
        )
