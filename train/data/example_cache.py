"""Cache of training files that were parsed a short time ago.  No jax.

A file is read when it is checked, when its examples are counted, when a job is examined and when the job gets a slot;
these reads mostly follow each other closely.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from jaxlora.config.training import TooLong
from jaxlora.storage.single_flight import SingleFlight
from train.data.examples import Unit
from train.data.load import Loaded

EXAMPLE_BYTES = 400  # memory of an example, besides its numbers

type Key = tuple[Path, int, int, int, TooLong]  # a rewritten file has another key


class KeptExamples:
    """Reads training files and keeps the most recently used ones, up to `max_bytes`.  Thread-safe."""

    def __init__(self, load: Callable[[Path, TooLong], Loaded], *, max_bytes: int):
        """load: reads a file, and raises DataInvalid for a bad one."""
        self._load, self._max_bytes = load, max_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[Key, tuple[Loaded, int]] = OrderedDict()  # examples, bytes; oldest use first
        self._nbytes = 0
        self._readings: SingleFlight[Key, Loaded] = SingleFlight()

    def __call__(self, path: Path, too_long: TooLong = "error") -> Loaded:
        """Returns the file's examples; waits when another thread is reading the same file.  Raises as `load` does."""
        key = _key(path, too_long)
        if key is None:
            return self._load(path, too_long)  # this raises the error that explains what is wrong
        return self._readings.get(key, lambda: self._find(key), lambda: self._keep(key, self._load(path, too_long)))

    def _find(self, key: Key) -> Loaded | None:
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def _keep(self, key: Key, loaded: Loaded) -> Loaded:
        nbytes = sum(map(_bytes, loaded.units))
        with self._lock:
            if nbytes <= self._max_bytes:
                self._kept[key] = loaded, nbytes
                self._nbytes += nbytes
            while self._nbytes > self._max_bytes:
                _, (_, freed) = self._kept.popitem(last=False)
                self._nbytes -= freed
        return loaded


def _key(path: Path, too_long: TooLong) -> Key | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return path, found.st_ino, found.st_size, found.st_mtime_ns, too_long


def _bytes(unit: Unit) -> int:
    total = 0
    for e in unit.segments:
        arrays = [e.tokens, e.weights]
        if e.rollout is not None:
            arrays += [e.rollout.logprobs, e.rollout.advantages, e.rollout.ratio_mask]
        total += EXAMPLE_BYTES + sum(a.nbytes for a in arrays)
    return total
