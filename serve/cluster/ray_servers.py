"""Servers that are actors of a Ray cluster: NAME.1 is the first process of the server NAME; calls go between processes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import ray  # ty: ignore[import-not-found]
import ray.util  # ty: ignore[import-not-found]
from ray.actor import ActorHandle  # ty: ignore[import-not-found]
from ray.exceptions import RayError, RayTaskError  # ty: ignore[import-not-found]
from starlette.types import Message, Scope

from jaxlora.core.errors import ConfigInvalid
from jaxlora.core.lora import AdapterRef
from serve.cluster.front import KEEPER
from serve.cluster.peer import Chunk, PeerGone
from serve.cluster.replica_view import Report
from serve.cluster.training.messages import Contact, KeeperGone, Orders, Publication, Terms

LOG = logging.getLogger("serve")
NAMESPACE = "jaxlora"
STORE_BYTES = 2**28  # of shared memory, for parts of large bodies; what does not fit lies in files
CALLS = 4096  # at once, to one actor
HEARS_S = 5.0  # a keeper that has not answered a trainer for so long is asked again


@contextlib.contextmanager
def connected(address: str | None, *, cpus: float) -> Generator[None]:
    """Is on a cluster while it is entered: that at an address, or one of its own, which only this machine reaches.

    cpus: that one of its own offers; they are a count, not a measurement.  Raises ConfigInvalid when none answers there.
    """
    own: Mapping[str, object] = {}
    if address is None:
        own = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    try:
        ray.init(address or "local", namespace=NAMESPACE, logging_level=logging.WARNING, **own)
    except (ConnectionError, ValueError) as error:
        raise ConfigInvalid(f"no Ray cluster answers at {address} ({error})") from error
    try:
        yield
    finally:
        ray.shutdown()


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
            return RayPeer(ray.get_actor(name))
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

    def __init__(self, actor: ActorHandle):
        self._actor = actor
        self._answer = actor.answer.options(num_returns="streaming")

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


class Kept:
    """An actor that is to be there: `repair` makes it again when its process has ended.

    Each gets a name of its own, NAME.1 and so on, as Ray keeps the name of one that has ended.
    """

    def __init__(self, name: str, make: type, *arguments: object, cpus: float, gpus: float, calls: int):
        """make: its class, of which another process makes one with these arguments.  calls: that it takes at once."""
        self.name = name
        self._make, self._arguments = ray.remote(make), arguments
        self._options = {"num_cpus": cpus, "num_gpus": gpus, "max_concurrency": calls}
        self._actor: ActorHandle | None = None
        self._started = 0

    def start(self) -> None:
        """Begins to make it."""
        self._started += 1
        named = self._make.options(name=f"{self.name}.{self._started}", **self._options)
        self._actor = named.remote(*self._arguments)

    def call(self, method: str, within_s: float | None = None) -> object:
        """Returns what a method returns, once the actor is made.  Raises PeerGone, also when it takes too long."""
        assert self._actor is not None, "it was started"
        try:
            return ray.get(getattr(self._actor, method).remote(), timeout=within_s)
        except RayError as error:
            raise PeerGone(f"{self.name}: {str(error).strip().splitlines()[-1]}") from error

    def repair(self, names: Collection[str]) -> None:
        """Begins to make it again if it is none of these, which are there."""
        if f"{self.name}.{self._started}" not in names:
            LOG.error("%s has ended; it is started again", self.name)
            self.start()
