"""What `jaxlora jobs` and `jaxlora files` ask of a running server, over HTTP, and how they tell the answers."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from jaxlora.core.errors import AlreadyExists, InvalidRequest
from serve.cli.http_client import ApiServer, Say, bars, server

JOBS = "fine_tuning/jobs"
MOVES = {"cancel": "cancelled", "pause": "paused", "resume": "in line again"}


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
    model = job["fine_tuned_model"] or "-"
    return f"{job['id']}  {job['status']:<16}  {steps:>9}{loss}{held}  {when(job['created_at'])}  {model}"


def event_line(event: Mapping) -> str:
    """One event for people."""
    mark = "" if event["level"] == "info" else f"{event['level']}: "
    return f"{when(event['created_at'])}  {mark}{event['message']}"


def checkpoint_line(checkpoint: Mapping) -> str:
    """One checkpoint for people."""
    numbers = {k: v for k, v in checkpoint["metrics"].items() if k != "step"}
    shown = "  ".join(f"{k} {v:.4f}" for k, v in numbers.items())
    return f"step {checkpoint['step_number']:<6}  {checkpoint['fine_tuned_model_checkpoint']}  {shown}"


def file_line(file: Mapping) -> str:
    """One file for people."""
    wrong = f"  {file['status_details']}" if file.get("status_details") else ""
    return (
        f"{file['id']}  {file['status']:<9}  {file['bytes']:>12}  {when(file['created_at'])}  "
        f"{file['purpose']}  {file['filename']}{wrong}"
    )


# ---- files


def list_files(*, url: str, key: str | None, as_json: bool, say: Say) -> None:
    """`files list`."""
    with server(url, key) as it:
        for file in it.pages("files", {}):
            say(json.dumps(file) if as_json else file_line(file))


def show_file(*, url: str, key: str | None, id: str, as_json: bool, say: Say) -> None:
    """`files show`."""
    with server(url, key) as it:
        file = it.entry("GET", f"files/{at(id)}")
    say(json.dumps(file) if as_json else file_line(file))


def upload_file(*, url: str, key: str | None, path: Path, as_json: bool, say: Say) -> None:
    """`files upload`."""
    with server(url, key) as it:
        file = sent(it, path)
    say(json.dumps(file) if as_json else file_line(file))


def download_file(*, url: str, key: str | None, id: str, out: Path | None, say: Say) -> None:
    """`files download`."""
    with server(url, key) as it:
        file = it.entry("GET", f"files/{at(id)}")
        out = Path(Path(file["filename"]).name or id) if out is None else out
        if out.exists():
            raise AlreadyExists(f"{out} exists; name another file with --out")
        with bars() as progress:
            it.download(f"files/{at(id)}/content", {}, out, progress)
    say(f"wrote {id} into {out}")


def delete_file(*, url: str, key: str | None, id: str, as_json: bool, say: Say) -> None:
    """`files delete`."""
    with server(url, key) as it:
        gone = it.entry("DELETE", f"files/{at(id)}")
    say(json.dumps(gone) if as_json else f"deleted {id}")


def sent(it: ApiServer, path: Path) -> dict:
    """The file that the server has made of a local one.  Raises InvalidRequest when there is none."""
    if not path.is_file():
        raise InvalidRequest(f"{path} is no file; give a JSONL file")
    with bars() as progress:
        return it.upload("files", {"purpose": "fine-tune"}, [path], progress)


def file_id(it: ApiServer, given: str) -> str:
    """The id of a file of the server: itself, or of a local file that is sent now."""
    if given.startswith("file-") and not Path(given).exists():
        return given
    return str(sent(it, Path(given))["id"])


# ---- jobs


def create_job(
    *,
    url: str,
    key: str | None,
    train: str,
    heldout: str | None,
    body: Mapping[str, object],
    follow: bool,
    as_json: bool,
    say: Say,
) -> None:
    """`jobs create`."""
    with server(url, key) as it:
        files = {"training_file": file_id(it, train)}
        if heldout is not None:
            files["validation_file"] = file_id(it, heldout)
        job = it.entry("POST", JOBS, {**body, **files})
        say(json.dumps(job) if as_json else job_line(job))
        if follow:
            follow_job(it, job["id"], as_json, say)


def list_jobs(*, url: str, key: str | None, as_json: bool, say: Say) -> None:
    """`jobs list`."""
    with server(url, key) as it:
        for job in it.pages(JOBS, {}):
            say(json.dumps(job) if as_json else job_line(job))


def show_job(*, url: str, key: str | None, id: str, as_json: bool, say: Say) -> None:
    """`jobs show`."""
    with server(url, key) as it:
        job = it.entry("GET", f"{JOBS}/{at(id)}")
    say(json.dumps(job) if as_json else job_line(job))
    if job["error"] is not None and not as_json:
        say(f"{job['error']['code']}: {job['error']['message']}")


def show_events(*, url: str, key: str | None, id: str, follow: bool, as_json: bool, say: Say) -> None:
    """`jobs events`, oldest first."""
    with server(url, key) as it:
        if follow:
            follow_job(it, id, as_json, say)
            return
        for event in reversed(list(it.pages(f"{JOBS}/{at(id)}/events", {}))):
            say(json.dumps(event) if as_json else event_line(event))


def follow_job(it: ApiServer, id: str, as_json: bool, say: Say) -> None:
    """All events of a job, and on until it ends."""
    for event in it.events(f"{JOBS}/{at(id)}/events", {"stream": "true"}):
        say(json.dumps(event) if as_json else event_line(event))


def show_checkpoints(*, url: str, key: str | None, id: str, as_json: bool, say: Say) -> None:
    """`jobs checkpoints`, newest first."""
    with server(url, key) as it:
        for checkpoint in it.pages(f"{JOBS}/{at(id)}/checkpoints", {}):
            say(json.dumps(checkpoint) if as_json else checkpoint_line(checkpoint))


def move_job(*, url: str, key: str | None, id: str, move: str, as_json: bool, say: Say) -> None:
    """`jobs cancel`, `pause`, `resume`."""
    with server(url, key) as it:
        job = it.entry("POST", f"{JOBS}/{at(id)}/{move}")
    say(json.dumps(job) if as_json else f"{id} is {MOVES[move]}")
