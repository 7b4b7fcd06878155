"""Compiling for TPUs that are not here: their compiler comes with the dependency group `aot`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.dispatch import traced_for

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
ALONE = {  # the compiler looks for no machine
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # pytest runs two processes, and neither holds a device
}


@contextlib.contextmanager
def chips(kind: str) -> Iterator[list]:
    """Four chips of that kind, for whose blocks programs are traced inside."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.fail("libtpu is not installed: run `uv run --isolated --group aot pytest -m aot`")
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)  # without a device it can write an entry and not read it
    try:
        with mock.patch.dict(os.environ, ALONE):
            devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[kind]).devices
            described = AbstractDevice(device_kind=devices[0].device_kind, num_cores=1, platform="tpu")
            mesh = AbstractMesh((), (), abstract_device=described)
            with jax.sharding.use_abstract_mesh(mesh), traced_for("cpu", "tpu"):
                yield list(devices)
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)


def kernels(compiled: jax.stages.Compiled) -> Counter:
    """Mosaic kernels of a compiled program, by name."""
    lines = [line for line in compiled.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    return Counter(re.match(r"\s*(?:ROOT )?%?([a-z_]+)", line)[1] for line in lines)


def collectives(compiled: jax.stages.Compiled, where: str) -> Counter:
    """Result types of the collectives that come from JAX code whose path has `where` in it."""
    kinds = r" = (\S+|\(.*?\)) (?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
    found = Counter()
    for line in compiled.as_text().splitlines():
        match, path = re.search(kinds, line[:2000]), re.search(r'op_name="([^"]*)"', line)
        if match and path and where in path[1]:
            found[re.sub(r"\{[^}]*\}", "", match[1])] += 1
    return found
