"""The HTTP client that the commands ask a running jaxlora server with: objects, lists, files and streams."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Self
from urllib.parse import quote, unquote

import httpx2
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from jaxlora.core.errors import AdapterNotFound, JaxLoraError, StorageFailed

CONNECT_S = 5.0
ANSWER_S = 600.0  # a large upload is checked and written before the answer comes
SILENT_S = 60.0  # a generation that is silent for longer is dead: servers ping
PAGE = 100


class AnswerFailed(JaxLoraError):
    """The server refused or broke off; the message is the server's."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be asked: the base, or an adapter."""

    id: str
    parent: str | None  # None: it is the base
    version: int | None
    rank: int | None
    state: str


class ApiClient:
    """One jaxlora server, asked with one key.  Every method raises AnswerFailed; `with` closes the connections."""

    def __init__(self, url: str, key: str | None):
        """key: of the API, where the server has any."""
        self.url = url.rstrip("/").removesuffix("/v1")
        with reported(self.url):
            self._http = httpx2.Client(
                base_url=self.url + "/v1/",
                headers={} if key is None else {"Authorization": f"Bearer {key}"},
                timeout=httpx2.Timeout(ANSWER_S, connect=CONNECT_S),
                trust_env=False,  # a proxy out of the environment would not find a server on this machine
                event_hooks={"response": [check]},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def entry(
        self, method: str, path: str, body: Mapping[str, object] | None = None, within_s: float = ANSWER_S
    ) -> dict:
        """The object that a request is answered with; body: in JSON."""
        timeout = httpx2.Timeout(within_s, connect=CONNECT_S)
        try:
            with reported(self.url):
                return self._http.request(method, path, json=body, timeout=timeout).json()
        except AnswerFailed as error:
            kind, _, name = path.partition("/")
            if error.code == AdapterNotFound.code and kind in ("adapters", "models") and name:
                name = unquote(name).partition("/")[0].partition("@")[0]
                if close := get_close_matches(name, [m.id for m in self.models()], n=1):
                    raise AnswerFailed(f"{error.message} Did you mean {close[0]}?") from error
            raise

    def text(self, path: str, body: Mapping[str, object]) -> str:
        """The plain text that a body in JSON is answered with."""
        with reported(self.url):
            return self._http.post(path, json=body).text

    def pages(self, path: str, query: Mapping[str, str]) -> Iterator[dict]:
        """Every entry of a list."""
        after: dict[str, str] = {}
        while True:
            with reported(self.url):
                page = self._http.get(path, params={"limit": str(PAGE), **query, **after}).json()
                yield from page["data"]
                if not page["has_more"]:
                    return
                after = {"after": page["last_id"]}

    def models(self) -> list[Model]:
        """The base first, then its adapters."""
        body = self.entry("GET", "models", within_s=SILENT_S)
        with reported(self.url):
            return sorted((_model(m) for m in body["data"]), key=lambda m: m.parent is not None)

    def model(self, name: str) -> Model:
        """The model of any name the server takes, as NAME@VERSION."""
        body = self.entry("GET", "models/" + quote(name, safe="/@"), within_s=SILENT_S)
        with reported(self.url):
            return _model(body)

    def upload(self, path: str, data: Mapping[str, str], files: Sequence[Path]) -> dict:
        """The object that a form of fields and files is answered with."""
        with contextlib.ExitStack() as stack:
            progress = stack.enter_context(_bars())
            opened = [
                ("file", (p.name, stack.enter_context(progress.open(p, "rb", description=p.name)))) for p in files
            ]
            with reported(self.url):
                return self._http.post(path, data=dict(data), files=opened).json()

    def download(self, path: str, query: Mapping[str, str], out: Path) -> None:
        """Writes what is answered, whole or not at all.  Raises StorageFailed, too."""
        partial = out.with_name(f".{out.name}.part")
        with _bars() as progress, reported(self.url), self._http.stream("GET", path, params=query) as response:
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
        with reported(self.url), self._http.stream("GET", path, params=query) as response:
            if response.is_error:
                response.read()
                raise refusal(response)
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise AnswerFailed(event["error"]["message"])
                    yield event

    async def answer(
        self, model: str, messages: Sequence[Mapping[str, str]], settings: Mapping[str, object]
    ) -> AsyncGenerator[str]:
        """The answer of a model, piece by piece.  Leaving it early cancels it on the server.

        On a connection of its own, so that two answers may run on one event loop.
        """
        body = {**settings, "model": model, "messages": list(messages), "stream": True}
        timeout = httpx2.Timeout(CONNECT_S, read=SILENT_S)
        with reported(self.url):
            async with (
                httpx2.AsyncClient(
                    base_url=self._http.base_url, headers=self._http.headers, timeout=timeout, trust_env=False
                ) as http,
                http.stream("POST", "chat/completions", json=body) as response,
            ):
                if response.is_error:
                    await response.aread()
                    raise refusal(response)
                async for line in response.aiter_lines():
                    data = line.removeprefix("data: ")
                    if data == "[DONE]":
                        return
                    if data == line:
                        continue  # a comment, or the end of an event
                    event = json.loads(data)
                    if "error" in event:
                        raise AnswerFailed(str(event["error"]["message"]))
                    for choice in event["choices"]:
                        yield choice["delta"].get("content") or ""
        raise AnswerFailed("the server broke off in the middle of the answer")


@contextlib.contextmanager
def reported(url: str) -> Generator[None]:
    """Raises failures below HTTP, and answers that are not a jaxlora server's, as AnswerFailed."""
    try:
        yield
    except httpx2.ConnectError as error:
        raise AnswerFailed(f"no server answers on {url}; start one with `jaxlora serve`, or give --url") from error
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise AnswerFailed(f"{url}: {str(error) or type(error).__name__}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise AnswerFailed(f"what answers on {url} is no jaxlora server") from error


def check(response: httpx2.Response) -> None:
    """Raises AnswerFailed when the response is a refusal."""
    if response.is_error:
        response.read()
        raise refusal(response)


def refusal(response: httpx2.Response) -> AnswerFailed:
    """The error that the server reports, in its words where it has some."""
    try:
        told = response.json()["error"]
        failed = AnswerFailed(str(told["message"]))
        failed.code = str(told.get("code"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return AnswerFailed(f"the server answered HTTP {response.status_code}")
    return failed


def _model(body: Mapping) -> Model:
    return Model(body["id"], body.get("parent"), body.get("version"), body.get("rank"), body.get("state", ""))


def _bars() -> Progress:
    """Progress of transfers, for a person at stderr, so that stdout is the answer."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
