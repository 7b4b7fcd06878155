"""The pool of adapters in training on the device, S slots of rows, and what it has in common with the one that serves.

A Pool is a pytree.  For each target it holds a_LSRX, b_LSRY and scale_LS; rank comes before features so that rows are
contiguous.  A slot is one index of S; an adapter of a smaller rank is padded with zero rows in both halves, which stay
zero in training.  Scale is float32 and per layer and target.

Shape letters: L layers (1 for lm_head), S slots, R rank of the pool, X Y features in, out, T tokens, G lanes, J tokens of a lane.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jaxlora.core.errors import AdapterInvalid, AdapterNotFinite
from jaxlora.core.lora import ALL_TARGETS, HEAD_TARGET, LAYER_TARGETS, AdapterWeights, LoraSpec
from jaxlora.core.model_config import ModelConfig, layer_count, parameters, target_features
from jaxlora.model.mesh import RULES, sharding
from pallas_kernels.gathered_lora.rank_classes import RankClasses
from pallas_kernels.segmented_lora.op import segmented_lora, take_rows
from pallas_kernels.sharding import Placement


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LoraRows:
    """One target's rows: of a pool (axes as named), of one slot (no S) or of the lanes of a batch (G in place of S)."""

    a_LSRX: jax.Array
    b_LSRY: jax.Array
    scale_LS: jax.Array  # float32


Rows = dict[str, LoraRows]  # by target


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolSpec:
    """What a pool can hold.  Fixed at creation; no request and no tenant changes it."""

    slots: int
    rank: int  # largest rank of an adapter
    dtype: str  # float32 where we train, the serving dtype where we serve
    targets: tuple[str, ...] = LAYER_TARGETS
    classes: RankClasses = ()  # (slots, rank) where a server's slots differ in rank, falling; `slots` and `rank` are theirs

    def __post_init__(self) -> None:
        if self.slots < 1 or self.rank < 1:
            raise AdapterInvalid(
                f"a pool needs at least one slot and rank 1, got {self.slots} slots of rank {self.rank}"
            )
        if len(self.classes) > 1:
            assert (self.slots, self.rank) == (sum(n for n, _ in self.classes), max(r for _, r in self.classes))

    @property
    def rank_classes(self) -> RankClasses:
        """Returns (slots, rank) of each class of slots, in the order of slots."""
        return self.classes if len(self.classes) > 1 else ((self.slots, self.rank),)

    def home(self, rank: int) -> PoolSpec:
        """Returns the class of slots that adapters of this rank have as their own: the smallest that holds them.

        Raises AdapterInvalid when none does.
        """
        fits = [(own, slots) for slots, own in self.rank_classes if own >= rank]
        if not fits:
            raise AdapterInvalid(f"rank {rank} exceeds the limit {self.rank} of this server")
        own, slots = min(fits)
        return PoolSpec(slots=slots, rank=own, dtype=self.dtype, targets=self.targets)

    def check(self, spec: LoraSpec) -> None:
        """Raises AdapterInvalid when an adapter of this specification does not fit a slot."""
        if spec.max_rank > self.rank:
            raise AdapterInvalid(f"rank {spec.max_rank} exceeds the limit {self.rank} of this server")
        missing = [t for t in spec.targets if t not in self.targets]
        if missing:
            raise AdapterInvalid(f"LoRA on {', '.join(missing)} is not supported by this server")


def row_axes(config: ModelConfig, target: str) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """Returns the logical axes of (a_LSRX, b_LSRY): features are split like the base kernel's."""
    x, y = ("embed", "vocab") if target == HEAD_TARGET else parameters(config)[target].axes[1:]
    return ("layers", "slots", "rank", x), ("layers", "slots", "rank", y)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraLayout:
    """How a LoRA product is split over the mesh: kernels need this, since XLA cannot partition them."""

    config: ModelConfig
    mesh: Mesh

    def lanes(self, target: str) -> Placement | None:
        """Returns the placement of lanes with rows gathered for them; None on one device.

        Lanes are split over data x fsdp, features as the base kernel's in use: over tensor alone.
        """
        x, y = self._features(target)
        lanes = self._lanes()
        return self._placement(lanes, None if x in lanes else x, None if y in lanes else y)

    def tokens(self, target: str) -> Placement | None:
        """Returns the placement of tokens that read the pool in place; None on one device.

        The parts of a row-parallel product are kept apart: the base's own sum carries them (`decoder.Block`).
        """
        x, y = self._features(target)
        found = self._placement(tuple(a for a in self._lanes() if a not in (x, y)), x, y)
        return found if found is None else replace(found, apart=x == RULES["mlp"] and y is None)

    def _lanes(self) -> tuple[str, ...]:
        axes = RULES["lanes"]
        assert isinstance(axes, tuple)
        return axes

    def _features(self, target: str) -> tuple[str | None, str | None]:
        """Returns the mesh axes of features in and out; an axis of one device splits nothing, and needs no sum."""
        split = []
        for axes in row_axes(self.config, target):
            axis = None if axes[-1] is None else RULES[axes[-1]]
            assert not isinstance(axis, tuple)
            split.append(None if axis is None or self.mesh.shape[axis] == 1 else axis)
        x, y = split
        return x, y

    def _placement(self, rows: tuple[str, ...], x: str | None, y: str | None) -> Placement | None:
        return None if self.mesh.size == 1 else Placement(mesh=self.mesh, rows=rows, x=x, y=y)


