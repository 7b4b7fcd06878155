"""`jaxlora serve --supervise`: a small process without jax that keeps the server running as its child.  Pure.

    child exits ──────────────────────────────────────────▶ wait, 1 s and then twice as long each time ─▶ the next child
    /health is 5xx or silent for long ─▶ SIGTERM twice ─▶ SIGKILL ─▶ the same
    too many of these in an hour ─▶ exit code 1

SIGTERM and SIGINT go on to the child, which drains; a second one as well, and it drains no longer; a third kills it.  The
child stands in a process group of its own, so that Ctrl-C in a terminal reaches it once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import httpx2

from jaxlora.serve_config import ServeConfig
from serve.logs import logging_to
from serve.supervised import LAST_S, SOCKET

LOG = logging.getLogger("serve")
ENDING = (signal.SIGTERM, signal.SIGINT)
USER_ERROR_EXIT = 2  # of a child that has said on stderr what its user can do about it
FAILED_EXIT = 1
FLAG = "--supervise"
UNHEALTHY_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SupervisorConfig:
    """How much a child may do before it is started again."""

    start_s: float = 1800.0  # until it answers for the first time: a download, compiling
    unhealthy_s: float = UNHEALTHY_S  # of bad health without a pause: more than a slow step takes
    probe_s: float = 1.0  # between two looks at its health
    answer_s: float = 5.0  # that a look may take
    end_s: float = 120.0  # from a signal to end to the kill
    lost_s: float = 45.0  # the same, of one that has no time to drain
    nudge_s: float = 1.0  # between the two signals that tell it so
    backoff_s: float = 1.0  # before the first restart; doubled for each one within `window_s`
    most_backoff_s: float = 60.0
    restarts: int = 10  # in `window_s`, before it is given up
    window_s: float = 3600.0


class Restarts:
    """When a server that failed is started again."""

    def __init__(self, config: SupervisorConfig):
        self._config = config
        self._failed: deque[float] = deque()  # when, in the last `window_s`

    @property
    def count(self) -> int:
        """Restarts in the last `window_s`."""
        return len(self._failed)

    def wait_s(self, now: float) -> float | None:
        """It has failed: seconds until it is started again; None when that happened too often."""
        config, failed = self._config, self._failed
        while failed and failed[0] <= now - config.window_s:
            failed.popleft()
        if len(failed) >= config.restarts:
            return None
        failed.append(now)
        return min(config.backoff_s * 2 ** (len(failed) - 1), config.most_backoff_s)


class Illness:
    """How long a server has not been well."""

    def __init__(self, limit_s: float):
        self._limit_s = limit_s
        self._since: float | None = None

    def looked(self, symptom: str | None, now: float) -> bool:
        """What a look has shown, None if all was well; whether that has lasted too long."""
        if symptom is None:
            self._since = None
            return False
        if self._since is None:
            LOG.warning("the server is not well: %s", symptom)
            self._since = now
        return now - self._since > self._limit_s


@dataclass(slots=True)
class Child:
    """A server process, and our end of the socket that it holds."""

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    url: str = ""  # where it answers, once it has said so

    @classmethod
    async def start(cls, command: Sequence[str], environment: Mapping[str, str]) -> Child:
        """A new one.  Raises OSError when the system has none to give, or there is no such program."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    pass_fds=(theirs.fileno(),),
                    env={**environment, SOCKET: str(theirs.fileno())},
                    process_group=0,
                )
        except OSError:
            ours.close()
            raise
        reader, writer = await asyncio.open_connection(sock=ours)
        return cls(process, reader, writer)

    async def answers(self) -> str:
        """Its URL, when it answers; waits for ever when it ends before."""
        self.url = (await self.reader.readline()).decode().strip()
        if not self.url:
            await asyncio.Event().wait()
        return self.url

    def send(self, number: int) -> None:
        """A signal, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    async def end(self, config: SupervisorConfig) -> None:
        """Ends it without a drain: its open requests get errors if it can still tell them."""
        for wait_s in (config.nudge_s, config.lost_s):
            self.send(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), wait_s)
                return
        self.send(signal.SIGKILL)
        await self.process.wait()


@dataclass(frozen=True, slots=True)
class Life:
    """A child from its start to its end."""

    reason: str  # why it has ended
    exit_code: int
    ran_s: float
    answered: bool  # it has been up


async def symptom_of(client: httpx2.AsyncClient, url: str) -> str | None:
    """What is wrong with the server there, or None.  Whatever it answers but a 5xx shows that it lives."""
    try:
        answer = await client.get(f"{url}/health")
    except httpx2.HTTPError as error:
        return f"/health does not answer ({type(error).__name__})"
    return f"/health says {answer.status_code}" if answer.status_code >= 500 else None


class Supervisor:
    """Keeps one command running until it is told to end."""

    def __init__(
        self,
        command: Sequence[str],
        config: SupervisorConfig,
        *,
        environment: Mapping[str, str] | None = None,
        passed_on: Collection[int] = (),
    ):
        """passed_on: signals for a child that answers, beside those to end.  environment: of the child; None: ours."""
        self._command, self._config = command, config
        self._environment = os.environ if environment is None else environment
        self._passed_on = passed_on
        self._restarts = Restarts(config)
        self._signals: list[int] = []  # to end
        self._ending = asyncio.Event()
        self._child: Child | None = None
        self._proven = False  # these settings have made a server that answers

    async def run(self) -> int:
        """The exit code, in the end: the child's own when a signal ended it.  Of the main thread."""
        loop = asyncio.get_running_loop()
        for number in ENDING:
            loop.add_signal_handler(number, self._end_by, number)
        for number in self._passed_on:
            loop.add_signal_handler(number, self._pass_on, number)
        try:
            return await self._keep_running()
        finally:
            for number in (*ENDING, *self._passed_on):
                loop.remove_signal_handler(number)

    async def _keep_running(self) -> int:
        while True:
            life = await self._one_life()
            self._proven |= life.answered
            if self._signals or (life.exit_code == USER_ERROR_EXIT and not self._proven):
                return life.exit_code  # of a user's error: with the same settings it would end alike
            wait_s = self._restarts.wait_s(time.monotonic())
            told = {"reason": life.reason, "exit_code": life.exit_code, "ran_s": round(life.ran_s, 1)}
            told["restarts"] = self._restarts.count
            if wait_s is None:
                LOG.critical("the server failed too often and is not started again", extra=told)
                return FAILED_EXIT
            LOG.error("the server failed and is started again", extra=told | {"backoff_s": wait_s})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), wait_s)
                return 0 if self._signals[0] == signal.SIGTERM else 128 + self._signals[0]  # as a server's

    async def _one_life(self) -> Life:
        """Starts a child and waits for its end."""
        began = time.monotonic()
        try:
            child = await Child.start(self._command, self._environment)
        except OSError as error:  # no memory or no process left, perhaps for now
            return Life(f"it cannot be started ({error.strerror})", FAILED_EXIT, 0.0, False)
        self._child = child
        if self._signals:  # that came while it was started
            self._pass_end(child)
        LOG.info("server started", extra={"server_pid": child.process.pid})
        try:
            reason = await self._until_it_ends(child)
        finally:
            self._child = None
            child.writer.close()
        code = child.process.returncode
        assert code is not None
        code = code if code >= 0 else 128 - code  # a signal, as shells tell it
        return Life(reason, code, time.monotonic() - began, bool(child.url))

    async def _until_it_ends(self, child: Child) -> str:
        """Why it has ended: by itself, or by us because it was not well."""
        exits = asyncio.ensure_future(child.process.wait())
        ails = asyncio.ensure_future(self._ails(child))
        told_to_end = asyncio.ensure_future(self._ending.wait())
        try:
            await asyncio.wait({exits, ails, told_to_end}, return_when=asyncio.FIRST_COMPLETED)
        finally:  # who was told to end may be unwell on its way: nobody looks any more
            for watch in (ails, told_to_end):
                watch.cancel()
            await asyncio.wait({ails, told_to_end})
        if exits.done() or self._signals:
            await exits
            return "it ended"
        reason = ails.result()
        LOG.error("the server is ended: %s", reason, extra={"server_pid": child.process.pid})
        await child.end(self._config)
        return reason

    async def _ails(self, child: Child) -> str:
        """What is wrong with it, when that has lasted too long."""
        config = self._config
        try:
            url = await asyncio.wait_for(child.answers(), config.start_s)
        except TimeoutError:
            return f"it did not answer within {config.start_s:g} s"
        LOG.info("server answers", extra={"server_pid": child.process.pid, "url": url})
        illness = Illness(config.unhealthy_s)
        async with httpx2.AsyncClient(timeout=config.answer_s, trust_env=False) as client:
            while not illness.looked(symptom := await symptom_of(client, url), time.monotonic()):
                await asyncio.sleep(config.probe_s)
        return f"{symptom} for {config.unhealthy_s:g} s"

    # ---- signals --------------------------------------------------------------------------------------------------

    def _end_by(self, number: int) -> None:
        self._signals.append(number)
        self._ending.set()
        if self._child is not None:
            self._pass_end(self._child)

    def _pass_end(self, child: Child) -> None:
        times = len(self._signals)
        child.send(self._signals[-1] if times < 3 else signal.SIGKILL)
        within_s = self._config.end_s if times == 1 else self._config.lost_s
        asyncio.get_running_loop().call_later(within_s, child.send, signal.SIGKILL)

    def _pass_on(self, number: int) -> None:
        if self._child is not None and self._child.url:
            self._child.send(number)


def command_again(arguments: Sequence[str]) -> list[str]:
    """The command of this process, from its own command line, without the flag."""
    return [sys.executable, *(a for a in arguments[1:] if a != FLAG)]


def main(config: ServeConfig, *, has_file: bool) -> NoReturn:
    """`jaxlora serve --supervise`: until SIGTERM or Ctrl-C, or until the server fails too often; exits with a code.

    has_file: the settings come from a file, which SIGHUP has read again.
    """
    limits = SupervisorConfig(unhealthy_s=max(UNHEALTHY_S, 5 * config.hang_s), end_s=config.grace_s + LAST_S)
    passed_on = (signal.SIGHUP,) if has_file else ()

    async def run() -> int:
        return await Supervisor(command_again(sys.orig_argv), limits, passed_on=passed_on).run()

    with logging_to(as_json=config.log == "json"):
        code = asyncio.run(run())
    sys.exit(code)
