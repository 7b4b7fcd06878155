"""The app on a socket, and its end: not ready and refusing at once, while what is open finishes within a grace time.

    SIGTERM, Ctrl-C ──▶ the drain closes ──▶ all answers are complete, or the grace time is over, or another signal comes
                    ──▶ what is still open ends with an error event ──▶ the server ends

A lost device ends it too: answers have got their errors by then, and no client gets 503 for ever.
uvicorn alone closes its socket first, so that clients find nobody, and cuts streams without a word.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from types import FrameType

import uvicorn

from jaxlora.core.errors import ConfigInvalid, DeviceLost, Unavailable
from serve.http.drain import Drain
from serve.runtime.device_thread import GONE, LOST, DeviceThread
from serve.server.app import create_app
from serve.server.connections import SPARE, Connection, Connections, connections_within
from serve.server.gate import AppConfig, hosts_for

LOG = logging.getLogger("serve")
BACKLOG = 2048  # connections that may wait to be accepted
ACCEPTED_AT_ONCE = 16  # of them, before one of ours is closed: each takes a descriptor
ERROR_S = 0.2  # for answers to send their errors
LOOK_S = 0.2  # how often the main thread looks whether a signal has come
LAST_WORDS_S = 5  # for a client to read how its stream ended


class DrainingServer(uvicorn.Server):
    """Ends in two steps.

    end_open: ends every open answer with an error; called on a thread of its own.  is_lost: whether there is no use in
    going on; looked at often.  ending: called once when the end begins, with how many requests are open.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        connections: Connections,
        drain: Drain,
        grace_s: float,
        end_open: Callable[[], None],
        is_lost: Callable[[], bool],
        ending: Callable[[int], None],
    ):
        super().__init__(config)
        self.server_state = self._connections = connections
        self._drain, self._grace_s, self._end_open, self._is_lost = drain, grace_s, end_open, is_lost
        self._ending, self._told = ending, False
        self._ends: float | None = None  # time.monotonic() when nothing is waited for any more
        self.interrupted = False  # by Ctrl-C

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to accept."""
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(BACKLOG)  # uvicorn's number is also how many are accepted at once

    def drain(self) -> None:
        """Begins the end; a second time, waits for nobody.  Of any thread, or a signal handler."""
        if self._ends is None:
            self._end_within(self._grace_s)
        else:
            self._ends = 0.0

    def _end_within(self, seconds: float) -> None:
        self._ends = time.monotonic() + seconds
        self._drain.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins the end on a signal."""
        self.interrupted |= sig == signal.SIGINT
        self.drain()

    async def on_tick(self, counter: int) -> bool:
        """Closes, ten times a second, connections that are overdue, and checks whether to end."""
        self._connections.close_overdue(asyncio.get_running_loop().time())
        if self._ends is None and self._is_lost():
            self._end_within(LAST_WORDS_S)
        if self._ends is not None and not self._told:
            self._told = True
            if not self._is_lost():  # which the log tells
                self._ending(self._drain.inside)
        if self._ends is not None and not self.should_exit:
            over = time.monotonic() >= self._ends
            if over and self._drain.inside:
                LOG.warning("%d requests are open when the server ends; each gets an error", self._drain.inside)
                await asyncio.to_thread(self._end_open)
                await asyncio.sleep(ERROR_S)
                # Those that wait for something else: an upload, a call that trains.
                self._drain.turn_out(DeviceLost(LOST) if self._is_lost() else Unavailable(GONE))
            self.should_exit = over or not self._drain.inside
        return await super().on_tick(counter)


@dataclass(slots=True)
class HttpServer:
    """An HTTP server on a bound socket, run by a thread of its own or by the caller."""

    server: DrainingServer
    listening: socket.socket
    thread: threading.Thread | None = None
    failure: BaseException | None = None  # of the thread

    @property
    def url(self) -> str:
        """Where it answers."""
        host, port = self.listening.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self) -> None:
        """Answers in the background, from now on; before, connections are refused.

        Raises ConfigInvalid when another server has come to listen there first.
        """
        with named_address(*self.listening.getsockname()[:2]):
            self.listening.listen(BACKLOG)
        self.thread = threading.Thread(target=self._run, name="jaxlora-http", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.server.run(sockets=[self.listening])
        except BaseException as error:
            self.failure = error

    @contextlib.contextmanager
    def ended_by_signals(self) -> Generator[None]:
        """Has SIGTERM and Ctrl-C begin the end while it is entered.  Main thread only."""
        before = {sig: signal.signal(sig, self.server.handle_exit) for sig in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def wait(self) -> None:
        """Returns when the end has begun and all open answers are complete, or when the device is lost.

        Raises KeyboardInterrupt when it was Ctrl-C, and what ended the background server.
        """
        assert self.thread is not None
        while self.thread.is_alive():
            self.thread.join(LOOK_S)  # without a limit CPython may sleep through a signal
        if self.failure is not None:
            raise self.failure
        if self.server.interrupted:
            raise KeyboardInterrupt

    def stop(self) -> None:
        """Ends the background server when all open answers are complete, or the grace time is over."""
        self.server.drain()
        if self.thread is not None:
            self.thread.join()


@contextlib.contextmanager
def named_address(host: str, port: int) -> Generator[None]:
    """Raises ConfigInvalid, naming the address, where it cannot be used."""
    try:
        yield
    except OSError as error:
        raise ConfigInvalid(f"cannot listen on {host} port {port} ({error.strerror}); choose another --port") from error


def bound(host: str, port: int) -> socket.socket:
    """A socket with this address, which does not listen yet.  An IPv6 host may stand in brackets.

    Raises ConfigInvalid when the address is taken or not ours.
    """
    host = host.removeprefix("[").removesuffix("]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named, or asyncio does not know that it is TCP, and each small write waits up to 40 ms for the client's acknowledgement.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        with named_address(host, port):
            listening.bind((host, port))
    except ConfigInvalid:
        listening.close()
        raise
    return listening


def make_http(
    runner: DeviceThread,
    config: AppConfig,
    *,
    listening: socket.socket,
    grace_s: float,
    ending: Callable[[int], None] = lambda inside: None,
) -> HttpServer:
    """The runner behind HTTP on a socket that is bound already, whose address says which hosts requests may name.

    grace_s: for open requests to finish when the server ends.  ending: see DrainingServer.
    """
    host = listening.getsockname()[0]
    most = connections_within(config.http.connections)
    app = create_app(runner, replace(config, hosts=hosts_for(host), most_requests=most - SPARE))
    settings = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        backlog=ACCEPTED_AT_ONCE,
        log_level="warning",
        timeout_graceful_shutdown=LAST_WORDS_S,
    )
    connections = Connections(most, config.http.header_timeout_s)
    server = DrainingServer(settings, connections, config.drain, grace_s, runner.end_all, lambda: runner.lost, ending)
    return HttpServer(server, listening)
