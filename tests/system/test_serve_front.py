"""The front learns which servers there are: those that come, go, hang, and come again under the same name."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from dataclasses import replace

import pytest

from jaxlora.config.cluster import RouterSection
from jaxlora.core.errors import Unavailable
from serve.cluster import front
from serve.cluster.front import KEEPER, REPLICA, Followed
from serve.cluster.peer import PeerGone
from serve.cluster.relay import Peers
from serve.cluster.replica_view import Report
from serve.cluster.router import Router

IDLE = Report(asked_s=0.0, slots=2, rows=4, running_rows=0, running_tokens=0, waiting_tokens=0, adapters={})


class FakePeer:
    """A server that reports unless it hangs or is gone."""

    def __init__(self):
        self.gone, self.stopped, self.may_answer = False, False, asyncio.Event()
        self.may_answer.set()
        self.asked = 0

    async def report(self, asked_s):
        self.asked += 1
        await self.may_answer.wait()
        if self.gone:
            raise PeerGone("its process has ended")
        if self.stopped:
            raise Unavailable("the server has stopped")
        return replace(IDLE, asked_s=asked_s)


class FakeServers(dict):
    """Servers by name; `away`: nobody knows which there are."""

    away = False

    def names(self):
        if self.away:
            raise PeerGone("the cluster does not answer")
        return list(self)

    def peer(self, name):
        if name not in self:
            raise PeerGone(f"{name} is not there")
        return self[name]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(front, "NAMES_S", 0.01)
    monkeypatch.setattr(front, "REPORT_S", 0.01)
    monkeypatch.setattr(front, "HANGS_S", 0.1)


@contextlib.asynccontextmanager
async def living(servers):
    """(the servers that can be asked) while an HTTP server around the front runs."""
    peers, messages, told, found = Peers(Router(RouterSection())), asyncio.Queue(), [], asyncio.Event()

    async def send(message):
        told.append(message["type"])

    messages.put_nowait({"type": "lifespan.startup"})
    life = asyncio.create_task(Followed(None, servers, peers, found.set)({"type": "lifespan"}, messages.get, send))
    yield peers
    messages.put_nowait({"type": "lifespan.shutdown"})
    async with asyncio.timeout(5):
        await life
    assert found.is_set() == (f"{KEEPER}.1" in servers)
    assert told == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert len(asyncio.all_tasks()) == 1


async def until(holds):
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.005)


def run(work):
    asyncio.run(work())


def test_servers_come_and_go():
    async def work():
        servers = FakeServers({f"{KEEPER}.1": FakePeer(), f"{REPLICA}0.1": FakePeer(), "front.1": FakePeer()})
        async with living(servers) as peers:
            await until(lambda: peers.keeper is servers[f"{KEEPER}.1"] and set(peers.replicas) == {"replica-0"})
            servers["replica-1.1"] = FakePeer()
            await until(lambda: set(peers.replicas) == {"replica-0", "replica-1"})
            servers["replica-0.1"].gone = servers[f"{KEEPER}.1"].gone = True
            await until(lambda: set(peers.replicas) == {"replica-1"} and peers.keeper is None)
            new = servers["replica-0.2"] = FakePeer()
            await until(lambda: peers.replicas.get("replica-0") is new)
            assert servers["front.1"].asked == 0

    run(work)


def test_one_that_hangs_is_left_out_until_it_answers():
    async def work():
        servers = FakeServers({"replica-0.1": FakePeer()})
        async with living(servers) as peers:
            await until(lambda: peers.replicas)
            servers["replica-0.1"].may_answer.clear()
            await until(lambda: not peers.replicas)
            asked = servers["replica-0.1"].asked
            await asyncio.sleep(0.2)
            assert servers["replica-0.1"].asked == asked
            servers["replica-0.1"].may_answer.set()
            await until(lambda: peers.replicas)

    run(work)


def test_one_that_a_request_found_gone_joins_again_by_its_next_report():
    async def work():
        servers = FakeServers({"replica-0.1": FakePeer()})
        async with living(servers) as peers:
            await until(lambda: peers.replicas)
            peers.leave("replica-0", servers["replica-0.1"])
            assert not peers.replicas
            await until(lambda: peers.replicas)

    run(work)


def test_servers_stay_known_while_nobody_knows_which_there_are():
    async def work():
        servers = FakeServers({"replica-0.1": FakePeer()})
        async with living(servers) as peers:
            await until(lambda: peers.replicas)
            servers.away = True
            asked = servers["replica-0.1"].asked
            await until(lambda: servers["replica-0.1"].asked > asked + 3)
            assert peers.replicas
            servers.away = False
            servers["replica-1.1"] = FakePeer()
            await until(lambda: len(peers.replicas) == 2)

    run(work)


def test_one_that_has_stopped_is_left_without_a_word_of_failure(caplog):
    async def work():
        servers = FakeServers({"replica-0.1": FakePeer()})
        async with living(servers) as peers:
            await until(lambda: peers.replicas)
            servers["replica-0.1"].stopped = True
            await until(lambda: not peers.replicas)

    run(work)
    assert not [record for record in caplog.records if record.exc_info]


def test_the_end_does_not_wait_for_who_knows_which_servers_there_are():
    """As it may wait for long, when Ray's head is gone."""
    over = threading.Event()

    class Hanging(FakeServers):
        def names(self):
            over.wait(30)
            return []

    async def work():
        async with living(Hanging()):
            await asyncio.sleep(0.05)

    began = time.monotonic()
    run(work)
    over.set()
    assert time.monotonic() - began < 5
