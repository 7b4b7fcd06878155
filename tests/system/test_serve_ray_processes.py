"""Actors of a real Ray cluster as the reconciler sees them, and what becomes of them when Ray's head is killed."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from cluster_world import until
from ray_world import ray_environment

from serve.cluster.autoscaler import Wanted
from serve.cluster.peer import PeerGone
from serve.cluster.reconciler import Life

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra `ray`"),
]


def actor_class():
    """A class that is pickled as a whole, as workers cannot import a test's modules."""

    class Actor:
        def __init__(self, why: str | None):
            if why is not None:
                raise ValueError(why)

        async def pid(self) -> int:
            return os.getpid()

        async def double(self, text: str) -> str:
            return 2 * text

        async def answer(self, scope: dict, body: list):
            import asyncio

            for part in range(300):
                self.parts = part + 1
                yield [{"type": "http.response.body", "body": b"x" * 1000, "more_body": True}]
                await asyncio.sleep(0)

        async def made(self) -> int:
            return self.parts

        async def never(self) -> None:
            import asyncio

            await asyncio.sleep(600)

        async def stop(self) -> None:
            pass

    return Actor


@pytest.fixture(scope="module")
def cluster():
    with ray_environment():
        from serve.cluster.ray_servers import RayCluster

        with contextlib.closing(RayCluster(None, 8)) as cluster:
            cluster.open()
            yield cluster


def start(cluster, server="replica-0", why=None):
    return cluster.start(server, actor_class(), why, cpus=0, gpus=0, calls=8)


def life(process, state, within_s=30):
    return until(lambda: process.life()[0] is state and process.life(), within_s)[1]


def test_one_gets_ready_answers_and_is_found_when_it_was_killed(cluster):
    process = start(cluster)
    assert process.life()[0] is Life.STARTING
    life(process, Life.READY)
    assert process.call("double", "ab", within_s=5) == "abab"
    with pytest.raises(PeerGone):
        process.call("never", within_s=0.2)
    os.kill(process.call("pid"), signal.SIGKILL)
    why = life(process, Life.ENDED)
    assert why
    with pytest.raises(PeerGone, match="replica-0"):
        process.call("pid")


def test_a_bad_start_says_why(cluster):
    assert life(start(cluster, why="the folder is in use"), Life.ENDED) == "ValueError: the folder is in use"


def test_one_that_was_told_to_stop_ends_and_its_name_is_never_used_again(cluster):
    from serve.cluster.ray_servers import RayServers

    processes = [start(cluster, "replica-7") for _ in range(2)]
    for process in processes:
        life(process, Life.READY)
    assert {"replica-7.1", "replica-7.2"} <= set(RayServers().names())
    pid = processes[0].call("pid")
    processes[0].stop()
    assert life(processes[0], Life.ENDED) == "it was told to stop"
    processes[0].kill()
    until(lambda: not Path(f"/proc/{pid}").exists(), 30)
    until(lambda: "replica-7.1" not in RayServers().names(), 30)
    assert processes[1].life()[0] is Life.READY


def test_a_call_is_looked_at_without_waiting(cluster):
    process = start(cluster)
    call = process.begin("never")
    assert not call.done()
    process.kill()
    with pytest.raises(PeerGone):
        until(call.done, 30)


def test_the_keeper_waits_for_a_client_that_does_not_read(cluster):
    from serve.cluster.ray_servers import PARTS_AHEAD, RayServers

    keeper = start(cluster, "keeper")
    life(keeper, Life.READY)

    async def read() -> tuple[int, int]:
        (name,) = [name for name in RayServers().names() if name.startswith("keeper.")]
        answer = RayServers().peer(name).answer({}, [b""])
        await anext(answer)
        await asyncio.sleep(1)
        ahead = keeper.call("made")
        return ahead, 1 + len([part async for part in answer])

    ahead, parts = asyncio.run(read())
    assert (ahead <= PARTS_AHEAD + 4, parts) == (True, 300)
    keeper.kill()


def test_after_its_head_was_killed_all_of_it_ends_and_another_one_starts(cluster):
    """The last test: what was there before is gone."""
    from serve.cluster.reconciler import Group, Kind, Reconciler
    from serve.cluster.up import reopen

    def group(name):
        return Group(Kind(name_of=lambda number: f"{name}{number}", start=lambda name: start(cluster, name), stop_s=9))

    groups = keeper, front, replicas = group("keeper"), group("front"), group("replica-")
    wanted = Wanted(replicas=1, trainers=0)
    servers = Reconciler(
        keeper=keeper, front=front, replicas=replicas, trainers=group("trainer-"), wanted=lambda _: wanted
    )
    for one in groups:
        one.look(1, 0.0)
    for one in groups:
        until(lambda one=one: one.look(1, 1.0) or one.ready, 30)
    pids = [process.call("pid") for one in groups for process in one.ready.values()]
    assert cluster.answers
    (head,) = [
        int(child)
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        if b"gcs_server" in Path(f"/proc/{child}/cmdline").read_bytes().partition(b"\0")[0]
    ]
    handler = signal.getsignal(signal.SIGTERM)
    os.kill(head, signal.SIGKILL)
    until(lambda: not cluster.answers, 10)
    began = time.monotonic()
    reopen(cluster, servers, threading.Event())
    assert signal.getsignal(signal.SIGTERM) is handler
    print(f"another cluster after {time.monotonic() - began:.1f} s")
    until(lambda: not [pid for pid in pids if Path(f"/proc/{pid}").exists()], 5)
    assert cluster.answers
    process = start(cluster, "keeper0")
    life(process, Life.READY)
    assert process.call("double", "a") == "aa"
