"""`jaxlora files …`: training files, here and on a running server."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxlora.core.errors import AlreadyExists, InvalidRequest
from serve.cli.jobs import Id, at, sent, when
from serve.cli.options import HERE, Json, Key, Url, connect, print_answer, print_entry, print_list

if TYPE_CHECKING:
    from serve.cli.http_client import ApiClient
    from train.data.check import FileCheck, Run

files = typer.Typer(help="Training files, here and on a running server.", no_args_is_help=True)

BAD_FILE_EXIT = 1
FIRST_LOOK_S, LAST_LOOK_S = 0.1, 2.0  # between two looks whether a file is checked
BAR_WIDTH = 40
MOST_PROBLEMS = 50  # shown of a file


def file_line(file: Mapping) -> str:
    """One file for people."""
    said = f"  {file['status_details']}" if file.get("status_details") else ""
    return (
        f"{file['id']}  {file['status']:<9}  {file['bytes']:>12}  {when(file['created_at'])}  "
        f"{file['purpose']}  {file['filename']}{said}"
    )


def checked(client: ApiClient, file: dict) -> dict:
    """The file once the server has checked it; a terminal shows that it waits."""
    from rich.console import Console

    console, pause_s = Console(stderr=True), FIRST_LOOK_S
    waiting = console.status(f"the server checks {file['id']}") if console.is_terminal else contextlib.nullcontext()
    with waiting:
        while file["status"] == "uploaded":
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_LOOK_S)
            file = client.entry("GET", f"files/{at(file['id'])}")
    return file


@files.command("list", epilog="Example:  jaxlora files list --json")
def list_files(url: Url = HERE, key: Key = None, as_json: Json = False) -> None:
    """Show your files, the newest first."""
    print_list(connect(url, key), "files", {}, file_line, as_json)


@files.command("show", epilog="Example:  jaxlora files show file-0123…")
def show_file(id: Id, url: Url = HERE, key: Key = None, as_json: Json = False) -> None:
    """Show one file, and what is wrong with it."""
    print_answer(connect(url, key), "GET", f"files/{at(id)}", file_line, as_json)


@files.command(epilog="Example:  jaxlora files upload train.jsonl")
def upload(
    path: Annotated[Path, typer.Argument(help="A file of examples: JSONL, a JSON array, CSV, TSV or Parquet.")],
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not wait for the server's check.")] = False,
    url: Url = HERE,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Send a training file, and wait until the server has checked it; a bad one ends with exit code 1."""
    with connect(url, key) as client:
        file = sent(client, path)
        if not no_wait:
            file = checked(client, file)
    print_entry(file, file_line, as_json)
    if file["status"] == "error":
        typer.echo(f"jaxlora: {path} is not usable; mend it and send it again", err=True)
        raise typer.Exit(BAD_FILE_EXIT)


