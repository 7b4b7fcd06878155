"""Compiling for H100s that are not here: XLA's and Triton's compilers come with the dependency group `aot-cuda`."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections import Counter
from collections.abc import Iterator

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh

# What a query of an H100 SXM answers, and NVIDIA's data sheet says.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  clock_rate_ghz: 1.98
  device_memory_size: 85899345920
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100"
"""
DESCRIBED = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")


@contextlib.contextmanager
def h100s() -> Iterator[list]:
    """Four H100s, for which programs are traced inside."""
    for package in ("jax_cuda13_plugin", "jax_triton"):
        if importlib.util.find_spec(package) is None:
            pytest.fail(f"{package} is not installed: run `uv run --isolated --group aot-cuda pytest -m aot_cuda`")
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)  # without a device it can write an entry and not read it
    try:
        jax.devices()  # finds the plug-in
        found = topologies.get_topology_desc(platform="cuda", topology_name="", target_config=H100, topology="1x1x4")
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=DESCRIBED)):
            yield list(found.devices)
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)


def kernels(compiled: jax.stages.Compiled) -> Counter:
    """Triton kernels of a compiled program, by the name of their scope."""
    target = 'custom_call_target="(triton_kernel_call_ffi|__gpu\\$xla.gpu.triton)"'  # of jax-triton, of XLA
    lines = [line for line in compiled.as_text().splitlines() if re.search(target, line)]
    return Counter(re.search(r'op_name="[^"]*/([a-z_]+)/(?:triton_kernel_call|ffi_call)"', line)[1] for line in lines)
