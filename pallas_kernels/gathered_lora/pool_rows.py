"""The rows of a serving pool: per target one flat array of rank rows, in tiles, of which each slot owns a range.

    slots 0 1 2 | 3 4 5 6      classes ((3, 16), (4, 4)): three slots of 16 rows, then four of 4
    rows  0..47 | 48..63       a slot begins where the one before ends; kernels read its adapter's true rank of them

A kernel reads as many rows as an adapter's rank for a target, rounded up to a tile of ROW_TILE where it reads tiles, and
none of a target that the adapter lacks.

Tiles have an axis of their own, so that whatever their number a TPU's compiler lays each out as its memory reads it.

Shape letters: L layers, S slots, N tiles of R = ROW_TILE rank rows, X Y features in, out, G lanes, Q rows of the largest
slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.gathered_lora.rank_classes import ROW_TILE, RankClasses, first_rows, tile_count

Order = tuple[jax.Array, jax.Array, jax.Array]  # int32: lanes by slot, their slots, how many of them are visited


def order_of_parts(order: Order, parts: int) -> Order:
    """Returns the order of lanes as that of the parts of lanes: each lane is so many, which follow each other."""
    order_G, slot_G, count = order
    part_GP = order_G[:, None] * parts + jnp.arange(parts, dtype=jnp.int32)[None]
    return part_GP.reshape(-1), jnp.repeat(slot_G, parts), count * parts


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PoolRows:
    """One target's rows of all slots."""

    a_LNRX: jax.Array
    b_LNRY: jax.Array
    scale_LS: jax.Array  # float32
    rank_S: jax.Array  # int32 rows that the slot's adapter has for this target; 0: it lacks the target
    classes: RankClasses = jax.tree.static()

    @property
    def rank(self) -> int:
        """Returns the rows of the largest slot."""
        return max(rank for _, rank in self.classes)


def of_slots(a_LSRX: jax.Array, b_LSRY: jax.Array, scale_LS: jax.Array) -> PoolRows:
    """Returns the rows of slots of one rank, all of which their adapters fill."""
    S, R = a_LSRX.shape[1:3]
    classes = ((S, R),)

    def flat(half: jax.Array) -> jax.Array:
        L, N, features = half.shape[0], tile_count(classes), half.shape[3]
        rows = jnp.pad(jnp.reshape(half, (L, S * R, features)), ((0, 0), (0, N * ROW_TILE - S * R), (0, 0)))
        return rows.reshape(L, N, ROW_TILE, features)

    return PoolRows(
        a_LNRX=flat(a_LSRX),
        b_LNRY=flat(b_LSRY),
        scale_LS=jnp.asarray(scale_LS),
        rank_S=jnp.full(S, R, jnp.int32),
        classes=classes,
    )


def lane_rows(rows: PoolRows, layer: jax.Array, slot_G: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns one layer's (a_GQX, b_GQY, scale_G) of each lane's slot, padded with zero rows; zeros without a slot.

    A row that an adapter lacks is one of its own that is not used, so a NaN of another adapter is never read.
    """
    safe_G = jnp.maximum(slot_G, 0)
    rank_G1 = jnp.where(slot_G >= 0, rows.rank_S[safe_G], 0)[:, None]
    place_Q = jnp.arange(rows.rank, dtype=jnp.int32)
    has_GQ = place_Q[None] < rank_G1
    row_GQ = jnp.asarray(first_rows(rows.classes))[safe_G][:, None] + jnp.where(has_GQ, place_Q[None], 0)

    def taken(half: jax.Array) -> jax.Array:
        return jnp.where(has_GQ[:, :, None], half[layer, row_GQ // ROW_TILE, row_GQ % ROW_TILE], 0)

    return taken(rows.a_LNRX), taken(rows.b_LNRY), jnp.where(slot_G >= 0, rows.scale_LS[layer, safe_G], 0.0)
