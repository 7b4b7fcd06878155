"""Threads that read and check what jobs bring, and the jobs that wait for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

from jaxlora.errors import JaxLoraError
from train.job_files import Facts, JobFiles, LiveJob, Material

FILE_THREADS = 2  # that read and check training files


class JobReaders:
    """Whose files are being read.  Of one thread; `done` alone is called on others."""

    def __init__(self, files: JobFiles, done: Callable[[], None]):
        self._files, self._done = files, done
        self._pool = ThreadPoolExecutor(FILE_THREADS, "job-files")
        self._reading: dict[str, LiveJob] = {}

    def examine(self, live: LiveJob) -> None:
        """Has the files of a new job read and checked."""
        live.examining = self._pool.submit(self._files.examine, live.job.id, live.job.request)
        self._await(live, live.examining)

    def open(self, live: LiveJob, *, parked: bool) -> None:
        """Has read what a job needs in its slot, which is kept free meanwhile."""
        assert live.facts is not None
        live.opening = self._pool.submit(self._files.open, live.job.id, live.job.request, live.facts, parked=parked)
        self._await(live, live.opening)

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
        self._pool.shutdown(cancel_futures=True)
