"""What an operator changes while the server runs: checked whole, then applied whole, between two steps.  Pure host code."""

from __future__ import annotations

from collections.abc import Collection

from jaxlora.config.serving import Tuning
from jaxlora.core.errors import InvalidRequest
from jaxlora.core.lora import AdapterRef
from serve.scheduler import Scheduler


def apply(tuning: Tuning, scheduler: Scheduler, *, slots: int, pins: Collection[AdapterRef]) -> None:
    """The scheduler decides by these settings from its next plan on.  All of them are data: nothing compiles.

    slots: those that are compiled.  pins: what the names under `pin` mean now.
    Raises InvalidRequest, and changes nothing, for more than the server has.
    """
    try:
        tuning.check_fits(slots, scheduler.limits.lanes)
    except ValueError as error:
        raise InvalidRequest(str(error), param="tuning") from error
    active = scheduler.active
    active.quantum_s = tuning.quantum_ms / 1000
    for ref in active.pinned - set(pins):
        active.unpin(ref)
    active.limit = tuning.active_slots or slots
    for ref in pins:
        active.pin(ref)
    scheduler.prefill_lanes = tuning.prefill_lanes_while_decoding or scheduler.limits.lanes
    scheduler.shares.weights = active.weights = tuning.weights
