"""What `jaxlora chat` asks of a running server, over HTTP."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

import httpx2

from jaxlora.core.errors import JaxLoraError

CONNECT_S, READ_S = 5.0, 60.0  # a stream that is silent for longer is dead: servers ping


class AnswerFailed(JaxLoraError):
    """The server refused or broke off; the message is what it said."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be asked: the base, or an adapter."""

    id: str
    parent: str | None  # None: it is the base
    version: int | None
    rank: int | None
    state: str


def bearer(key: str | None) -> dict[str, str]:
    """The headers that say who asks."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


class Server:
    """One jaxlora server.  Used on one event loop."""

    def __init__(self, url: str, key: str | None = None):
        """key: of the API, where the server has any."""
        self.url = url.rstrip("/").removesuffix("/v1")
        timeout = httpx2.Timeout(CONNECT_S, read=READ_S)
        with told(self.url):
            # No proxy out of the environment: it would not find a server on this machine.
            self._http = httpx2.AsyncClient(
                base_url=self.url + "/v1/", headers=bearer(key), timeout=timeout, trust_env=False
            )

    async def close(self) -> None:
        """Drops the connections."""
        await self._http.aclose()

    async def models(self) -> list[Model]:
        """The base first, then its adapters.  Raises AnswerFailed."""
        body = await self._read("models")
        found = [_model(m) for m in body["data"]]
        return sorted(found, key=lambda m: m.parent is not None)

    async def model(self, name: str) -> Model:
        """The model of any name the server takes, as NAME@VERSION.  Raises AnswerFailed."""
        return _model(await self._read("models/" + quote(name, safe="/@")))

    async def answer(
        self, model: str, messages: Sequence[Mapping[str, str]], settings: Mapping[str, object]
    ) -> AsyncGenerator[str]:
        """The answer's text, piece by piece.  Leaving it early cancels it on the server.  Raises AnswerFailed."""
        body = {**settings, "model": model, "messages": list(messages), "stream": True}
        with told(self.url):
            async with self._http.stream("POST", "chat/completions", json=body) as response:
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

    async def _read(self, path: str) -> dict:
        with told(self.url):
            response = await self._http.get(path)
            if response.is_error:
                raise refusal(response)
            return response.json()


@contextlib.contextmanager
def told(url: str) -> Generator[None]:
    """Failures below HTTP, and answers that are not a jaxlora server's, as AnswerFailed."""
    try:
        yield
    except httpx2.ConnectError as error:
        raise AnswerFailed(f"no server answers on {url}; start one with `jaxlora serve`, or give --url") from error
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise AnswerFailed(f"{url}: {str(error) or type(error).__name__}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise AnswerFailed(f"what answers on {url} is no jaxlora server") from error


def _model(body: Mapping) -> Model:
    return Model(body["id"], body.get("parent"), body.get("version"), body.get("rank"), body.get("state", ""))


def refusal(response: httpx2.Response) -> AnswerFailed:
    """What the server said, in its words where it has some."""
    try:
        said = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        said = f"the server answered HTTP {response.status_code}"
    return AnswerFailed(said)
