"""`jaxlora COMMAND`.  A command imports what it runs when it runs, so that help is instant.

Exit codes: 0 done; 1 a job that was followed, or a file, is not good; 2 an error the user can act on, told on stderr; 130
interrupted.
"""

from __future__ import annotations

import errno
import importlib.metadata
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from jaxlora.core.errors import ConfigInvalid, JaxLoraError
from jaxlora.neighbours import HOME, check_neighbours
from serve.cli.adapters import EXPORT_EXAMPLES, IMPORT_EXAMPLES, Verbose, adapters, export, import_adapter, told
from serve.cli.bench import bench
from serve.cli.files import files
from serve.cli.init import init
from serve.cli.jobs import jobs
from serve.cli.keys import keys
from serve.cli.options import HERE, Json, Key, Url

ERROR_EXIT, INTERRUPTED_EXIT = 2, 130
FULL = (errno.ENOSPC, errno.EDQUOT)  # no room on a disk, or none for this user
SERVE_EXAMPLES = """Example:  jaxlora serve configs/serve_smollm2.toml

Example:  jaxlora serve --model smollm2 --port 8000"""


class Commands(TyperGroup):
    """The commands; our errors are told on stderr, without a traceback, with exit code 2, Ctrl-C in exit code 130."""

    def invoke(self, ctx: typer.Context) -> object:  # ty: ignore[incompatible-method-override]  the base has no public name
        """Runs the command that is named."""
        try:
            return super().invoke(ctx)
        except JaxLoraError as e:
            typer.echo(f"jaxlora: {told(ctx, e)}", err=True)
            raise typer.Exit(ERROR_EXIT) from e
        except OSError as e:
            if e.errno not in FULL:
                raise
            where = "" if e.filename is None else f" ({e.filename})"
            typer.echo(f"jaxlora: the disk is full{where}; free some space and start again", err=True)
            raise typer.Exit(ERROR_EXIT) from e
        except KeyboardInterrupt as e:
            typer.echo("jaxlora: interrupted", err=True)
            raise typer.Exit(INTERRUPTED_EXIT) from e


