"""A disk that is really full: a file system of four megabytes, which a process mounts for itself alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = next(p for p in Path(__file__).parents if p.name == "tests") / "support"


def may_mount() -> bool:
    """Whether this system lets a user have file systems of their own."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.fault("R9")
@pytest.mark.skipif(not may_mount(), reason="this system has no namespaces for users")
def test_a_full_disk_loses_nothing_that_was_confirmed_and_shows_nothing_half(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(SUPPORT.parents[1]), str(SUPPORT)])}
    command = ["unshare", "-rm", sys.executable, str(SUPPORT / "full_disk_child.py"), str(disk)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "upload": "storage_full",
        "key": "storage_full",
        "version": "storage_failed",
        "served meanwhile": True,
        "files": ["a.jsonl", "a.jsonl"],
        "kept": "a.jsonl",
        "parts": 0,
        "versions": True,
    }