def empty_pool(config: ModelConfig, spec: PoolSpec, mesh: Mesh) -> Rows:
    """Returns a pool of zero rows, placed on the mesh."""
    pool = {}
    for target in spec.targets:
        L, (x, y) = layer_count(config, target), target_features(config, target)
        a_axes, b_axes = row_axes(config, target)
        pool[target] = LoraRows(
            a_LSRX=jnp.zeros((L, spec.slots, spec.rank, x), spec.dtype, device=sharding(mesh, a_axes)),
            b_LSRY=jnp.zeros((L, spec.slots, spec.rank, y), spec.dtype, device=sharding(mesh, b_axes)),
            scale_LS=jnp.zeros((L, spec.slots), jnp.float32, device=sharding(mesh, ("layers", "slots"))),
        )
    return pool


def host_rows(config: ModelConfig, spec: PoolSpec, adapter: AdapterWeights) -> Rows:
    """Returns one slot's rows of this adapter as NumPy arrays of its dtype: every target of the pool, every row, and scale.

    Arrays that need no padding are the adapter's own; those of a target that it lacks are shared, and read-only.

    Raises AdapterInvalid when the adapter does not fit, AdapterNotFinite when a weight is not finite.
    """
    spec.check(adapter.spec)
    adapter.check_finite()
    rows = {}
    for target in spec.targets:
        L, (x, y) = layer_count(config, target), target_features(config, target)
        if target in adapter.weights:
            given_a, given_b = adapter.weights[target]
            R = adapter.spec.max_rank
            if (given_a.shape, given_b.shape) != ((L, R, x), (L, R, y)):
                raise AdapterInvalid(
                    f"the weights of {target} have shapes {given_a.shape} and {given_b.shape}; this base and rank {R} "
                    f"want {(L, R, x)} and {(L, R, y)}"
                )
            a, b = (_padded(given, spec.rank) for given in (given_a, given_b))
        else:
            a, b = (no_rows(L, spec.rank, n, adapter.dtype) for n in (x, y))
        rows[target] = LoraRows(a_LSRX=a, b_LSRY=b, scale_LS=scales(config, adapter.spec, target))  # ty: ignore[invalid-argument-type]
    return rows


def _padded(given: np.ndarray, rank: int) -> np.ndarray:
    """Returns [L, rank, features]: the given rows, then zeros.  The same array where none are missing."""
    L, R, features = given.shape
    if rank == R:
        return given
    whole = np.zeros((L, rank, features), given.dtype)
    whole[:, :R] = given
    return whole


@functools.lru_cache(maxsize=64)
def no_rows(layers: int, rank: int, features: int, dtype: str) -> np.ndarray:
    """Returns zeros [layers, rank, features], read-only: one array for all who ask, which takes no memory until it is read."""
    zeros = np.zeros((layers, rank, features), jnp.dtype(dtype))
    zeros.setflags(write=False)
    return zeros


def scales(config: ModelConfig, spec: LoraSpec, target: str) -> np.ndarray:
    """Returns float32 [L]: the scale of each layer's module, 0 where it is not adapted."""
    return np.array([spec.scale(target, i) for i in range(layer_count(config, target))], np.float32)


def adapter_of_rows(rows: Mapping[str, LoraRows], spec: LoraSpec, base_hash: str) -> AdapterWeights:
    """Returns the host adapter whose weights are one slot's rows (float32, cut to the adapter's largest rank)."""
    weights = {
        t: (
            np.asarray(rows[t].a_LSRX, np.float32)[:, : spec.max_rank],
            np.asarray(rows[t].b_LSRY, np.float32)[:, : spec.max_rank],
        )
        for t in spec.targets
    }
    return AdapterWeights(spec=spec, base_hash=base_hash, weights=weights)


@jax.jit
def _all_finite(rows: Rows) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(rows)]).all()


def read_finite(rows: Rows) -> None:
    """Raises AdapterNotFinite when one slot's device rows contain a NaN or an infinity."""
    if not bool(_all_finite(rows)):
        raise AdapterNotFinite("the adapter has non-finite weights; it is not published")


