"""`jaxlora jobs …` and `jaxlora files …`: fine-tuning on a running server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from serve.cli.adapters import HERE, Json, Key, Url

jobs = typer.Typer(help="The fine-tuning jobs of a running server.", no_args_is_help=True)
files = typer.Typer(help="The training files of a running server.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(metavar="ID")]
CREATE_EXAMPLES = """Example:  jaxlora jobs create train.jsonl --model smollm2 --suffix support --follow

Example:  jaxlora jobs create file-0123… --model smollm2 --heldout held.jsonl --rank 8 --lr 1e-3 --steps 60"""


@jobs.command(epilog=CREATE_EXAMPLES)
def create(
    train: Annotated[str, typer.Argument(metavar="TRAIN", help="A JSONL file, or the id of one on the server.")],
    model: Annotated[str, typer.Option(help="The base, or an adapter to go on from.")],
    heldout: Annotated[str | None, typer.Option(help="For held-out losses, likewise.", show_default=False)] = None,
    suffix: Annotated[str | None, typer.Option(help="In the name of the model.", show_default=False)] = None,
    method: Annotated[str, typer.Option(help="supervised or dpo.")] = "supervised",
    epochs: Annotated[int | None, typer.Option(help="Passes over the file.", show_default=False)] = None,
    steps: Annotated[int | None, typer.Option(help="Steps, instead of epochs.", show_default=False)] = None,
    batch: Annotated[int | None, typer.Option(help="Examples of a step.", show_default=False)] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.", show_default=False)] = None,
    rank: Annotated[int | None, typer.Option(help="Of the adapter.", show_default=False)] = None,
    alpha: Annotated[float | None, typer.Option(help="Of the adapter.", show_default=False)] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="Of first weights and order.", show_default=False)] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show its events until it ends.")] = False,
    url: Url = HERE,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Start a job.  A local file is sent first."""
    numbers = {"n_epochs": epochs, "batch_size": batch}
    lora = {"r": rank, "alpha": alpha}
    body = {
        "model": model,
        "suffix": suffix,
        "seed": seed,
        "method": {"type": method, method: {"hyperparameters": _given(numbers)}},
        "lora": _given(lora) or None,
        "learning_rate": lr,
        "max_steps": steps,
        "checkpoint_every": checkpoint_every,
    }
    _ask(
        "create_job", train=train, heldout=heldout, body=_given(body), follow=follow, url=url, key=key, as_json=as_json
    )


@jobs.command("list", epilog="Example:  jaxlora jobs list --json")
def list_jobs(url: Url = HERE, key: Key = None, as_json: Json = False) -> None:
    """Show your jobs, the newest first."""
    _ask("list_jobs", url=url, key=key, as_json=as_json)


@jobs.command("show", epilog="Example:  jaxlora jobs show ftjob-0123…")
def show_job(id: Id, url: Url = HERE, key: Key = None, as_json: Json = False) -> None:
    """Show one job, and why it failed."""
    _ask("show_job", id=id, url=url, key=key, as_json=as_json)


@jobs.command(epilog="Example:  jaxlora jobs events ftjob-0123… --follow")
def events(
    id: Id,
    follow: Annotated[bool, typer.Option("--follow", help="On until the job ends.")] = False,
    url: Url = HERE,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Show what happened to a job, the oldest first."""
    _ask("show_events", id=id, follow=follow, url=url, key=key, as_json=as_json)


@jobs.command(epilog="Example:  jaxlora jobs checkpoints ftjob-0123…")
def checkpoints(id: Id, url: Url = HERE, key: Key = None, as_json: Json = False) -> None:
    """Show the versions of a job that can be asked, the newest first."""
    _ask("show_checkpoints", id=id, url=url, key=key, as_json=as_json)


@jobs.command(epilog="Example:  jaxlora jobs cancel ftjob-0123…")
def cancel(id: Id, url: Url = HERE, key: Key = None, as_json: Json = False) -> None:
    """End a job; what it has learned stays."""
    _ask("move_job", id=id, move="cancel", url=url, key=key, as_json=as_json)


@jobs.command(epilog="Example:  jaxlora jobs pause ftjob-0123…")
def pause(id: Id, url: Url = HERE, key: Key = None, as_json: Json = False) -> None:
    """Have a job wait until it is resumed."""
    _ask("move_job", id=id, move="pause", url=url, key=key, as_json=as_json)


@jobs.command(epilog="Example:  jaxlora jobs resume ftjob-0123…")
def resume(id: Id, url: Url = HERE, key: Key = None, as_json: Json = False) -> None:
    """Have a paused job go on."""
    _ask("move_job", id=id, move="resume", url=url, key=key, as_json=as_json)


@files.command("list", epilog="Example:  jaxlora files list --json")
def list_files(url: Url = HERE, key: Key = None, as_json: Json = False) -> None:
    """Show your files, the newest first."""
    _ask("list_files", url=url, key=key, as_json=as_json)


@files.command("show", epilog="Example:  jaxlora files show file-0123…")
def show_file(id: Id, url: Url = HERE, key: Key = None, as_json: Json = False) -> None:
    """Show one file, and what is wrong with it."""
    _ask("show_file", id=id, url=url, key=key, as_json=as_json)


@files.command(epilog="Example:  jaxlora files upload train.jsonl")
def upload(
    path: Annotated[Path, typer.Argument(help="A JSONL file.")], url: Url = HERE, key: Key = None, as_json: Json = False
) -> None:
    """Send a training file."""
    _ask("upload_file", path=path, url=url, key=key, as_json=as_json)


@files.command(epilog="Example:  jaxlora files download file-0123… --out metrics.csv")
def download(
    id: Id,
    out: Annotated[Path | None, typer.Option(help="File to write (default: its name)", show_default=False)] = None,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Fetch a file, such as the metrics of a job."""
    _ask("download_file", id=id, out=out, url=url, key=key)


@files.command(epilog="Example:  jaxlora files delete file-0123…")
def delete(id: Id, url: Url = HERE, key: Key = None, as_json: Json = False) -> None:
    """Delete a file that no job needs."""
    _ask("delete_file", id=id, url=url, key=key, as_json=as_json)


def _given(values: Mapping[str, object]) -> dict[str, object]:
    """Those that are said."""
    return {k: v for k, v in values.items() if v is not None}


def _ask(what: str, **arguments: object) -> None:
    from serve.cli import main as cli  # which imports this file

    with cli.clean_exit():
        cli.resolve(f"serve.cli.jobs_client:{what}")(**arguments, say=typer.echo)
