"""`jaxlora up` and `jaxlora serve` as processes over a tiny model, one after the other on the same folder."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

CONFIG = """
host = "127.0.0.1"
port = 0
slots = 3
max_rank = 4
rows = 4
kv_pages = 32
page_tokens = 32
prefill_lanes = 2
prefill_tokens = 32
default_max_tokens = 8
max_waiting = 256
max_waiting_tokens = 65536
max_request_s = 120
grace_s = 20
host_adapters_gb = 0.1
host_kv_gb = 0.1
adapters = "adapters"
data = "data"
[model]
path = "{model}"
dtype = "float32"
[training]
slots = 1
lanes = 2
lane_tokens = 32
publish_every = 4
[cluster]
replicas = 2
trainers = 0
"""


@dataclass
class Running:
    """A process that answers on a URL."""

    process: subprocess.Popen
    url: str
    log: Path

    def pids(self, role: str) -> list[int]:
        """Those of its processes that said what they do, by the word for it: "reads", "writes", "answers"; oldest first."""
        found = re.findall(rf"pid=(\d+)\)\S* .*this process {role}", self.log.read_text())
        return [pid for pid in map(int, found) if Path(f"/proc/{pid}").exists()]

    def below(self) -> set[int]:
        """It and all processes that it has started, and those that these have."""
        parents: dict[int, int] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended
                parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        found = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return found

    def stop(self, within_s: float = 120) -> int:
        """The exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(within_s)


@contextlib.contextmanager
def running(
    command: str,
    folder: Path,
    model: Path,
    *,
    more: str = "",
    program: Sequence[str] = ("-m", "serve.cli.main"),
    **changes: object,
) -> Iterator[Running]:
    """`jaxlora serve` or `jaxlora up` on this folder; killed if it is still there at the end.

    changes: of CONFIG.  more: settings behind it.
    """
    text = CONFIG.format(model=model) + more
    for name, value in changes.items():
        text, count = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value}", text)
        assert count == 1, name
    (folder / "serve.toml").write_text(text)
    with (folder / "log.txt").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, *program, *command.split(), str(folder / "serve.toml")],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        try:
            assert process.stdout is not None
            found, told = None, ""
            for line in process.stdout:
                log.write(line)
                log.flush()
                told += line
                if found := re.search(r"on (http://\S+)/v1", line):
                    break
            assert found is not None, told + (folder / "log.txt").read_text()[-4000:]
            threading.Thread(target=log.writelines, args=(process.stdout,), daemon=True).start()
            yield Running(process, found[1].rstrip(","), folder / "log.txt")
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def until(what, within_s: float):
    """What `what` returns once that is true."""
    ends = time.monotonic() + within_s
    while not (found := what()):
        assert time.monotonic() < ends, f"not within {within_s} s"
        time.sleep(0.05)
    return found
