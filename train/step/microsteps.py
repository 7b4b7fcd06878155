"""A training step split into microsteps, so that other work on the device waits for one microstep and not for the step.

A pass takes a few lanes through the model: some layers at a time forward, some targets at a time through the head, and
back again.  A pass of all lanes, then an update slot by slot, is what `train_step` does in one program.

    begin ─▶ forward × groups of layers ─▶ head × runs of targets ─▶ losses ─▶ back through the head × runs ─▶ backward × groups

Which layers, targets and slots is data, so each of these is one program.  What a group of layers keeps for its gradient
travels from `forward` to `backward` (`Waiting`; `remat` says what it is).

Shape letters: G lanes of a pass, J tokens of a lane, T = G * J, C targets of a run, L layers, D model.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlora.config.training import LANE_BLOCK
from jaxlora.core.errors import ConfigInvalid
from jaxlora.core.lora import HEAD_TARGET
from jaxlora.core.model_config import ModelConfig
from jaxlora.model.decoder import Base, embedded, final_norm, forward_some, head_weight
from jaxlora.model.lora_pool import LaneLora, Rows
from jaxlora.model.mesh import RULES, check_lanes, place_array, place_rows, replicated
from pallas_kernels.product.op import Packed
from train.step.batch import LaneSums, TrainBatch, idle_batch
from train.step.lane_lora import add_gradients, lane_rows
from train.step.optimizer import Halves
from train.step.state import States, halves, with_gradients, with_halves
from train.step.step import lane_attend, lane_tokens, lora_layout, summed, target_logprobs, with_dropout

KINDS = ("forward", "head", "head back", "backward")  # of the microsteps of a pass


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Waiting:
    """A gradient waiting for its cotangent.  It reads the base's arrays, stores none: jit copies its outputs."""

    kept: list[jax.Array]
    form: tuple[jax.tree_util.PyTreeDef, tuple[int | None, ...]] = jax.tree.static()  # which leaves are the base's

    @staticmethod
    def of(pull: Callable[[jax.Array], tuple], read: object) -> Waiting:
        """Wraps what `jax.vjp` returned for a function that read these arrays of the base, in the same trace."""
        leaves, form = jax.tree.flatten(pull)
        place = {id(x): i for i, x in enumerate(jax.tree.leaves(read))}
        kept = [leaf for leaf in leaves if id(leaf) not in place]
        return Waiting(kept, (form, tuple(place.get(id(leaf)) for leaf in leaves)))

    def pull(self, read: object, d: jax.Array) -> tuple[jax.Array, Halves]:
        """Returns the gradients of the function's input and of its adapters' halves."""
        kept, bases, (form, places) = iter(self.kept), jax.tree.leaves(read), self.form
        leaves = [next(kept) if i is None else bases[i] for i in places]
        return jax.tree.unflatten(form, leaves)(d)


@dataclass(frozen=True, kw_only=True, slots=True)
class MicrostepSizes:
    """How small the microsteps are; the time of one is about proportional to lanes * layers, or to lanes * targets."""

    lanes: int  # of one pass
    layers: int  # of one group
    targets: int  # of each lane in one run through the head
    waits: bool = True  # for the end of each before the next is started, as others use the device too

    def check(self, config: ModelConfig, mesh: Mesh, lanes: int) -> None:
        """Raises ConfigInvalid when they do not divide a step of so many lanes, or the model."""
        divide = min(self.lanes, self.layers) > 0 and lanes % self.lanes == config.layers % self.layers == 0
        if not divide or self.targets < 1 or self.targets % min(self.targets, LANE_BLOCK):
            raise ConfigInvalid(
                f"a microstep needs lanes that divide the step's {lanes}, layers that divide the model's "
                f"{config.layers} and targets below {LANE_BLOCK} or a multiple of it; "
                f"got {self.lanes}, {self.layers} and {self.targets}"
            )
        check_lanes(mesh, self.lanes, "training lanes of a microstep")


def small_parts(mesh: Mesh) -> MicrostepSizes:
    """Returns sizes for about the time of a decode step: one lane on each group of devices through one layer."""
    return MicrostepSizes(lanes=mesh.shape["data"] * mesh.shape["fsdp"], layers=1, targets=16)


