"""What `jaxlora adapters` asks of a running server, over HTTP, and how it tells the answers."""

from __future__ import annotations

import json
import time
from pathlib import Path
from urllib.parse import quote

from jaxlora.core.errors import AlreadyExists, InvalidRequest
from jaxlora.peft.archive import FILES
from serve.cli.http_client import Say, bars, server


def at(name: str) -> str:
    """The name as part of a path.  Raises InvalidRequest for one that would lead to another path."""
    if not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise InvalidRequest(f"{name!a} is no name of an adapter; write NAME or TENANT/NAME")
    return quote(name, safe="/@")


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
    form = {"name": name} | ({"allow_base_mismatch": "true"} if any_base else {})
    with server(url, key) as it, bars() as progress:
        entry = it.upload("adapters", form, parts(path), progress)
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
            it.download(f"adapters/{at(name)}/download", {"dtype": dtype}, out, progress)
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
