"""`jaxlora up`: the servers of a cluster, started one after the other, kept running, and drained at the end.

The front goes first at the end, and last at the start: whoever it lets in finds a server.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import cast

from jaxlora.config.serving import ServeConfig
from jaxlora.core.errors import ConfigInvalid
from serve.cluster.front import KEEPER, REPLICA, Front
from serve.cluster.peer import About, PeerGone
from serve.cluster.ray_servers import CALLS, Kept, RayServers, connected
from serve.cluster.replica import Replica
from serve.cluster.training.messages import TRAINER
from serve.cluster.training.process import TrainerProcess
from serve.observability.logs import logging_to
from serve.server.announcer import Announcer
from serve.server.build import LOG, PRIVATE, STOP_S
from serve.server.uvicorn import bound

FRONT = "front"
LOOK_S = 1.0  # between two looks whether all servers are there
LAST_S = 30.0  # beyond what a server gives its requests and its device, to save what it has


def main(config: ServeConfig, *, address: str | None) -> None:
    """Runs the cluster until SIGTERM or Ctrl-C, and then until open requests are complete.

    address: of a Ray cluster; None makes one on this machine.  Raises ConfigInvalid, and PeerGone for a server that does
    not start.
    """
    os.umask(PRIVATE)
    if config.cluster.trainers and (config.training is None or config.blobs is not None):
        raise ConfigInvalid(
            "[cluster] trainers need [training], and files and checkpoints in `data`; leave out [blobs]"
        )
    if config.blobs is not None:
        raise ConfigInvalid("up keeps adapters in a folder that every server reads; leave out [blobs]")
    config, cluster = on_one_port(config), config.cluster
    if address is None and not cluster.gpus:  # they share this machine's memory
        config = replace(config, memory_share=config.memory_share / (cluster.replicas + cluster.trainers + 1))
    folder, cpus = Path.cwd(), math.ceil(cluster.cpus * (cluster.replicas + cluster.trainers + 1)) + 1

    def server(name: str, *, reads: bool) -> Kept:
        arguments = (config, folder, reads, RayServers().names)
        return Kept(name, Replica, *arguments, cpus=cluster.cpus, gpus=cluster.gpus, calls=CALLS)

    def trainer(name: str) -> Kept:
        arguments = (config, folder, RayServers())
        return Kept(name, TrainerProcess, *arguments, cpus=cluster.cpus, gpus=cluster.gpus, calls=CALLS)

    with (
        logging_to(as_json=config.log == "json", level=config.log_level),
        Announcer(grace_s=config.grace_s, as_json=config.log == "json").until_stopped() as announcer,
        connected(address, cpus=cpus),
    ):
        keeper = server(KEEPER, reads=False)
        replicas = [server(f"{REPLICA}{n}", reads=True) for n in range(cluster.replicas)]
        trainers = [trainer(f"{TRAINER}{n}") for n in range(cluster.trainers)]
        with announcer.progress.stage("starting the keeper"):
            keeper.start()
            about = cast(About, keeper.call("about"))
        others = [*replicas, *trainers]
        with announcer.progress.stage("starting", of=len(others), unit="servers") as stage:
            for other in others:
                other.start()
            for number, other in enumerate(others, 1):
                stage.at(number)
                other.call("ready")
        front = Kept(FRONT, Front, config, folder, about, RayServers(), cpus=0, gpus=0, calls=1)
        front.start()
        url = front.call("url")
        announcer.ready()
        with signals() as (over, interrupted):
            print(f"serving {about.base_name} with {len(replicas)} replicas on {url}/v1", flush=True)
            while not over.wait(LOOK_S):
                repair([keeper, *others, front])
            announcer.say(f"stopping: open requests may take {config.grace_s:g} s; jobs stop at a checkpoint")
            stop(config.grace_s, front, [*others, keeper])
        if interrupted.is_set():
            raise KeyboardInterrupt


def on_one_port(config: ServeConfig) -> ServeConfig:
    """Returns the settings with the port that a front has, and has again when it is started again."""
    with contextlib.closing(bound(config.host, config.port)) as listening:
        return replace(config, port=listening.getsockname()[1])


@contextlib.contextmanager
def signals() -> Generator[tuple[threading.Event, threading.Event]]:
    """Yields what SIGTERM and Ctrl-C set while it is entered, and what Ctrl-C sets.  Main thread only."""
    over, interrupted = threading.Event(), threading.Event()

    def end(sig: int, _: object) -> None:
        if sig == signal.SIGINT:
            interrupted.set()
        over.set()

    before = {sig: signal.signal(sig, end) for sig in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield over, interrupted
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


def repair(actors: list[Kept]) -> None:
    """Starts again what has ended."""
    try:
        names = RayServers().names()
    except PeerGone as error:
        LOG.error("%s", error.message)
        return
    for actor in actors:
        actor.repair(names)


def stop(grace_s: float, front: Kept, servers: list[Kept]) -> None:
    """Ends the front when its requests are complete, then all servers at once; one that does not end is cut off."""

    def end(actor: Kept) -> None:
        try:
            actor.call("stop", grace_s + STOP_S + LAST_S)
        except PeerGone as error:
            LOG.error("it did not stop in order: %s", error.message)

    end(front)
    with ThreadPoolExecutor(len(servers)) as threads:
        list(threads.map(end, servers))
