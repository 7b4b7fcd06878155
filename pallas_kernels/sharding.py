"""Placement: how an op's arrays are split over a mesh, and how a body runs on each device.

XLA partitions its own operations over devices; a Pallas kernel it cannot partition: on a mesh the Pallas bodies, and
all bodies of decode's LoRA, run under `shard_map`, each device on its own part.

    output features split (column-parallel)   no collective forward; backward dh, [tokens, R], is summed
    input features split (row-parallel)       forward h, [tokens, R], is summed before its second half; backward none
      whose parts are kept apart (decode)     none of its own: the sum of the base's product carries each device's part
    rows split                                none
    vocabulary split                          forward each token's maximum logit, sum, own; backward dx, dh are summed
    attention heads split                     none: queries are on the device of their keys
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Mesh axes that split a LoRA product, the loss or attention.  All targets of a call are split alike."""

    mesh: Mesh | AbstractMesh
    rows: tuple[str, ...] = ()  # of tokens or lanes
    x: str | None = None  # of features in
    y: str | None = None  # of features out
    heads: str | None = None  # of attention: query heads and kv heads alike
    apart: bool = False  # x is split, y is not: each device's part comes back, [parts, tokens, Y], and the caller sums

    def local[Tree](self, specs: Tree, arrays: Tree) -> Tree:
        """Returns the shapes that one device sees."""

        def part(spec: PartitionSpec, x: jax.Array) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(NamedSharding(self.mesh, spec).shard_shape(x.shape), x.dtype)

        return jax.tree.map(part, specs, arrays)

    def on_each[**Args, Out](
        self, body: Callable[Args, Out], in_specs: tuple, out_specs: object
    ) -> Callable[Args, Out]:
        """Returns the body wrapped to run on each device's part."""
        return jax.shard_map(body, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