class LaneLora:
    """Adapted linears of tokens in lanes, with rows gathered beforehand (training, which differentiates them)."""

    def __init__(self, rows_LG: Rows, layout: LoraLayout | None = None):
        self.layout = layout
        self.per_layer = {t: r for t, r in rows_LG.items() if t != HEAD_TARGET}
        self.targets = frozenset(self.per_layer)  # those of the layers
        self.head = rows_LG.get(HEAD_TARGET)

    @staticmethod
    def gather(pool: Rows, slot_G: jax.Array) -> Rows:
        """Returns the rows of each lane's slot, [L, G, ...]; zeros for NO_ADAPTER."""
        return jax.tree.map(lambda p: take_rows(p, slot_G), pool)

    def deltas(self, layer: Rows, targets: tuple[str, ...], x_TX: jax.Array) -> tuple[jax.Array | None, ...]:
        """Returns [T, Y] per target, None where the pool lacks it.  Targets share one read of x: A is concatenated."""
        have = [layer[t] for t in targets if t in layer]
        if not have:
            return (None,) * len(targets)
        G = have[0].a_LSRX.shape[0]
        x_GJX = x_TX.reshape(G, -1, x_TX.shape[-1])
        placement = None if self.layout is None else self.layout.lanes(targets[0])
        got = iter(segmented_lora(x_GJX, [(r.a_LSRX, r.b_LSRY, r.scale_LS) for r in have], placement))
        return tuple(next(got).reshape(x_TX.shape[0], -1) if t in layer else None for t in targets)

    def head_rows(self) -> tuple[jax.Array, jax.Array, jax.Array] | None:
        """Returns (a_GRD, b_GRV, scale_G) of the head, if this pool adapts it."""
        h = self.head
        return None if h is None else (h.a_LSRX[0], h.b_LSRY[0], h.scale_LS[0])

    def head_placement(self) -> Placement | None:
        """Returns how the head's product is split over the mesh."""
        return None if self.layout is None else self.layout.lanes(HEAD_TARGET)


class DropoutLora:
    """Applies dropout to the input of each lane's A in training, by the lane's own rate and random numbers.

    Targets that share one read of x share its mask (PEFT draws one for each).  The head's input has no dropout.
    A lane of rate 0 keeps its bits, whatever other lanes drop; when no lane drops, nothing is drawn.
    """

    def __init__(self, lanes: LaneLora, layer_L: jax.Array, rate_G: jax.Array, draw_GN: jax.Array):
        """layer_L: the numbers of the layers of the rows.

        draw_GN: int32 numbers that seed a lane's random numbers: of its tenant, its step, its place there.
        """
        self.lanes, self.rate_G = lanes, rate_G
        self.per_layer = (_layer_keys(draw_GN, layer_L), lanes.per_layer)

    def deltas(
        self, layer: tuple[jax.Array, Rows], targets: tuple[str, ...], x_TX: jax.Array
    ) -> tuple[jax.Array | None, ...]:
        """Returns a layer's LoRA deltas as LaneLora's, of x with dropout and the rest scaled up."""
        key_G, rows = layer
        if self.lanes.targets.isdisjoint(targets):
            return (None,) * len(targets)
        drop = functools.partial(self._dropped, key_G, ALL_TARGETS.index(targets[0]))
        return self.lanes.deltas(rows, targets, lax.cond((self.rate_G > 0).any(), drop, lambda x: x, x_TX))

    def _dropped(self, key_G: jax.Array, target: int, x_TX: jax.Array) -> jax.Array:
        x_GJX = x_TX.reshape(self.rate_G.shape[0], -1, x_TX.shape[-1])

        def of_lane(x_JX: jax.Array, rate: jax.Array, key: jax.Array) -> jax.Array:
            keep_JX = jax.random.uniform(jax.random.fold_in(key, target), x_JX.shape) >= rate
            return jnp.where(keep_JX, x_JX.astype(jnp.float32) / (1 - rate), 0).astype(x_JX.dtype)

        return jax.vmap(of_lane)(x_GJX, self.rate_G, key_G).reshape(x_TX.shape)


def _layer_keys(draw_GN: jax.Array, layer_L: jax.Array) -> jax.Array:
    """Returns [L, G] keys of the lanes' random numbers in each layer: made once, not in each linear, as a program compiles
    longer for each."""

    def of(layer: jax.Array, draw_N: jax.Array) -> jax.Array:
        key = jax.random.key(0)
        for number in (*draw_N, layer):
            key = jax.random.fold_in(key, number)
        return key

    return jax.vmap(jax.vmap(of, (None, 0)), (0, None))(layer_L, draw_GN)
