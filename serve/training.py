"""Training beside serving: what the device thread runs between decode steps, and when it publishes."""

from __future__ import annotations

from collections.abc import Callable

from jaxlora.errors import AdapterNotFinite
from jaxlora.lora import AdapterRef
from serve.runner import Runner
from train.trainer import StepReport, Trainer


class LiveTraining:
    """A trainer whose tenants are published every few steps, and when they are done.  Lives on the device thread.

    A tenant's adapter is published under its own name.  Callbacks run on the device thread and must not wait for it.
    """

    def __init__(
        self,
        trainer: Trainer,
        runner: Runner,
        *,
        publish_every: int,
        on_step: Callable[[list[StepReport]], None],
        on_publish: Callable[[AdapterRef, int], None],
    ):
        self.trainer, self.runner, self.publish_every = trainer, runner, publish_every
        self.on_step, self.on_publish = on_step, on_publish

    @property
    def has_work(self) -> bool:
        """Whether a tenant is training."""
        return self.trainer.has_work

    def step(self) -> None:
        """One training step, then the publications it makes due: (version, optimizer steps it has learned)."""
        reports = self.trainer.step()
        self.on_step(reports)
        for report in reports:
            tenant = self.trainer.tenants[report.tenant]
            if report.step % self.publish_every and tenant.status == "running":
                continue
            try:
                ref = self.runner.publish(tenant.name, tenant.name, tenant.spec, self.trainer.rows(tenant.name))
            except AdapterNotFinite:
                tenant.status = "failed"  # the last good version stays
                continue
            self.on_publish(ref, report.step)
