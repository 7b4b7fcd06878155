"""Multi-process runs: several processes hold one mesh together, each with the devices of its own machine.

All run the same program on the same files and decide alike, so that all start every compiled step in the
same order.  One of them, the lead, prints and writes.
"""

from __future__ import annotations

import os

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlora.core.errors import ConfigInvalid

PROCESS_ID = "JAX_PROCESS_ID"  # which process this is, from 0
COORDINATOR = "JAX_COORDINATOR_ADDRESS"  # host:port of process 0; jax reads it
SILENT_S = 30  # seconds after which a silent process, or one that failed, ends the others


def join(count: int) -> None:
    """Connects to the other processes; does nothing for one.  Call it once, before jax touches a device.

    The process number and the coordinator come from the environment, or from what jax knows of the cluster.
    Raises ConfigInvalid when neither gives them, or for an impossible number.
    """
    if count == 1:
        return
    given = os.environ.get(PROCESS_ID)
    if given is not None and not (given.isdecimal() and int(given) < count):
        raise ConfigInvalid(f"{PROCESS_ID} must be a number from 0 to {count - 1}, got {given!r}")
    address = os.environ.get(COORDINATOR)
    if address is not None and not address.rpartition(":")[2].isdecimal():
        raise ConfigInvalid(f"{COORDINATOR} must be host:port of process 0, got {address!r}")
    try:
        jax.distributed.initialize(
            num_processes=count,
            process_id=None if given is None else int(given),
            heartbeat_timeout_seconds=SILENT_S,
            shutdown_timeout_seconds=SILENT_S,
        )
    except ValueError as e:
        raise ConfigInvalid(
            f"mesh.processes is {count}, but which process is this, and where do they meet? ({e}) "
            f"Set {COORDINATOR} to host:port of process 0 and {PROCESS_ID} to this one's number, from 0",
            param="mesh.processes",
        ) from e
    if jax.default_backend() == "cpu":
        # Only process 0 would find its programs on disk, and reach a collective long before the others have compiled
        # theirs; but on CPUs all must reach their first collective within 30 s.
        jax.config.update("jax_enable_compilation_cache", False)


def is_lead() -> bool:
    """Returns whether this process prints and writes."""
    return jax.process_index() == 0


def any_says(yes: bool) -> bool:
    """Returns whether `yes` is true in any process.  All must call it at the same point; each waits for the others."""
    if jax.process_count() == 1:
        return yes
    return bool(np.any(multihost_utils.process_allgather(np.array(yes))))


def least(nbytes: int) -> int:
    """Returns the least that any process gives, in whole MiB.  All must call it at the same point, as `any_says`."""
    if jax.process_count() == 1:
        return nbytes
    return int(np.min(multihost_utils.process_allgather(np.array(nbytes >> 20, np.int32)))) << 20


def meet() -> None:
    """Waits for all processes: one that leaves while the lead writes would end the lead after a while."""
    any_says(False)
