"""What clients reach: one socket, the gate, and behind it the servers of the cluster.

It has no model and no jobs.  It knows the keys, counts what each address and tenant has open, finds the servers by their
names and asks each, a few times a second, what it has to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

from jaxlora.config.serving import ServeConfig
from jaxlora.core.errors import Unavailable
from serve.access.keys import Keys, needs_keys
from serve.access.rate_limit import Limiter
from serve.api.gradient.errors import API, gradient_response
from serve.cluster.aliases import Aliases
from serve.cluster.autoscaler import Load
from serve.cluster.metrics import ClusterMetrics
from serve.cluster.peer import KEEPER, REPLICA, About, Chunk, Peer, PeerGone
from serve.cluster.relay import Peers, Relay
from serve.cluster.router import Router
from serve.db.database import Database
from serve.db.gradient import StoredGradient
from serve.db.jobs import StoredJobs
from serve.db.keys import StoredKeys
from serve.http.drain import Drain
from serve.http.errors import ErrorShapes
from serve.http.json_bodies import JsonBodies
from serve.http.request_log import METRICS_PATH
from serve.observability.logs import logging_to
from serve.server.gate import OPEN_PATHS, AppConfig, Gate
from serve.server.uvicorn import bound, config_on, http_over

LOG = logging.getLogger("serve")
NAMES_S = 0.5  # between two looks at which servers there are
REPORT_S = 0.25  # between two questions to one
CALL_S = 5.0  # for the event loop to answer another thread
HANGS_S = 5.0  # a server that has not answered for so long is asked for nothing else


class Servers(Protocol):
    """The servers of a cluster, as what carries calls to them knows them: SERVER.1 is its first process, and so on."""

    def names(self) -> Collection[str]:
        """Returns the names of the processes that are there or are being started.  May wait for the network."""
        ...

    def peer(self, name: str) -> Peer:
        """Returns the server of this process.  Raises PeerGone."""
        ...

    async def keep(self, data: bytes) -> Chunk:
        """Puts a part of a body where every server can read it."""
        ...


class Front:
    """The HTTP server in front of the others, which answers on a thread of its own until `stop`."""

    def __init__(self, config: ServeConfig, folder: Path, about: About, servers: Servers):
        """folder: that relative paths of the settings begin from.  about: the servers.

        Raises ConfigInvalid for an address that cannot be used, and as the keys do; Unavailable, StorageFailed.
        """
        os.chdir(folder)
        drain, limiter = Drain(), Limiter(config.limits)
        with contextlib.ExitStack() as stack:
            stack.enter_context(logging_to(as_json=config.log == "json", level=config.log_level))
            LOG.info("this process answers clients")
            listening = stack.enter_context(contextlib.closing(bound(config.host, config.port)))
            database = stack.enter_context(contextlib.closing(Database(config.database_url)))
            keys = Keys(StoredKeys(database), needed=needs_keys(config))
            settings = config_on(
                listening,
                AppConfig(
                    default_max_tokens=config.default_max_tokens,
                    max_request_s=config.max_request_s,
                    caller_of=keys.caller_of,
                    limits=config.limits,
                    http=config.http,
                    body_limits=about.body_limits,
                    drain=drain,
                    open_paths=OPEN_PATHS | {METRICS_PATH} if config.metrics_open else OPEN_PATHS,
                ),
            )
            cluster, self._found = config.cluster, threading.Event()
            peers = Peers(Router(cluster.router), scaling=cluster.scaling, may_rest=cluster.replicas == 0)
            relay = Relay(
                peers,
                base_name=about.base_name,
                default_max_tokens=config.default_max_tokens,
                keep=servers.keep,
                find=Aliases(StoredJobs(database), StoredGradient(database)).find,
            )
            bodies = JsonBodies(
                relay, rate=limiter.bodies, uploads=about.body_limits.keys(), most_values=about.most_values
            )
            metrics = ClusterMetrics(bodies, peers, is_open=config.metrics_open, adapters=config.metrics_adapters)
            gate = Gate(metrics, settings, ErrorShapes({API: gradient_response}))
            self._followed = Followed(gate, servers, peers, self._found.set)
            self._http = http_over(
                self._followed,
                settings,
                listening=listening,
                grace_s=config.grace_s,
                end_open=lambda: None,
                end_error=lambda: Unavailable(
                    "the server stopped before the answer was complete; retry when it is up again"
                ),
                is_lost=lambda: False,
                ending=lambda inside: LOG.info("stopping: %d requests are open", inside),
            )
            if keys.keyless:
                LOG.warning("there are no keys: anyone on this machine may do everything (see jaxlora keys --help)")
            keys.start(drain.shut_out)
            stack.callback(keys.close)
            self._http.start()
            stack.callback(self._http.stop)
            self._end = stack.pop_all()

    def url(self) -> str:
        """Returns where it answers, once it has found the keeper and a replica, where there must be one."""
        self._found.wait()
        return self._http.url

    def load(self) -> Load:
        """Returns what decides how many replicas there should be.  Raises Unavailable when it has ended."""
        return self._followed.call(self._followed.peers.load)

    def drain(self, replica: str) -> None:
        """Sends a replica's process nothing more.  Raises Unavailable when it has ended."""
        self._followed.call(functools.partial(self._followed.peers.drain, replica))

    def stop(self) -> None:
        """Ends when all open answers are complete, or the grace time is over."""
        self._end.close()