@files.command(epilog="Example:  jaxlora files download file-0123… --out metrics.csv")
def download(
    id: Id,
    out: Annotated[Path | None, typer.Option(help="File to write (default: its name)", show_default=False)] = None,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Fetch a file, such as the metrics of a job."""
    with connect(url, key) as client:
        file = client.entry("GET", f"files/{at(id)}")
        out = Path(Path(file["filename"]).name or id) if out is None else out
        if out.exists():
            raise AlreadyExists(f"{out} exists; name another file with --out")
        client.download(f"files/{at(id)}/content", {}, out)
    typer.echo(f"wrote {id} into {out}")


@files.command(epilog="Example:  jaxlora files delete file-0123…")
def delete(id: Id, url: Url = HERE, key: Key = None, as_json: Json = False) -> None:
    """Delete a file that no job needs."""
    print_answer(connect(url, key), "DELETE", f"files/{at(id)}", lambda _: f"deleted {id}", as_json)


# ---- check


@files.command(epilog="Example:  jaxlora files check train.csv --model smollm2 --lane-tokens 512")
def check(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL, a JSON array, CSV, TSV or Parquet.")],
    model: Annotated[str, typer.Option(help="Whose tokenizer and chat template: as serve takes it.")],
    loss: Annotated[
        str | None, typer.Option(help="That the examples are for, such as dpo (default: any).", show_default=False)
    ] = None,
    lane_tokens: Annotated[
        int, typer.Option(help="Tokens of a training lane: lane_tokens, or a server's training.longest_tokens.", min=1)
    ] = 256,
    too_long: Annotated[
        str, typer.Option(help="Of examples that a lane does not hold: error, skip or truncate.")
    ] = "error",
    as_json: Json = False,
) -> None:
    """Say what a file holds, what of it is trained, and what is wrong, without a server; a bad one ends with exit code 1."""
    from jaxlora.config.training import LOSSES, TOO_LONG
    from jaxlora.core.errors import ConfigInvalid
    from train.data.check import describe
    from train.data.load import LengthLimit, scan_file

    if loss is not None and loss not in LOSSES:
        raise ConfigInvalid(f"--loss must be one of {', '.join(LOSSES)}, got {loss}")
    choice = next((one for one in TOO_LONG if one == too_long), None)
    if choice is None:
        raise ConfigInvalid(f"--too-long must be {', '.join(TOO_LONG)}, got {too_long}")
    if not path.is_file():
        raise InvalidRequest(f"{path} is no file; give one of training data")
    from jaxlora.checkpoints.load import find_model, open_tokenizer

    tokenizer = open_tokenizer(find_model(model)[1])
    limit = LengthLimit(lane_tokens=lane_tokens, too_long=choice, measured=True)
    try:
        found = scan_file(path, tokenizer, limit=limit, loss=loss, most_problems=MOST_PROBLEMS)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read ({error.strerror})") from error
    report = describe(found, tokenizer)
    if as_json:
        typer.echo(json.dumps({"file": str(path), "lane_tokens": lane_tokens} | report.to_json()))
    else:
        for line in report_lines(path, report, coloured=sys.stdout.isatty()):
            typer.echo(line)
    if not report.good:
        raise typer.Exit(BAD_FILE_EXIT)


def report_lines(path: Path, report: FileCheck, *, coloured: bool) -> list[str]:
    """What a person reads of it.  coloured: trained tokens have a colour; else they stand in [[ ]]."""
    shapes = ", ".join(f"{count} {name}" for name, count in report.shapes.items())
    lines = [
        f"{path}: {report.examples} examples of {report.read} {report.unit}s in {report.format}"
        + f" ({shapes})" * bool(shapes)
    ]
    if report.examples:
        share = 100 * report.trained_tokens / report.tokens
        lines += [
            f"{report.tokens} tokens, {report.trained_tokens} of them trained ({share:.0f} %); tokens of an example, median {report.median_tokens:g}:"
        ]
        widest = max(one.examples for one in report.histogram)
        for one in report.histogram:
            bar = "#" * -(-one.examples * BAR_WIDTH // widest)
            lines.append(f"  {one.least:>6} to {one.most:>6}  {one.examples:>7}  {bar}".rstrip())
    if report.long is not None:
        lines.append(f"too long: {report.long}")
    for one in report.rendered:
        mark = "in colour" if coloured else "in [[ ]]"
        text = "".join(_marked(run, coloured) for run in one.runs)
        lines += [
            "",
            f"{report.unit} {one.number}, {one.tokens} tokens, the trained ones {mark}:",
            *(f"  | {line}" for line in text.split("\n")),
        ]
    if report.problems:
        lines += [
            "",
            f"problems: {len(report.problems)}{' or more' if report.stopped else ''}",
            *(f"  {problem}" for problem in report.problems),
        ]
    lines += [
        "",
        "good: this file can be trained with" if report.good else "bad: mend what is said above, and check again",
    ]
    return lines


def _marked(run: Run, coloured: bool) -> str:
    """The text with what would steer a terminal escaped."""
    text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in run.text)
    if not run.trained:
        return text
    return typer.style(text, fg="green", bold=True) if coloured else f"[[{text}]]"
