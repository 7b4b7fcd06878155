"""What `jaxlora adapters` asks of a running server, over HTTP, and how it tells the answers."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

import httpx2
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from jaxlora.archives import FILES
from jaxlora.errors import AlreadyExists, InvalidRequest, StorageFailed
from serve.chat_client import CONNECT_S, refusal, told

IMPORT_S = 600.0  # a large adapter is checked and written before the answer comes
PAGE = 1000
Say = Callable[[str], None]


class AdaptersServer:
    """One jaxlora server, asked with one key."""

    def __init__(self, url: str, key: str | None):
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        timeout = httpx2.Timeout(IMPORT_S, connect=CONNECT_S)
        with told(self.url):
            # No proxy out of the environment: it would not find a server on this machine.
            self._http = httpx2.Client(base_url=self.url + "/v1/", headers=headers, timeout=timeout, trust_env=False)

    def close(self) -> None:
        """Drops the connections."""
        self._http.close()

    def pages(self, path: str, query: Mapping[str, str]) -> Iterator[dict]:
        """Every entry of a list.  Raises AnswerFailed, as all of these do."""
        after: dict[str, str] = {}
        while True:
            with told(self.url):
                page = _checked(self._http.get(path, params={"limit": str(PAGE), **query, **after})).json()
                yield from page["data"]
                if not page["has_more"]:
                    return
                after = {"after": page["last_id"]}

    def text(self, path: str, body: Mapping[str, object]) -> str:
        """What the server says in plain text to a body in JSON."""
        with told(self.url):
            return _checked(self._http.post(path, json=body)).text

    def entry(self, method: str, path: str) -> dict:
        """The object that a request without a body is answered with."""
        with told(self.url):
            return _checked(self._http.request(method, path)).json()

    def upload(self, name: str, paths: list[Path], *, any_base: bool, progress: Progress) -> dict:
        """Sends an archive, or the files of a PEFT folder, as a new version of NAME; what the server says of it."""
        data = {"name": name} | ({"allow_base_mismatch": "true"} if any_base else {})
        with contextlib.ExitStack() as stack:
            files = [("file", (p.name, stack.enter_context(progress.open(p, "rb", description=p.name)))) for p in paths]
            with told(self.url):
                return _checked(self._http.post("adapters", data=data, files=files)).json()

    def download(self, name: str, out: Path, *, dtype: str, progress: Progress) -> None:
        """Writes the zip of a version, whole or not at all."""
        partial = out.with_name(f".{out.name}.part")
        with (
            told(self.url),
            self._http.stream("GET", f"adapters/{at(name)}/download", params={"dtype": dtype}) as response,
        ):
            if response.is_error:
                response.read()
                raise refusal(response)
            total = int(response.headers["content-length"])
            task = progress.add_task(out.name, total=total)
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


def _checked(response: httpx2.Response) -> httpx2.Response:
    """The response.  Raises AnswerFailed, with what the server said, when it is a refusal."""
    if response.is_error:
        raise refusal(response)
    return response


def at(name: str) -> str:
    """The name as part of a path.  Raises InvalidRequest for one that would lead to another path."""
    if not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise InvalidRequest(f"{name!a} is no name of an adapter; write NAME or TENANT/NAME")
    return quote(name, safe="/@")


@contextlib.contextmanager
def server(url: str, key: str | None) -> Generator[AdaptersServer]:
    """A server for one command."""
    it = AdaptersServer(url, key)
    try:
        yield it
    finally:
        it.close()


def bars() -> Progress:
    """Progress of transfers, for a person at stderr, so that stdout is the answer."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def parts(path: Path) -> list[Path]:
    """What to send of a path: an archive, or a PEFT folder's files.  Raises InvalidRequest for any other."""
    if path.is_file():
        return [path]
    files = [path / name for name in FILES if (path / name).is_file()]
    if len(files) < 2:
        raise InvalidRequest(f"{path} is no PEFT folder and no archive of one: it lacks {FILES[0]} or {FILES[1]}")
    return files


def line(entry: dict) -> str:
    """One adapter or version for people."""
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry["created"]))
    pinned = "  pinned" if entry["pinned"] else ""
    return f"{entry['id']:<32}  version {entry['version']:<5}  rank {entry['rank']:<4}  {entry['state']:<6}  {made}{pinned}"


# ---- the commands


def show(*, url: str, key: str | None, prefix: str, as_json: bool, say: Say) -> None:
    """`list`."""
    with server(url, key) as it:
        for entry in it.pages("adapters", {"prefix": prefix}):
            say(json.dumps(entry) if as_json else line(entry))


def versions(*, url: str, key: str | None, name: str, as_json: bool, say: Say) -> None:
    """`versions`."""
    with server(url, key) as it:
        for entry in it.pages(f"adapters/{at(name)}/versions", {}):
            say(json.dumps(entry) if as_json else line(entry))


def upload(*, url: str, key: str | None, name: str, path: Path, any_base: bool, as_json: bool, say: Say) -> None:
    """`upload`."""
    with server(url, key) as it, bars() as progress:
        entry = it.upload(name, parts(path), any_base=any_base, progress=progress)
    if as_json:
        say(json.dumps(entry))
        return
    say(line(entry))
    for note in entry["notes"]:
        say(f"note: {note}")
    if entry["ignored"]:
        say(f"note: these settings have no effect here: {', '.join(entry['ignored'])}")


def download(*, url: str, key: str | None, name: str, out: Path | None, dtype: str, say: Say) -> None:
    """`download`."""
    with server(url, key) as it:
        entry = it.entry("GET", f"adapters/{at(name)}")
        out = out or Path(f"{entry['name']}-{entry['version']}.zip")
        if out.exists():
            raise AlreadyExists(f"{out} exists; name another file with --out")
        with bars() as progress:
            it.download(name, out, dtype=dtype, progress=progress)
    say(f"wrote {name}, version {entry['version']}, into {out}")


def change(*, url: str, key: str | None, name: str, action: str, as_json: bool, say: Say) -> None:
    """`delete`, `pin`, `unpin`."""
    method, path = (
        ("DELETE", f"adapters/{at(name)}") if action == "delete" else ("POST", f"adapters/{at(name)}/{action}")
    )
    with server(url, key) as it:
        entry = it.entry(method, path)
    done = {"delete": "deleted", "pin": "pinned", "unpin": "unpinned"}[action]
    say(json.dumps(entry) if as_json else f"{done} {name}")


def load(*, url: str, key: str | None, name: str, path: str, in_place: bool, any_base: bool, say: Say) -> None:
    """`load`."""
    body = {"lora_name": name, "lora_path": path, "load_inplace": in_place, "allow_base_mismatch": any_base}
    with server(url, key) as it:
        say(it.text("load_lora_adapter", body))


def unload(*, url: str, key: str | None, name: str, say: Say) -> None:
    """`unload`."""
    with server(url, key) as it:
        say(it.text("unload_lora_adapter", {"lora_name": name}))
