"""Files read in other processes: what comes back, and what becomes of one that takes too much."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import numpy as np
import pytest
from small_world import tiny_path

from jaxlora.checkpoints.tokenizer import Tokenizer
from jaxlora.core.errors import DataInvalid, StorageAway, Unavailable
from train.data import file_readers
from train.data.file_readers import FileReaders, ReaderLimits
from train.data.load import LengthLimit, Loaded, load_file
from train.data.reader_process import read_units, write_units

ASK, ANSWER = {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}
TEXT = {"text": "so much for that"}
KINDS = [
    {"messages": [ASK, ANSWER]},
    {"input": {"messages": [ASK]}, "preferred_output": [ANSWER], "non_preferred_output": [dict(ANSWER, content="no")]},
    {"input_ids": [4, 5], "logprobs": [0, -1], "advantages": [0, 1], "sequence_ratio_mask": [0, 1]},
    {"prompt": "añ", "completion": "b"},
    {"input_ids": [4, 5, 6], "weights": [0, 1.5, -1]},
    {"input_ids": [7, 5, 6], "logprobs": [0, -1, -2], "advantages": [0, 1, 3]},
    TEXT,
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_hf(tiny_path("tiny-llama-tied"))


@pytest.fixture
def write(tmp_path):
    def write(name, *lines):
        path = tmp_path / name
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return path

    return write


@pytest.fixture
def readers(tokenizer, tmp_path):
    with contextlib.ExitStack() as stack:

        def start(*, lane_tokens=63, memory_bytes=2**30, cpu_s=60.0):
            limits = ReaderLimits(memory_bytes=memory_bytes, cpu_s=cpu_s)
            made = FileReaders(tokenizer, tmp_path / "tokenizer", lane_tokens=lane_tokens, limits=limits)
            stack.callback(made.close)
            return made

        yield start


def here(path, tokenizer, **how):
    """As `FileReaders.load` reads it, in this process."""
    limit = LengthLimit(lane_tokens=63, setting="training.longest_tokens", **how)
    return load_file(path, tokenizer, limit=limit, loss=None, name="the file")


def plain(units):
    """All that they hold, comparable."""
    rows = []
    for unit in units:
        for e in unit.segments:
            rollout = e.rollout and [
                x.tolist() for x in (e.rollout.logprobs, e.rollout.advantages, e.rollout.ratio_mask)
            ]
            rows.append((type(unit).__name__, e.tokens.tolist(), e.weights.tolist(), rollout))
    return rows


def test_units_come_out_as_they_went_in(tokenizer, write):
    units = [here(write("one", line), tokenizer).units[0] for line in KINDS]
    for some, note in ((units, "a note"), (units[:1], None), (units[2:3], None), ([], None)):
        stream = io.BytesIO()
        write_units(Loaded(some, note), stream)
        stream.seek(0)
        came = read_units(json.loads(stream.readline()), stream)
        assert (plain(came.units), came.note) == (plain(some), note)
        assert stream.read() == b""
    write_units(Loaded(units), stream := io.BytesIO())
    cut = io.BytesIO(stream.getvalue()[:-1])
    with pytest.raises(EOFError):
        read_units(json.loads(cut.readline()), cut)


def test_a_file_is_read_as_in_this_process_whatever_it_holds(tokenizer, readers, write):
    there, bad = readers(), write("bad", TEXT, "{", {"text": "x " * 500})
    for lines in ([KINDS[1]], [KINDS[2], KINDS[5]], [line for line in KINDS if KINDS.index(line) not in (1, 2, 5)]):
        good = write("good", *lines)
        assert plain(there.load(good, "a").units) == plain(here(good, tokenizer).units)
    for path in (bad, bad.parent / "gone"):
        says = []
        for load in (lambda p: there.load(p, "a"), lambda p: here(p, tokenizer)):
            with pytest.raises(DataInvalid) as caught:
                load(path)
            says.append(caught.value.message)
        assert says[0] == says[1]
    assert np.concatenate([e.tokens for e in there.load(write("more", TEXT), "b").units]).dtype == np.int32


def test_a_file_that_takes_too_much_memory_ends_its_reader_and_nothing_else(readers, write):
    there, good = readers(lane_tokens=10**5, memory_bytes=2**25), write("good", TEXT)
    bomb = write("bomb", '{"text": [' + "[]," * 10**6 + "[]]}")
    for _ in range(2):
        with pytest.raises(DataInvalid, match="more than 32 MiB of memory; divide it"):
            there.load(bomb, "a")
        assert len(there.load(good, "b").units) == 1


@pytest.mark.parametrize("bomb", ["cell", "rows"])
def test_a_parquet_file_that_unpacks_to_too_much_ends_its_reader_and_nothing_else(readers, write, tmp_path, bomb):
    """What it takes to import pyarrow is no file's: a good one is read within the same limit."""
    pyarrow = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    there = readers(memory_bytes=2**25)
    good, bad = tmp_path / "good", tmp_path / "bad"
    pq.write_table(pyarrow.table({"text": [TEXT["text"]]}), good)
    texts = pyarrow.array(["x" * 2**26]) if bomb == "cell" else pyarrow.repeat("so much for that", 2 * 10**5)
    pq.write_table(pyarrow.table({"text": texts}), bad, compression="zstd")
    assert bad.stat().st_size < 2**20
    for _ in range(2):
        assert plain(there.load(good, "a").units) == plain(there.load(write("line", TEXT), "a").units)
        with pytest.raises(DataInvalid, match="more than 32 MiB of memory; divide it"):
            there.load(bad, "a")


