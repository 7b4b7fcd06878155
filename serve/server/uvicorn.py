"""The app on a socket, and its end: not ready and refusing at once, while what is open finishes within a grace time.

    SIGTERM, Ctrl-C ──▶ the drain closes ──▶ all answers are complete, or the grace time is over, or another signal comes
                    ──▶ what is still open ends with an error event ──▶ the server ends

A device that is lost ends it too: answers have got their errors by then, and nobody is told 503 for ever.
uvicorn alone closes its socket first, so that clients find nobody, and cuts streams without a word.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

import uvicorn
from fastapi import APIRouter
from starlette.requests import HTTPConnection

from jaxlora.core.errors import ConfigInvalid, DeviceLost, Unavailable
from serve.access.caller import Caller, anyone
from serve.access.rate_limit import Limiter
from serve.http.drain import Drain
from serve.http.errors import Shape
from serve.http.request_log import Listener
from serve.runtime.device_thread import GONE, LOST, DeviceThread
from serve.server.app import NO_SHAPES, OPEN_PATHS, create_app, hosts_for

LOG = logging.getLogger("serve")
BACKLOG = 2048  # connections that may wait to be accepted
TELL_S = 0.2  # for answers to tell their errors
LAST_WORDS_S = 5  # for a client to read how its stream ended


class DrainingServer(uvicorn.Server):
    """Ends in two steps.

    end_open: ends every open answer with an error; called on a thread of its own.  is_lost: whether there is no use in
    going on; looked at often.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        drain: Drain,
        grace_s: float,
        end_open: Callable[[], None],
        is_lost: Callable[[], bool],
    ):
        super().__init__(config)
        self._drain, self._grace_s, self._end_open, self._is_lost = drain, grace_s, end_open, is_lost
        self._ends: float | None = None  # time.monotonic() when nothing is waited for any more
        self.interrupted = False  # by Ctrl-C

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
        """A signal to end."""
        self.interrupted |= sig == signal.SIGINT
        self.drain()

    async def on_tick(self, counter: int) -> bool:
        """Looks, ten times a second, whether the end has come."""
        if self._ends is None and self._is_lost():
            self._end_within(LAST_WORDS_S)
        if self._ends is not None and not self.should_exit:
            over = time.monotonic() >= self._ends
            if over and self._drain.inside:
                LOG.warning("%d requests are open when the server ends; each gets an error", self._drain.inside)
                await asyncio.to_thread(self._end_open)
                await asyncio.sleep(TELL_S)
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

    @property
    def url(self) -> str:
        """Where it answers."""
        host, port = self.listening.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def listen(self) -> None:
        """From now on a client waits for its answer; before, it is refused."""
        self.listening.listen(BACKLOG)

    def run(self) -> None:
        """Answers until SIGTERM, then until all open answers are complete; or until the device is lost.

        Raises KeyboardInterrupt when it was Ctrl-C.
        """
        self.server.run(sockets=[self.listening])
        if self.server.interrupted:
            raise KeyboardInterrupt

    def start(self) -> None:
        """Answers in the background, from now on."""
        self.listen()
        self.thread = threading.Thread(target=self.run, name="jaxlora-http", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Ends the background server when all open answers are complete, or the grace time is over."""
        self.server.drain()
        if self.thread is not None:
            self.thread.join()


def make_http(
    runner: DeviceThread,
    *,
    host: str,
    port: int,
    default_max_tokens: int,
    max_request_s: float,
    grace_s: float,
    routers: Sequence[APIRouter] = (),
    listeners: Sequence[Listener] = (),
    open_paths: Collection[str] = OPEN_PATHS,
    caller_of: Callable[[HTTPConnection], Caller] = anyone,
    limiter: Limiter | None = None,
    body_limits: Mapping[str, int] | None = None,
    error_shapes: Mapping[str, Shape] = NO_SHAPES,
    drain: Drain | None = None,
) -> HttpServer:
    """The runner behind HTTP, on a socket that is bound already.  An IPv6 host may stand in brackets.

    routers, listeners, open_paths, caller_of, limiter, body_limits, error_shapes, drain: as `create_app` takes them.

    Raises ConfigInvalid when the address is taken or not ours.
    """
    host = host.removeprefix("[").removesuffix("]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise ConfigInvalid(f"cannot listen on {host} port {port} ({error.strerror}); choose another --port") from error
    drain = Drain() if drain is None else drain
    app = create_app(
        runner,
        default_max_tokens=default_max_tokens,
        hosts=hosts_for(host),
        max_request_s=max_request_s,
        drain=drain,
        routers=routers,
        listeners=listeners,
        open_paths=open_paths,
        caller_of=caller_of,
        limiter=limiter,
        body_limits=body_limits,
        error_shapes=error_shapes,
    )
    settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=LAST_WORDS_S)
    server = DrainingServer(settings, drain, grace_s, runner.end_all, lambda: runner.lost)
    return HttpServer(server, listening)
