"""Servers that are actors of a Ray cluster: NAME.1 is the first process of the server NAME; calls go between processes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections import Counter
from collections.abc import AsyncGenerator, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import ray  # ty: ignore[import-not-found]
import ray.util  # ty: ignore[import-not-found]
from ray.actor import ActorHandle  # ty: ignore[import-not-found]
from ray.exceptions import RayError, RayTaskError  # ty: ignore[import-not-found]
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # ty: ignore[import-not-found]
from starlette.types import Message, Scope

from jaxlora.core.errors import ConfigInvalid
from jaxlora.core.lora import AdapterRef
from serve.cluster.peer import KEEPER, Chunk, PeerGone
from serve.cluster.reconciler import Life
from serve.cluster.replica_view import Report
from serve.cluster.training.messages import Contact, KeeperGone, Orders, Publication, Terms

LOG = logging.getLogger("serve")
NAMESPACE = "jaxlora"
STORE_BYTES = 2**28  # of shared memory, for parts of large bodies; what does not fit lies in files
CALLS = 4096  # at once, to one actor
PARTS_AHEAD = 16  # of an answer of the keeper, that its client has not read yet
PROBE_S = 2.0  # for Ray's head to take a connection
HEARS_S = 5.0  # a keeper that has not answered a trainer for so long is asked again


@dataclass(slots=True)
class RayCluster:
    """A Ray cluster that is there at an address, or one of our own, which only this machine reaches.

    cpus: that one of our own offers; they are a count, not a measurement.
    """

    address: str | None
    cpus: float
    head: tuple[str, int] | None = None  # where Ray's head answered
    _started: Counter[str] = field(default_factory=Counter)  # processes of each server, in all clusters so far

    def open(self) -> None:
        """Joins the cluster, or starts it.  Main thread only.  Raises ConfigInvalid when none answers at the address."""
        own: Mapping[str, object] = {}
        if self.address is None:
            own = {"num_cpus": self.cpus, "include_dashboard": False, "object_store_memory": STORE_BYTES}
        on_term = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(self.address or "local", namespace=NAMESPACE, logging_level=logging.WARNING, **own)
        except (ConnectionError, RuntimeError, ValueError) as error:
            ray.shutdown()
            raise ConfigInvalid(f"no Ray cluster answers at {self.address} ({error})") from error
        finally:
            signal.signal(signal.SIGTERM, on_term)  # Ray takes it
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        self.head = (host.strip("[]"), int(port))

    def close(self) -> None:
        """Leaves the cluster; our processes end with that, and so does one of our own."""
        ray.shutdown()

    @property
    def answers(self) -> bool:
        """Whether something takes connections where Ray's head answered."""
        assert self.head is not None, "it was opened"
        try:
            socket.create_connection(self.head, PROBE_S).close()
        except OSError:
            return False
        return True

    def start(
        self, server: str, make: type, *arguments: object, cpus: float, gpus: float, calls: int, here: bool = False
    ) -> RayProcess:
        """Begins to make an actor of this class with these arguments.

        calls: that it takes at once.  here: whether it must be on the machine that `jaxlora up` runs on.  It is SERVER.1,
        SERVER.2 and so on, as Ray keeps the name of one that has ended.
        """
        self._started[server] += 1
        name = f"{server}.{self._started[server]}"
        options: dict[str, object] = {"num_cpus": cpus, "num_gpus": gpus, "max_concurrency": calls}
        if here:
            node = ray.get_runtime_context().get_node_id()
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
        return RayProcess(server, ray.remote(make).options(name=name, **options).remote(*arguments))


@dataclass(frozen=True, slots=True)
class RayServers:
    """The actors of this cluster by name, as `Front` asks for them."""

    def names(self) -> Collection[str]:
        """Returns the names of the actors."""
        try:
            return ray.util.list_named_actors()
        except RayError as error:
            raise PeerGone(f"the cluster does not answer: {error}") from error

    def peer(self, name: str) -> RayPeer:
        """Returns the actor that has this name now.  Raises PeerGone."""
        try:
            return RayPeer(ray.get_actor(name), is_bounded=name.startswith(f"{KEEPER}."))
        except (ValueError, RayError) as error:
            raise PeerGone(f"{name} is not there") from error

    async def keep(self, data: bytes) -> Chunk:
        """Puts a part of a body where every process can read it."""
        return await asyncio.to_thread(ray.put, data)

    def own_name(self) -> str:
        """Returns the name of this actor; see `Carrier`."""
        return ray.get_runtime_context().get_actor_name()

    def keeper(self) -> RayKeeper:
        """Returns the keeper that there is now; see `Carrier`."""
        try:
            names = [name for name in ray.util.list_named_actors() if name.startswith(f"{KEEPER}.")]
            return RayKeeper(ray.get_actor(max(names, key=lambda name: int(name.rpartition(".")[2]))))
        except (ValueError, RayError) as error:
            raise KeeperGone("it is not there") from error


