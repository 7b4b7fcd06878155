"""`jaxlora adapters …`: the adapters of a running server; `jaxlora import` and `jaxlora export`: those of files."""

from __future__ import annotations

import contextlib
import json
import time
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

import typer

from jaxlora.core.errors import AlreadyExists, InvalidRequest, JaxLoraError
from serve.cli.options import HERE, Json, Key, Url, connect, print_answer, print_entry, print_list

if TYPE_CHECKING:
    from jaxlora.core.adapter_size import AdapterSize

adapters = typer.Typer(help="The adapters of a running server.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="NAME; with an admin's key also TENANT/NAME.")]
Version = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="The newest version where none is named.")]
Base = Annotated[str, typer.Option(help='The base: "smollm2", a directory, a .gguf file or a hub id.')]
AnyBase = Annotated[
    bool, typer.Option("--any-base", help="Take a file that records another base, if names and shapes fit.")
]
VERBOSE = "jaxlora.verbose"  # in the context that commands share


def _note_verbose(ctx: typer.Context, wanted: bool) -> bool:
    ctx.meta[VERBOSE] = wanted
    return wanted


Verbose = Annotated[
    bool, typer.Option("--verbose", help="Of a refused adapter, list every mistake.", callback=_note_verbose)
]  # its value is noted for `told`, which comes after the command
LOCAL_TENANT = "local"  # the owner of an adapter that is named without one
LOAD_EXAMPLES = """Example:  jaxlora adapters load support /srv/adapters/support

Example:  jaxlora adapters load acme/support /srv/adapters/support --in-place"""
IMPORT_EXAMPLES = """Example:  jaxlora import runs/x/acme/peft --name support --adapters adapters --model smollm2

Example:  jaxlora import support.zip --name acme/support --adapters adapters --model DIR"""
EXPORT_EXAMPLES = """Example:  jaxlora export runs/x/acme/peft --model DIR --form merged --out merged

Example:  jaxlora export --adapters runs/x/store --name acme@3 --model smollm2 --form gguf-lora --out lora"""


def at(name: str) -> str:
    """The name as part of a path.  Raises InvalidRequest for one that would lead to another path."""
    if not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise InvalidRequest(f"{name!a} is no name of an adapter; write NAME or TENANT/NAME")
    return quote(name, safe="/@")


def parts(path: Path) -> list[Path]:
    """The files to send of a path: an archive, or a PEFT folder's.  Raises InvalidRequest for any other."""
    from jaxlora.peft.archive import FILES  # imports NumPy

    if path.is_file():
        return [path]
    files = [path / name for name in FILES if (path / name).is_file()]
    if len(files) < 2:
        raise InvalidRequest(f"{path} is no PEFT folder and no archive of one: it lacks {FILES[0]} or {FILES[1]}")
    return files


def line(entry: Mapping) -> str:
    """One adapter or version for people."""
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry["created"]))
    pinned = "  pinned" if entry["pinned"] else ""
    return f"{entry['id']:<32}  version {entry['version']:<5}  rank {entry['rank']:<4}  {entry['state']:<6}  {made}{pinned}"


def exported_size(archive: Path) -> AdapterSize:
    """The size of the adapter in a server's zip of a PEFT folder, as its jaxlora.json says it."""
    from jaxlora.core.adapter_size import AdapterSize
    from jaxlora.peft.folder import OWN_FILE  # imports NumPy

    with zipfile.ZipFile(archive) as files:
        return AdapterSize.from_json(json.loads(files.read(OWN_FILE)))


def print_notes(notes: Collection[str], ignored: Collection[str] = ()) -> None:
    """Prints what a reader of an adapter should know: notes, and the settings that have no effect."""
    for note in notes:
        typer.echo(f"note: {note}")
    if ignored:
        typer.echo(f"note: these settings have no effect here: {', '.join(ignored)}")


def told(ctx: typer.Context, error: JaxLoraError) -> str:
    """An error's message, with how to see all mistakes where one can; under --verbose each in a line more."""
    line = error.message.strip()
    if not error.details or VERBOSE not in ctx.meta:
        return line
    if not ctx.meta[VERBOSE]:
        return f"{line} (--verbose lists all {len(error.details)} mistakes)"
    return "\n  ".join([line, *(" ".join(detail.split()) for detail in error.details)])


# ---- of a running server


@adapters.command("list", epilog="Example:  jaxlora adapters list --prefix sup --json")
def show(
    url: Url = HERE,
    key: Key = None,
    prefix: Annotated[str, typer.Option(help="Names that begin so.")] = "",
    as_json: Json = False,
) -> None:
    """Show your adapters, the newest first; with an admin's key everybody's."""
    print_list(connect(url, key), "adapters", {"prefix": prefix}, line, as_json)


@adapters.command(epilog="Example:  jaxlora adapters versions support")
def versions(name: Name, url: Url = HERE, key: Key = None, as_json: Json = False) -> None:
    """Show the versions of one adapter, the newest first."""
    print_list(connect(url, key), f"adapters/{at(name)}/versions", {}, line, as_json)


