"""Loads a base in a process of its own and prints, as JSON, how much memory that took at most: `load_child.py PATH DTYPE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxlora.checkpoints.load import open_base
from jaxlora.config.base import ONE_DEVICE, ModelSection


def status(name: str) -> int:
    """A line of this process's status, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


if __name__ == "__main__":
    model = ModelSection(path=sys.argv[1], dtype=sys.argv[2])
    jnp.ones(3).block_until_ready()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    arrays = jax.block_until_ready(jax.tree.leaves(open_base(model, ONE_DEVICE).base))
    peak, stays = status("VmHWM") - before, sum(x.nbytes for x in arrays)
    print(json.dumps({"peak": peak, "stays": stays}))
