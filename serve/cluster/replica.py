"""One server of a cluster: what `jaxlora serve` builds, without HTTP, in a process that answers calls.

The keeper, which writes, has the claim to the database and the lock of the adapters, trains, and places jobs at trainers.  The
others read both, see a version as soon as it is on the disk, and answer requests only.  This module knows nothing of what
carries the calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Collection, Generator, Sequence
from dataclasses import replace
from pathlib import Path

from starlette.types import Message, Scope

from jaxlora.checkpoints.load import load_found
from jaxlora.config.serving import ServeConfig
from jaxlora.core.errors import StateInvalid, StorageAway, StorageFailed, Unavailable
from jaxlora.core.lora import AdapterRef
from jaxlora.core.progress import Lines, Progress
from jaxlora.model import compile_cache
from jaxlora.model.machine import memory_errors
from serve.cluster.answers import answered
from serve.cluster.peer import JOB, About, Chunk
from serve.cluster.replica_view import Report
from serve.cluster.training.group import TrainingGroup
from serve.cluster.training.messages import Contact, Orders, Publication, Terms
from serve.cluster.training.report import TrainingReport
from serve.http.drain import Drain
from serve.observability.logs import logging_to
from serve.server.app import create_app, most_values
from serve.server.build import PRIVATE, SIZE_KEYS, STOP_S, Server, assembled, begin, leave, planned
from serve.server.instance import followed_base, followed_instance, opened_instance, same_base

LOG = logging.getLogger("serve")
NEWS_S = 0.25  # between two looks at what the writing server has made, for requests that follow an adapter and for pins
ENDING_S = 0.05  # between two looks whether requests are open


class Replica:
    """The server.  Its methods are of one event loop, which is not the thread that makes it."""

    def __init__(self, config: ServeConfig, folder: Path, reads: bool, processes: Callable[[], Collection[str]]):
        """Builds the server and compiles its programs.  folder: that relative paths of the settings begin from.

        reads: whether another one writes, which has started before.  processes: names of those of the cluster.  Raises what a
        start of `jaxlora serve` raises, and StateInvalid where there is nothing to read yet.
        """
        os.umask(PRIVATE)
        os.chdir(folder)
        compile_cache.enable(None)
        self._config = replace(config, training=None, load=()) if reads else config
        self._drain, self._processes = Drain(), processes
        self._group: TrainingGroup | None = None
        with contextlib.ExitStack() as stack:
            stack.enter_context(logging_to(as_json=config.log == "json", level=config.log_level))
            LOG.info("this process %s", "reads and answers requests" if reads else "writes, and trains")
            self._server = self._assembled(stack, reads=reads)
            if reads:
                stack.enter_context(following(self._server))
            self._app = create_app(self._server.runner, replace(self._server.own.app, hosts=None))
            self._end = stack.pop_all()

    def _assembled(self, stack: contextlib.ExitStack, *, reads: bool) -> Server:
        config = self._config
        instance = stack.enter_context(followed_instance(config) if reads else opened_instance(config))
        progress = Progress(Lines(LOG.info))
        found, sized = planned(config, LOG.info)
        with memory_errors(f"serving {found.name}", SIZE_KEYS):
            with progress.stage(f"opening {found.name}"):
                opened = load_found(found, config.model, config.mesh)
            database = instance.database
            opened = followed_base(database, opened) if reads else same_base(database, config, opened)
            server = stack.enter_context(assembled(sized, instance, opened, self._drain))
            if server.own.jobs is not None and sized.training is not None:
                terms = Terms(base_hash=opened.base_hash, training=sized.training)
                self._group = TrainingGroup(server.own.jobs, terms, instance.epoch, self._processes)
                self._group.start()
                stack.callback(self._group.close)
            begin(server.runner, opened, sized, server.own, progress)
        stack.enter_context(server.compiles)
        return server

    async def ready(self) -> None:
        """Returns once the server answers."""

    async def about(self) -> About:
        """Describes the server."""
        return About(
            base_name=self._server.runner.base_name,
            most_values=most_values(self._server.runner),
            body_limits=self._server.own.app.body_limits,
        )

    async def report(self, asked_s: float) -> Report:
        """Tells what the server has to do, between two steps; see `Peer`.  Ends the process when the device is lost."""
        server = self._server
        if server.runner.lost:
            leave(server.store)

        def measured() -> Report:
            return server.runner.call(lambda: report_of(server, asked_s))

        return await asyncio.to_thread(measured)

    async def answer(self, scope: Scope, body: Sequence[Chunk]) -> AsyncGenerator[list[Message]]:
        """Yields the app's answer to a request; see `answered`."""
        if (job := scope["state"].get(JOB)) is not None:
            self._server.runner.catalog.jobs.put(job)
        async with contextlib.aclosing(answered(self._app, scope, body)) as answer:
            async for messages in answer:
                yield messages

    async def training(self) -> TrainingReport:
        """Tells what the training group has to do.  Raises StateInvalid where there is none."""
        return self._training.report()

    async def drain_trainer(self, name: str) -> None:
        """Moves the jobs of the trainer "trainer-0" or so elsewhere, and gives it no more; returns when it holds none.

        A process started under this name later is given jobs again.  Raises StateInvalid where there is no group.
        """
        await asyncio.to_thread(self._training.drain, name)

    async def terms(self) -> Terms:
        """Returns what trainers must be like; see `KeeperPeer`, here and below."""
        return self._training.terms()

    async def contact(self, contact: Contact) -> Orders:
        """Hears a trainer, and returns what it is to do."""
        return self._training.contact(contact)

    async def publish(self, publication: Publication) -> AdapterRef:
        """Makes a version of a trainer's weights."""
        return await asyncio.to_thread(self._training.publish, publication)

    @property
    def _training(self) -> TrainingGroup:
        if self._group is None:
            raise StateInvalid("this server takes no jobs")
        return self._group

    async def stop(self) -> None:
        """Ends the server: what is open is complete, or `grace_s` are over; jobs stop at a checkpoint; all is saved."""
        self._drain.close()
        ends = time.monotonic() + self._config.grace_s
        while self._drain.inside and time.monotonic() < ends:
            await asyncio.sleep(ENDING_S)
        runner = self._server.runner
        if self._group is not None:
            await asyncio.to_thread(self._group.close)
        await asyncio.to_thread(runner.end_all)
        self._drain.turn_out(Unavailable("the server is stopping; ask another one"))
        if not await asyncio.to_thread(runner.end, STOP_S):
            leave(self._server.store)
        await asyncio.to_thread(self._end.close)


