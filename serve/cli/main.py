"""`jaxlora COMMAND`.  Each command is named "module:function" and imported when it runs, so that help is instant.

Exit codes: 0 done; 2 an error the user can act on, one line on stderr; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from jaxlora.core.errors import ConfigInvalid, JaxLoraError
from serve.cli.adapters import HERE, IMPORT_EXAMPLES, Json, Key, Url, adapters, import_adapter
from serve.cli.jobs import files, jobs
from serve.cli.keys import keys
from serve.cli.neighbours import check_neighbours, own_home

ERROR_EXIT, INTERRUPTED_EXIT = 2, 130
SERVE_EXAMPLES = """Example:  jaxlora serve configs/serve_smollm2.toml

Example:  jaxlora serve --model smollm2 --port 8000"""

EXPORT_EXAMPLES = """Example:  jaxlora export runs/x/acme/peft --model DIR --form merged --out merged

Example:  jaxlora export --adapters runs/x/store --name acme@3 --model smollm2 --form gguf-lora --out lora"""

app = typer.Typer(
    name="jaxlora",
    help="One frozen base model, many tenants: their LoRA adapters train together and are served together.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def resolve(target: str) -> Callable[..., None]:
    """The function behind "module:function", imported now, from beside us."""
    check_neighbours(own_home())
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)


@contextlib.contextmanager
def clean_exit() -> Generator[None]:
    """Turns our errors into one line on stderr and exit code 2, Ctrl-C into exit code 130."""
    try:
        yield
    except JaxLoraError as e:
        line = " ".join(e.message.split())
        typer.echo(f"jaxlora: {line}", err=True)
        raise typer.Exit(ERROR_EXIT) from e
    except KeyboardInterrupt as e:
        typer.echo("jaxlora: interrupted", err=True)
        raise typer.Exit(INTERRUPTED_EXIT) from e


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"jaxlora {importlib.metadata.version('jaxlora')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """One frozen base model, many tenants: their LoRA adapters train together and are served together."""


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
    with clean_exit():
        resolve("serve.demo.command:main")(exit_after=exit_after, port=port, out=out, seed=seed)


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
    adapters: Annotated[
        Path | None,
        typer.Option(help="Root of the adapter store (without CONFIG.toml: ./adapters)", show_default=False),
    ] = None,
    log: Annotated[
        str | None, typer.Option(help="human, or json: one object a line, on stderr.", show_default=False)
    ] = None,
    supervise: Annotated[bool, typer.Option("--supervise", hidden=True)] = False,  # refused, for one version
) -> None:
    """Serve a base and its adapters over HTTP.

    Give CONFIG.toml, or --model for the defaults of jaxlora.config.serving.serve_defaults.  An option beside CONFIG.toml
    replaces the file's value.
    """
    with clean_exit():
        from jaxlora.config.serving import ServeConfig, serve_defaults
        from jaxlora.config.training import load

        if supervise:
            raise ConfigInvalid(
                "--supervise is gone; leave it out and have the server restarted by systemd, Docker or Kubernetes, "
                "with the files in deploy/"
            )
        if config is not None:
            settings = load(config, ServeConfig)
        elif model is not None:
            settings = serve_defaults(model, Path("adapters") if adapters is None else adapters)
        else:
            raise ConfigInvalid("serve needs to know the base; give CONFIG.toml or --model, e.g. --model smollm2")
        flags = {"host": host, "port": port, "slots": slots, "max_rank": max_rank, "rows": rows, "adapters": adapters}
        flags |= {"log": log}
        try:
            if model is not None:
                settings = replace(settings, model=replace(settings.model, path=model))
            settings = replace(settings, **{k: v for k, v in flags.items() if v is not None})
        except ValueError as e:
            raise ConfigInvalid(f"an option of serve: {e}") from e
        resolve("serve.server.build:main")(settings, config)


@app.command(epilog="Example:  jaxlora chat roman --url http://127.0.0.1:8000")
def chat(
    name: Annotated[str | None, typer.Argument(metavar="ADAPTER[@VERSION]", show_default=False)] = None,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Talk to the adapters of a running server, and see one beside the base.  Reads questions from a pipe, too."""
    with clean_exit():
        resolve("serve.cli.chat:main")(url=url, key=key, name=name)


