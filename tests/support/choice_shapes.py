"""The programs that sample from a step's logits, compiled for devices that are not here, and what they read."""

from __future__ import annotations

import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from kernel_shapes import HANDS_ON
from step_shapes import lanes, newest

from jaxlora.model.mesh import replicated, sharding
from serve.engine.logit_edits import LogitEdits
from serve.engine.sampling import Work
from serve.engine.step import PackedBatch, StepBatch, StepPrograms

ROWS, VOCAB = 64, 128256


def choice(mesh: Mesh, work: Work) -> jax.stages.Lowered:
    """The program of this work, of Llama's vocabulary."""
    batch = StepBatch.idle(ROWS, 1, 4)
    edits = lanes(mesh, LogitEdits.idle(ROWS, 512, VOCAB)) if work is Work.EDITED else None
    packed = (lanes(mesh, PackedBatch.of(batch)),)
    return StepPrograms(mesh).choice.lower(logits(mesh), newest(mesh, ROWS), packed, edits, work)


def alternatives(mesh: Mesh) -> jax.stages.Lowered:
    total_B = jax.ShapeDtypeStruct((ROWS,), jnp.float32, sharding=replicated(mesh))
    return StepPrograms(mesh).alternatives.lower(logits(mesh), total_B)


def logits(mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((ROWS, VOCAB), jnp.float32, sharding=sharding(mesh, ("lanes", "vocab")))


def readers(compiled: jax.stages.Compiled) -> Counter:
    """Instructions by their kind that read an array as large as the logits, on one device.

    Not a TPU's copy into the chip's own memory beside other work.  Fails for a loop or a branch: its instructions would count
    several times, or not always.
    """
    entry = re.search(r"^ENTRY .*?^\}", compiled.as_text(), re.M | re.S)
    assert entry is not None
    large, found = set(), Counter()
    for line in entry[0].splitlines()[1:]:
        match = re.match(r"\s*(?:ROOT )?%?(\S+) = (.+?) ([a-z][a-z0-9-]*)\((.*?)\)(?:, |$)", line)
        if match is None:
            continue
        name, type_, kind, operands = match.groups()
        assert kind not in ("while", "conditional"), line[:200]
        reads = any(x in large for x in re.findall(r"%([^\s,()]+)", operands))
        if reads and kind not in HANDS_ON and not kind.endswith(("-start", "-done")):
            found[kind] += 1
        sizes = (math.prod(map(int, s.split(","))) for s in re.findall(r"\w\[([\d,]+)\]", type_))
        if any(size >= ROWS * VOCAB for size in sizes):
            large.add(name)
    return found
