"""The pool of adapters that a server serves: flat rank rows, of which each slot owns a range (`gathered_lora.pool_rows`).

    one slot's Rows ─write_slot─▶ ServingPool ─read_slot─▶ one slot's Rows
                                       └─ PoolLora: the linears of a step's tokens; MixedLora: of two kinds of tokens

What a slot holds is replaced whole; the rank of each target is found as it is written: rows past the last that is not zero
add nothing and are never read.

Shape letters: L layers, S slots, N tiles of R rank rows (of one slot's Rows: its rank), X Y features in, out, T tokens, G lanes.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh

from jaxlora.core.model_config import ModelConfig, layer_count, target_features
from jaxlora.model.lora_pool import LoraLayout, LoraRows, PoolSpec, Rows, no_rows, row_axes
from jaxlora.model.mesh import sharding
from pallas_kernels.gathered_lora.op import gathered_lora, visits_by_slot
from pallas_kernels.gathered_lora.pool_rows import PoolRows, lane_rows
from pallas_kernels.gathered_lora.rank_classes import ROW_TILE, first_rows, tile_count
from pallas_kernels.segmented_lora.op import segmented_lora
from pallas_kernels.sharding import Placement

ServingPool = dict[str, PoolRows]  # by target


def empty_serving_pool(config: ModelConfig, spec: PoolSpec, mesh: Mesh) -> ServingPool:
    """Returns a pool without adapters, all zeros, placed on the mesh.  Compiles once for each of its arguments."""
    return _zeros(config, spec, mesh)()


@functools.cache
def _zeros(config: ModelConfig, spec: PoolSpec, mesh: Mesh) -> jax.stages.Wrapped:
    shapes = pool_shapes(config, spec, mesh)
    where = jax.tree.map(lambda x: x.format, shapes)
    return jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), out_shardings=where)


def pool_shapes(config: ModelConfig, spec: PoolSpec, mesh: Mesh) -> ServingPool:
    """Returns the shapes of a pool's arrays, with their places.

    The layout is fixed, rows of features in order: a TPU's compiler is free to choose otherwise where that pads less, and
    copies the pool wherever two choices meet.
    """
    pool, classes = {}, spec.rank_classes

    def shape(sizes: tuple[int, ...], axes: tuple[str | None, ...], dtype: str) -> jax.Array:
        place = Format(Layout(major_to_minor=tuple(range(len(sizes)))), sharding(mesh, axes))
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)  # ty: ignore[invalid-explicit-return]

    for target in spec.targets:
        L, N, (x, y) = layer_count(config, target), tile_count(classes), target_features(config, target)
        (layers, slots, rank, x_axis), (*_, y_axis) = row_axes(config, target)
        pool[target] = PoolRows(
            a_LNRX=shape((L, N, ROW_TILE, x), (layers, None, rank, x_axis), spec.dtype),
            b_LNRY=shape((L, N, ROW_TILE, y), (layers, None, rank, y_axis), spec.dtype),
            scale_LS=shape((L, spec.slots), (layers, slots), "float32"),
            rank_S=shape((spec.slots,), (slots,), "int32"),
            classes=classes,
        )
    return pool


def zero_rows(config: ModelConfig, spec: PoolSpec) -> Rows:
    """Returns a slot's rows in the pool's dtype as `host_rows` does, of an adapter that is all zeros."""

    def zeros(target: str) -> LoraRows:
        L, features = layer_count(config, target), target_features(config, target)
        a, b = (no_rows(L, spec.rank, n, spec.dtype) for n in features)
        return LoraRows(a_LSRX=a, b_LSRY=b, scale_LS=np.zeros(L, np.float32))  # ty: ignore[invalid-argument-type]

    return {target: zeros(target) for target in spec.targets}


def serving_pool_bytes(config: ModelConfig, spec: PoolSpec, mesh: Mesh) -> int:
    """Returns the bytes of a pool's arrays on all devices together."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pool_shapes(config, spec, mesh)))


