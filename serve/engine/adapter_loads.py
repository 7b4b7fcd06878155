"""Reads adapters from the store into host rows, on threads of its own.  A failure ends the adapter's requests alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from jaxlora.core.errors import AdapterNotFound, JaxLoraError
from jaxlora.core.lora import AdapterRef
from jaxlora.model.lora_pool import Rows

READERS = 4  # threads for adapters in RAM or on this disk, and as many for those in object storage, which may hang
LOAD_WAIT_S = 0.005  # how long a step without other work waits for a read; messages wait as long
FAILED_S = 5.0  # before a version that could not be read is tried again; its requests get the same error meanwhile


class AdapterLoads:
    """The adapters that are being read, or have been read and have no slot yet.  Owned by one thread.

    read: the rows of a version.  Called on a thread of its own, as it may read a disk.  is_here: whether that needs no
    network.  clock: seconds.
    """

    def __init__(
        self, read: Callable[[AdapterRef], Rows], is_here: Callable[[AdapterRef], bool], clock: Callable[[], float]
    ):
        self._read, self._is_here, self._clock = read, is_here, clock
        self._near = ThreadPoolExecutor(READERS, thread_name_prefix="adapter-load")
        self._far = ThreadPoolExecutor(READERS, thread_name_prefix="adapter-fetch")
        self._loads: dict[AdapterRef, Future[Rows]] = {}
        self._failed: dict[AdapterRef, tuple[float, JaxLoraError]] = {}  # until when, and why; the oldest first

    def __bool__(self) -> bool:
        """Whether an adapter is being read or waits for a slot."""
        return bool(self._loads)

    def want(self, refs: Sequence[AdapterRef]) -> list[tuple[AdapterRef, JaxLoraError]]:
        """Starts to read the adapters that enter next and forgets all others.  Returns those that cannot be read, and why.

        Raises RuntimeError for an internal error, which is not the adapter's.
        """
        for ref in [ref for ref in self._loads if ref not in refs]:
            self._loads.pop(ref).cancel()
        now = self._clock()
        while self._failed and next(iter(self._failed.values()))[0] <= now:
            del self._failed[next(iter(self._failed))]
        failed = []
        for ref in refs:
            if ref in self._failed:
                failed.append((ref, self._failed[ref][1]))
            elif ref not in self._loads:
                self._loads[ref] = (self._near if self._is_here(ref) else self._far).submit(self._read, ref)
            elif self._loads[ref].done() and not self._is_read(ref):
                error = self._loads.pop(ref).exception()
                if not isinstance(error, JaxLoraError):
                    raise RuntimeError(f"reading {ref} failed") from error
                failed.append((ref, error))
                if not isinstance(error, AdapterNotFound):  # that reads no disk, and the version may come at any time
                    self._failed[ref] = now + FAILED_S, error
        return failed

    def ready(self) -> list[AdapterRef]:
        """Returns the adapters that have been read."""
        return [ref for ref in self._loads if self._is_read(ref)]

    def take(self, ref: AdapterRef) -> Rows:
        """Removes an adapter that has been read and returns its rows."""
        return self._loads.pop(ref).result()

    def wait(self) -> None:
        """Waits until an adapter is read, at most LOAD_WAIT_S."""
        wait(self._loads.values(), LOAD_WAIT_S, FIRST_COMPLETED)

    def _is_read(self, ref: AdapterRef) -> bool:
        load = self._loads[ref]
        return load.done() and load.exception() is None
