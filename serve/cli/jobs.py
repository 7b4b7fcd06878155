"""`jaxlora jobs …`: fine-tuning on a running server."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

import typer

from jaxlora.core.errors import InvalidRequest
from serve.cli.options import HERE, Json, Key, Url, connect, print_answer, print_entry, print_list

if TYPE_CHECKING:
    from serve.cli.http_client import ApiClient

jobs = typer.Typer(help="The fine-tuning jobs of a running server.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(metavar="ID")]
JOBS = "fine_tuning/jobs"
FAILED_EXIT = 1  # of a command that followed a job to another end than success
MOST_EVENTS = 3000  # the newest ones, of which a chart is drawn
CHART_WIDTH = 80  # columns at most
CREATE_EXAMPLES = """Example:  jaxlora jobs create train.jsonl --model smollm2 --name support --follow

Example:  jaxlora jobs create file-0123… --model smollm2 --heldout held.jsonl --rank 8 --lr 1e-3 --steps 60"""


def at(id: str) -> str:
    """An id as part of a path.  Raises InvalidRequest for one that would lead to another path."""
    if id in ("", ".", ".."):
        raise InvalidRequest(f"{id!a} is no id")
    return quote(id, safe="")


def when(seconds: float) -> str:
    """A time for people."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def job_line(job: Mapping) -> str:
    """One job for people."""
    p = job["progress"]
    steps = f"{p['step']}/{p['total_steps'] or '?'}"
    loss = "" if p["train_loss"] is None else f"  loss {p['train_loss']:.4f}"
    held = "" if p["valid_loss"] is None else f"  held out {p['valid_loss']:.4f}"
    return f"{job['id']}  {job['status']:<16}  {steps:>9}{loss}{held}  {when(job['created_at'])}  {job['adapter']}"


def size_line(size: Mapping) -> str:
    """The size of a job's adapter for people."""
    from jaxlora.core.adapter_size import AdapterSize  # imports NumPy

    return f"{AdapterSize.from_json(size)}, {size['slot_bytes']:,} in a slot"


def event_line(event: Mapping) -> str:
    """One event for people."""
    mark = "" if event["level"] == "info" else f"{event['level']}: "
    return f"{when(event['created_at'])}  {mark}{event['message']}"


def checkpoint_line(checkpoint: Mapping) -> str:
    """One checkpoint for people."""
    numbers = {k: v for k, v in checkpoint["metrics"].items() if k != "step"}
    shown = "  ".join(f"{k} {v:.4f}" for k, v in numbers.items())
    return f"step {checkpoint['step_number']:<6}  {checkpoint['adapter']}@{checkpoint['adapter_version']}  {shown}"


def sent(client: ApiClient, path: Path) -> dict:
    """The file that the server has made of a local one.  Raises InvalidRequest when there is none."""
    if not path.is_file():
        raise InvalidRequest(f"{path} is no file; give one of training data")
    return client.upload("files", {"purpose": "fine-tune"}, [path])


def file_id(client: ApiClient, given: str) -> str:
    """The id of a file of the server: itself, or of a local file that is sent now."""
    if given.startswith("file-") and not Path(given).exists():
        return given
    return str(sent(client, Path(given))["id"])


def follow_job(client: ApiClient, id: str, as_json: bool) -> None:
    """Prints all events of a job until it ends, and the next command when it has succeeded.

    Raises typer.Exit with FAILED_EXIT when it failed or was cancelled; KeyboardInterrupt, after saying how to go on.
    """
    try:
        job = followed(client, id, as_json)
    except KeyboardInterrupt:
        typer.echo(f"\n{id} goes on", err=True)
        typer.echo(f"  follow it again:  {hint(client, f'jobs events {id} --follow')}", err=True)
        typer.echo(f"  end it:  {hint(client, f'jobs cancel {id}')}", err=True)
        raise
    if job["status"] != "succeeded":
        why = "" if job["error"] is None else ": " + " ".join(job["error"]["message"].split())
        typer.echo(f"jaxlora: {id} {job['status']}{why}", err=True)
        raise typer.Exit(FAILED_EXIT)
    if not as_json:
        typer.echo(f"now: {hint(client, f'chat {shlex.quote(job["adapter"])}')}")


def followed(client: ApiClient, id: str, as_json: bool) -> dict:
    """Prints all events of a job until it ends, however often a stream of them does.  Returns the job."""
    from train.jobs.status import ENDED  # not for commands that ask for help: `train` may be a folder of the user's

    query = {"stream": "true"}
    while True:
        job = client.entry("GET", f"{JOBS}/{at(id)}")  # before the events: after those of a job at its end come none
        for event in client.events(f"{JOBS}/{at(id)}/events", query):
            print_entry(event, event_line, as_json)
            query["after"] = event["id"]
        if job["status"] in ENDED:
            return job


def hint(client: ApiClient, command: str) -> str:
    """A command as the user would type it for the same server."""
    return f"jaxlora {command}" + ("" if client.url == HERE else f" --url {shlex.quote(client.url)}")


def loss_lines(events: list[dict]) -> list[str]:
    """A chart of the losses that these events tell of, the newest first; in ASCII where the output is no terminal, or an old one."""
    from serve.cli.loss_chart import UNICODE, chart

    numbers = [event["data"] for event in reversed(events) if event["type"] == "metrics" and event["data"]]
    train, heldout = (
        [(data["step"], data[name]) for data in numbers if "step" in data and data.get(name) is not None]
        for name in ("train_loss", "valid_loss")
    )
    try:
        UNICODE.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        ascii_only = True
    else:
        ascii_only = not sys.stdout.isatty()
    width = min(shutil.get_terminal_size().columns, CHART_WIDTH)
    return chart(train, heldout, width=width, ascii_only=ascii_only)


