"""A process that is killed between two writes: `python crash_child.py`, one order a line of input, one result a line of output.

    {"case": "adapters", "folder": "…", "seed": 3, "at": 17}  →  {"calls": 17, "killed": true, "said": [["try", …], ["done", …]]}

Each order runs in a fork of this process, which has imported everything and done nothing.  Before its `at`-th call that
changes the disk (a rename, fsync, new folder or file, removal, the commit of a transaction, and after that) the fork is
gone, as by kill -9: in whatever thread the call is made.  What it had said before is what a client may count on.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from database_world import checkpoint_record, event, job_record
from files_world import GOOD, opened
from sqlalchemy.engine.default import DefaultDialect
from store_world import LARGE, make

from jaxlora.storage.adapter_store import AdapterStore
from jaxlora.storage.checkpoint_writer import CheckpointWriter, Snapshot
from jaxlora.storage.disk_cache import DiskCopies
from jaxlora.storage.object_store import Blobs
from jaxlora.storage.remote_adapters import RemoteVersions
from serve.db.database import Database
from serve.db.jobs import StoredJobs
from train.jobs.status import JobStatus

KILLED = 9
CREATES = os.O_CREAT | os.O_TRUNC

type Say = Callable[..., None]


class Points:
    """The calls that change the disk, counted; the process ends before one of them."""

    def __init__(self, at: int):
        self.at, self.calls, self._lock = at, 0, threading.Lock()
        for name in ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self.counted(getattr(os, name)))
        open_ = os.open
        counted = self.counted(open_)
        os.open = lambda path, flags, *a, **k: (counted if flags & CREATES else open_)(path, flags, *a, **k)
        commit = DefaultDialect.do_commit

        def committed(dialect, connection):
            self.reach()
            commit(dialect, connection)
            self.reach()

        DefaultDialect.do_commit = committed

    def reach(self) -> None:
        with self._lock:
            self.calls += 1
            if self.calls == self.at:
                os._exit(KILLED)

    def counted(self, call: Callable) -> Callable:
        def counted(*args, **kwargs):
            self.reach()
            return call(*args, **kwargs)

        return counted


def open_store(folder: Path, remote: bool) -> AdapterStore:
    """The store of a machine, with object storage that outlives it if wanted."""
    there = None
    if remote:
        (folder.parent / "bucket").mkdir(exist_ok=True)
        there = RemoteVersions(Blobs(f"file://{folder.parent}/bucket", timeout_s=20), DiskCopies(None))
    return AdapterStore(folder, host_bytes=LARGE, remote=there)


def adapters(folder: Path, draw: random.Random, say: Say, *, remote: bool = False) -> None:
    """Versions come and go; what is said of one is its name and number."""
    store = open_store(folder / "store", remote)
    for _ in range(9):
        name = draw.choice("ab")
        versions = store.versions("acme", name)
        match draw.choice(("publish", "publish", "publish", "one", "all")):
            case "publish":
                ref = store.mint("acme", name)
                say("try", "publish", name, ref.version)
                store.put(make(ref))
                if draw.random() < 0.7:
                    store.wait_saved(ref)
                    say("done", "publish", name, ref.version)
            case "one" if versions:
                ref = draw.choice(versions)
                say("try", "delete", name, ref.version)
                store.delete_version(ref)
                say("done", "delete", name, ref.version)
            case "all" if versions:
                for ref in versions:
                    say("try", "delete", name, ref.version)
                store.delete("acme", name)
                for ref in versions:
                    say("done", "delete", name, ref.version)
    store.close()


def files(folder: Path, draw: random.Random, say: Say) -> None:
    """Uploads come and go; what is said of one is its name, and its id when it is known."""
    database = Database(f"sqlite:///{folder}/records.sqlite")
    with opened(database, folder / "files") as store:
        ids: dict[str, str] = {}
        for i in range(6):
            if ids and draw.random() < 0.4:
                name = draw.choice(sorted(ids))
                say("try", "delete", name)
                store.delete(ids.pop(name), "acme")
                say("done", "delete", name)
            else:
                say("try", "upload", f"{i}.jsonl")
                ids[f"{i}.jsonl"] = store.keep("acme", f"{i}.jsonl", "fine-tune", GOOD * (i + 1)).id
                say("done", "upload", f"{i}.jsonl")
    database.close()


def jobs(folder: Path, draw: random.Random, say: Say) -> None:
    """Jobs are created, run and evaluated; each change comes with an event."""
    database = Database(f"sqlite:///{folder}/records.sqlite")
    stored = StoredJobs(database)
    for i in range(4):
        record = job_record(f"ftjob-{i}", metadata={})
        say("try", "create", record.id)
        stored.insert(record, events=[event("created")])
        say("done", "create", record.id)
        if draw.random() < 0.6:
            say("try", "run", record.id)
            record = replace(record, status=JobStatus.RUNNING)
            stored.save(record, events=[event("running")])
            say("done", "run", record.id)
            if draw.random() < 0.6:
                say("try", "evaluate", record.id)
                scored = replace(checkpoint_record(1, job=record.id), id=f"ftckpt-{i}")
                stored.save(record, events=[event("evaluated")], checkpoints=[scored])
                say("done", "evaluate", record.id)
    database.close()


def checkpoints(folder: Path, draw: random.Random, say: Say) -> None:
    """Steps are saved, and only the newest two are kept."""
    writer = CheckpointWriter()
    for step in range(1, 5):
        say("try", "save", step)
        arrays = {"x": np.full(5, step, np.float32), "y": np.arange(step, step + 3)}
        snapshot = Snapshot(folder=folder / "job", step=step, arrays=arrays, meta={"step": step}, keep=2, best=None)
        writer.submit("job", snapshot)
        writer.flush()
        assert [o.error for o in writer.outcomes()] == [None]
        say("done", "save", step)
    writer.close()


CASES = {
    "adapters": adapters,
    "remote": lambda *a: adapters(*a, remote=True),
    "files": files,
    "jobs": jobs,
    "checkpoints": checkpoints,
}


def run(order: dict, out: int) -> None:
    """Obeys an order, in a fork."""
    points = Points(order["at"])
    write = os.write

    def say(*words) -> None:
        write(out, (json.dumps(words) + "\n").encode())

    CASES[order["case"]](Path(order["folder"]), random.Random(order["seed"]), say)
    say("end", points.calls)


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        read, out = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            code = 1
            try:
                run(order, out)
                code = 0
            finally:
                os._exit(code)
        os.close(out)
        with open(read) as said:
            words = [json.loads(text) for text in said]
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        calls = words.pop()[1] if code == 0 else order["at"]
        print(json.dumps({"calls": calls, "code": code, "said": words}), flush=True)


if __name__ == "__main__":
    main()