app = typer.Typer(
    name="jaxlora",
    cls=Commands,
    help="One frozen base model, many tenants: their LoRA adapters train together and are served together.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"jaxlora {importlib.metadata.version('jaxlora')}")
        raise typer.Exit


@app.callback()
def common(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """One frozen base model, many tenants: their LoRA adapters train together and are served together."""
    if ctx.invoked_subcommand != "doctor":  # which reports it beside all else
        check_neighbours(HOME)


@app.command(epilog="Example:  jaxlora demo --exit --out runs/demo")
def demo(
    exit_after: Annotated[
        bool, typer.Option("--exit", help="Stop after the demo instead of going on serving.")
    ] = False,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; 0 takes any free one.", min=0, max=65535)] = 8000,
    out: Annotated[
        Path | None, typer.Option(help="Folder for adapters and metrics (default: a temporary one)", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of data, first weights and sampling.", min=0)] = 0,
) -> None:
    """Train a few tenants' adapters on the demo model in one step, serve them all, and compare."""
    from serve.demo.command import main

    main(exit_after=exit_after, port=port, out=out, seed=seed)


@app.command(epilog=SERVE_EXAMPLES)
def serve(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG.toml", show_default=False)] = None,
    model: Annotated[
        str | None, typer.Option(help='"smollm2", a directory, a .gguf file or a hub id.', show_default=False)
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default=False)] = None,
    port: Annotated[int | None, typer.Option(help="0 takes any free port.", show_default=False)] = None,
    slots: Annotated[int | None, typer.Option(help="Adapters on the device at once.", show_default=False)] = None,
    max_rank: Annotated[int | None, typer.Option(help="Largest rank a slot holds.", show_default=False)] = None,
    rows: Annotated[int | None, typer.Option(help="Sequences decoded in one step.", show_default=False)] = None,
    memory_gb: Annotated[
        float | None,
        typer.Option(help="Most memory to take; sizes that are not given are chosen from it.", show_default=False),
    ] = None,
    adapters: Annotated[
        Path | None,
        typer.Option(help="Root of the adapter store (without CONFIG.toml: ./adapters)", show_default=False),
    ] = None,
    log: Annotated[
        str | None, typer.Option(help="human, or json: one object a line, on stderr.", show_default=False)
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.", show_default=False)] = None,
    adopt: Annotated[
        bool,
        typer.Option(
            "--adopt", help="Start although files, adapters or bucket are of another server, or a newer start."
        ),
    ] = False,
    new_base: Annotated[
        bool,
        typer.Option("--new-base", help="Start although unfinished jobs began with another base or chat template."),
    ] = False,
    verbose: Verbose = False,
    supervise: Annotated[bool, typer.Option("--supervise", hidden=True)] = False,  # refused, for one version
) -> None:
    """Serve a base and its adapters over HTTP.

    Give CONFIG.toml (`jaxlora init serve` writes one), or --model alone: every setting has a default.  An option beside
    CONFIG.toml replaces the file's value.
    """
    from jaxlora.config.base import ModelSection
    from jaxlora.config.serving import ServeConfig
    from jaxlora.config.toml import load

    if supervise:
        raise ConfigInvalid(
            "--supervise is gone; leave it out and have the server restarted by systemd, Docker or Kubernetes, "
            "with the files in deploy/"
        )
    if config is not None:
        settings = load(config, ServeConfig)
    elif model is not None:
        settings = ServeConfig(model=ModelSection(path=model))
        if adapters is not None:
            settings = replace(settings, data=adapters.with_name("data"))
    else:
        raise ConfigInvalid("serve needs to know the base; give CONFIG.toml or --model, e.g. --model smollm2")
    flags = {"host": host, "port": port, "slots": slots, "max_rank": max_rank, "rows": rows, "adapters": adapters}
    flags = flags | {"log": log, "log_level": log_level, "memory_gb": memory_gb}
    try:
        if model is not None:
            settings = replace(settings, model=replace(settings.model, path=model))
        settings = replace(settings, **{k: v for k, v in flags.items() if v is not None})
    except ValueError as e:
        raise ConfigInvalid(f"an option of serve: {e}") from e
    from serve.server.build import main  # imports JAX, which a wrong option does not wait for

    main(settings, config, adopt=adopt, new_base=new_base)


@app.command(epilog="Example:  jaxlora up configs/serve_smollm2.toml")
def up(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", show_default=False)],
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster; without it one is made on this machine.", show_default=False)
    ] = None,
) -> None:
    """Serve with several processes behind one address, as [cluster] of CONFIG.toml says.  Needs the extra `ray`."""
    from jaxlora.config.serving import ServeConfig
    from jaxlora.config.toml import load

    settings = load(config, ServeConfig)
    from serve.cluster.ray_environment import set_environment

    set_environment(address)
    try:
        from serve.cluster.up import main
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigInvalid("up needs the extra `ray`; install jaxlora[ray]") from error

    main(settings, address=address)


@app.command(epilog="Example:  jaxlora chat roman --url http://127.0.0.1:8000")
def chat(
    name: Annotated[str | None, typer.Argument(metavar="ADAPTER[@VERSION]", show_default=False)] = None,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Talk to the adapters of a running server, and see one beside the base.  Reads questions from a pipe, too."""
    from serve.cli.chat import main

    main(url=url, key=key, name=name)


@app.command(epilog="Example:  jaxlora top --url http://127.0.0.1:8000 --once")
def top(
    url: Url = HERE,
    key: Key = None,
    as_json: Json = False,
    once: Annotated[bool, typer.Option("--once", help="Look once and exit.")] = False,
) -> None:
    """See what a running server does: slots, lines, tokens a second, training jobs.  Where keys exist, with an admin's."""
    from serve.cli.top import main

    main(url=url, key=key, as_json=as_json, once=once)


@app.command(epilog="Example:  jaxlora train configs/train_two_tenants.toml")
def train(config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", show_default=False)]) -> None:
    """Train the tenants of a TOML file together; their adapters land in its `out` folder."""
    from jaxlora.config.training import TrainConfig, load

    settings = load(config, TrainConfig)
    from train.run.command import main  # imports JAX, which a wrong file does not wait for

    main(settings)


app.command(epilog=EXPORT_EXAMPLES)(export)


@app.command(epilog="Example:  jaxlora doctor --model smollm2")
def doctor(
    model: Annotated[
        str | None, typer.Option(help="Show the sizes that a server of this base would have.", show_default=False)
    ] = None,
    memory_gb: Annotated[float | None, typer.Option(help="With so much memory.", show_default=False)] = None,
) -> None:
    """Say what is installed, which devices and how much memory there are, where things are kept, and what is wrong."""
    from serve.cli.doctor import report

    healthy = True
    for line in report(HOME, check_neighbours, model=model, memory_gb=memory_gb):
        typer.echo(line.text)
        healthy = healthy and line.ok
    if not healthy:
        raise typer.Exit(ERROR_EXIT)


app.add_typer(bench, name="bench")
app.add_typer(init, name="init")
app.add_typer(adapters, name="adapters")
app.command("import", epilog=IMPORT_EXAMPLES)(import_adapter)
app.add_typer(keys, name="keys")
app.add_typer(jobs, name="jobs")
app.add_typer(files, name="files")


def main() -> None:
    """What the `jaxlora` script runs."""
    app()


if __name__ == "__main__":
    main()
