"""Threads that read and check what jobs bring, and the jobs that wait for them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

from jaxlora.core.errors import JaxLoraError, StorageAway
from train.job_files import Facts, JobFiles, LiveJob, Material

LOG = logging.getLogger("train")
FILE_THREADS = 2  # that read and check training files
RETRY_S = 5.0  # when object storage does not answer


class JobReaders:
    """Whose files are being read.  Of one thread; `done` alone is called on others."""

    def __init__(self, files: JobFiles, done: Callable[[], None]):
        self._files, self._done = files, done
        self._pool = ThreadPoolExecutor(FILE_THREADS, "job-files")
        self._reading: dict[str, LiveJob] = {}
        self._ended = threading.Event()

    def examine(self, live: LiveJob) -> None:
        """Has the files of a new job read and checked."""
        job = live.job

        def examine() -> Facts:
            return self._patiently(lambda: self._files.examine(job.id, job.request))

        live.examining = self._pool.submit(examine)
        self._await(live, live.examining)

    def open(self, live: LiveJob, *, parked: bool) -> None:
        """Has read what a job needs in its slot, which is kept free meanwhile."""
        assert live.facts is not None
        job, facts = live.job, live.facts

        def open_() -> Material:
            return self._patiently(lambda: self._files.open(job.id, job.request, facts, parked=parked))

        live.opening = self._pool.submit(open_)
        self._await(live, live.opening)

    def _patiently[T](self, read: Callable[[], T]) -> T:
        """What it reads, when the storage of it answers."""
        while True:
            try:
                return read()
            except StorageAway as error:
                LOG.warning("a job waits: %s", error)
                if self._ended.wait(RETRY_S):
                    raise

    def _await(self, live: LiveJob, future: Future[Facts] | Future[Material]) -> None:
        self._reading[live.job.id] = live
        future.add_done_callback(lambda _: self._done())

    def opening(self) -> Iterator[LiveJob]:
        """The jobs that a slot is kept free for."""
        return (live for live in self._reading.values() if live.opening is not None)

    def hear(self) -> Iterator[tuple[LiveJob, Facts | Material | None, JaxLoraError | OSError | None]]:
        """What was read since the last call: (job, what it is, None) or (job, None, what is wrong with it)."""
        for live in list(self._reading.values()):
            for future in (live.examining, live.opening):
                if future is None or not future.done():
                    continue
                self.forget(live)
                try:
                    yield live, future.result(), None
                except (JaxLoraError, OSError) as error:
                    yield live, None, error

    def forget(self, live: LiveJob) -> None:
        """What is read for it is of no use any more."""
        live.examining = live.opening = None
        self._reading.pop(live.job.id, None)

    def wait(self) -> None:
        """Returns when something is read, at once when nothing is being read."""
        futures = [f for x in self._reading.values() for f in (x.examining, x.opening) if f is not None]
        wait(futures, return_when="FIRST_COMPLETED")

    def close(self) -> None:
        """Waits for what is being read, and reads no more."""
        self._ended.set()
        self._pool.shutdown(cancel_futures=True)
