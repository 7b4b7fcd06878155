"""The systemd section of docs/deploy.md, walked: its commands run as they stand under a systemd that is process 1.

The machine is one of namespaces (tests/support/machine.sh).  The programs of step 1 are there, the clone is this folder, and
the model is the tiny one.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_world import tiny_path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests/support"
PAGE = (ROOT / "docs/deploy.md").read_text()
NEEDED = ("unshare", "nsenter", "ip", "runuser", "useradd", "curl", "uv", "/lib/systemd/systemd", "/usr/bin/python3")
WAIT_S = 1800.0  # no test is of the speed


def missing() -> str:
    """Why there can be no such machine here; empty: there can."""
    if os.geteuid() != 0:
        return "namespaces want root"
    if absent := [name for name in NEEDED if shutil.which(name) is None]:
        return f"there is no {', '.join(absent)}"
    can = subprocess.run(
        [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--net",
            "--cgroup",
            "sh",
            "-c",
            "mount -t cgroup2 none /sys/fs/cgroup",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    return can.stderr.strip()


pytestmark = [pytest.mark.soak, pytest.mark.skipif(bool(missing()), reason=missing())]


def steps() -> dict[int, list[str]]:
    """The commands of the section, by the number of their step."""
    section = re.search(r"^## systemd\n(.*?)(?=^## )", PAGE, re.M | re.S)[1]
    parts = re.split(r"^\*\*(\d)\.\*\*", section, flags=re.M)[1:]
    texts = {int(number): text for number, text in zip(parts[::2], parts[1::2], strict=True)}
    return {
        number: [line for block in re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S) for line in block.splitlines()]
        for number, text in texts.items()
    }


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One that runs; its process 1 and the folder of its files."""

    init: int
    folder: Path
    key: str

    def run(self, command: str, *, ok: bool = True) -> str:
        """What a command line prints there."""
        within = ["nsenter", "--target", str(self.init), "--all", "env", f"PATH={self.folder}/bin:{os.environ['PATH']}"]
        done = subprocess.run(
            [*within, f"KEY={self.key}", "bash", "-c", command],
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        assert not ok or done.returncode == 0, done.stdout + done.stderr + self.log()
        return done.stdout.strip()

    def property(self, name: str) -> str:
        return self.run(f"systemctl show --property {name} --value jaxlora.service")

    def log(self) -> str:
        """The last of the server's, and of systemd's."""
        files = [self.folder / "etc/jaxlora/server.log", self.folder / "machine.log"]
        return "\n".join(f.read_text()[-2000:] for f in files if f.exists())

    def until(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not what():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.2)


def child(pid: int) -> int | None:
    """The systemd that a process became the parent of."""
    with contextlib.suppress(OSError):
        for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if Path(f"/proc/{one}/comm").read_text().strip() == "systemd":
                return int(one)
    return None


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Iterator[Machine]:
    """One on which steps 2 to 4 are done."""
    folder = tmp_path_factory.mktemp("machine")
    shutil.copytree(tiny_path("tiny-llama-tied"), folder / "opt/model")  # not in /tmp, which the unit has for itself
    by_step = steps()
    (key_line,) = by_step[4]
    tiny = 'sed -i \'s|path = "smollm2"|path = "/opt/model"|\' /etc/jaxlora/serve.toml'
    log = "printf '[Service]\\nStandardOutput=append:/etc/jaxlora/server.log\\nStandardError=inherit\\n'"
    drop_in = "/etc/systemd/system/jaxlora.service.d"
    lines = [
        f"cd {shlex.quote(str(ROOT))}",
        "export UV_PYTHON=/usr/bin/python3 UV_LINK_MODE=copy",
        *by_step[2],
        *by_step[3],
        tiny,
        f"mkdir {drop_in} && {log} > {drop_in}/log.conf",
        f"{key_line} > {folder}/key",
    ]
    (folder / "install.sh").write_text("\n".join(lines))
    command = ["unshare", "--mount", "--propagation", "private", str(SUPPORT / "machine.sh"), str(folder)]
    with (folder / "machine.log").open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            deadline = time.monotonic() + WAIT_S
            while (init := child(process.pid)) is None:
                assert process.poll() is None, (folder / "machine.log").read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.2)
            it = Machine(init=init, folder=folder, key=(folder / "key").read_text().strip())
            it.until(lambda: it.run("systemctl is-system-running", ok=False) == "running")
            yield it
        finally:
            if (init := child(process.pid)) is not None:
                os.kill(init, signal.SIGKILL)  # and with it all of its namespace
            process.kill()


def test_step_5_starts_a_server_that_answers(machine):
    for line in steps()[5][:4]:
        shown = machine.run(line)
    assert '"object":"list"' in shown
    assert machine.property("ActiveState") == "active"
    assert machine.run("systemctl is-active jaxlora-health.timer") == "active"
    assert (
        machine.run("curl --silent --output /dev/null --write-out '%{http_code}' http://127.0.0.1:8000/v1/models")
        == "401"
    )
    process = machine.property("MainPID")
    status = machine.run(f"cat /proc/{process}/status")
    assert re.search(r"^CapBnd:\s*0+$", status, re.M)
    assert re.search(r"^NoNewPrivs:\s*1$", status, re.M)
    assert re.search(r"^Seccomp:\s*2$", status, re.M)


def test_a_server_that_is_killed_is_started_again_and_remembers_its_key(machine):
    before = machine.property("MainPID")
    machine.run(f"kill -KILL {before}")
    machine.until(lambda: machine.property("NRestarts") == "1")
    machine.until(lambda: machine.property("ActiveState") == "active")
    assert machine.property("MainPID") != before
    assert '"object":"list"' in machine.run(steps()[5][3])


def test_a_reload_reads_the_tuning_again(machine):
    machine.run("sed -i 's/quantum_ms = 200/quantum_ms = 150/' /etc/jaxlora/serve.toml")
    machine.run(steps()[5][4])
    log = machine.folder / "etc/jaxlora/server.log"
    machine.until(lambda: "tuned by /etc/jaxlora/serve.toml" in log.read_text())


def test_a_stop_ends_within_its_time_and_is_no_failure(machine):
    machine.run("systemctl stop jaxlora.service")
    assert (machine.property("ActiveState"), machine.property("ExecMainStatus")) == ("inactive", "0")


def test_a_wrong_setting_is_not_tried_again(machine):
    machine.run("sed -i 's/^slots = 8/slots = 0/' /etc/jaxlora/serve.toml")
    machine.run("systemctl start jaxlora.service", ok=False)
    assert (machine.property("ExecMainStatus"), machine.property("ActiveState")) == ("2", "failed")
    assert machine.property("NRestarts") == "0"
    assert re.search("slots.* at least 1", machine.log())
