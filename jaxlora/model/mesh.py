"""The device mesh, and the ONE table from logical axes to mesh axes.

Everything that lives on devices (base, pool, KV pages, batches, training state) is placed through `sharding`.
One device is a 1x1x1 mesh.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlora.core.errors import ConfigInvalid
from jaxlora.core.model_config import ModelConfig
from pallas_kernels.sharding import Placement

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "slots": None,
    "rank": None,
    "pages": None,
    "lanes": ("data", "fsdp"),  # rows of a batch
}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a data x fsdp x tensor mesh over the first devices, those of one process adjacent.

    Raises ConfigInvalid when there are too few devices, a size is below 1, or a process would have no device in it.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = (data, fsdp, tensor)
    if min(sizes) < 1:
        raise ConfigInvalid(f"mesh sizes must be at least 1, got data {data}, fsdp {fsdp}, tensor {tensor}")
    count = data * fsdp * tensor
    if count > len(devices):
        raise ConfigInvalid(f"a mesh of {data}x{fsdp}x{tensor} needs {count} devices, there are {len(devices)}")
    idle = {d.process_index for d in devices[count:]} - {d.process_index for d in devices[:count]}
    if idle:
        raise ConfigInvalid(
            f"a mesh of {data}x{fsdp}x{tensor} leaves process {min(idle)} without a device in it; there are "
            f"{len(devices)} devices in all, use them all or start fewer processes"
        )
    return Mesh(np.array(devices[:count]).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def sharding(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    """Returns the sharding of an array with these logical axes; None is an axis that is never split."""
    return NamedSharding(mesh, PartitionSpec(*(None if a is None else RULES[a] for a in axes)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a small array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def attention_placement(mesh: Mesh) -> Placement | None:
    """Returns how attention is split, for its kernels: lanes as in a batch, heads over tensor; None on one device."""
    lanes, heads = RULES["lanes"], RULES["kv_heads"]
    assert isinstance(lanes, tuple)
    assert isinstance(heads, str)
    return None if mesh.size == 1 else Placement(mesh=mesh, rows=lanes, heads=heads)


def place_array(x: np.ndarray, where: NamedSharding) -> jax.Array:
    """Places the array on the devices.  All processes have the same array, and each feeds its own devices."""
    if where.is_fully_addressable:
        return jax.device_put(x, where)
    return jax.make_array_from_callback(x.shape, where, x.__getitem__)


def place[T](tree: T, where: NamedSharding) -> T:
    """Places the NumPy arrays on the devices, as `place_array` does."""
    if where.is_fully_addressable:
        return jax.device_put(tree, where)  # all in one call
    return jax.tree.map(lambda x: place_array(x, where), tree)


def place_rows[T](mesh: Mesh, batch: T) -> T:
    """Places the NumPy batch on the devices: every array's first axis is rows (lanes, sequences), over data x fsdp."""
    return place(batch, rows_sharding(mesh))


@functools.cache  # called in every step, and making it takes longer than copying a batch
def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array whose first axis is rows."""
    return NamedSharding(mesh, PartitionSpec(RULES["lanes"]))


def check_model(mesh: Mesh, config: ModelConfig) -> None:
    """Raises ConfigInvalid, naming every size of the model that the mesh does not divide."""
    sizes = {
        ("tensor", "query heads"): config.heads,
        ("tensor", "kv heads"): config.kv_heads,
        ("tensor", "mlp features"): config.d_ff,
        ("tensor", "vocabulary entries"): config.vocab,
        ("fsdp", "model features"): config.d_model,
    }
    wrong = [
        f"{axis} {mesh.shape[axis]} does not divide {n} {what}"
        for (axis, what), n in sizes.items()
        if n % mesh.shape[axis]
    ]
    if wrong:
        most = {
            a: math.gcd(mesh.shape[a], *(n for (axis, _), n in sizes.items() if axis == a)) for a in ("fsdp", "tensor")
        }
        choose = " and ".join(f"{axis} {n}" for axis, n in most.items() if n != mesh.shape[axis])
        raise ConfigInvalid(f"mesh {describe(mesh)} does not fit this model: {'; '.join(wrong)}; choose {choose}")


def lane_parts(mesh: Mesh) -> int:
    """Returns over how many groups of devices the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_lanes(mesh: Mesh, lanes: int, what: str) -> None:
    """Raises ConfigInvalid when the rows of a batch do not divide over data x fsdp."""
    parts = lane_parts(mesh)
    if lanes % parts:
        raise ConfigInvalid(f"mesh {describe(mesh)}: {lanes} {what} do not divide over data x fsdp = {parts}")


def describe(mesh: Mesh) -> str:
    """Returns data, fsdp and tensor as '1x2x3'."""
    return "x".join(str(mesh.shape[a]) for a in MESH_AXES)
