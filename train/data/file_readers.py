"""Reads a server's training files in processes with limits of memory and processor time.  No jax."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from jaxlora.config.training import TooLong
from jaxlora.core.atomic_files import disk_errors
from jaxlora.core.errors import DataInvalid, StorageAway, Unavailable
from jaxlora.core.tenant_threads import TenantThreads
from train.data import reader_process
from train.data.load import Loaded

CPU_S = 60.0  # of processor time that any file may take, and again for each MiB of it
POLL_S, STUCK_S = 0.5, 10.0  # between two looks at a process; without any processor time until it is ended
KEPT_BYTES = 2**23  # a process that read a larger file gives its memory back by ending
STOPPING = "the server is stopping"
MEMORY_ENDS = (reader_process.MEMORY_EXIT, -signal.SIGABRT, -signal.SIGKILL, -signal.SIGSEGV)


class SavedTokenizer(Protocol):
    """A tokenizer that a process can open."""

    def save(self, folder: Path) -> None:
        """Writes the files that `Tokenizer.from_hf` reads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReaderLimits:
    """Limits of reading one file."""

    memory_bytes: int  # besides what the process has before it reads
    cpu_s: float  # however large the file is


class FileReaders:
    """A few processes, started when they are needed; tenants take turns, and of one tenant one file is read at a time."""

    def __init__(
        self,
        tokenizer: SavedTokenizer,
        folder: Path,
        *,
        lane_tokens: int,
        setting: str = "training.longest_tokens",
        limits: ReaderLimits,
        processes: int = 2,
    ):
        """folder: for the tokenizer, in place of one there.  lane_tokens: of a lane; setting: what messages call them.

        Raises StorageFull, StorageFailed.
        """
        with disk_errors("the tokenizer of the readers"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            tokenizer.save(folder)
        settings: dict[str, object] = {"tokenizer": str(folder), "lane_tokens": lane_tokens, "setting": setting}
        settings["memory_bytes"] = limits.memory_bytes
        self._command = [sys.executable, "-P", "-m", reader_process.__name__, json.dumps(settings)]
        self._limits = limits
        self._threads = TenantThreads(processes, "file-reader")
        self._of_thread = threading.local()  # `process` of each of our threads
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._closed = False

    def load(self, path: Path, tenant: str, too_long: TooLong = "error") -> Loaded:
        """Returns the examples of a tenant's file.

        Raises DataInvalid for a bad one, and for one that takes too much to read; StorageAway when the machine cannot
        start a process, Unavailable after `close`.
        """
        try:
            return self._threads.submit(tenant, self._load, path, too_long).result()
        except (RuntimeError, CancelledError):
            if self._closed:
                raise Unavailable(STOPPING) from None
            raise

    def close(self) -> None:
        """Ends the processes, whatever they are reading.  May be called twice."""
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.kill()
        self._threads.shutdown()
        for process in list(self._processes):
            self._end(process)

    def _load(self, path: Path, too_long: TooLong) -> Loaded:
        size_bytes = path.stat().st_size if path.exists() else 0
        cpu_s = min(CPU_S * (1 + size_bytes / 2**20), self._limits.cpu_s)
        process = self._process()
        try:
            loaded = _ask(process, path, cpu_s, too_long)
        except DataInvalid:
            raise
        except (BrokenPipeError, EOFError):
            self._end(process)
            raise self._why(process.returncode, cpu_s) from None
        except BaseException:
            self._end(process)
            raise
        if size_bytes > KEPT_BYTES:
            self._end(process)
        return loaded

    def _process(self) -> subprocess.Popen[bytes]:
        """Returns this thread's process, a new one when it has none that lives.  Raises RuntimeError after `close`."""
        process: subprocess.Popen[bytes] | None = getattr(self._of_thread, "process", None)
        if process is not None and process.poll() is None:
            return process
        if process is not None:
            self._end(process)
        with self._lock:
            if self._closed:
                raise RuntimeError("closed")
            alone = {
                "TOKENIZERS_PARALLELISM": "false",
                "OPENBLAS_NUM_THREADS": "1",
                "ARROW_DEFAULT_MEMORY_POOL": "system",
            }
            try:
                process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=os.environ | alone,
                    start_new_session=True,  # Ctrl-C is the server's
                )
            except OSError as error:
                raise StorageAway(f"no process can be started to read files ({error.strerror}); retry later") from error
            self._processes.add(process)
        self._of_thread.process = process
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Kills it, unless it has ended."""
        process.kill()
        process.wait()
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        with self._lock:
            self._processes.discard(process)

    def _why(self, code: int, cpu_s: float) -> Exception:
        """Returns what the end of a process while it read a file says of the file."""
        if self._closed:
            return Unavailable(STOPPING)
        if code == -signal.SIGXCPU:
            return DataInvalid(
                f"reading the file took more than {cpu_s:.0f} s of processor time; divide it into several files"
            )
        if code in MEMORY_ENDS:
            most = self._limits.memory_bytes / 2**20
            return DataInvalid(
                f"reading the file took more than {most:.0f} MiB of memory; divide it into several files"
            )
        return RuntimeError(f"the process that reads files ended with exit code {code}")


def _end_if_stuck(process: subprocess.Popen[bytes]) -> None:
    """Returns when the process answers or has ended; kills one that computes nothing: without memory a library may wait for ever."""
    before, since = -1, time.monotonic()
    assert process.stdout is not None
    while not select.select([process.stdout], [], [], POLL_S)[0]:
        if (used := _ticks(process.pid)) != before:
            before, since = used, time.monotonic()
        elif time.monotonic() - since > STUCK_S:
            process.kill()


def _ticks(pid: int) -> int:
    """Returns the processor time that a process has taken; another number each time where the system does not say."""
    try:
        return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    except OSError:
        return time.monotonic_ns()


def _ask(process: subprocess.Popen[bytes], path: Path, cpu_s: float, too_long: TooLong) -> Loaded:
    """Returns the examples that the process reads.  Raises DataInvalid; BrokenPipeError or EOFError when it has ended."""
    assert process.stdin is not None
    assert isinstance(process.stdout, io.BufferedReader)
    process.stdin.write(json.dumps({"path": str(path), "cpu_s": cpu_s, "too_long": too_long}).encode() + b"\n")
    process.stdin.flush()
    _end_if_stuck(process)
    answer = process.stdout.readline()
    if not answer.endswith(b"\n"):
        raise EOFError
    counts = json.loads(answer)
    if "invalid" in counts:
        raise DataInvalid(counts["invalid"])
    return reader_process.read_units(counts, process.stdout)