def report_of(server: Server, asked_s: float) -> Report:
    """Returns what the server has to do.  Device thread only."""
    scheduler = server.runner.engine.scheduler
    left = scheduler.left()
    adapters = {(ref.tenant, ref.name): 0 for ref in scheduler.slots.resident()}
    for ref, tokens in left.items():
        if ref is not None:
            adapters[ref.tenant, ref.name] = adapters.get((ref.tenant, ref.name), 0) + sum(tokens)
    return Report(
        asked_s=asked_s,
        slots=scheduler.slots.count,
        rows=scheduler.limits.rows,
        running_rows=len(scheduler.running),
        running_tokens=sum(running for running, _ in left.values()),
        waiting_tokens=sum(waiting for _, waiting in left.values()),
        adapters=adapters,
    )


@contextlib.contextmanager
def following(server: Server) -> Generator[None]:
    """Has pins and followers go on to the versions that the writing server makes, while it is entered."""
    over = threading.Event()

    def take() -> None:
        for ref in server.store.take_news():
            if ref == server.store.latest(ref.tenant, ref.name):
                server.runner.call(functools.partial(server.runner.engine.announce, ref))

    def follow() -> None:
        sees = True
        while not over.wait(NEWS_S):
            try:
                take()
            except (StorageAway, StorageFailed) as error:
                if sees:
                    LOG.error("new versions are not seen: %s", error.message)
                sees = False
            except Unavailable:
                return  # the server ends
            else:
                if not sees:
                    LOG.warning("new versions are seen again")
                sees = True

    thread = threading.Thread(target=follow, name="adapter-news", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