def _given(values: Mapping[str, object]) -> dict[str, object]:
    """Those that are not None."""
    return {k: v for k, v in values.items() if v is not None}


# ---- jobs


@jobs.command(epilog=CREATE_EXAMPLES)
def create(
    train: Annotated[str, typer.Argument(metavar="TRAIN", help="A file of examples, or the id of one on the server.")],
    model: Annotated[str, typer.Option(help="The base, or an adapter to go on from.")],
    heldout: Annotated[str | None, typer.Option(help="For held-out losses, likewise.", show_default=False)] = None,
    name: Annotated[
        str | None, typer.Option("--name", "--suffix", help="Of the adapter it makes.", show_default=False)
    ] = None,
    method: Annotated[str, typer.Option(help="supervised or dpo.")] = "supervised",
    epochs: Annotated[int | None, typer.Option(help="Passes over the file.", show_default=False)] = None,
    steps: Annotated[int | None, typer.Option(help="Steps, instead of epochs.", show_default=False)] = None,
    batch: Annotated[int | None, typer.Option(help="Examples of a step.", show_default=False)] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.", show_default=False)] = None,
    rank: Annotated[int | None, typer.Option(help="Of the adapter.", show_default=False)] = None,
    alpha: Annotated[float | None, typer.Option(help="Of the adapter.", show_default=False)] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="Of first weights and order.", show_default=False)] = None,
    too_long: Annotated[
        str | None,
        typer.Option(help="Of examples that a lane does not hold: error, skip or truncate.", show_default=False),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show its events until it ends.")] = False,
    url: Url = HERE,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Start a job.  A local file is sent first.

    With --follow, exit code 1 says that the job failed or was cancelled; Ctrl-C leaves it running.
    """
    numbers = {"n_epochs": epochs, "batch_size": batch}
    lora = {"r": rank, "alpha": alpha}
    body = {
        "model": model,
        "suffix": name,
        "seed": seed,
        "method": {"type": method, method: {"hyperparameters": _given(numbers)}},
        "lora": _given(lora) or None,
        "learning_rate": lr,
        "max_steps": steps,
        "checkpoint_every": checkpoint_every,
        "too_long": too_long,
    }
    with connect(url, key) as client:
        body["training_file"] = file_id(client, train)
        if heldout is not None:
            body["validation_file"] = file_id(client, heldout)
        job = client.entry("POST", JOBS, _given(body))
        print_entry(job, job_line, as_json)
        if follow:
            follow_job(client, job["id"], as_json)
        elif not as_json:
            typer.echo(f"to follow it: {hint(client, f'jobs events {job["id"]} --follow')}")


@jobs.command("list", epilog="Example:  jaxlora jobs list --json")
def list_jobs(url: Url = HERE, key: Key = None, as_json: Json = False) -> None:
    """Show your jobs, the newest first."""
    print_list(connect(url, key), JOBS, {}, job_line, as_json)


@jobs.command("show", epilog="Example:  jaxlora jobs show ftjob-0123…")
def show_job(id: Id, url: Url = HERE, key: Key = None, as_json: Json = False) -> None:
    """Show one job: how far it is, how large its adapter is, its losses as a chart, and why it failed."""
    with connect(url, key) as client:
        job = client.entry("GET", f"{JOBS}/{at(id)}")
        print_entry(job, job_line, as_json)
        if as_json:
            return
        if job["size"] is not None:
            typer.echo(size_line(job["size"]))
        for line in loss_lines(list(islice(client.pages(f"{JOBS}/{at(id)}/events", {}), MOST_EVENTS))):
            typer.echo(line)
    if job["error"] is not None:
        typer.echo(f"{job['error']['code']}: {job['error']['message']}")


@jobs.command(epilog="Example:  jaxlora jobs events ftjob-0123… --follow")
def events(
    id: Id,
    follow: Annotated[bool, typer.Option("--follow", help="On until the job ends.")] = False,
    url: Url = HERE,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Show what happened to a job, the oldest first.  With --follow, exit code 1 says that it did not succeed."""
    with connect(url, key) as client:
        if follow:
            follow_job(client, id, as_json)
            return
        for event in reversed(list(client.pages(f"{JOBS}/{at(id)}/events", {}))):
            print_entry(event, event_line, as_json)


@jobs.command(epilog="Example:  jaxlora jobs checkpoints ftjob-0123…")
def checkpoints(id: Id, url: Url = HERE, key: Key = None, as_json: Json = False) -> None:
    """Show the versions of a job that can be asked, the newest first."""
    print_list(connect(url, key), f"{JOBS}/{at(id)}/checkpoints", {}, checkpoint_line, as_json)


@jobs.command(epilog="Example:  jaxlora jobs cancel ftjob-0123…")
def cancel(id: Id, url: Url = HERE, key: Key = None, as_json: Json = False) -> None:
    """End a job; what it has learned stays."""
    print_answer(connect(url, key), "POST", f"{JOBS}/{at(id)}/cancel", lambda _: f"{id} is cancelled", as_json)


@jobs.command(epilog="Example:  jaxlora jobs pause ftjob-0123…")
def pause(id: Id, url: Url = HERE, key: Key = None, as_json: Json = False) -> None:
    """Have a job wait until it is resumed."""
    print_answer(connect(url, key), "POST", f"{JOBS}/{at(id)}/pause", lambda _: f"{id} is paused", as_json)


@jobs.command(epilog="Example:  jaxlora jobs resume ftjob-0123…")
def resume(id: Id, url: Url = HERE, key: Key = None, as_json: Json = False) -> None:
    """Have a paused job go on."""
    print_answer(connect(url, key), "POST", f"{JOBS}/{at(id)}/resume", lambda _: f"{id} is in line again", as_json)
