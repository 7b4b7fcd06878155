"""`serve --supervise`: a child that dies or hangs is started again, with longer and longer waits, until it is given up; and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serve import supervised
from serve.supervisor import FAILED_EXIT, Illness, Restarts, Supervisor, SupervisorConfig, command_again

TESTS = Path(__file__).parent
FAST = {"unhealthy_s": 0.3, "probe_s": 0.05, "answer_s": 0.2, "nudge_s": 0.2, "lost_s": 0.2}
FAST |= {"backoff_s": 0.01, "most_backoff_s": 0.03, "restarts": 3}
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
SUPERVISOR = """
import asyncio, json, signal, sys
from serve.logs import logging_to
from serve.supervisor import Supervisor, SupervisorConfig

async def run():
    config = SupervisorConfig(**json.loads(sys.argv[1]))
    return await Supervisor([sys.executable, *sys.argv[2:]], config, passed_on=[signal.SIGHUP]).run()

with logging_to(as_json=True):
    code = asyncio.run(run())
sys.exit(code)
"""


def child(folder: Path, *lives: str) -> list[str]:
    return [str(TESTS / "supervised_child.py"), str(folder), *lives]


def log_of(folder: Path) -> list[str]:
    return (folder / "log").read_text().splitlines() if (folder / "log").exists() else []


def until(folder: Path, line: str, times: int = 1) -> None:
    deadline = time.monotonic() + 20
    while sum(one.startswith(line) for one in log_of(folder)) < times:
        assert time.monotonic() < deadline, log_of(folder)
        time.sleep(0.01)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def pids(folder: Path) -> list[int]:
    return [int(line.split()[1]) for line in log_of(folder) if line.startswith("start")]


def supervise(folder: Path, *lives: str, until_life: int | None = None, **limits: float) -> int:
    """The exit code; ended by SIGTERM when the child of this number answers."""
    config = SupervisorConfig(**FAST | limits)  # ty: ignore[invalid-argument-type]
    supervisor = Supervisor([sys.executable, *child(folder, *lives)], config, environment=ENVIRONMENT)

    async def run() -> int:
        running = asyncio.ensure_future(supervisor.run())
        if until_life is not None:
            await asyncio.to_thread(until, folder, "answers", until_life)
            supervisor._end_by(signal.SIGTERM)
        return await asyncio.wait_for(running, 30)

    try:
        return asyncio.run(run())
    finally:
        assert not any(map(alive, pids(folder)))


def told(caplog, message: str) -> list:
    return [r for r in caplog.records if r.message == message]


# --- policy


def test_the_wait_doubles_up_to_its_limit_and_too_many_in_the_window_are_given_up():
    restarts = Restarts(SupervisorConfig(backoff_s=1, most_backoff_s=5, restarts=5, window_s=100))
    assert [restarts.wait_s(now) for now in (0, 10, 20, 30, 40)] == [1, 2, 4, 5, 5]
    assert restarts.wait_s(99) is None
    assert restarts.wait_s(110) == 5  # two have fallen out of the window
    assert restarts.count == 4
    assert restarts.wait_s(1000) == 1  # it ran well for long


def test_bad_health_counts_from_its_first_sign_and_one_good_look_ends_it():
    illness = Illness(10)
    assert not illness.looked("bad", 100)
    assert not illness.looked("worse", 110)
    assert illness.looked("bad", 110.1)
    assert not illness.looked(None, 111)
    assert not illness.looked("bad", 200)  # nobody looked in between: that is no illness
    assert not illness.looked("bad", 210)


def test_the_defaults_leave_room_for_what_a_server_does():
    config = SupervisorConfig()
    assert config.start_s >= 600  # it compiles
    assert config.unhealthy_s >= 10 * 4.0  # ServeConfig.hang_s
    waits_s = [min(config.backoff_s * 2**i, config.most_backoff_s) for i in range(config.restarts)]
    assert sum(waits_s) < config.window_s / 4  # else it would never be given up


# --- a child that fails


def test_one_that_dies_is_started_again(tmp_path, caplog):
    assert supervise(tmp_path, "once:1", "once:0", "up", until_life=3) == 0
    assert len(pids(tmp_path)) == 3
    failed = told(caplog, "the server failed and is started again")
    assert [(r.exit_code, r.restarts, r.backoff_s, r.reason) for r in failed] == [
        (1, 1, 0.01, "it ended"),
        (0, 2, 0.02, "it ended"),
    ]
    assert log_of(tmp_path)[-1] == "SIGTERM"


def test_one_that_always_dies_is_given_up(tmp_path, caplog):
    assert supervise(tmp_path, "exit:3") == FAILED_EXIT
    assert len(pids(tmp_path)) == 1 + 3
    assert [r.backoff_s for r in told(caplog, "the server failed and is started again")] == [0.01, 0.02, 0.03]
    (record,) = told(caplog, "the server failed too often and is not started again")
    assert (record.exit_code, record.restarts) == (3, 3)


def test_what_its_user_must_mend_ends_the_supervisor_too(tmp_path):
    assert supervise(tmp_path, "exit:2") == 2
    assert len(pids(tmp_path)) == 1


def test_the_same_exit_code_of_settings_that_have_worked_is_a_failure(tmp_path):
    assert supervise(tmp_path, "once:1", "exit:2", "up", until_life=2) == 0
    assert len(pids(tmp_path)) == 3


def test_a_program_that_is_not_there_is_given_up(caplog):
    supervisor = Supervisor(["/nowhere/jaxlora"], SupervisorConfig(**FAST))  # ty: ignore[invalid-argument-type]
    assert asyncio.run(supervisor.run()) == FAILED_EXIT
    assert {r.reason for r in caplog.records} == {"it cannot be started (No such file or directory)"}


@pytest.mark.parametrize(
    ("life", "limits", "reason", "exit_code", "heard"),
    [
        ("sick", {}, "/health says 503 for 0.3 s", 0, ["SIGTERM"]),
        ("silent", {}, r"/health does not answer \(\w+\) for 0.3 s", 0, ["SIGTERM"]),
        ("mute", {"start_s": 0.5}, "it did not answer within 0.5 s", 0, ["SIGTERM"]),
        ("stubborn", {}, "/health says 503 for 0.3 s", 128 + 9, ["SIGTERM", "SIGTERM"]),
    ],
    ids=["sick", "silent", "mute", "stubborn"],
)
def test_one_that_hangs_is_ended_and_started_again(tmp_path, caplog, life, limits, reason, exit_code, heard):
    assert supervise(tmp_path, life, "up", until_life=2, **limits) == 0
    (record,) = told(caplog, "the server failed and is started again")
    assert re.fullmatch(reason, record.reason)
    assert record.exit_code == exit_code
    lines = log_of(tmp_path)
    second = lines.index(f"start {pids(tmp_path)[1]}")
    assert [line for line in lines[:second] if line.startswith("SIG")] == heard


# --- signals, and a supervisor that is gone


@contextlib.contextmanager
def process(folder: Path, *lives: str, **limits: float):
    """A supervisor in a process of its own, whose child answers."""
    command = [sys.executable, "-c", SUPERVISOR, json.dumps(FAST | limits), *child(folder, *lives)]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as it:
        try:
            until(folder, "answers")
            yield it
        finally:
            it.kill()
    assert not any(map(alive, pids(folder)))


def lines_of(process: subprocess.Popen) -> list[dict]:
    assert process.stderr is not None
    return [json.loads(line) for line in process.stderr]


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_to_end_goes_on_to_the_child_and_a_second_one_too(tmp_path, name):
    with process(tmp_path, "patient", lost_s=20) as it:
        it.send_signal(signal.Signals[name])
        until(tmp_path, name)
        time.sleep(2 * FAST["unhealthy_s"])  # it drains, and its bad health is nobody's business
        assert it.poll() is None
        it.send_signal(signal.Signals[name])
        assert it.wait(10) == 7
        assert [line for line in log_of(tmp_path) if line.startswith("SIG")] == [name, name]
        lines = lines_of(it)
    assert [line["event"] for line in lines] in (["server started"], ["server started", "server answers"])
    assert {line["server_pid"] for line in lines} == set(pids(tmp_path))


@pytest.mark.parametrize("signals", [1, 3])
def test_a_child_that_does_not_end_is_killed(tmp_path, signals):
    with process(tmp_path, "stubborn", unhealthy_s=60, end_s=0.5 if signals == 1 else 60, lost_s=60) as it:
        for number in range(signals):
            it.send_signal(signal.SIGTERM)
            if number < 2:
                until(tmp_path, "SIGTERM", number + 1)
        assert it.wait(10) == 128 + 9


def test_a_hangup_goes_on_to_a_child_that_answers(tmp_path):
    with process(tmp_path, "up") as it:
        deadline = time.monotonic() + 10
        while "SIGHUP" not in log_of(tmp_path):  # it may not have heard yet that the child answers
            assert time.monotonic() < deadline
            it.send_signal(signal.SIGHUP)
            time.sleep(0.05)
        it.send_signal(signal.SIGTERM)
        assert it.wait(10) == 0
    assert len(pids(tmp_path)) == 1


def test_a_signal_between_two_lives_ends_it(tmp_path):
    with process(tmp_path, "once:1", backoff_s=60.0, most_backoff_s=60.0) as it:
        assert it.stderr is not None
        while "backoff_s" not in it.stderr.readline():
            pass
        it.send_signal(signal.SIGTERM)
        assert it.wait(10) == 0
    assert len(pids(tmp_path)) == 1


@pytest.mark.parametrize("life", ["up", "stubborn", pytest.param("mute", marks=pytest.mark.slow)])
def test_a_child_does_not_outlive_its_supervisor(tmp_path, life):
    with process(tmp_path, life, unhealthy_s=60) as it:
        it.kill()
        it.wait()
        deadline = time.monotonic() + 10
        while alive(pids(tmp_path)[0]):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert log_of(tmp_path)[-1] == "SIGTERM"


def test_a_process_without_a_supervisor_tells_nobody(monkeypatch):
    monkeypatch.delenv(supervised.SOCKET, raising=False)
    supervised.attach(1.0)("http://127.0.0.1:1")


def test_the_child_is_started_as_we_were_but_for_the_flag():
    ours = ["python3", "-m", "jaxlora.cli", "serve", "server.toml", "--supervise", "--port", "0"]
    assert command_again(ours) == [sys.executable, "-m", "jaxlora.cli", "serve", "server.toml", "--port", "0"]
