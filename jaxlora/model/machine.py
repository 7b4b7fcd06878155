"""What a memory plan must know of this machine, and what is said when memory is short after all."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Generator
from dataclasses import replace

import jax

from jaxlora.config.base import MeshSection
from jaxlora.core.errors import ConfigInvalid, JaxLoraError
from jaxlora.core.host_memory import MemoryLimit, host_limit
from jaxlora.model import multihost
from jaxlora.model.base_form import form_of
from jaxlora.model.memory_needs import GB, Machine
from jaxlora.model.mesh import RULES
from pallas_kernels.native.library import instruction_set
from pallas_kernels.triton_launch import packages

EXHAUSTED = ("RESOURCE_EXHAUSTED", "bad_alloc")  # what errors say, of several classes, when XLA gets no memory


def machine_of(mesh: MeshSection, memory_gb: float | None) -> Machine:
    """Returns this machine as a plan sees it.  memory_gb: the most that one device, or a CPU's process, may take.

    Several processes must choose alike: each gets the least device memory of all, and waits here for the others.
    """
    sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "tensor": mesh.tensor}

    def split(axes: str | tuple[str, ...] | None) -> int:
        names = () if axes is None else (axes,) if isinstance(axes, str) else axes
        return math.prod(sizes[name] for name in names)

    try:
        native = instruction_set() is not None
        packages()  # of the route by which a GPU's kernels would be launched
    except ValueError as error:  # of an environment variable
        raise ConfigInvalid(str(error)) from error
    devices, first = math.prod(sizes.values()), jax.local_devices()[0]
    host = host_limit()
    device = host
    if first.platform != "cpu":
        stats = first.memory_stats() or {}
        device = MemoryLimit(nbytes=stats.get("bytes_limit", 0), origin=f"the {first.device_kind}'s", own=True)
    if memory_gb is not None:
        asked = MemoryLimit(nbytes=round(memory_gb * GB), origin="memory_gb", own=True)
        held = device.own and 0 < device.nbytes < asked.nbytes  # by a limit that more than it would kill us
        device = device if held else asked
    elif not device.nbytes:
        raise ConfigInvalid(
            f"{first.device_kind} does not say how much memory it has; set memory_gb", param="memory_gb"
        )
    device = replace(device, nbytes=multihost.least(device.nbytes))
    return Machine(
        platform=first.platform,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        device=device,
        host=None if first.platform == "cpu" else host,
        devices=devices,
        parts={name: split(axes) for name, axes in RULES.items()},
        rows=split(RULES["lanes"]),
        form=form_of(first.platform, devices, native=native, quantized=False),
    )


@contextlib.contextmanager
def memory_errors(what: str, keys: str) -> Generator[None]:
    """Turns an allocation that fails into ConfigInvalid: one line, which names the settings to lower."""
    try:
        yield
    except JaxLoraError:
        raise
    except Exception as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in EXHAUSTED):
            raise
        reason = " ".join(str(error).split())[:200] or "the system has none left"
        raise ConfigInvalid(
            f"memory ran out while {what} ({reason}); lower {keys}, or memory_gb so that smaller ones are chosen",
            param="memory_gb",
        ) from error