def test_a_table_of_one_huge_cell_is_refused_in_little_memory(readers, write):
    there = readers(memory_bytes=2**25)
    for start, end in (
        ('prompt,completion\na,"', ""),
        ('prompt,completion\na,"', '"\nc,d'),
        ("prompt,completion\na,", ""),
    ):
        path = write("huge", start + ("x" * 1000 + "\n") * 2**15 + end if '"' in start else start + "x" * 2**25 + end)
        with pytest.raises(DataInvalid, match=r"line 2: [0-9]+ bytes, more than the"):
            there.load(path, "a")
        if end:
            assert len(there.load(path, "a", "skip").units) == 1


def test_what_becomes_of_long_examples_and_what_is_said_of_them_comes_back(tokenizer, readers, write):
    there, path = readers(), write("long", TEXT, {"text": "x y " * 200}, TEXT)
    for how in ("skip", "truncate"):
        came, wanted = there.load(path, "a", how), here(path, tokenizer, too_long=how)
        assert (plain(came.units), came.note) == (plain(wanted.units), wanted.note)
        assert "training.longest_tokens = 63" in came.note
    with pytest.raises(DataInvalid, match=r"training.longest_tokens = \d+ or more would hold all"):
        there.load(path, "a")


def test_a_file_that_takes_too_long_ends_its_reader_and_nothing_else(readers, write):
    there, good = readers(lane_tokens=10**6, cpu_s=0.5), write("good", TEXT)
    with pytest.raises(DataInvalid, match=r"more than 0 s of processor time|more than 1 s of processor time"):
        there.load(write("slow", {"messages": [ASK, ANSWER] * 300}), "a")
    assert len(there.load(good, "a").units) == 1


def test_a_tenant_of_many_files_leaves_a_reader_to_others(readers, write, tmp_path):
    """Its files are pipes, which are read for as long as the test wants."""
    there, pipe = readers(), tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(3) as pool:
        busy = [pool.submit(there.load, pipe, "busy") for _ in range(3)]
        assert len(there.load(write("good", TEXT, TEXT), "quiet").units) == 2
        assert not any(future.done() for future in busy)
        for _ in range(3):
            pipe.write_text(json.dumps(TEXT))  # returns when somebody reads it
            done, busy = wait(busy, 60, FIRST_COMPLETED)  # in whichever order the threads of the pool asked
            assert [len(future.result().units) for future in done] == [1]


def test_a_server_that_ends_does_not_wait_for_a_file(readers, tmp_path):
    there, pipe, ended = readers(), tmp_path / "pipe", threading.Event()
    os.mkfifo(pipe)
    says = []

    def read():
        try:
            there.load(pipe, "a")
        except Unavailable as error:
            says.append(error.message)
        ended.set()

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    with pipe.open("w"):  # opens when the reader has begun
        there.close()
        for thread in threads:
            thread.join(10)
    assert says == ["the server is stopping"] * 2
    with pytest.raises(Unavailable):
        there.load(pipe, "a")


def test_a_machine_that_starts_no_process_says_nothing_of_the_file(monkeypatch, readers, write):
    there, good = readers(), write("good", TEXT)

    def full(*args, **how):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", full)
        with pytest.raises(StorageAway, match="Too many open files"):
            there.load(good, "a")
    assert len(there.load(good, "a").units) == 1


def test_a_reader_killed_while_idle_is_replaced(readers, write):
    there, good = readers(), write("good", TEXT)
    there.load(good, "a")
    for process in list(there._processes):
        process.kill()
        process.wait()
    assert len(there.load(good, "a").units) == 1


def test_a_reader_that_stands_still_is_ended_and_replaced(monkeypatch, readers, write):
    """As one does whose library waits for memory that it never gets."""
    monkeypatch.setattr(file_readers, "POLL_S", 0.02)
    monkeypatch.setattr(file_readers, "STUCK_S", 0.2)
    readers = readers()
    command = readers._command
    monkeypatch.setattr(readers, "_command", [sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(DataInvalid, match="of memory; divide it"):
        readers.load(write("a.jsonl", TEXT), "acme")
    monkeypatch.setattr(readers, "_command", command)
    monkeypatch.setattr(file_readers, "STUCK_S", 10.0)
    assert len(readers.load(write("b.jsonl", TEXT), "acme").units) == 1