class RayPeer:
    """A `Replica` in another process."""

    def __init__(self, actor: ActorHandle, *, is_bounded: bool):
        """is_bounded: whether it waits for a client that reads slowly, as files are large; that costs a call for each part."""
        self._actor = actor
        ahead = {"_generator_backpressure_num_objects": PARTS_AHEAD} if is_bounded else {}
        self._answer = actor.answer.options(num_returns="streaming", **ahead)

    async def answer(self, scope: Scope, body: Sequence[Chunk]) -> AsyncGenerator[list[Message]]:
        """Yields the messages of its answer; see `Peer`."""
        whole = False
        stream = self._answer.remote(scope, body)
        try:
            with gone():
                async for part in stream:
                    yield await part
            whole = True
        finally:
            if not whole:
                ray.cancel(stream)

    async def report(self, asked_s: float) -> Report:
        """Returns what it has to do; see `Peer`."""
        with gone():
            return await self._actor.report.remote(asked_s)


class RayKeeper:
    """The keeper in another process, as its trainers call it; see `KeeperPeer`."""

    def __init__(self, actor: ActorHandle):
        self._actor = actor

    def terms(self) -> Terms:
        """Returns the terms, once the keeper has started."""
        return cast(Terms, self._call(self._actor.terms.remote()))

    def contact(self, contact: Contact) -> Orders:
        """Tells the keeper what there is."""
        return cast(Orders, self._call(self._actor.contact.remote(contact)))

    def publish(self, publication: Publication) -> AdapterRef:
        """Makes a version."""
        return cast(AdapterRef, self._call(self._actor.publish.remote(publication)))

    def _call(self, answer: ray.ObjectRef) -> object:
        """Returns what the keeper answers.  Raises what it raises, and KeeperGone."""
        try:
            return ray.get(answer, timeout=HEARS_S)
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:
            raise KeeperGone("it does not answer") from error


@contextlib.contextmanager
def gone() -> Generator[None]:
    """Raises PeerGone where an actor's process has ended; what the actor itself raises comes as it is."""
    try:
        yield
    except RayTaskError:
        raise
    except RayError as error:
        LOG.debug("a call was not answered: %s", error)
        raise PeerGone("the server stopped before the answer was complete; retry") from error


class RayProcess:
    """An actor, from its start on; see `Process`."""

    def __init__(self, server: str, actor: ActorHandle):
        self._server, self._actor = server, actor
        self._asked = actor.__ray_ready__.remote()  # answered by every actor that is ready
        self._life, self._why = Life.STARTING, ""
        self._stopping: RayCall | None = None

    def life(self) -> tuple[Life, str]:
        """Returns how far it is, and of one that has ended why."""
        try:
            if self._life is not Life.ENDED and ray.wait([self._asked], timeout=0)[0]:
                ray.get(self._asked)
                self._life, self._asked = Life.READY, self._actor.__ray_ready__.remote()
            if self._stopping is not None and self._stopping.done():
                self._life, self._why = Life.ENDED, "it was told to stop"
        except (RayError, PeerGone) as error:
            self._life, self._why = Life.ENDED, last_line(error)
        return self._life, self._why

    def call(self, method: str, *arguments: object, within_s: float | None = None) -> object:
        """Returns what a method returns, once the actor is made.  Raises PeerGone, also when it takes too long."""
        return self.begin(method, *arguments).result(within_s)

    def begin(self, method: str, *arguments: object) -> RayCall:
        """Calls a method."""
        return RayCall(self._server, getattr(self._actor, method).remote(*arguments))

    def stop(self) -> None:
        """Has it complete its open requests, save what it has, and end."""
        self._stopping = self.begin("stop")

    def kill(self) -> None:
        """Ends it at once."""
        with contextlib.suppress(RayError):
            ray.kill(self._actor)


@dataclass(frozen=True, slots=True)
class RayCall:
    """A call of an actor's method."""

    server: str
    answer: ray.ObjectRef

    def done(self) -> bool:
        """Whether it has returned.  Raises PeerGone when it has failed."""
        if not ray.wait([self.answer], timeout=0)[0]:
            return False
        self.result(None)
        return True

    def result(self, within_s: float | None) -> object:
        """Returns what it returns.  Raises PeerGone, also when it takes too long."""
        try:
            return ray.get(self.answer, timeout=within_s)
        except RayError as error:
            raise PeerGone(f"{self.server}: {last_line(error)}") from error


def last_line(error: Exception) -> str:
    """Returns the last line of a message, which says what was raised where Ray tells a whole traceback."""
    return str(error).strip().splitlines()[-1]
