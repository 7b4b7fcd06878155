"""Training files that were just read: read once, however many ask, within a bound of bytes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxlora.core.errors import DataInvalid
from train.data.example_cache import EXAMPLE_BYTES, KeptExamples
from train.data.examples import Example, Pair, Rollout
from train.data.load import Loaded


class Loader:
    """Reads a file of a number: so many tokens."""

    def __init__(self):
        self.read = []
        self.hold = threading.Event()
        self.hold.set()
        self.begun = threading.Event()

    def __call__(self, path, too_long):
        self.begun.set()
        assert self.hold.wait(10)
        self.read.append(path.name)
        text = path.read_text()
        if not text.isdigit():
            raise DataInvalid("no number")
        return Loaded([example(int(text))], too_long)


def example(tokens, **more):
    weights = np.ones(tokens, np.float32)
    weights[0] = 0
    return Example(np.arange(tokens, dtype=np.int32), weights, **more)


def bytes_of(tokens):
    return EXAMPLE_BYTES + 8 * tokens


@pytest.fixture
def loader():
    return Loader()


@pytest.fixture
def file(tmp_path):
    def make(name, text):
        (tmp_path / name).write_text(str(text))
        return tmp_path / name

    return make


def test_a_file_is_read_once_until_it_is_written_anew(loader, file):
    kept, path = KeptExamples(loader, max_bytes=10**6), file("a", 5)
    assert kept(path) is kept(path)
    assert loader.read == ["a"]
    file("a", 12)
    assert [len(e) for e in kept(path).units] == [12]
    assert loader.read == ["a", "a"]


def test_what_becomes_of_long_examples_is_part_of_what_is_kept(loader, file):
    kept, path = KeptExamples(loader, max_bytes=10**6), file("a", 5)
    assert [kept(path, how).note for how in ("skip", "error", "skip")] == ["skip", "error", "skip"]
    assert loader.read == ["a", "a"]


def test_what_was_used_longest_ago_makes_way(loader, file):
    kept = KeptExamples(loader, max_bytes=2 * bytes_of(9))
    a, b, c = (file(name, 9) for name in "abc")
    for path in (a, b, a, c):
        kept(path)
    assert loader.read == ["a", "b", "c"]
    kept(a)
    assert loader.read == ["a", "b", "c"]
    kept(b)
    assert loader.read == ["a", "b", "c", "b"]


def test_what_is_larger_than_all_of_the_room_is_not_kept_and_drives_nobody_out(loader, file):
    kept = KeptExamples(loader, max_bytes=bytes_of(9))
    small, large = file("small", 9), file("large", 10)
    for path in (small, large, large, small):
        kept(path)
    assert loader.read == ["small", "large", "large"]


def test_all_numbers_of_a_file_count(loader, file):
    rollout = Rollout(np.zeros(4, np.float32), np.zeros(4, np.float32), np.zeros(4, np.bool_))
    units = [Pair(example(4), example(5)), example(4, rollout=rollout)]
    whole = bytes_of(4) + bytes_of(5) + bytes_of(4) + 4 * 9
    path, read = file("a", 1), []

    def load(path, too_long):
        read.append(path)
        return Loaded(units)

    for room, times in ((whole, 1), (whole - 1, 2)):
        kept = KeptExamples(load, max_bytes=room)
        read.clear()
        assert [list(kept(path).units) for _ in range(2)] == [units, units]
        assert len(read) == times


def test_many_who_ask_at_once_wait_for_one_reading(loader, file):
    kept, path = KeptExamples(loader, max_bytes=0), file("a", 5)
    loader.hold.clear()
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(kept, path) for _ in range(4)]
        assert loader.begun.wait(10)
        threading.Timer(0.2, loader.hold.set).start()
        found = [f.result(10) for f in asked]
    assert loader.read == ["a"]
    assert all(f is found[0] for f in found)


@pytest.mark.parametrize("text", ["nonsense", None], ids=["bad", "gone"])
def test_an_error_is_everyones_and_is_not_kept(loader, file, tmp_path, text):
    path = tmp_path / "a" if text is None else file("a", text)
    kept = KeptExamples(loader, max_bytes=10**6)
    for _ in range(2):
        with pytest.raises((DataInvalid, FileNotFoundError)):
            kept(path)
    assert loader.read == ["a", "a"]