def by_layers(lanes: int) -> MicrostepSizes:
    """Returns sizes for a trainer alone on its device whose base has an array for each layer: so many lanes a pass.

    A program of all layers would hold each of them once more, and take as many times as long to compile.
    """
    return MicrostepSizes(lanes=lanes, layers=1, targets=LANE_BLOCK, waits=False)


class Holder(Protocol):
    """Keeps the states between the microsteps; each microstep reads them as they are then."""

    states: States


# ---- programs ---------------------------------------------------------------------------------------------------------


def _begin(base: Base, pools: tuple[Rows, ...], batch: TrainBatch) -> tuple[Rows, jax.Array]:
    return lane_rows(pools, batch.slot_G), _by_lane(base, embedded(base, lane_tokens(batch)))


def _forward(
    base: Base, rows_LG: Rows, batch: TrainBatch, x_TD: jax.Array, first: jax.Array, *, layers: int, remat: str
) -> tuple[jax.Array, Waiting]:
    def cut(x: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, first, layers, 0)

    rows = {t: jax.tree.map(cut, r) for t, r in rows_LG.items() if t != HEAD_TARGET}
    some_L = first + jnp.arange(layers)

    def group(x_TD: jax.Array, trained: Halves) -> jax.Array:
        lora = with_dropout(LaneLora(with_halves(rows, trained), lora_layout(base)), some_L, batch)
        attend = lane_attend(base, batch)
        return forward_some(base, lane_tokens(batch), x_TD, lora, attend, (), some_L=some_L, remat=remat)[0]

    x_TD, pull = jax.vjp(group, x_TD, halves(rows))
    return _by_lane(base, x_TD), Waiting.of(pull, base)


def _head(
    base: Base,
    rows_LG: Rows,
    batch: TrainBatch,
    x_TD: jax.Array,
    found: tuple[jax.Array, jax.Array],
    pick_GC: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], Waiting]:
    """Writes the log-probabilities at the picked positions into `found`; a pick past the lane is ignored."""
    G, J = batch.target_GJ.shape
    safe_GC, taken_GC = jnp.minimum(pick_GC, J - 1), pick_GC < J
    target_GC = jnp.take_along_axis(batch.target_GJ, safe_GC, axis=1)
    rows, read = {t: r for t, r in rows_LG.items() if t == HEAD_TARGET}, _head_arrays(base)

    def run(x_TD: jax.Array, trained: Halves) -> tuple[jax.Array, jax.Array]:
        x_GCD = jnp.take_along_axis(x_TD.reshape(G, J, -1), safe_GC[..., None], axis=1)
        x_XD = final_norm(base, x_GCD.reshape(-1, x_GCD.shape[-1]))
        lanes = LaneLora(with_halves(rows, trained), lora_layout(base))
        return target_logprobs(base, read[0], lanes, x_XD, target_GC, taken_GC)

    logprob_GC, pull, hit_GC = jax.vjp(run, x_TD, halves(rows), has_aux=True)
    at = jnp.arange(G)[:, None], pick_GC
    logprob_GJ, hit_GJ = (
        old.at[at].set(new, mode="drop") for old, new in zip(found, (logprob_GC, hit_GC), strict=True)
    )
    return (_by_lane(base, logprob_GJ), _by_lane(base, hit_GJ)), Waiting.of(pull, read)


def _head_arrays(base: Base) -> tuple[tuple[jax.Array | Packed, jax.Array], jax.Array]:
    """Returns what of the base the head's gradient reads: the head as `head_weight` has it, the final norm."""
    return head_weight(base), base.arrays["norm"]


def _losses(
    batch: TrainBatch, found: tuple[jax.Array, jax.Array], x_TD: jax.Array
) -> tuple[jax.Array, jax.Array, LaneSums]:
    logprob_GJ, hit_GJ = found
    d_GJ, sums = jax.grad(lambda logprob_GJ: summed(batch, logprob_GJ, hit_GJ), has_aux=True)(logprob_GJ)
    return d_GJ, jnp.zeros_like(x_TD), sums