@adapters.command(epilog="Example:  jaxlora adapters upload support runs/x/acme/peft")
def upload(
    name: Name,
    path: Annotated[Path, typer.Argument(help="A PEFT folder, or a zip, tar or tar.gz of one.")],
    any_base: AnyBase = False,
    verbose: Verbose = False,
    url: Url = HERE,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Send a PEFT adapter to the server: a new adapter, or the next version of one."""
    form = {"name": name} | ({"allow_base_mismatch": "true"} if any_base else {})
    with connect(url, key) as client:
        entry = client.upload("adapters", form, parts(path))
    print_entry(entry, line, as_json)
    if not as_json:
        print_notes(entry["notes"], entry["ignored"])


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
    with connect(url, key) as client:
        entry = client.entry("GET", f"adapters/{at(name)}")
        out = out or Path(f"{entry['name']}-{entry['version']}.zip")
        if out.exists():
            raise AlreadyExists(f"{out} exists; name another file with --out")
        client.download(f"adapters/{at(name)}/download", {"dtype": dtype}, out)
    typer.echo(f"wrote {name}, version {entry['version']}, into {out}; {exported_size(out)}")


@adapters.command(epilog="Example:  jaxlora adapters delete support@3")
def delete(name: Version, url: Url = HERE, key: Key = None, as_json: Json = False) -> None:
    """Delete an adapter with all its versions, or the one version that is named."""
    print_answer(connect(url, key), "DELETE", f"adapters/{at(name)}", lambda _: f"deleted {name}", as_json)


@adapters.command(epilog="Example:  jaxlora adapters pin support")
def pin(name: Name, url: Url = HERE, key: Key = None, as_json: Json = False) -> None:
    """Keep an adapter on the device, in its newest version, whoever waits.  Needs an admin's key."""
    print_answer(connect(url, key), "POST", f"adapters/{at(name)}/pin", lambda _: f"pinned {name}", as_json)


@adapters.command(epilog="Example:  jaxlora adapters unpin support")
def unpin(name: Name, url: Url = HERE, key: Key = None, as_json: Json = False) -> None:
    """Let an adapter take its turns again.  Needs an admin's key."""
    print_answer(connect(url, key), "POST", f"adapters/{at(name)}/unpin", lambda _: f"unpinned {name}", as_json)


@adapters.command(epilog=LOAD_EXAMPLES)
def load(
    name: Name,
    path: Annotated[str, typer.Argument(help="A PEFT folder on the server, inside its lora_roots.")],
    in_place: Annotated[bool, typer.Option("--in-place", help="As the next version, if the name is taken.")] = False,
    any_base: AnyBase = False,
    verbose: Verbose = False,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Have the server load one of its own folders.  Needs an admin's key."""
    body = {"lora_name": name, "lora_path": path, "load_inplace": in_place, "allow_base_mismatch": any_base}
    with connect(url, key) as client:
        typer.echo(client.text("load_lora_adapter", body))


@adapters.command(epilog="Example:  jaxlora adapters unload support")
def unload(name: Name, url: Url = HERE, key: Key = None) -> None:
    """Have the server forget an adapter, with all its versions.  Needs an admin's key."""
    with connect(url, key) as client:
        typer.echo(client.text("unload_lora_adapter", {"lora_name": name}))


# ---- of files


def import_adapter(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A PEFT folder, or a zip, tar or tar.gz of one.")],
    name: Annotated[str, typer.Option(help="[TENANT/]NAME; the tenant is `local` where none is named.")],
    store: Annotated[Path, typer.Option("--adapters", help="Root of the adapter store.")],
    model: Base,
    any_base: AnyBase = False,
    verbose: Verbose = False,
) -> None:
    """Put a PEFT adapter into a store that no server has open, as the next version of its name."""
    from jaxlora.core.lora import check_name
    from jaxlora.peft.ingest import find_base, read_path
    from jaxlora.storage.adapter_store import AdapterStore

    tenant, slash, short = name.rpartition("/")
    tenant = tenant if slash else LOCAL_TENANT
    check_name(tenant, "tenant")
    check_name(short, "--name")
    weights, report = read_path(find_base(model), folder, any_base=any_base)
    print_notes(report.notes, report.ignored)
    with contextlib.closing(AdapterStore(store, host_bytes=0)) as opened:
        ref = opened.add(tenant, short, weights)
    typer.echo(f"imported {ref}: {len(report.modules)} modules, {report.parameters} parameters")


def export(
    model: Base,
    form: Annotated[str, typer.Option(help="peft, merged (a whole model, for transformers) or gguf-lora.")],
    out: Annotated[Path, typer.Option(help="Folder to write, whole or not at all.")],
    folder: Annotated[Path | None, typer.Argument(metavar="PEFT_FOLDER", show_default=False)] = None,
    store: Annotated[
        Path | None, typer.Option("--adapters", help="Root of an adapter store.", show_default=False)
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="TENANT/NAME@VERSION in that store; NAME alone is its newest.", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 (default), bfloat16 (not gguf-lora) or float16 (not merged).", show_default=False),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace --out if an export wrote it.")] = False,
    dequantise: Annotated[
        bool, typer.Option("--dequantise", help="Merge into a quantised base, which is then larger.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Write one adapter, out of a PEFT folder or a store, in a form that others load."""
    from jaxlora.core.lora import AdapterRef
    from jaxlora.peft.export import prepare, read_stored_over
    from jaxlora.peft.ingest import read_over

    plan = prepare(model, form=form, dtype=dtype, out=out, replace=replace, dequantise=dequantise)
    if folder is not None and store is None and name is None:
        weights, report = read_over(plan.base, folder)
        print_notes(report.notes)
        adapter = weights.named(AdapterRef(LOCAL_TENANT, "adapter", 1))  # a folder names no version
    elif folder is None and store is not None and name is not None:
        adapter = read_stored_over(plan.base, store, name)
    else:
        raise InvalidRequest("give a PEFT folder, or --adapters STORE with --name NAME[@VERSION]")
    size, notes = plan.write(adapter)
    print_notes(notes)
    typer.echo(f"wrote {adapter.ref} over {plan.base.name} as {form} ({plan.dtype}) into {plan.out}; {size}")
