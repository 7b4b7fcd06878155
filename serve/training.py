"""Training beside serving: what the device thread runs between decode steps, and when it publishes."""

from __future__ import annotations

import logging
from collections.abc import Callable

from jaxlora.errors import AdapterNotFinite, JaxLoraError
from jaxlora.lora import AdapterRef
from serve.runner import Runner
from train.trainer import StepReport, Trainer

KEEP_VERSIONS = 3  # of a tenant in training: the newest, and time for requests that were resolved just before it
LOG = logging.getLogger("serve")


class LiveTraining:
    """A trainer whose tenants are published every few steps, and when they are done.  Lives on the device thread.

    A tenant's adapter is published under its own name; its newest `keep` versions stay.  Callbacks run on the device thread and must not wait for it.
    """

    def __init__(
        self,
        trainer: Trainer,
        runner: Runner,
        *,
        publish_every: int,
        keep: int = KEEP_VERSIONS,
        on_step: Callable[[list[StepReport]], None],
        on_publish: Callable[[AdapterRef, int], None],
    ):
        self.trainer, self.runner, self.publish_every, self.keep = trainer, runner, publish_every, keep
        self.on_step, self.on_publish = on_step, on_publish
        self._owed: set[str] = set()  # tenants whose publication is due, or failed and is to be tried again

    @property
    def has_work(self) -> bool:
        """Whether a tenant is training."""
        return self.trainer.has_work

    def step(self) -> None:
        """One training step, then the publications it makes due: (version, optimizer steps it has learned)."""
        reports = self.trainer.step()
        self.on_step(reports)
        due = False
        for report in reports:
            tenant = self.trainer.tenants[report.tenant]
            if tenant.status == "done" or (tenant.status == "running" and report.step % self.publish_every == 0):
                self._owed.add(tenant.name)
                due = True
        if due:
            for name in sorted(self._owed):
                self._publish(name)

    def publish(self, name: str) -> AdapterRef:
        """A version of the tenant's present weights.  Raises NotFound for an unknown one, and as `Runner.publish` does."""
        rows = self.trainer.rows(name)
        tenant = self.trainer.tenants[name]
        ref = self.runner.publish(name, name, tenant.spec, rows, keep=self.keep)
        self._owed.discard(name)
        self.on_publish(ref, tenant.step)
        return ref

    def _publish(self, name: str) -> None:
        """Publishes one tenant that is due.  Whatever hinders it is this tenant's alone; it is tried again with the next publication."""
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
