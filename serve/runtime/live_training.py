"""Training beside serving: a trainer that the device thread runs between decode steps, and its publications."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from jaxlora.checkpoints.load import Opened
from jaxlora.core.errors import AdapterNotFinite, JaxLoraError
from jaxlora.core.lora import AdapterRef
from jaxlora.core.progress import Counted, uncounted
from jaxlora.model.lora_pool import PoolSpec
from serve.runtime.bodies import told
from serve.runtime.publisher import Publisher
from train.step.microsteps import small_parts
from train.trainer import FIRST_PART, StepReport, Trainer

PUBLISH = "publish"  # a part of training beside serving
KEEP_VERSIONS = 3  # of a tenant in training: the newest, and time for requests that were resolved just before it
LOG = logging.getLogger("serve")


def small_trainer(opened: Opened, pool: PoolSpec, *, lanes: int, lane_tokens: int | Sequence[int]) -> Trainer:
    """Returns a trainer over an opened base whose steps come in small parts, between those of serving."""
    return Trainer(
        opened.base,
        opened.mesh,
        [pool],
        lanes=lanes,
        lane_tokens=lane_tokens,
        base_hash=opened.base_hash,
        parts=small_parts(opened.mesh),
    )


def warm_up(trainer: Trainer, publisher: Publisher, compiling: Counted = uncounted) -> None:
    """Compiles the programs of training and of its publications.  Device thread only.  compiling: see `Trainer.warm_up`."""
    with told("training", trainer.mesh.devices.flat[0].platform):
        trainer.warm_up(compiling)
    for rows in trainer.bucket_rows():
        publisher.rehearse(rows)


class LiveTraining:
    """Publishes the tenants of a trainer every few steps, and when they are done.  Device thread only.

    A tenant's adapter is published under its own name; its newest `keep` versions stay.  Callbacks run on the device
    thread and must not wait for it.
    """

    def __init__(
        self,
        trainer: Trainer,
        publisher: Publisher,
        *,
        publish_every: int,
        keep: int = KEEP_VERSIONS,
        on_step: Callable[[list[StepReport]], None],
        on_publish: Callable[[AdapterRef, int], None],
    ):
        self.trainer, self._publisher, self.publish_every, self.keep = trainer, publisher, publish_every, keep
        self.on_step, self.on_publish = on_step, on_publish
        self._due: list[str] = []  # tenants that are published next
        self._owed: set[str] = set()  # those whose publication failed; it is tried again with the next one
        self._learned: dict[str, float] = {}  # when their newest update was done, on the monotonic clock

    @property
    def has_work(self) -> bool:
        """Whether a tenant is training, or a publication is due."""
        return self.trainer.has_work or bool(self._due)

    @property
    def part(self) -> str:
        """The name of the part that `advance` runs next."""
        return PUBLISH if self._due else self.trainer.part

    def advance(self) -> None:
        """Runs the next part of a training step, or a publication that is due."""
        if self._due:
            self._publish(self._due.pop(0))
            return
        reports = self.trainer.advance()
        if reports:
            self.on_step(reports)
        for report in reports:
            tenant = self.trainer.tenants[report.tenant]
            self._learned[tenant.name] = time.monotonic()
            if tenant.status == "done" or (tenant.status == "running" and report.step % self.publish_every == 0):
                self._due = sorted({*self._due, *self._owed, tenant.name})

    def step(self) -> None:
        """Runs one training step, or the rest of one, and the publications that it makes due."""
        self.advance()
        while self.part != FIRST_PART:
            self.advance()

    def publish(self, name: str) -> AdapterRef:
        """Publishes the tenant's present weights.  Raises NotFound for an unknown one, and as `Publisher.publish` does."""
        rows = self.trainer.rows(name)
        tenant = self.trainer.tenants[name]
        ref = self._publisher.publish(
            name, name, tenant.spec, rows, keep=self.keep, learned_s=self._learned.get(name, time.monotonic())
        )
        self._owed.discard(name)
        self.on_publish(ref, tenant.step)
        return ref

    def _publish(self, name: str) -> None:
        """Publishes one tenant that is due.  A failure is this tenant's alone, and is tried again with the next publication."""
        self._owed.add(name)
        tenant = self.trainer.tenants.get(name)
        if tenant is None or tenant.status == "failed":
            self._owed.discard(name)  # the last good version stays
            return
        try:
            self.publish(name)
        except AdapterNotFinite as error:
            LOG.error("tenant %s ends: %s", name, error)
            self.trainer.fail(name, str(error))
            self._owed.discard(name)
        except (JaxLoraError, OSError) as error:
            LOG.error(
                "tenant %s is not published at step %d, the next publication tries again: %s", name, tenant.step, error
            )
