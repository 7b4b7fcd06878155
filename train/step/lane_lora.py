"""LoRA rows of a step's lanes: the rows of each lane's slot, taken from all slot buckets, and their gradients, added there.

`lane_rows` gathers those of all layers at once where they are kept for later (`microsteps`).  `StepLora` gathers a
layer's when the layer runs, and adds their gradient to the slots as the backward pass leaves the layer: neither the rows
of all layers nor their gradients are ever held for the lanes.
Shape letters: G lanes, L layers, S slots of a bucket, R LoRA rank, X features, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Gradients:
    """The summed gradients of all buckets while a backward pass adds to them."""

    totals: Sequence[dict[str, tuple[jax.Ref, jax.Ref]]]  # by bucket: target → (a_LSRX, b_LSRY), changed in place
    by: jax.Array  # float32 scalar that the loss is differentiated by: rows have a gradient only if something has


class StepLora(LaneLora):
    """Adapted linears of lanes; takes a layer's rows from the pools when the layer runs."""

    def __init__(
        self, pools: Sequence[Rows], slot_G: jax.Array, layout: LoraLayout, gradients: Gradients | None = None
    ):
        """gradients: where the rows' gradients are added; None where none is computed."""
        head, rest = (
            [{t: r for t, r in pool.items() if (t == HEAD_TARGET) is wanted} for pool in pools]
            for wanted in (True, False)
        )
        super().__init__({}, layout)
        self.targets = frozenset(rest[0])
        self._pools, self._slot_G, self._gradients = rest, slot_G, gradients
        self.per_layer = np.arange(layout.config.layers, dtype=np.int32)  # constants where layers are unrolled
        if head[0]:
            self.head = self._followed(lane_rows(head, slot_G), 0)[HEAD_TARGET]

    def deltas(  # ty: ignore[incompatible-method-override]
        self, layer: jax.Array, targets: tuple[str, ...], x_TX: jax.Array
    ) -> tuple[jax.Array | None, ...]:
        """Returns a layer's LoRA deltas, as LaneLora.deltas does."""
        pools = [{t: pool[t] for t in targets if t in pool} for pool in self._pools]
        rows = self._followed(lane_rows(pools, self._slot_G, layer), layer) if pools[0] else {}
        return super().deltas(rows, targets, x_TX)

    def _followed(self, rows: Rows, layer: jax.Array | int) -> Rows:
        """Returns a layer's rows, whose gradients are added to the totals."""
        if self._gradients is None:
            return rows
        totals, by = self._gradients.totals, self._gradients.by
        followed = {}
        for target, row in rows.items():
            own = [total[target] for total in totals]
            a, b = _follow((row.a_LSRX, row.b_LSRY), by, own, jnp.int32(layer), self._slot_G)
            followed[target] = LoraRows(a_LSRX=a, b_LSRY=b, scale_LS=row.scale_LS)
        return followed


Pair = tuple[jax.Array, jax.Array]


@jax.custom_vjp
def _follow(
    halves: Pair, by: jax.Array, totals: list[tuple[jax.Ref, jax.Ref]], layer: jax.Array, slot_G: jax.Array
) -> Pair:
    return halves


def _follow_forward(halves, by, totals, layer, slot_G):
    return halves, (totals, layer, slot_G)


def _follow_backward(saved, gradient):
    totals, layer, slot_G = saved
    layers = [x if x.ndim == 4 else x[None] for x in gradient]
    before = [{"": tuple(half[...] for half in total)} for total in totals]
    after = add_gradients(before, {"": tuple(layers)}, slot_G, layer)
    for total, new in zip(totals, after, strict=True):
        for half, value in zip(total, new[""], strict=True):
            half[...] = value
    return None, jnp.zeros((), jnp.float32), None, None, None


_follow.defvjp(_follow_forward, _follow_backward)


def add_gradients(
    totals: Sequence[Halves], grads_LG: Halves, slot_G: jax.Array, first: jax.Array | int = 0
) -> tuple[Halves, ...]:
    """Returns the summed gradients of all buckets with each lane's added to its own slot's.

    grads_LG: of some targets and some layers, from number `first` on; the others stay as they are.
    """
    own = own_slots([next(iter(total.values()))[0].shape[1] for total in totals], slot_G)
    return tuple(_add_own(total, grads_LG, slot_G, first) for total, slot_G in zip(totals, own, strict=True))


def _add_own(total: Halves, grads_LG: Halves, slot_G: jax.Array, first: jax.Array | int) -> Halves:
    def add_lane(g: jax.Array, total: Halves) -> Halves:
        slot = slot_G[g]
        safe = jnp.maximum(slot, 0)

        def add(total_LSRX: jax.Array, grad_LGRX: jax.Array) -> jax.Array:
            new = lax.dynamic_index_in_dim(grad_LGRX[:, :, : total_LSRX.shape[2]], g, 1)
            at = (first, safe, 0, 0)
            old = lax.dynamic_slice(total_LSRX, at, new.shape)
            return lax.dynamic_update_slice(total_LSRX, jnp.where(slot != NO_ADAPTER, old + new, old), at)

        return jax.tree.map(add, total, grads_LG)

    some = {target: total[target] for target in grads_LG}
    return total | lax.fori_loop(0, slot_G.shape[0], add_lane, some)