def _head_back(
    base: Base,
    waiting: Waiting,
    d_GJ: jax.Array,
    pick_GC: jax.Array,
    slot_G: jax.Array,
    grads: tuple[Halves, ...],
    dx_TD: jax.Array,
) -> tuple[tuple[Halves, ...], jax.Array]:
    J = d_GJ.shape[1]
    d_GC = jnp.take_along_axis(d_GJ, jnp.minimum(pick_GC, J - 1), axis=1)
    more_TD, dhead = waiting.pull(_head_arrays(base), jnp.where(pick_GC < J, d_GC, 0))
    return add_gradients(grads, dhead, slot_G), _by_lane(base, dx_TD + more_TD)


def _backward(
    base: Base, waiting: Waiting, first: jax.Array, slot_G: jax.Array, grads: tuple[Halves, ...], dx_TD: jax.Array
) -> tuple[tuple[Halves, ...], jax.Array]:
    dx_TD, dhalves = waiting.pull(base, dx_TD)
    return add_gradients(grads, dhalves, slot_G, first), _by_lane(base, dx_TD)


def _by_lane(base: Base, x_TD: jax.Array) -> jax.Array:
    """Constrains the array to one placement: another placement would be another program."""
    return lax.with_sharding_constraint(x_TD, NamedSharding(base.mesh, PartitionSpec(RULES["lanes"])))


@functools.cache
def _forward_by(layers: int, remat: str) -> Callable:
    """Returns the same function each time, so that equal trainers share what is compiled."""
    return functools.partial(_forward, layers=layers, remat=remat)


class _Group(NamedTuple):
    """Layers that run in one microstep."""

    base: Base  # `Base.only` of them
    first: jax.Array  # int32 number of the first


