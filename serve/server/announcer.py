"""What a server tells whoever started it: how far the start is, and at the end what becomes of requests and jobs."""

from __future__ import annotations

import contextlib
import functools
import logging
import signal
import sys
from collections.abc import Callable, Generator
from typing import NoReturn, Self

from jaxlora.core.progress import Lines, Progress, screen_on
from serve.runtime.watchdog import Watch
from train.jobs.status import JobStatus

LOG = logging.getLogger("serve")
GO_ON = (JobStatus.VALIDATING_FILES, JobStatus.QUEUED, JobStatus.RUNNING)  # by themselves, at the next start


class Announcer:
    """Lines on stdout, or records of the log where that is for programs, so that nothing stands between them."""

    def __init__(self, *, grace_s: float, as_json: bool):
        """grace_s: for open requests to finish when the server ends."""
        self._grace_s = grace_s
        self.say: Callable[[str], None] = LOG.info if as_json else functools.partial(print, flush=True)
        self.progress = Progress(Lines(self.say) if as_json else screen_on(sys.stdout))
        self._is_ready = False
        self._starting = contextlib.ExitStack()

    @contextlib.contextmanager
    def until_stopped(self) -> Generator[Self]:
        """Tells when a server that was asked to stop has stopped.  Until it is ready SIGTERM ends it, with exit code 0.

        The first process of a container has no other answer to SIGTERM.  Main thread only.
        """
        before = signal.signal(signal.SIGTERM, _end)
        with self._starting:
            self._starting.callback(signal.signal, signal.SIGTERM, before)
            try:
                yield self
            except (KeyboardInterrupt, SystemExit):
                self.say("stopped")
                raise
        self.say("stopped")

    def ready(self) -> None:
        """The start is over."""
        self._is_ready = True
        self._starting.close()

    def ending(self, watch: Watch, inside: int) -> None:
        """Tells what becomes of so many open requests and of jobs when the server begins to end."""
        if not self._is_ready:
            self.say("stopping before it is ready; what compiles now ends first")
            return
        training = watch.snapshot.training
        jobs = 0 if training is None else sum(training.jobs.get(state, 0) for state in GO_ON)
        words = [
            *(
                [f"{some(inside, 'open request')} may take {self._grace_s:g} s, or until another signal"]
                if inside
                else []
            ),
            *([f"{some(jobs, 'job')} will stop at a checkpoint and go on at the next start"] if jobs else []),
        ]
        self.say(f"stopping: {'; '.join(words) or 'nothing is open'}")


def some(count: int, what: str) -> str:
    """So many of them in words."""
    return f"{count} {what}" + ("" if count == 1 else "s")


def _end(*_: object) -> NoReturn:
    raise SystemExit(0)
