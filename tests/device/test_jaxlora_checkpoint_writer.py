"""The background writer: in order, one in flight of a key, bounded, and no error is lost."""

from __future__ import annotations

import threading
from collections import defaultdict

import numpy as np
import pytest

from jaxlora.storage import checkpoint_writer
from jaxlora.storage.checkpoint_writer import CheckpointWriter, Snapshot
from jaxlora.storage.checkpoints import restore_state


def snapshot(folder, step: int, *, best: int | None = None, keep: int = 1) -> Snapshot:
    arrays = {"x": np.full((3, 4), step, np.float32), "count": np.int32(step)}
    return Snapshot(folder=folder, step=step, arrays=arrays, meta={"step": step}, keep=keep, best=best)


class SlowDisk:
    """Stands where save_state stood: saves when it is let, and notes what it was given."""

    def __init__(self, monkeypatch):
        self.saved, self.running, self.most = defaultdict(list), defaultdict(int), 0
        self.go, self.begun = threading.Semaphore(0), threading.Semaphore(0)
        monkeypatch.setattr(checkpoint_writer, "save_state", self.save)

    def save(self, folder, step, arrays, meta, *, keep, best):
        self.running[folder] += 1
        self.most = max(self.most, self.running[folder])
        self.begun.release()
        self.go.acquire()
        self.running[folder] -= 1
        if meta["step"] < 0:
            raise ValueError("a negative step")
        self.saved[folder.name].append(step)


def test_saves_and_keeps_the_newest_and_the_best(tmp_path):
    writer = CheckpointWriter()
    for step in range(1, 6):
        writer.submit("job", snapshot(tmp_path / "job", step, best=2 if step >= 2 else 1))
        writer.flush()  # else a newer one may take the place of one that waits
    writer.close()
    assert [(o.key, o.step, o.error) for o in writer.outcomes()] == [("job", step, None) for step in range(1, 6)]
    assert writer.outcomes() == []
    assert sorted(p.name for p in (tmp_path / "job").iterdir()) == ["2", "5"]
    like = snapshot(tmp_path, 0).arrays
    for step in (2, 5):
        found = restore_state(tmp_path / "job", like, step=step)
        assert (found.step, found.meta) == (step, {"step": step})
        assert isinstance(found.arrays["x"], np.ndarray)
        np.testing.assert_array_equal(found.arrays["x"], np.full((3, 4), step, np.float32))
        assert found.arrays["count"] == step
    assert restore_state(tmp_path / "job", like, step=3) is None
    assert restore_state(tmp_path / "job", like).step == 5


def test_submit_waits_for_no_disk_and_the_newest_takes_the_place_of_those_that_wait(tmp_path, monkeypatch):
    disk, writer = SlowDisk(monkeypatch), CheckpointWriter()
    for step in range(1, 10):
        writer.submit("a", snapshot(tmp_path / "a", step, best=4 if step >= 4 else None))
        if step == 1:
            disk.begun.acquire()  # in flight
    assert disk.saved == {}
    for _ in range(3):
        disk.go.release()
    writer.flush()
    assert disk.saved == {"a": [1, 4, 9]}  # 4 is the best: it is not passed over
    assert disk.most == 1
    writer.close()


def test_keys_do_not_wait_for_each_other(tmp_path, monkeypatch):
    disk, writer = SlowDisk(monkeypatch), CheckpointWriter()
    for key in "ab":
        writer.submit(key, snapshot(tmp_path / key, 1))
    for _ in "ab":
        assert disk.begun.acquire(timeout=60)  # both in flight, none finished
    for _ in "ab":
        disk.go.release()
    writer.close()
    assert disk.saved == {"a": [1], "b": [1]}


@pytest.mark.parametrize("step", [-1, 2])
def test_an_error_is_told_and_the_next_save_goes_on(tmp_path, monkeypatch, step):
    disk, writer = SlowDisk(monkeypatch), CheckpointWriter()
    writer.submit("a", snapshot(tmp_path / "a", step))
    disk.begun.acquire()
    writer.submit("a", snapshot(tmp_path / "a", 3))
    for _ in range(2):
        disk.go.release()
    writer.close()
    outcomes = writer.outcomes()
    assert [(o.step, type(o.error)) for o in outcomes] == [
        (step, ValueError if step < 0 else type(None)),
        (3, type(None)),
    ]
    assert disk.saved["a"][-1] == 3


def test_a_discard_comes_after_what_is_in_flight_and_before_what_follows(tmp_path, monkeypatch):
    disk = SlowDisk(monkeypatch)
    writer = CheckpointWriter()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for key in "ab":
        writer.submit(key, snapshot(tmp_path / key, 1))
    for _ in range(2):
        disk.begun.acquire(timeout=10)
    writer.submit("a", snapshot(tmp_path / "a", 2))
    writer.discard("a", tmp_path / "a")
    assert (tmp_path / "a").exists(), "a save is in flight"
    for _ in range(2):
        disk.go.release()
    writer.flush()
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "b").exists()
    assert disk.saved == {"a": [1], "b": [1]}, "what waited is not saved"
    disk.go.release()
    writer.submit("a", snapshot(tmp_path / "a", 3))
    writer.close()
    assert disk.saved["a"] == [1, 3]
