"""What a server writes is its own user's alone: uploads, jobs, checkpoints, adapters, the database and its log."""

import contextlib
import os
import stat

import pytest
from test_house_kill import finished, job_of, server

from serve.db.database import Database


def readable(*folders):
    """Files and folders in them that others than their owner may touch."""
    names, wrong = set(), []
    for path in (path for folder in folders for path in folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # it came and went
            wrong += [path] if path.lstat().st_mode & 0o077 else []
            names.add(path.name)
    return names, wrong


def test_a_database_that_others_could_read_is_theirs_no_more(tmp_path):
    """As an older version left it."""
    old = os.umask(0o022)
    try:
        path = tmp_path / "db.sqlite"
        for mode in (None, 0o644):
            if mode is not None:
                path.chmod(mode)
            database = Database(f"sqlite:///{path}")
            made = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
            assert made == {"db.sqlite": 0o600, "db.sqlite-wal": 0o600, "db.sqlite-shm": 0o600}
            database.close()
    finally:
        os.umask(old)


@pytest.mark.slow
def test_nothing_that_a_server_writes_can_be_read_by_others(tmp_path):
    with server(tmp_path) as (_, client):
        finished(client, job_of(client, tmp_path).id)
        names, open_to_others = readable(tmp_path / "data", tmp_path / "adapters")
    assert {"jaxlora.sqlite", "jaxlora.sqlite-wal", "jobs", "files", "counters", "weights"} <= names
    assert open_to_others == []
