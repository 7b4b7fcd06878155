"""Writes training state to disk in the background: the step loop submits a snapshot and reads the outcome later.

One save of a key (a tenant) is in flight at a time; a snapshot that arrives meanwhile waits, and a newer one replaces
it, unless the waiting one is the best so far.  So memory is bounded: three snapshots per key.  What is saved is sent to
object storage where there is one; a step that could not be sent is sent with the next.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from jaxlora.storage.checkpoints import Tree, save_state
from jaxlora.storage.remote_states import StateCopies

LOG = logging.getLogger("jaxlora")
WORKERS = 2  # keys saved in parallel


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """One step of one tenant, for `save_state`.  The arrays are NumPy and must not change."""

    folder: Path
    step: int
    arrays: Tree
    meta: Mapping[str, object]
    keep: int  # number of newest steps to keep
    best: int | None  # a step to keep besides


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Result of a save."""

    key: str
    step: int
    error: Exception | None


class CheckpointWriter:
    """Saves snapshots.  Thread-safe; `submit`, `discard` and `outcomes` do not wait for a disk."""

    def __init__(
        self,
        ended: Callable[[], None] = lambda: None,
        copies: StateCopies | None = None,
        may_save: Callable[[str], bool] = lambda key: True,
    ) -> None:
        """ended: called on a writer thread when there is a new outcome.  copies: receives what is saved.

        may_save: asked on a writer thread about the key of a snapshot, which else is thrown away.
        """
        self._ended, self._copies, self._may_save = ended, copies, may_save
        self._pool = ThreadPoolExecutor(WORKERS, "checkpoint")
        self._changed = threading.Condition()
        self._waiting: dict[str, list[Snapshot | Path]] = {}  # even of keys with a save in flight; a path is discarded
        self._outcomes: deque[Outcome] = deque()

    def submit(self, key: str, snapshot: Snapshot) -> None:
        """Queues a snapshot behind those of its key that are in flight or stay queued."""
        with self._changed:
            waiting = self._waiting.get(key, [])
            self._line_up(key, [*(s for s in waiting if isinstance(s, Path) or s.step == snapshot.best), snapshot])

    def discard(self, key: str, folder: Path) -> None:
        """Removes a folder of checkpoints after the save of its key in flight; waiting snapshots are not saved."""
        with self._changed:
            self._line_up(key, [folder])

    def _line_up(self, key: str, waiting: list[Snapshot | Path]) -> None:
        idle = key not in self._waiting
        self._waiting[key] = waiting
        if idle:
            self._pool.submit(self._run, key)

    def outcomes(self) -> list[Outcome]:
        """Returns the saves that ended since the last call, each once."""
        with self._changed:
            ended = list(self._outcomes)
            self._outcomes.clear()
            return ended

    def is_busy(self, key: str) -> bool:
        """Whether something of a key is in flight or waits."""
        with self._changed:
            return key in self._waiting

    def flush(self) -> None:
        """Returns when nothing is in flight and nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)

    def close(self) -> None:
        """Finishes what was submitted; nothing may be submitted afterwards."""
        self._pool.shutdown()

    def _run(self, key: str) -> None:
        """Saves what waits of one key, oldest first, until nothing does."""
        while (snapshot := self._next(key)) is not None:
            if isinstance(snapshot, Path):
                self._remove(snapshot)
                continue
            if not self._may_save(key):
                continue
            error: Exception | None = None
            try:
                save_state(
                    snapshot.folder,
                    snapshot.step,
                    snapshot.arrays,
                    snapshot.meta,
                    keep=snapshot.keep,
                    best=snapshot.best,
                )
            except Exception as e:  # any error belongs in the tenant's outcome and must not end this thread
                error = e
            else:
                self._send(snapshot.folder)
            with self._changed:
                self._outcomes.append(Outcome(key=key, step=snapshot.step, error=error))
            self._ended()

    def _send(self, folder: Path) -> None:
        try:
            if self._copies is not None:
                self._copies.send(folder)
        except Exception as error:
            LOG.error("the newest checkpoint of %s is on this machine only: %s", folder.name, error)

    def _remove(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            if self._copies is not None:
                self._copies.delete(folder)
        except Exception as error:
            LOG.error("the checkpoints of %s were not removed from object storage: %s", folder.name, error)

    def _next(self, key: str) -> Snapshot | Path | None:
        with self._changed:
            if self._waiting[key]:
                return self._waiting[key].pop(0)
            del self._waiting[key]
            self._changed.notify_all()
            return None
