"""Compiling for H100s that are not here: XLA's and Triton's compilers come with the dependency group `aot-cuda`."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh
from kernel_shapes import HANDS_ON

from pallas_kernels.dispatch import traced_for

# What a query of an H100 SXM answers, and NVIDIA's data sheet says.  Without the versions XLA takes the driver for an old one
# and leaves cuBLAS, custom calls and conditionals out of CUDA graphs.
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
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100"
"""
ITEMSIZE = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8}
DESCRIBED = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")


@contextlib.contextmanager
def h100s(count: int = 4) -> Iterator[list]:
    """So many H100s, for which programs are traced inside."""
    for package in ("jax_cuda13_plugin", "jax_triton"):
        if importlib.util.find_spec(package) is None:
            pytest.fail(f"{package} is not installed: run `uv run --isolated --group aot-cuda pytest -m aot_cuda`")
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)  # without a device it can write an entry and not read it
    try:
        jax.devices()  # finds the plug-in
        found = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=H100, topology=f"1x1x{count}"
        )
        mesh = AbstractMesh((), (), abstract_device=DESCRIBED)
        with jax.sharding.use_abstract_mesh(mesh), traced_for("cpu", "cuda"):
            yield list(found.devices)
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)


def kernels(compiled: jax.stages.Compiled) -> Counter:
    """Triton kernels of a compiled program, by the name of their scope."""
    target = 'custom_call_target="(triton_kernel_call_ffi|__gpu\\$xla.gpu.triton)"'  # of jax-triton, of XLA
    lines = [line for line in compiled.as_text().splitlines() if re.search(target, line)]
    return Counter(re.search(r'op_name="[^"]*/([a-z_]+)/(?:triton_kernel_call|ffi_call)"', line)[1] for line in lines)


@dataclass(frozen=True)
class Launches:
    """What a compiled program does on the device, in order: what XLA calls its thunks."""

    entries: Counter  # what the host launches: by kind, such as CommandBuffer (a CUDA graph), CustomKernel, While, Conditional
    names: list[str]  # of kernels and custom calls, in graphs and outside of them

    @staticmethod
    def dump_to(folder: Path) -> dict[str, str | bool]:
        """The compiler's options with which a program can be read afterwards."""
        return {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}

    @classmethod
    def read(cls, folder: Path) -> Launches:
        """Of the one program that was compiled with `dump_to` of this folder."""
        (path,) = folder.glob("*thunk_sequence_after_thunk_passes.txt")
        found = re.findall(r"^( *)\d+: k([A-Z]\w+)[^]]*\] *(\S*)", path.read_text(), re.M)
        assert found
        kernels = [name for _, kind, name in found if kind in ("CustomKernel", "CustomCall")]
        return cls(Counter(kind for indent, kind, _ in found if not indent), kernels)

    def of_layer(self, layers: int) -> int:
        """Kernels of one of so many equal layers: how far apart the same kernel is in one and in the next."""
        places = defaultdict(list)
        for i, name in enumerate(self.names):
            places[name].append(i)
        apart = Counter(b - a for at in places.values() if len(at) == layers for a, b in itertools.pairwise(at))
        return apart.most_common(1)[0][0]


def as_large_as(nbytes: int, compiled: jax.stages.Compiled) -> list[str]:
    """Instructions that make an array of so many bytes or more; a scatter writes where its array lies."""
    found = []
    for line in compiled.as_text().splitlines():
        match = re.match(r"\s*(?:ROOT )?%?(\S+) = (.+?) ([a-z][a-z0-9-]*)\(", line)
        if match and match[3] not in HANDS_ON and "scatter" not in match[1]:
            arrays = re.findall(r"(\w+)\[([\d,]+)\]", match[2])
            if any(ITEMSIZE[kind] * math.prod(map(int, sizes.split(","))) >= nbytes for kind, sizes in arrays):
                found.append(line.strip()[:300])
    return found