class Microsteps:
    """The programs of the microsteps, and the order in which a pass runs them."""

    def __init__(self, base: Base, states: States, sizes: MicrostepSizes, remat: str, *, shortest: int):
        """shortest: positions of the shortest lanes; the names of microsteps of longer ones say their length."""
        self.base, self.sizes, self._shortest = base, sizes, shortest
        placed = jax.tree.map(lambda x: x.sharding, tuple(s.grads for s in states))
        lanes, small = NamedSharding(base.mesh, PartitionSpec(RULES["lanes"])), replicated(base.mesh)
        self._begin = jax.jit(_begin)
        self._forward = jax.jit(_forward_by(sizes.layers, remat))
        self._head = jax.jit(_head, donate_argnums=4)
        self._losses = jax.jit(_losses, out_shardings=(lanes, lanes, small))
        self._head_back = jax.jit(_head_back, donate_argnums=(5, 6), out_shardings=(placed, lanes))
        self._backward = jax.jit(_backward, donate_argnums=(4, 5), out_shardings=(placed, lanes))
        self._ends = base.only(0, 0)
        self._groups = [
            _Group(base.only(i, sizes.layers), place_array(np.asarray(i, np.int32), small))
            for i in range(0, base.config.layers, sizes.layers)
        ]

    def warm_up(self, length: int, holder: Holder, begins: Callable[[], None]) -> None:
        """Compiles and runs every program on idle lanes of `length` positions, with one target and no slot.

        begins: called before the first of each of the `KINDS`.
        """
        batch = idle_batch(self.sizes.lanes, length)
        batch.weight_GJ[0, 0] = 1.0
        shortened = copy.copy(self)
        shortened._groups = self._groups[:2]  # all others run what the second does
        seen = set()
        for kind in shortened.gradients(batch, holder, lambda: np.asarray(batch.slot_G)):
            if kind not in seen:
                seen.add(kind)
                begins()

    def gradients(
        self, batch: TrainBatch, holder: Holder, slots: Callable[[], np.ndarray]
    ) -> Generator[str, None, LaneSums]:
        """Runs a pass of `sizes.lanes` lanes (NumPy): adds gradients to the holder's states, returns the sums (NumPy).

        Yields the name of each microstep before it runs it, then waits for it (`sizes.waits`).  slots: called before each microstep
        that adds gradients, returns the slot of each lane; NO_ADAPTER adds them to none.
        """
        lanes, picks = self._placed(batch)

        def add(program: jax.stages.Wrapped, dx_TD: jax.Array, *args: object) -> jax.Array:
            slot_G, grads = place_rows(self.base.mesh, slots()), tuple(s.grads for s in holder.states)
            grads, dx_TD = program(*args, slot_G, grads, dx_TD)
            holder.states = with_gradients(holder.states, grads)
            return self._ended(dx_TD)

        at = self._length_name(batch)
        x_TD, groups, runs, found = yield from self._up(lanes, picks, holder)
        d_GJ, dx_TD, sums = self._losses(lanes, found, x_TD)
        for pick_GC in picks:
            yield "head back" + at
            dx_TD = add(self._head_back, dx_TD, self._ends, runs.pop(0), d_GJ, pick_GC)
        for group in reversed(self._groups):
            yield "backward" + at
            dx_TD = add(self._backward, dx_TD, group.base, groups.pop(), group.first)
        return jax.device_get(sums)

    def logprobs(self, batch: TrainBatch, holder: Holder) -> Generator[str, None, np.ndarray]:
        """Returns float32 [G, J]: target log-probabilities of the lanes of a pass.  Yields as `gradients` does."""
        lanes, picks = self._placed(batch)
        *_, (logprob_GJ, _) = yield from self._up(lanes, picks, holder)
        return jax.device_get(logprob_GJ)

    def _up(
        self, lanes: TrainBatch, picks: Sequence[jax.Array], holder: Holder
    ) -> Generator[str, None, tuple[jax.Array, list[Waiting], list[Waiting], tuple[jax.Array, jax.Array]]]:
        """Runs forward.  Returns (last layer's output, waiting gradients of groups and of runs, logprobs and hits)."""
        at = self._length_name(lanes)
        yield "forward" + at
        rows_LG, x_TD = self._begin(self._ends, tuple(s.pool for s in holder.states), lanes)
        groups: list[Waiting] = []
        for group in self._groups:
            if groups:
                yield "forward" + at
            x_TD, waiting = self._forward(group.base, rows_LG, lanes, x_TD, group.first)
            groups.append(waiting)
            self._ended(x_TD)
        runs: list[Waiting] = []
        found = self._nothing_found(lanes.target_GJ.shape)
        for pick_GC in picks:
            yield "head" + at
            found, run = self._head(self._ends, rows_LG, lanes, x_TD, found, pick_GC)
            runs.append(run)
            self._ended(found)
        return x_TD, groups, runs, found

    def _ended[Tree](self, result: Tree) -> Tree:
        """Returns the result of a microstep, which has ended where others wait for it."""
        return jax.block_until_ready(result) if self.sizes.waits else result

    def _length_name(self, lanes: TrainBatch) -> str:
        length = lanes.target_GJ.shape[1]
        return "" if length == self._shortest else f" {length}"

    def _nothing_found(self, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        return place_rows(self.base.mesh, (np.zeros(shape, np.float32), np.zeros(shape, np.bool_)))  # ty: ignore[invalid-explicit-return]

    def _placed(self, batch: TrainBatch) -> tuple[TrainBatch, list[jax.Array]]:
        """Returns the lanes of a pass, and for each run through the head the positions it visits; on the device."""
        wanted_GJ = batch.weight_GJ != 0
        (G, J), C = wanted_GJ.shape, self.sizes.targets
        order_GJ = np.argsort(~wanted_GJ, axis=1, stable=True)
        count_G = wanted_GJ.sum(1)
        runs = -(-int(count_G.max()) // C)
        pick_GJ = np.full((G, max(runs * C, J)), J, np.int32)
        pick_GJ[:, :J] = np.where(np.arange(J)[None] < count_G[:, None], order_GJ, J)
        picks = [pick_GJ[:, i * C : (i + 1) * C] for i in range(runs)]
        return place_rows(self.base.mesh, (batch, picks))  # ty: ignore[invalid-explicit-return]