@app.command(epilog="Example:  jaxlora top --url http://127.0.0.1:8000 --once")
def top(
    url: Url = HERE,
    key: Key = None,
    as_json: Json = False,
    once: Annotated[bool, typer.Option("--once", help="Look once and exit.")] = False,
) -> None:
    """See what a running server does: slots, lines, tokens a second, training jobs.  Where keys exist, with an admin's."""
    with clean_exit():
        resolve("serve.cli.top:main")(url=url, key=key, as_json=as_json, once=once, say=typer.echo)


@app.command(epilog="Example:  jaxlora train configs/train_two_tenants.toml")
def train(config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", show_default=False)]) -> None:
    """Train the tenants of a TOML file together; their adapters land in its `out` folder."""
    with clean_exit():
        resolve("train.run.command:main")(config)


@app.command(epilog=EXPORT_EXAMPLES)
def export(
    model: Annotated[str, typer.Option(help='The base: "smollm2", a directory, a .gguf file or a hub id.')],
    form: Annotated[str, typer.Option(help="peft, merged (a whole model, for transformers) or gguf-lora.")],
    out: Annotated[Path, typer.Option(help="Folder to write, whole or not at all.")],
    folder: Annotated[Path | None, typer.Argument(metavar="PEFT_FOLDER", show_default=False)] = None,
    adapters: Annotated[Path | None, typer.Option(help="Root of an adapter store.", show_default=False)] = None,
    name: Annotated[
        str | None,
        typer.Option(help="TENANT/NAME@VERSION in that store; NAME alone is its newest.", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 (default), bfloat16 (not gguf-lora) or float16 (not merged).", show_default=False),
    ] = None,
    replace_out: Annotated[bool, typer.Option("--replace", help="Replace --out if an export wrote it.")] = False,
    dequantise: Annotated[
        bool, typer.Option("--dequantise", help="Merge into a quantised base, which is then larger.")
    ] = False,
) -> None:
    """Write one adapter, out of a PEFT folder or a store, in a form that others load."""
    with clean_exit():
        resolve("jaxlora.peft.export:main")(
            model=model,
            folder=folder,
            store=adapters,
            name=name,
            form=form,
            out=out,
            dtype=dtype,
            replace=replace_out,
            dequantise=dequantise,
            say=typer.echo,
        )


@app.command(epilog="Example:  jaxlora doctor")
def doctor() -> None:
    """Say what is installed, which devices there are, where things are kept, and what is wrong."""
    with clean_exit():
        from serve.cli.doctor import report

        healthy = True
        for line in report(own_home()):
            typer.echo(line.text)
            healthy = healthy and line.ok
        if not healthy:
            raise typer.Exit(ERROR_EXIT)


bench = typer.Typer(help="Measure this device.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command(epilog="Example:  jaxlora bench kernels --op gathered_lora --model smollm2-135m --json")
def kernels(
    op: Annotated[
        list[str] | None, typer.Option(help="An op; may be repeated (default: all).", show_default=False)
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="smollm2-135m, qwen3-4b or llama-3.1-8b, one layer; may be repeated (default: all).",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    rows: Annotated[int, typer.Option(help="Sequences of a decode step.", min=1)] = 32,
    adapters: Annotated[int, typer.Option(help="Distinct adapters among them.", min=1)] = 16,
    slots: Annotated[int, typer.Option(help="Slots of the pool.", min=1)] = 64,
    rank: Annotated[int, typer.Option(help="Rank of every adapter.", min=1)] = 16,
    lanes: Annotated[int, typer.Option(help="Lanes of training and prefill.", min=1)] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of a lane.", min=1)] = 128,
    context: Annotated[int, typer.Option(help="Tokens in the KV pages of a sequence.", min=1)] = 512,
    rounds: Annotated[int, typer.Option(help="The least of so many timings counts.", min=1)] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Time every op beside what this device can do, the base product and other forms of the op."""
    with clean_exit():
        if dtype not in ("bfloat16", "float32"):
            raise ConfigInvalid(f"--dtype must be bfloat16 or float32, got {dtype}")
        sizes = {"rows": rows, "adapters": adapters, "slots": slots, "rank": rank}
        sizes |= {"lanes": lanes, "tokens": tokens, "context": context}
        try:
            made = resolve("pallas_kernels.bench.cases:Sizes")(**sizes)
            resolve("pallas_kernels.bench.run:main")(
                ops=op or [],
                models=model or [],
                dtype=dtype,
                sizes=made,
                rounds=rounds,
                as_json=as_json,
                say=typer.echo,
            )
        except ValueError as e:
            raise ConfigInvalid(f"bench kernels: {e}") from e


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
