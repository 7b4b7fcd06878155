"""LoRA rows of a step's lanes: the rows of each lane's slot, taken from all slot buckets.

`lane_rows` gathers those of all layers at once where they are kept for later (`microsteps`).  `StepLora` gathers a
layer's when the layer runs, so no copy of all is made: a gradient of the rows then arrives at *taps*, zeros of their
shape that are never read.
Shape letters: G lanes, L layers, S slots of a bucket, R LoRA rank, X features, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlora.core.lora import HEAD_TARGET
from jaxlora.model.lora_pool import LaneLora, LoraLayout, LoraRows, Rows
from pallas_kernels import NO_ADAPTER
from pallas_kernels.segmented_lora.op import take_layer_rows
from train.step.optimizer import Halves


def slots_of(pool: Rows) -> int:
    """Returns how many slots a bucket has."""
    return next(iter(pool.values())).scale_LS.shape[1]


def own_slots(slots: Sequence[int], slot_G: jax.Array) -> list[jax.Array]:
    """Returns each bucket's own slots, counted from its start; NO_ADAPTER where a slot is another bucket's."""
    own, start = [], 0
    for count in slots:
        end = start + count
        own.append(jnp.where((slot_G >= start) & (slot_G < end), slot_G - start, NO_ADAPTER))
        start = end
    return own


def lane_rows(pools: Sequence[Rows], slot_G: jax.Array, layer: jax.Array | None = None) -> Rows:
    """Returns each lane's rows, [L, G, R, X] or of one layer [G, R, X], with the largest rank of all buckets.

    They are zero past a slot's own rank, and where a lane has no slot.
    """
    own = own_slots([slots_of(pool) for pool in pools], slot_G)
    rank = max(rows.a_LSRX.shape[2] for pool in pools for rows in pool.values())
    before = 0 if layer is None else 1  # axes missing before that of lanes

    def taken(pool: Rows, slot_G: jax.Array) -> Rows:
        if layer is None:
            return LaneLora.gather(pool, slot_G)
        return jax.tree.map(lambda x: take_layer_rows(x, layer, slot_G), pool)

    def padded(x: jax.Array) -> jax.Array:
        """Returns the rows padded with zeros up to this rank; scales as they are."""
        is_scale = x.ndim + before == 2
        return x if is_scale else jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, rank - x.shape[-2]), (0, 0)])

    def choose(*of_buckets: jax.Array) -> jax.Array:
        """Returns each lane's own from the arrays of all buckets."""
        chosen = padded(of_buckets[0])
        for slot_G, x in zip(own[1:], of_buckets[1:], strict=True):
            has = (slot_G != NO_ADAPTER).reshape((1,) * (1 - before) + (-1,) + (1,) * (x.ndim + before - 2))
            chosen = jnp.where(has, padded(x), chosen)
        return chosen

    return jax.tree.map(choose, *(taken(pool, slots) for pool, slots in zip(pools, own, strict=True)))


class StepLora(LaneLora):
    """Adapted linears of lanes; takes a layer's rows from the pools when the layer runs."""

    def __init__(self, pools: Sequence[Rows], slot_G: jax.Array, layout: LoraLayout, taps_LG: Halves | None = None):
        """taps_LG: halves of every target, shaped as `lane_rows` gives them; None where no gradient is computed."""
        head, rest = (
            [{t: r for t, r in pool.items() if (t == HEAD_TARGET) is wanted} for pool in pools]
            for wanted in (True, False)
        )
        super().__init__({}, layout)
        self.targets = frozenset(rest[0])
        self._pools, self._slot_G = rest, slot_G
        taps = {} if taps_LG is None else taps_LG
        self.per_layer = jnp.arange(layout.config.layers), {t: tap for t, tap in taps.items() if t != HEAD_TARGET}
        if head[0]:
            self.head = _attached(lane_rows(head, slot_G), taps)[HEAD_TARGET]

    def deltas(  # ty: ignore[incompatible-method-override]
        self, layer: tuple[jax.Array, Halves], targets: tuple[str, ...], x_TX: jax.Array
    ) -> tuple[jax.Array | None, ...]:
        """Returns a layer's LoRA deltas, as LaneLora.deltas does."""
        index, taps = layer
        pools = [{t: pool[t] for t in targets if t in pool} for pool in self._pools]
        rows = _attached(lane_rows(pools, self._slot_G, index), taps) if pools[0] else {}
        return super().deltas(rows, targets, x_TX)


def _attached(rows: Rows, taps: Halves) -> Rows:
    """Returns the rows; where there are taps, the rows' gradient goes to the taps."""
    attached = {}
    for target, row in rows.items():
        a, b = row.a_LSRX, row.b_LSRY
        if target in taps:
            a, b = _attach((a, b), taps[target])
        attached[target] = LoraRows(a_LSRX=a, b_LSRY=b, scale_LS=row.scale_LS)
    return attached


@jax.custom_vjp
def _attach(halves: tuple[jax.Array, jax.Array], taps: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return halves


_attach.defvjp(lambda halves, taps: (halves, None), lambda _, gradient: (None, gradient))