def slot_bytes(pool: ServingPool, owned: int) -> int:
    """Returns the bytes of one slot of so many rows on all devices together, whatever lies in it."""
    return sum(
        sum(owned * half.nbytes // (half.shape[1] * ROW_TILE) for half in (rows.a_LNRX, rows.b_LNRY))
        + (rows.scale_LS.nbytes + rows.rank_S.nbytes) // rows.rank_S.shape[0]
        for rows in pool.values()
    )


def write_slot(pool: ServingPool, slot: jax.Array, rows: Mapping[str, LoraRows], owned: int) -> ServingPool:
    """Returns the pool with one slot, which owns so many rows, replaced whole, cast to the pool's dtype.

    Targets that `rows` lacks and rows past its own become zero: nothing of the slot's last adapter remains.  Rows past
    those that the slot owns are cut off: the slot must hold the adapter's rank.
    """

    def put(whole: PoolRows, part: LoraRows | None) -> PoolRows:
        first = jnp.asarray(first_rows(whole.classes))[slot]

        def filled(half: jax.Array, given: jax.Array | None) -> tuple[jax.Array, jax.Array]:
            own = jnp.zeros((half.shape[0], owned, half.shape[3]), half.dtype)
            if given is not None:
                own = lax.dynamic_update_slice(own, given[:, :owned].astype(half.dtype), (0, 0, 0))
            used_R = (own != 0).any((0, 2))
            tile, place, around = _around(half, first, owned)
            around = lax.dynamic_update_slice_in_dim(around, own, place, 1)
            return lax.dynamic_update_slice_in_dim(
                half, around.reshape(half.shape[0], -1, *half.shape[2:]), tile, 1
            ), used_R

        a_LNRX, in_a_R = filled(whole.a_LNRX, None if part is None else part.a_LSRX)
        b_LNRY, in_b_R = filled(whole.b_LNRY, None if part is None else part.b_LSRY)
        rank = jnp.where(in_a_R | in_b_R, jnp.arange(1, owned + 1, dtype=jnp.int32), 0).max()
        scale_L = jnp.zeros(whole.scale_LS.shape[0]) if part is None else part.scale_LS
        return PoolRows(
            a_LNRX=a_LNRX,
            b_LNRY=b_LNRY,
            scale_LS=lax.dynamic_update_index_in_dim(whole.scale_LS, scale_L, slot, 1),
            rank_S=lax.dynamic_update_index_in_dim(whole.rank_S, rank, slot, 0),
            classes=whole.classes,
        )

    return {target: put(whole, rows.get(target)) for target, whole in pool.items()}


def _around(half_LNRX: jax.Array, first: jax.Array, owned: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (the first of the tiles in which so many rows lie, the first row's place there, their rows [L, rows, X])."""
    L, N, R, X = half_LNRX.shape
    count = min(-(-(owned + R - 1) // R), N)
    tile = jnp.minimum(first // R, N - count)
    return tile, first - tile * R, lax.dynamic_slice_in_dim(half_LNRX, tile, count, 1).reshape(L, count * R, X)


@functools.cache
def slot_writer(config: ModelConfig, spec: PoolSpec, mesh: Mesh) -> jax.stages.Wrapped:
    """Returns `write_slot`, jitted, for pools of this specification: it donates the pool, and leaves it where it lies."""
    where = jax.tree.map(lambda x: x.format, pool_shapes(config, spec, mesh))
    return jax.jit(write_slot, donate_argnums=0, static_argnums=3, out_shardings=where)


def read_slot(pool: ServingPool, slot: jax.Array, owned: int) -> Rows:
    """Returns a copy of the rows of one slot, which owns so many, in the pool's dtype."""

    def own(half: jax.Array, first: jax.Array) -> jax.Array:
        _, place, around = _around(half, first, owned)
        return lax.dynamic_slice_in_dim(around, place, owned, 1)

    def take(whole: PoolRows) -> LoraRows:
        first = jnp.asarray(first_rows(whole.classes))[slot]
        return LoraRows(
            a_LSRX=own(whole.a_LNRX, first),
            b_LSRY=own(whole.b_LNRY, first),
            scale_LS=lax.dynamic_index_in_dim(whole.scale_LS, slot, 1, keepdims=False),
        )

    return {target: take(whole) for target, whole in pool.items()}


class _InPool(ABC):
    """Adapted linears that read the pool layer by layer."""

    pool: ServingPool
    per_layer: np.ndarray  # constants where layers are unrolled

    def deltas(self, layer: jax.Array, targets: tuple[str, ...], x_TX: jax.Array) -> tuple[jax.Array | None, ...]:
        """Returns [T, Y] per target, None where the pool lacks it."""
        have = [t for t in targets if t in self.pool]
        got = dict(zip(have, self.product(layer, have, x_TX), strict=True)) if have else {}
        return tuple(got.get(t) for t in targets)

    @abstractmethod
    def product(self, layer: jax.Array, targets: Sequence[str], x_TX: jax.Array) -> tuple[jax.Array, ...]:
        """Returns [T, Y] per target, all of which the pool has.  The head's layer is 0."""


class PoolLora(_InPool):
    """Adapted linears of a step: lanes of as many tokens each, one slot a lane.  The pool is read layer by layer, in place.

    Where a mesh splits features over the axes of lanes too, prompts take a layer's rows by lane as it runs.
    """

    def __init__(
        self, pool: ServingPool, slot_G: jax.Array, tokens: int, layers: int, layout: LoraLayout | None = None
    ):
        """tokens: of a lane.  A pool without targets adds nothing, and the program has no LoRA."""
        self.pool, self.slot_G, self.layout = pool, slot_G, layout
        self.per_layer = np.arange(layers, dtype=np.int32)
        self._decodes = tokens == 1
        # All targets split their features over the same axes, so the tokens of all are split alike.
        self._visits = visits_by_slot(slot_G, next((self._placement(target) for target in pool), None))

    def product(self, layer: jax.Array, targets: Sequence[str], x_TX: jax.Array) -> tuple[jax.Array, ...]:
        """Returns [T, Y] per target, all of which the pool has, of as many tokens a lane.  The head's layer is 0."""
        rows, placement = [self.pool[t] for t in targets], self._placement(targets[0])
        if self._decodes or self._lies_as(targets[0], placement):
            return gathered_lora(x_TX, rows, layer, self.slot_G, self._visits, placement)
        x_GJX = x_TX.reshape(self.slot_G.shape[0], -1, x_TX.shape[-1])
        got = segmented_lora(x_GJX, [lane_rows(row, layer, self.slot_G) for row in rows], placement)
        return tuple(y.reshape(x_TX.shape[0], -1) for y in got)

    def _lies_as(self, target: str, placement: Placement | None) -> bool:
        """Returns whether the pool's features are split as those of lanes are."""
        if self.layout is None or placement is None:
            return True
        pool = self.layout.tokens(target)
        return pool is not None and (pool.x, pool.y) == (placement.x, placement.y)

    def _placement(self, target: str) -> Placement | None:
        if self.layout is None:
            return None
        return self.layout.tokens(target) if self._decodes else self.layout.lanes(target)


class MixedLora(_InPool):
    """Adapted linears of lanes of prompt chunks and, after them, of decode rows: each part as `PoolLora` has it alone."""

    def __init__(self, prompts: PoolLora, rows: PoolLora):
        """rows: of one token a lane.  Both read one pool."""
        self.pool, self.per_layer = rows.pool, prompts.per_layer
        self._prompts, self._rows = prompts, rows

    def product(self, layer: jax.Array, targets: Sequence[str], x_TX: jax.Array) -> tuple[jax.Array, ...]:
        """Returns [T, Y] per target, all of which the pool has; the rows' tokens are the last of T."""
        of_prompts = x_TX.shape[0] - self._rows.slot_G.shape[0]
        prompts = self._prompts.product(layer, targets, x_TX[:of_prompts])
        rows = self._rows.product(layer, targets, x_TX[of_prompts:])
        # Prompts have no parts to be summed with the base's own; rows have them on a mesh.
        rows = [y.sum(0) if y.ndim == 3 else y for y in rows]
        return tuple(jnp.concatenate(parts) for parts in zip(prompts, rows, strict=True))
