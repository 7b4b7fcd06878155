"""Preempted KV comes back from the host as it was, and moving it copies only what moves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import offload_world
import pytest
from offload_world import COUNTS, DTYPES, F, L, P, Z, check_compiled, check_moves, on_mesh, random_bits

from jaxlora.model.kv_offload import PageMover, page_bytes
from jaxlora.model.mesh import make_mesh

TESTS = Path(__file__).parents[1] / "support"


@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_come_back_bit_for_bit_in_other_places_and_nothing_compiles(dtype):
    assert check_moves(make_mesh(), dtype) == len(COUNTS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cache_is_not_copied(dtype):
    check_compiled(make_mesh(), dtype)


def test_on_a_mesh_likewise():
    """Eight virtual devices, in a process of their own where every warning is an error."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": path,
    }
    command = [sys.executable, "-W", "error", offload_world.__file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout) == len(DTYPES) * len(COUNTS)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_the_bytes_of_a_page(dtype, size):
    kv = on_mesh(make_mesh(), *(random_bits(seed, dtype, L, P, Z, F) for seed in (0, 1)))
    assert page_bytes(kv) == 2 * L * Z * F * size


def test_pages_that_were_saved_fit_only_as_many():
    mesh = make_mesh()
    k, v = (random_bits(seed, "float32", L, P, Z, F) for seed in (0, 1))
    mover, kv = PageMover(mesh), on_mesh(mesh, k, v)
    saved = mover.save(kv, [3, 4])
    with pytest.raises(AssertionError, match="2 pages were saved, 3 are to take them"):
        mover.restore(kv, [0, 1, 2], saved)
