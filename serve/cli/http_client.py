"""A running jaxlora server, asked over HTTP with one key: what its commands have in common."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path

import httpx2
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from jaxlora.core.errors import StorageFailed
from serve.cli.chat_client import CONNECT_S, bearer, refusal, told

ANSWER_S = 600.0  # a large upload is checked and written before the answer comes
PAGE = 100
Say = Callable[[str], None]


class ApiServer:
    """One jaxlora server, asked with one key."""

    def __init__(self, url: str, key: str | None):
        self.url = url.rstrip("/").removesuffix("/v1")
        timeout = httpx2.Timeout(ANSWER_S, connect=CONNECT_S)
        with told(self.url):
            # No proxy out of the environment: it would not find a server on this machine.
            self.http = httpx2.Client(base_url=self.url + "/v1/", headers=bearer(key), timeout=timeout, trust_env=False)

    def close(self) -> None:
        """Drops the connections."""
        self.http.close()

    def pages(self, path: str, query: Mapping[str, str]) -> Iterator[dict]:
        """Every entry of a list.  Raises AnswerFailed, as all of these do."""
        after: dict[str, str] = {}
        while True:
            with told(self.url):
                page = checked(self.http.get(path, params={"limit": str(PAGE), **query, **after})).json()
                yield from page["data"]
                if not page["has_more"]:
                    return
                after = {"after": page["last_id"]}

    def text(self, path: str, body: Mapping[str, object]) -> str:
        """What the server says in plain text to a body in JSON."""
        with told(self.url):
            return checked(self.http.post(path, json=body)).text

    def entry(self, method: str, path: str, body: Mapping[str, object] | None = None) -> dict:
        """The object that a request is answered with; body: in JSON."""
        with told(self.url):
            return checked(self.http.request(method, path, json=body)).json()

    def upload(self, path: str, data: Mapping[str, str], files: Sequence[Path], progress: Progress) -> dict:
        """The object that a form of fields and files is answered with."""
        with contextlib.ExitStack() as stack:
            opened = [
                ("file", (p.name, stack.enter_context(progress.open(p, "rb", description=p.name)))) for p in files
            ]
            with told(self.url):
                return checked(self.http.post(path, data=dict(data), files=opened)).json()

    def download(self, path: str, query: Mapping[str, str], out: Path, progress: Progress) -> None:
        """Writes what is answered, whole or not at all."""
        partial = out.with_name(f".{out.name}.part")
        with told(self.url), self.http.stream("GET", path, params=query) as response:
            if response.is_error:
                response.read()
                raise refusal(response)
            length = response.headers.get("content-length")
            task = progress.add_task(out.name, total=None if length is None else int(length))
            try:
                with partial.open("wb") as file:
                    for piece in response.iter_bytes():
                        file.write(piece)
                        progress.advance(task, len(piece))
                partial.rename(out)
            except OSError as error:
                raise StorageFailed(f"{out} cannot be written: {error.strerror}") from error
            finally:
                partial.unlink(missing_ok=True)

    def events(self, path: str, query: Mapping[str, str]) -> Iterator[dict]:
        """Each event of a stream as it comes."""
        with told(self.url), self.http.stream("GET", path, params=query) as response:
            if response.is_error:
                response.read()
                raise refusal(response)
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))


def checked(response: httpx2.Response) -> httpx2.Response:
    """The response.  Raises AnswerFailed, with what the server said, when it is a refusal."""
    if response.is_error:
        raise refusal(response)
    return response


@contextlib.contextmanager
def server(url: str, key: str | None) -> Generator[ApiServer]:
    """A server for one command."""
    it = ApiServer(url, key)
    try:
        yield it
    finally:
        it.close()


def bars() -> Progress:
    """Progress of transfers, for a person at stderr, so that stdout is the answer."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