class Followed:
    """ASGI application that knows which servers there are for as long as the HTTP server around it runs."""

    def __init__(self, app: ASGIApp, servers: Servers, peers: Peers, found: Callable[[], None]):
        """found: called when there are all to ask that there must be, again and again."""
        self._app, self._servers, self.peers, self._found = app, servers, peers, found
        self._loop: asyncio.AbstractEventLoop | None = None  # while the HTTP server runs
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._finding = ThreadPoolExecutor(4, "finding")  # the loop's own one would be waited for at the end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, or lives as long as the HTTP server."""
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        await receive()  # it starts
        self._loop = asyncio.get_running_loop()
        finding = asyncio.create_task(self._find())
        await send({"type": "lifespan.startup.complete"})
        await receive()  # it ends
        self._loop = None
        for task in (finding, *self._asking.values()):
            task.cancel()
        self._finding.shutdown(wait=False, cancel_futures=True)
        await send({"type": "lifespan.shutdown.complete"})

    def call[T](self, work: Callable[[], T]) -> T:
        """Returns what this returns in the event loop.  Of any other thread.  Raises Unavailable."""

        async def run() -> T:
            return work()

        if (loop := self._loop) is None:
            raise Unavailable("the front does not answer requests")
        return asyncio.run_coroutine_threadsafe(run(), loop).result(CALL_S)

    async def _find(self) -> None:
        """Begins to ask each server that appears."""
        while True:
            try:
                names = await asyncio.get_running_loop().run_in_executor(self._finding, self._servers.names)
                self.peers.known = {name.partition(".")[0] for name in names if name.startswith(REPLICA)}
            except PeerGone as error:
                LOG.error("which servers there are is not known: %s", error.message)
                names = ()
            for name in names:
                if name not in self._asking and name.startswith((KEEPER, REPLICA)):
                    self._asking[name] = asyncio.create_task(self._ask(name))
                    self._asking[name].add_done_callback(functools.partial(self._asked, name))
            await asyncio.sleep(NAMES_S)

    def _asked(self, name: str, task: asyncio.Task[None]) -> None:
        """The process of this name is gone."""
        del self._asking[name]
        if not task.cancelled() and (error := task.exception()) is not None:
            LOG.error("%s is asked no more", name, exc_info=error)

    async def _ask(self, name: str) -> None:
        """Asks one server what it has to do, until its process is gone."""
        server = name.partition(".")[0]
        try:
            peer = await asyncio.get_running_loop().run_in_executor(self._finding, self._servers.peer, name)
        except PeerGone:
            return
        with contextlib.suppress(Unavailable):  # also one that has stopped, and has a process still
            while True:
                answer = asyncio.ensure_future(peer.report(self.peers.clock()))
                if not (await asyncio.wait((answer,), timeout=HANGS_S))[0]:
                    self.peers.leave(server, peer)
                report = await answer
                if server == KEEPER:
                    self.peers.keeper = peer
                else:
                    self.peers.report(server, peer, report)
                if self.peers.keeper is not None and (self.peers.replicas or self.peers.may_rest):
                    self._found()
                await asyncio.sleep(REPORT_S)
        self.peers.leave(server, peer)
