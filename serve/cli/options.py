"""The options that commands share, and what follows from them: the server that is asked, and how an answer is printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from serve.cli.http_client import ApiClient

HERE = "http://127.0.0.1:8000"
Url = Annotated[str, typer.Option(help="Where the server answers.")]
Key = Annotated[str | None, typer.Option(help="An API key, if the server has any.", envvar="JAXLORA_KEY")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


def connect(url: str, key: str | None) -> ApiClient:
    """A client of the server at `url`; `with` closes it."""
    from serve.cli.http_client import ApiClient  # imports httpx2 and rich, which help does without

    return ApiClient(url, key)


def print_entry(entry: Mapping, line: Callable[[Mapping], str], as_json: bool) -> None:
    """Prints an object of the server as JSON, or as the line that `line` makes of it."""
    typer.echo(json.dumps(entry) if as_json else line(entry))


def print_answer(client: ApiClient, method: str, path: str, line: Callable[[Mapping], str], as_json: bool) -> None:
    """Prints the object that one request is answered with, as `print_entry` does; closes the client."""
    with client:
        print_entry(client.entry(method, path), line, as_json)


def print_list(
    client: ApiClient, path: str, query: Mapping[str, str], line: Callable[[Mapping], str], as_json: bool
) -> None:
    """Prints every entry of a list, as `print_entry` does; closes the client."""
    with client:
        for entry in client.pages(path, query):
            print_entry(entry, line, as_json)
