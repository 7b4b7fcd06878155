"""kill -9 between any two writes of publish, delete, upload, job, evaluation and checkpoint, then a start: nothing that was confirmed is
lost, nothing whose deletion was confirmed is back, and nothing is half there.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from crash_child import KILLED, open_store
from files_world import GOOD, opened
from store_world import make, put, same

from jaxlora.core.errors import AdapterNotFound
from jaxlora.core.lora import AdapterRef
from jaxlora.storage.checkpoints import restore_state, save_state
from serve.db.database import Database
from serve.db.jobs import StoredJobs
from train.jobs.status import JobStatus

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())
ENDLESS = 10**9

type Words = list[tuple]
type Order = Callable[..., dict]


@pytest.fixture(scope="module")
def order() -> Iterator[Order]:
    """Has the child obey an order."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    env = os.environ | {"PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(ROOT / "tests" / "support" / "crash_child.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as child:
        assert child.stdin is not None
        assert child.stdout is not None

        def ask(**order) -> dict:
            print(json.dumps(order, default=str), file=child.stdin, flush=True)
            return json.loads(child.stdout.readline())

        yield ask
        child.stdin.close()


def words(said: list, kind: str, what: str) -> set[tuple]:
    return {tuple(rest) for k, w, *rest in said if (k, w) == (kind, what)}


def check_adapters(folder: Path, said: list, *, remote: bool = False) -> None:
    tried, done = words(said, "try", "publish"), words(said, "done", "publish")
    leaving, left = words(said, "try", "delete"), words(said, "done", "delete")
    machines = ["store", "store", "another"] if remote else ["store", "store"]
    for machine in machines:
        store = open_store(folder / machine, remote)
        listed = {(ref.name, v.version) for ref in store.list(None) for v in store.versions("acme", ref.name)}
        assert done - leaving <= listed, "a version that was said to be saved is gone"
        assert not listed & left, "a version that was said to be deleted is back"
        assert listed <= tried, "a version that nobody made"
        for name, version in listed:
            ref = AdapterRef("acme", name, version)
            assert same(store.get(ref), make(ref)), "a version is half there"
        for name, version in left:
            with pytest.raises(AdapterNotFound):
                store.get(AdapterRef("acme", name, version))
        store.flush()
        assert not [p for p in (folder / machine / "trash").iterdir() if p.is_dir()], "what went stays in the way"
        store.close()
    store = open_store(folder / "store", remote)
    for name in "ab":
        assert put(store, name=name).ref.version > max((v for n, v in tried if n == name), default=0)
    store.close()


def check_remote(folder: Path, said: list) -> None:
    check_adapters(folder, said, remote=True)


def check_files(folder: Path, said: list) -> None:
    tried, done = words(said, "try", "upload"), words(said, "done", "upload")
    leaving, left = words(said, "try", "delete"), words(said, "done", "delete")
    for _ in range(2):
        database = Database(f"sqlite:///{folder}/records.sqlite")
        with opened(database, folder / "files") as store:
            page = store.page("acme", after=None, limit=99, purpose=None, oldest_first=True).records
            listed = {(record.filename,) for record in page}
            assert len(listed) == len(page), "a file is there twice"
            assert done - leaving <= listed <= tried
            assert not listed & left
            for record in page:
                assert store.path(record).read_bytes() == GOOD * (int(record.filename.split(".")[0]) + 1)
            store.keep("acme", "another", "fine-tune", GOOD)
            store.delete(
                store.page("acme", after=None, limit=1, purpose=None, oldest_first=False).records[0].id, "acme"
            )
        database.close()


def check_jobs(folder: Path, said: list) -> None:
    database = Database(f"sqlite:///{folder}/records.sqlite")
    stored = StoredJobs(database)
    records = {record.id: record for record in stored.unfinished()}
    assert {id for (id,) in words(said, "done", "create")} <= set(records)
    assert set(records) <= {id for (id,) in words(said, "try", "create")}
    for id, record in records.items():
        runs = record.status is JobStatus.RUNNING
        assert runs or (id,) not in words(said, "done", "run")
        events = [e.message for e in stored.events_since(id, None, 0, limit=9)]
        scored = stored.checkpoints(id, None, after=None, limit=9).records
        assert len(scored) == 1 or (id,) not in words(said, "done", "evaluate"), "an evaluation is gone"
        expected = ["created", "running", "evaluated"][: 1 + runs + len(scored)]
        assert events == expected, "an event without its change, or the other way round"
    database.close()


def check_checkpoints(folder: Path, said: list) -> None:
    tried, done = words(said, "try", "save"), words(said, "done", "save")
    like = {"x": np.zeros(5, np.float32), "y": np.zeros(3, np.int64)}
    found = restore_state(folder / "job", like)
    if found is None:
        assert not done
    else:
        assert max(done, default=(0,)) <= (found.step,) <= max(tried)
        assert found.meta == {"step": found.step}
        assert (found.arrays["x"] == found.step).all()
        assert (found.arrays["y"] == np.arange(found.step, found.step + 3)).all()
    save_state(folder / "job", 9, like, {"step": 9})
    assert sorted(p.name for p in (folder / "job").iterdir()) == sorted(
        {"9"} | ({str(found.step)} if found is not None else set())
    )


CHECKS = {
    "adapters": check_adapters,
    "remote": check_remote,
    "files": check_files,
    "jobs": check_jobs,
    "checkpoints": check_checkpoints,
}


@pytest.mark.fault("C2")
@pytest.mark.parametrize("case", CHECKS)
@pytest.mark.parametrize("points", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_kill_9_between_two_writes_loses_nothing_that_was_confirmed(order, tmp_path, case, points):
    draw, killed = random.Random(f"{case}-{points}"), 0
    for i in range(points):
        seed = draw.randrange(10**6)
        folders = [tmp_path / f"{i}-{end}" for end in ("whole", "killed")]
        for folder in folders:
            folder.mkdir()
        whole = order(case=case, folder=folders[0], seed=seed, at=ENDLESS)
        assert whole["code"] == 0
        CHECKS[case](folders[0], whole["said"])
        at = draw.randrange(1, whole["calls"] + 1)
        found = order(case=case, folder=folders[1], seed=seed, at=at)
        assert found["code"] in (0, KILLED), f"seed {seed}, point {at}"
        killed += found["code"] == KILLED
        try:
            CHECKS[case](folders[1], found["said"])
        except AssertionError as error:
            error.add_note(f"case {case}, seed {seed}, killed before call {at} of {whole['calls']}")
            raise
    assert killed >= points // 2
