"""A keeper and its trainers in one process: each trainer has threads of its own, and a wire that can be cut."""

from __future__ import annotations

import time
from pathlib import Path

from jobs_api_world import Server
from serve_world import World

from jaxlora.core.lora import ALL_TARGETS
from jaxlora.core.progress import uncounted
from jaxlora.model.lora_pool import PoolSpec
from serve.cluster.training.group import TrainingGroup
from serve.cluster.training.loop import TrainerLoop
from serve.cluster.training.messages import KeeperGone, Terms
from serve.server.build_jobs import Hooks, make_live
from train.jobs.states import Parking
from train.step.microsteps import small_parts
from train.trainer import Trainer

PART_S = 0.002  # that each part of a step takes at least


class Cluster:
    """The keeper that there is now, and the names of the processes."""

    def __init__(self):
        self.names: set[str] = set()
        self.far: list[FarTrainer] = []  # that have not ended
        self.group: TrainingGroup | None = None
        self.epoch = 0

    def keep(self, server: Server) -> TrainingGroup:
        """Makes the keeper of a server that has not begun; trainers reach it once it is made `group`."""
        self.epoch += 1
        trainer = server.host.live.jobs.trainer
        terms = Terms(base_hash=trainer.base_hash, training=server.config.training)
        group = TrainingGroup(server.host, terms, self.epoch, lambda: set(self.names))
        group.start()
        return group


class Wire:
    """What carries a trainer's calls."""

    def __init__(self, cluster: Cluster):
        self.cluster, self.is_cut = cluster, False

    def keeper(self) -> Wire:
        return self

    def _group(self) -> TrainingGroup:
        if self.is_cut or self.cluster.group is None:
            raise KeeperGone("nobody is there")
        return self.cluster.group

    def terms(self):
        return self._group().terms()

    def contact(self, contact):
        orders = self._group().contact(contact)
        self._group()  # the answer is lost as well
        return orders

    def publish(self, publication):
        return self._group().publish(publication)


class FarTrainer:
    """A trainer's process, as far as a test needs one."""

    def __init__(self, name: str, cluster: Cluster, trainer: Trainer, server: Server, *, load=None, hang_s=60.0):
        for tenant in list(trainer.tenants):  # of a trainer that was killed
            trainer.remove(tenant)
        self.name, self.cluster, self.wire = name, cluster, Wire(cluster)
        folder = server.config.data / "jobs"
        parking = Parking(folder / "parked" / name, host_bytes=10**8)
        training = server.config.training

        def make(hooks: Hooks):
            live = make_live(trainer, training, hooks, folder / "states", parking, load or server.files.load)
            advance = live.advance

            def slowly() -> None:
                advance()
                time.sleep(PART_S)

            live.advance = slowly
            return live

        self.failures: list[BaseException] = []
        self.loop = TrainerLoop(name, make, self.wire.keeper, self.failures.append, hang_s=hang_s)
        cluster.names.add(name)
        cluster.far.append(self)
        self.loop.start()

    def kill(self) -> None:
        """Ends it as kill -9 would: nothing more is written or told."""
        self.wire.is_cut = self.loop._is_late = self.loop._stopping = True
        self._end()
        for thread in self.loop._threads:
            thread.join()
        self.loop.live.close()

    def stop(self) -> None:
        """Ends it in order."""
        self.loop.stop(20)
        self._end()

    def _end(self) -> None:
        self.cluster.names.discard(self.name)
        self.cluster.far.remove(self)

    def jobs(self) -> set[str]:
        """The jobs that it has."""
        return set(self.loop._holds)


def far_trainer(world: World, server: Server) -> Trainer:
    """Like the server's own, compiled."""
    training = server.config.training
    pool = PoolSpec(slots=training.slots, rank=training.max_rank, dtype="float32", targets=ALL_TARGETS)
    trainer = Trainer(
        world.base,
        world.mesh,
        [pool],
        lanes=training.lanes,
        lane_tokens=training.lengths,
        base_hash=world.base_hash,
        parts=small_parts(world.mesh),
    )
    trainer.warm_up(uncounted)
    return trainer


def states(server: Server, id: str) -> Path:
    """The folder of a job's checkpoints."""
    return server.config.data / "jobs" / "states" / id
