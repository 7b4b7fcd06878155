"""`jaxlora up`: the servers of a cluster, as many as are wanted, kept running, and drained at the end.

The front goes first at the end; until the first replica is there it holds requests.  Where Ray's head is gone all
servers end, and start again with the next one.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

from jaxlora.config.serving import ServeConfig
from jaxlora.core.errors import ConfigInvalid
from serve.cluster.autoscaler import Autoscaler, Load, Wanted
from serve.cluster.front import Front
from serve.cluster.peer import KEEPER, REPLICA, About, PeerGone
from serve.cluster.ray_servers import CALLS, RayCall, RayCluster, RayProcess, RayServers
from serve.cluster.reconciler import Group, Kind, Reconciler
from serve.cluster.replica import Replica
from serve.cluster.training.messages import TRAINER
from serve.cluster.training.process import TrainerProcess
from serve.cluster.training.report import TrainingReport
from serve.observability.logs import logging_to
from serve.server.announcer import Announcer
from serve.server.build import LOG, PRIVATE, STOP_S
from serve.server.uvicorn import bound

FRONT = "front"
FRONT_CALLS = 8  # at once, to the front: by this process alone
FIRST_LOOK_S = 0.2  # between two looks at the servers while the first of them start
LOOK_S = 1.0  # and afterwards
ASK_S = 5.0  # for a server to say something
AWAY_S = 5.0  # without an answer of Ray's head, it is gone
HEAD_S = 15.0  # for open requests and checkpoints then: Ray's other processes end a minute after their head
AGAIN_S = 10.0  # at most between two attempts to have Ray again
LAST_S = 30.0  # beyond what a server gives its requests and its device, to save what it has


def main(config: ServeConfig, *, address: str | None) -> None:
    """Runs the cluster until SIGTERM or Ctrl-C, and then until open requests are complete.

    address: of a Ray cluster; None makes one on this machine.  Raises ConfigInvalid, and PeerGone for a server that does
    not start.
    """
    os.umask(PRIVATE)
    if config.cluster.trainer_limit and (config.training is None or config.blobs is not None):
        raise ConfigInvalid(
            "[cluster] trainers need [training], and files and checkpoints in `data`; leave out [blobs]"
        )
    config, cluster = on_one_port(config), config.cluster
    if address is None and not cluster.gpus:  # they share this machine's memory
        config = replace(config, memory_share=config.memory_share / cluster.server_limit)
    ray, scaler = RayCluster(address, math.ceil(cluster.cpus * cluster.server_limit) + 1), Autoscaler(cluster)
    with (
        logging_to(as_json=config.log == "json", level=config.log_level),
        Announcer(grace_s=config.grace_s, as_json=config.log == "json").until_stopped() as announcer,
        contextlib.closing(ray),
    ):
        ray.open()
        servers = reconciler(config, Path.cwd(), ray, scaler)
        base, url = started(servers, cluster.replicas, announcer)
        announcer.ready()
        with signals() as (over, interrupted):
            print(f"serving {base} with {count_of(config)} on {url}/v1", flush=True)
            away_since_s: float | None = None
            while not over.wait(LOOK_S):
                now_s = time.monotonic()
                if ray.answers:
                    away_since_s = None
                    look(servers, now_s)
                elif away_since_s is None:
                    away_since_s = now_s
                elif now_s - away_since_s >= AWAY_S:
                    reopen(ray, servers, over)
                    away_since_s, servers = None, reconciler(config, Path.cwd(), ray, scaler)
            announcer.say(f"stopping: open requests may take {config.grace_s:g} s; jobs stop at a checkpoint")
            stop(servers, config.grace_s + STOP_S + LAST_S)
        if interrupted.is_set():
            raise KeyboardInterrupt


def count_of(config: ServeConfig) -> str:
    """Returns how many replicas there are, in words."""
    least, most = config.cluster.replicas, config.cluster.replica_limit
    return f"{least} replicas" if least == most else f"{least} to {most} replicas"


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


def reconciler(config: ServeConfig, folder: Path, ray: RayCluster, scaler: Autoscaler) -> Reconciler[RayProcess]:
    """Returns what starts, repairs and removes the servers of this cluster, none of which is there yet."""
    cluster, stop_s = config.cluster, config.grace_s + STOP_S + LAST_S

    def server(name: str, make: type, *arguments: object) -> RayProcess:
        return ray.start(name, make, config, folder, *arguments, cpus=cluster.cpus, gpus=cluster.gpus, calls=CALLS)

    def front_over(name: str) -> RayProcess:
        about = one(keeper).call("about", within_s=ASK_S)
        return ray.start(name, Front, config, folder, about, others, cpus=0, gpus=0, calls=FRONT_CALLS, here=True)

    def drained(replica: str) -> bool:
        try:
            one(front).call("drain", replica, within_s=ASK_S)
        except PeerGone as error:
            LOG.error("%s is not drained yet: %s", replica, error.message)
            return False
        return True

    def moved(trainer: str) -> bool:
        try:
            if trainer not in moves:
                moves[trainer] = one(keeper).begin("drain_trainer", trainer)
            if not moves[trainer].done():
                return False
        except PeerGone as error:
            LOG.error("the jobs of %s are not moved yet: %s", trainer, error.message)
            moves.pop(trainer, None)
            return False
        del moves[trainer]
        return True

    def wanted(now_s: float) -> Wanted:
        training = said(keeper, "training") if cluster.trainer_limit else None
        return scaler.wanted(cast(Load | None, said(front, "load")), cast(TrainingReport | None, training), now_s)

    moves: dict[str, RayCall] = {}
    others = RayServers()
    keeper = Group(
        Kind(
            name_of=lambda _: KEEPER,
            start=lambda name: server(name, Replica, False, others.names),
            stop_s=stop_s,
        )
    )
    front = Group(Kind(name_of=lambda _: FRONT, start=front_over, stop_s=stop_s))
    replicas = Group(
        Kind(
            name_of=lambda number: f"{REPLICA}{number}",
            start=lambda name: server(name, Replica, True, others.names),
            drained=drained,
            stop_s=stop_s,
        )
    )
    trainers = Group(
        Kind(
            name_of=lambda number: f"{TRAINER}{number}",
            start=lambda name: server(name, TrainerProcess, others),
            drained=moved,
            stop_s=STOP_S + LAST_S,
        )
    )
    return Reconciler(keeper=keeper, front=front, replicas=replicas, trainers=trainers, wanted=wanted)


def one(group: Group[RayProcess]) -> RayProcess:
    """Returns the process of a group of one.  Raises PeerGone while it cannot be called."""
    for process in group.ready.values():
        return process
    raise PeerGone("it is not there now")


def said(group: Group[RayProcess], method: str) -> object:
    """Returns what the process of a group of one says; None where it says nothing."""
    try:
        return one(group).call(method, within_s=ASK_S)
    except PeerGone as error:
        LOG.debug("%s: %s", method, error.message)
        return None


def started(servers: Reconciler[RayProcess], replicas: int, announcer: Announcer) -> tuple[str, str]:
    """Returns the base's name and the front's URL once there are so many replicas.  Raises PeerGone for a bad start."""
    with announcer.progress.stage("starting", of=2 + replicas, unit="servers") as stage:
        while not servers.front.ready or len(servers.replicas.ready) < replicas:
            servers.look(time.monotonic())
            if servers.failure is not None:
                raise PeerGone(servers.failure)
            stage.at(sum(len(group.ready) for group in servers.groups))
            time.sleep(FIRST_LOOK_S)
        about = cast(About, one(servers.keeper).call("about"))
        return about.base_name, cast(str, one(servers.front).call("url"))


def look(servers: Reconciler[RayProcess], now_s: float) -> None:
    """Does what can be done now; what needs a server that has just gone is left for the next look."""
    try:
        servers.look(now_s)
    except PeerGone as error:
        LOG.error("%s", error.message)


def stop(servers: Reconciler[RayProcess], within_s: float) -> None:
    """Ends the front when its requests are complete, then all servers at once; one that does not end is cut off."""

    def end(processes: Mapping[str, RayProcess]) -> None:
        calls = [process.begin("stop") for process in processes.values()]
        ends_s = time.monotonic() + within_s
        for call in calls:
            try:
                call.result(max(0.0, ends_s - time.monotonic()))
            except PeerGone as error:
                LOG.error("it did not stop in order: %s", error.message)

    end(servers.front.ready)
    end(
        {
            name: process
            for group in servers.groups
            if group is not servers.front
            for name, process in group.ready.items()
        }
    )


def reopen(ray: RayCluster, servers: Reconciler[RayProcess], over: threading.Event) -> None:
    """Ends what is left of the servers, and returns when there is a cluster again, or none is wanted any more."""
    own = ray.address is None
    then = "it is started again" if own else f"waiting until one is there again at {ray.address}"
    LOG.error("Ray's head has not answered for %g s; all servers end, and %s", AWAY_S, then)
    stop(servers, HEAD_S)
    ray.close()
    wait_s = 0.0
    while not over.wait(wait_s):
        wait_s = min(2 * wait_s + 1, AGAIN_S)
        if own or ray.answers:
            try:
                ray.open()
            except ConfigInvalid as error:
                LOG.error("%s; the next attempt is in %g s", error.message, wait_s)
            else:
                LOG.info("Ray is there again; all servers are started")
                return
