"""The process that reads training files for a server, and how their examples travel.  No jax.

A file comes from whoever may upload one; what it costs to read is this process's to pay, which runs after all others of
the machine and ends when it needs more memory or processor time than a file may have.  `train.data.file_readers` starts it
and asks it:

    settings       one argument, JSON: {"tokenizer": folder, "lane_tokens", "setting", "memory_bytes"}
    standard input  a line a file, JSON: {"path", "cpu_s", "too_long"}
    standard output for each file a line of JSON, {"invalid": what is wrong with it} or counts and a note, then arrays (`write_units`)
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import queue
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxlora.core.errors import DataInvalid, JaxLoraError
from train.data import parquet
from train.data.examples import Example, Pair, Rollout, Unit
from train.data.file_formats import is_parquet
from train.data.load import LengthLimit, Loaded, load_file

MEMORY_EXIT = 81  # its memory was not enough
NICENESS = 10
FIRST_VICTIM = "1000"  # of the kernel, when the machine has no memory left

ROLLOUT_COLUMNS = {"logprobs": np.float32, "advantages": np.float32, "ratio_mask": np.bool_}


def write_units(loaded: Loaded, out: io.BufferedIOBase) -> None:
    """Writes the examples or pairs: a line of counts, then flat arrays over all of their segments."""
    units = loaded.units
    segments = [segment for unit in units for segment in unit.segments]
    rollouts = [segment.rollout for segment in segments if segment.rollout is not None]
    counts = {
        "note": loaded.note,
        "units": len(units),
        "segments": len(segments),
        "tokens": sum(map(len, segments)),
        "rollout_tokens": sum(len(rollout.logprobs) for rollout in rollouts),
    }
    out.write(json.dumps(counts).encode() + b"\n")
    out.write(np.array([isinstance(unit, Pair) for unit in units], np.bool_))
    out.write(np.array([len(segment) for segment in segments], np.int32))
    out.write(np.array([segment.rollout is not None for segment in segments], np.bool_))
    for segment in segments:
        out.write(segment.tokens)
    for segment in segments:
        out.write(segment.weights)
    for name in ROLLOUT_COLUMNS:
        for rollout in rollouts:
            out.write(getattr(rollout, name))


def read_units(counts: Mapping, source: io.BufferedIOBase) -> Loaded:
    """Returns what `write_units` wrote after this line of counts.  Raises EOFError when it ends early."""
    is_pair = _read(source, counts["units"], np.bool_)
    lengths = _read(source, counts["segments"], np.int32)
    has_rollout = _read(source, counts["segments"], np.bool_)
    tokens = _split(_read(source, counts["tokens"], np.int32), lengths)
    weights = _split(_read(source, counts["tokens"], np.float32), lengths)
    columns = [_read(source, counts["rollout_tokens"], dtype) for dtype in ROLLOUT_COLUMNS.values()]
    rows = zip(*(_split(column, lengths[has_rollout]) for column in columns), strict=True)
    rollouts = (Rollout(*next(rows)) if has else None for has in has_rollout)
    segments = (Example(*parts) for parts in zip(tokens, weights, rollouts, strict=True))
    units: list[Unit] = [Pair(next(segments), next(segments)) if pair else next(segments) for pair in is_pair]
    return Loaded(units, counts["note"])


def _read(source: io.BufferedIOBase, count: int, dtype: type[np.generic]) -> np.ndarray:
    array = np.empty(count, dtype)
    raw = memoryview(array.view(np.uint8))
    if source.readinto(raw) != len(raw):
        raise EOFError(f"the examples end early: {len(raw)} bytes of {np.dtype(dtype)} were to come")
    return array


def _split(flat: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    ends = np.cumsum(lengths).tolist()
    return [flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def main(settings: Mapping[str, object]) -> None:
    """Reads files until its input ends."""
    import resource  # absent on Windows

    from jaxlora.checkpoints.tokenizer import Tokenizer

    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    os.nice(NICENESS)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(FIRST_VICTIM)
    tokenizer = Tokenizer.from_hf(Path(str(settings["tokenizer"])))
    lane_tokens, memory_bytes = int(str(settings["lane_tokens"])), int(str(settings["memory_bytes"]))
    asked: queue.SimpleQueue[dict] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(asked,), daemon=True).start()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_memory(memory_bytes)
    ready_for_parquet = False
    while True:
        task = asked.get()
        used = resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = math.ceil(used.ru_utime + used.ru_stime + task["cpu_s"])
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        if not ready_for_parquet and is_parquet(task["path"]):
            ready_for_parquet = True
            _limit_memory(None)  # what a library takes is not the file's
            with contextlib.suppress(DataInvalid):  # it is not installed: `load_file` says so
                parquet.prepare()
            _limit_memory(memory_bytes)
        limit = LengthLimit(lane_tokens=lane_tokens, too_long=task["too_long"], setting=str(settings["setting"]))
        try:
            loaded = load_file(task["path"], tokenizer, limit=limit, loss=None, name="the file")
        except JaxLoraError as error:
            out.write(json.dumps({"invalid": error.message}).encode() + b"\n")
        else:
            write_units(loaded, out)
            del loaded
        out.flush()


def _limit_memory(more_bytes: int | None) -> None:
    """Lets the process have so much more than it has now; None: any."""
    import resource

    if sys.platform != "linux":
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = hard if more_bytes is None else pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _listen(asked: queue.SimpleQueue[dict]) -> None:
    """Ends the process with its input: nobody waits for an answer any more."""
    for line in sys.stdin:
        asked.put(json.loads(line))
    os._exit(0)


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except MemoryError:
        os._exit(MEMORY_EXIT)
