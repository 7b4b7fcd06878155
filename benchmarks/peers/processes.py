"""A peer's processes: started, waited for, measured with all their children, and ended."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.environments import Unavailable

READY_S, STOP_S = 600, 30
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a tree of processes, in bytes."""

    peak: int  # the sum of each process's resident peak since it was last reset
    private: int  # that no other process shares
    shared: int  # its part of pages that others share


@dataclass(frozen=True, slots=True)
class Tree:
    """A process and all below it."""

    pid: int

    def pids(self) -> list[int]:
        """Returns those that run now."""
        below: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and (fields := _stat(int(entry.name))):
                below.setdefault(int(fields[1]), []).append(int(entry.name))
        found = [self.pid]
        for pid in found:
            found += below.get(pid, [])
        return found

    def cpu_s(self) -> float:
        """Returns the CPU seconds so far, those of children that have ended included."""
        return sum(sum(map(int, fields[11:15])) for pid in self.pids() if (fields := _stat(pid))) / TICKS

    def reset_peak(self) -> None:
        """Has each process's peak begin at what it has now."""
        for pid in self.pids():
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")

    def memory(self) -> Memory:
        """Returns what they have, and had at most."""
        peak = private = proportional = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                peak += _kib(f"/proc/{pid}/status", "VmHWM")
                private += _kib(f"/proc/{pid}/smaps_rollup", "Private_Clean", "Private_Dirty")
                proportional += _kib(f"/proc/{pid}/smaps_rollup", "Pss")
        return Memory(peak * 1024, private * 1024, max(0, proportional - private) * 1024)


def machine_cpu_s() -> float:
    """Returns the CPU seconds that all cores together have worked since the machine started."""
    user, nice, system, _idle, _wait, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / TICKS


def wait_quiet(share: float, limit_s: float) -> None:
    """Returns once less than this share of one core has worked for a second, or after so long."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        before = machine_cpu_s()
        time.sleep(1)
        if machine_cpu_s() - before < share:
            return


def _stat(pid: int) -> list[str] | None:
    """The fields of a process from its state on; None: it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _kib(path: str, *names: str) -> int:
    text = Path(path).read_text()
    return sum(int(n) for name in names for n in re.findall(rf"^{name}:\s+(\d+)", text, re.M))


def free_port() -> int:
    """Returns a port on which nothing listens now."""
    with socket.create_server(("127.0.0.1", 0)) as it:
        return it.getsockname()[1]


@contextlib.contextmanager
def running(
    command: Sequence[str | Path], log: Path, *, environment: Mapping[str, str] = {}, pipes: bool = False
) -> Generator[subprocess.Popen[str]]:
    """Has a process run; its output goes to a log.  pipes: its stdin and stdout are the caller's."""
    log.parent.mkdir(parents=True, exist_ok=True)
    end = subprocess.PIPE if pipes else None
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdin=end, stdout=end or out, stderr=out, text=True, env={**os.environ, **environment}
        )
    try:
        yield process
    finally:
        below = Tree(process.pid).pids()[1:]
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
        for pid in below:  # whom a killed parent leaves behind
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if pipes:
            process.communicate()


def wait_ready(process: subprocess.Popen[str], url: str, log: Path) -> None:
    """Returns once the URL answers with 200.  Raises Unavailable when the process ends before, or is slow."""
    until = time.monotonic() + READY_S
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise Unavailable(f"the server did not become ready: {' '.join(log.read_text()[-600:].split())}")
