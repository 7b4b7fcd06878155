"""How much of this machine's memory a process may have: control groups, resource limits and what is available.

What was freed is given back after programs are compiled, which leaves hundreds of megabytes behind.

Every way of asking takes its files from `root`, so that a test can write another machine.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# As /proc/self/limits names them: the command, and bytes of stacks, heaps and libraries that were reserved and not used
# (measured: a server under load).
RESOURCE_LIMITS = {"Max data size": ("ulimit -d", 600 * 10**6), "Max address space": ("ulimit -v", 2 * 10**9)}
UNLIMITED = 2**60  # version 1 of control groups writes a huge number where there is no limit


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryLimit:
    """Bytes that a process, or a device, may take."""

    nbytes: int
    origin: str  # who says so, for a reader
    own: bool  # nobody else lives on these bytes: all of them may be used


def host_limit(root: Path = Path("/")) -> MemoryLimit:
    """Returns the least of the limits of this process and of what the machine has available, its own memory included.

    A control group's limit counts where it is less than the machine has free; the group's other processes are not asked.
    """
    limits = [*_control_groups(root), *_resource_limits(root), *_available(root)]
    if not limits:
        return MemoryLimit(nbytes=4 * 2**30, origin="a guess, as this system does not say", own=False)
    return min(limits, key=lambda limit: limit.nbytes)


def give_back() -> None:
    """Returns freed memory to the system, which the C library would keep for later; does nothing where it cannot."""
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _control_groups(root: Path) -> Iterator[MemoryLimit]:
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            top, file = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            top, file = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        inside = PurePosixPath(group.lstrip("/"))
        for folder in {inside, *inside.parents}:  # a limit of an outer group holds for the inner ones
            for text in _lines(top / folder / file):
                if text.isdecimal() and int(text) < UNLIMITED:
                    yield MemoryLimit(nbytes=int(text), origin="the limit of the control group", own=True)


def _resource_limits(root: Path) -> Iterator[MemoryLimit]:
    """Yields what `ulimit` says, less what it counts and no memory stands behind."""
    for line in _lines(root / "proc/self/limits"):
        for name, (command, reserved) in RESOURCE_LIMITS.items():
            soft = line.removeprefix(name).split()[:1]
            if line.startswith(name) and soft and soft[0].isdecimal():
                nbytes = max(int(soft[0]) - reserved, 1)
                yield MemoryLimit(nbytes=nbytes, origin=f"{command} less {reserved / 1e9:.1f} GB reserved", own=True)


def _available(root: Path) -> Iterator[MemoryLimit]:
    kib = {}
    for file in ("proc/meminfo", "proc/self/status"):
        for line in _lines(root / file):
            name, _, rest = line.partition(":")
            with contextlib.suppress(ValueError, IndexError):
                kib[name] = int(rest.split()[0])
    if "MemAvailable" in kib:
        nbytes = 1024 * (kib["MemAvailable"] + kib.get("RssAnon", 0))
        yield MemoryLimit(nbytes=nbytes, origin="the machine's available memory", own=False)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
