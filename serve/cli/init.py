"""`jaxlora init serve` and `jaxlora init train`: a commented settings file to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jaxlora.core.errors import AlreadyExists, StorageFailed

init = typer.Typer(help="Write a settings file that shows every setting and its default.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(metavar="FILE", help="What to write; - is the screen.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]
SCREEN, SERVE_FILE, TRAIN_FILE = Path("-"), Path("serve.toml"), Path("train.toml")


@init.command("serve", epilog="Example:  jaxlora init serve && jaxlora serve serve.toml")
def init_serve(file: File = SERVE_FILE, force: Force = False) -> None:
    """Write the settings of a server."""
    from jaxlora.config.serving import ServeConfig
    from jaxlora.config.template import template

    write(file, template(ServeConfig, f"jaxlora serve {SERVE_FILE if file == SCREEN else file}"), force)
    if file != SCREEN:
        typer.echo(f"now: jaxlora serve {file}")


@init.command("train", epilog="Example:  jaxlora init train && jaxlora train train.toml")
def init_train(file: File = TRAIN_FILE, force: Force = False) -> None:
    """Write the settings of a training run."""
    from jaxlora.config.template import EXAMPLES, template
    from jaxlora.config.training import TrainConfig

    write(file, template(TrainConfig, f"jaxlora train {TRAIN_FILE if file == SCREEN else file}"), force)
    if file != SCREEN:
        typer.echo(f"now: put examples into {file.parent / str(EXAMPLES['train'])}, or name your file as `train`,")
        typer.echo(f"then: jaxlora train {file}")


def write(file: Path, text: str, force: bool) -> None:
    """Writes a new file, or prints.  Raises AlreadyExists, and StorageFailed for a place that cannot be written."""
    if file == SCREEN:
        typer.echo(text, nl=False)
        return
    try:
        with file.open("w" if force else "x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError as e:
        raise AlreadyExists(f"{file} is there; name another file, or add --force to replace it") from e
    except OSError as e:
        raise StorageFailed(f"{file} cannot be written ({e.strerror}); name another file") from e
    typer.echo(f"wrote {file}")
