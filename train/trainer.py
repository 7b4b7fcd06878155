"""Many tenants, one step at a time: seats, mixing, the compiled step, and what each tenant learns of it.

    add ──▶ seat in a slot        step: mixer ─▶ lanes ─▶ train_step ─▶ one StepReport per tenant in the batch

Joining, leaving and every setting are data.  Owned by one thread.

Shape letters: G lanes, J positions of a lane, U due slots, L layers, R LoRA rank, X Y features in, out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlora.config import Optimizer, check_lane_tokens
from jaxlora.errors import AlreadyExists, DataInvalid, NotFound, StateInvalid
from jaxlora.lora import ALL_TARGETS, Adapter, AdapterRef, LoraSpec
from jaxlora.mesh import check_lanes, place_rows, replicated
from jaxlora.model import Base
from jaxlora.model_config import ModelConfig, target_features
from jaxlora.pool import PoolSpec, Rows, adapter_of_rows, host_rows, layer_count
from pallas_kernels import NO_ADAPTER
from train.data import Example, ExampleStream, Lane, pack
from train.mixer import Mixer
from train.optimizer import IDLE, Hyper
from train.state import SlotState, empty_state, fresh_seat
from train.step import TrainBatch, idle_batch, make_programs

MAX_BAD_STEPS = 5  # skipped updates in a row after which a tenant stops


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """One tenant's part in one step."""

    tenant: str
    step: int  # optimizer steps it has done
    loss: float  # weighted mean over its target tokens (divided by the weights' sizes), nats
    accuracy: float  # share of target tokens that were the likeliest
    lr: float
    grad_norm: float  # before clipping
    tokens: int  # real tokens computed for it
    finite: bool  # False: the update was skipped


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """How well a model predicts some examples."""

    nll: float  # mean per target token, nats
    accuracy: float
    tokens: int  # target tokens


@dataclass(slots=True)
class Tenant:
    """One tenant in training."""

    name: str
    slot: int
    spec: LoraSpec
    optimizer: Optimizer
    stream: ExampleStream
    step: int = 0
    bad_steps: int = 0  # in a row
    status: str = "running"  # running, done or failed
    failure: str = ""  # why it failed
    losses: list[float] = field(default_factory=list)


class Trainer:
    """Trains every tenant that has a seat.  Not thread-safe: one thread owns it."""

    def __init__(self, base: Base, mesh: Mesh, pool_spec: PoolSpec, *, lanes: int, lane_tokens: int, base_hash: str):
        """Raises ConfigInvalid for lane_tokens that are not whole blocks and for lanes that do not divide over the mesh.

        Raises InvalidRequest for fewer than one lane.
        """
        check_lane_tokens(lane_tokens)
        check_lanes(mesh, lanes, "training lanes")
        self.base, self.mesh, self.pool_spec, self.base_hash = base, mesh, pool_spec, base_hash
        self.lanes, self.lane_tokens = lanes, lane_tokens
        self.tenants: dict[str, Tenant] = {}
        self.trained_tokens = 0
        self._mixer = Mixer(lanes, lane_tokens)
        self._state = empty_state(base, pool_spec, mesh)
        self._programs = make_programs(self._state, mesh)

    def warm_up(self) -> None:
        """Compiles and runs what `add`, `step`, `evaluate` and `unseat` run, once, on idle lanes."""
        batch = place_rows(self.mesh, idle_batch(self.lanes, self.lane_tokens))
        hyper = self._device(Hyper.stack([IDLE] * self.lanes))
        idle = self._device(np.full(self.lanes, NO_ADAPTER, np.int32))
        self._state, *_ = self._programs.train_step(self.base, self._state, batch, hyper, idle)
        slot = self._device(np.int32(0))
        seat = self._programs.unseat(self._state, slot)
        self._state = self._programs.seat(self._state, slot, jax.device_put(jax.device_get(seat)))
        jax.block_until_ready(self._programs.evaluate(self.base, self._state.pool, batch))

    @property
    def has_work(self) -> bool:
        """Whether a tenant is training."""
        return len(self._mixer) > 0

    # ---- tenants --------------------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        spec: LoraSpec,
        optimizer: Optimizer,
        examples: Sequence[Example],
        *,
        batch_size: int,
        seed: int,
        weight: float = 1.0,
        resume: tuple[SlotState, int, int] | None = None,
    ) -> Tenant:
        """A tenant joins from the next step on, with fresh weights drawn from its seed, or with (state, step, cursor).

        One that comes back after its last step is `done` and trains no more.
        Raises AlreadyExists, AdapterInvalid (rank or targets), DataInvalid (no examples, too long an example),
        InvalidRequest (batch size), StateInvalid when every slot is taken.
        """
        if name in self.tenants:
            raise AlreadyExists(f"tenant {name} is already training; remove it first", param="name")
        self.pool_spec.check(spec)
        if not self.free_slots:
            raise StateInvalid(f"all {self.pool_spec.slots} training slots are taken; wait for one to leave")
        taken = {t.slot for t in self.tenants.values()}
        slot = next(s for s in range(self.pool_spec.slots) if s not in taken)
        state, step, cursor = resume if resume is not None else (self.fresh(spec, seed), 0, 0)
        stream = ExampleStream(examples, seed, cursor)
        running = step < optimizer.total_steps
        if running:
            self._mixer.add(name, stream, batch_size=batch_size, weight=weight)
        self._state = self._programs.seat(
            self._state, self._device(np.int32(slot)), jax.device_put(jax.device_get(state))
        )
        status = "running" if running else "done"
        self.tenants[name] = Tenant(name, slot, spec, optimizer, stream, step, status=status)
        return self.tenants[name]

    def remove(self, name: str) -> None:
        """The tenant leaves and its slot is free.  Raises NotFound."""
        tenant = self._tenant(name)
        if tenant.status == "running":
            self._mixer.remove(name)
        del self.tenants[name]

    def fail(self, name: str, reason: str) -> None:
        """The tenant trains no more; its slot keeps what it learned until it is removed.  Raises NotFound."""
        tenant = self._tenant(name)
        if tenant.status == "running":
            self._mixer.remove(name)
        tenant.status, tenant.failure = "failed", reason

    def _tenant(self, name: str) -> Tenant:
        if name not in self.tenants:
            raise NotFound(f"no tenant {name} in training", param="name")
        return self.tenants[name]

    @property
    def free_slots(self) -> int:
        """How many tenants may join."""
        return self.pool_spec.slots - len(self.tenants)

    def check(self, spec: LoraSpec, examples: Sequence[Example], batch_size: int) -> None:
        """Raises as `add` would for these, whoever sits here now.  From any thread."""
        self.pool_spec.check(spec)
        if not examples:
            raise DataInvalid("no examples to train on; give at least one")
        self._mixer.check(examples, batch_size)

    def set_weight(self, name: str, weight: float) -> None:
        """A running tenant's share of the tokens, from the next step on.  Raises NotFound, InvalidRequest."""
        self._mixer.set_weight(name, weight)

    def fresh(self, spec: LoraSpec, seed: int) -> SlotState:
        """What a new tenant starts with, in NumPy.  From any thread."""
        return self.seat_of(fresh_adapter(self.base.config, AdapterRef("new", "new", 1), spec, seed, self.base_hash))

    def seat_of(self, adapter: Adapter) -> SlotState:
        """What a tenant starts with that goes on from an adapter, in NumPy.  From any thread.

        Raises AdapterInvalid when it does not fit, AdapterNotFinite.
        """
        return fresh_seat(host_rows(self.base.config, self.pool_spec, adapter))

    def unseat(self, name: str) -> SlotState:
        """A device copy of all the tenant's state, as it is now."""
        return self._programs.unseat(self._state, self._device(np.int32(self._tenant(name).slot)))

    def rows(self, name: str) -> Rows:
        """A device copy of the tenant's weights and scales."""
        return self.unseat(name).rows

    def adapter(self, name: str, ref: AdapterRef) -> Adapter:
        """The tenant's adapter on the host."""
        return adapter_of_rows(self.rows(name), ref, self._tenant(name).spec, self.base_hash)

    # ---- steps ----------------------------------------------------------------------------------------------------

    def step(self) -> list[StepReport]:
        """One optimizer step for every tenant whose turn it is, in one compiled program.

        A tenant whose last step this was becomes `done`, one with too many skipped updates in a row `failed`.
        Raises StateInvalid when nobody trains.
        """
        mixed = self._mixer.next()
        lanes_of: dict[str, list[int]] = {}
        for g, (name, _) in enumerate(mixed.lanes):
            lanes_of.setdefault(name, []).append(g)
        due = [self.tenants[name] for name in mixed.due]
        divisor_of = {name: _divisor([mixed.lanes[g][1] for g in gs]) for name, gs in lanes_of.items()}
        batch = self._batch([lane for _, lane in mixed.lanes], [self.tenants[n].slot for n, _ in mixed.lanes])
        hyper_rows = [t.optimizer.row(t.step, divisor_of[t.name]) for t in due]
        idle = self.lanes - len(due)
        hyper = self._device(Hyper.stack(hyper_rows + [IDLE] * idle))
        slot_U = self._device(np.array([t.slot for t in due] + [NO_ADAPTER] * idle, np.int32))
        self._state, sums, update = self._programs.train_step(self.base, self._state, batch, hyper, slot_U)
        sums, update = jax.device_get((sums, update))
        reports = []
        for u, tenant in enumerate(due):
            gs = lanes_of[tenant.name]
            tokens = sum(int((mixed.lanes[g][1].segment_J != 0).sum()) for g in gs)
            self.trained_tokens += tokens
            report = StepReport(
                tenant=tenant.name,
                step=tenant.step + 1,
                loss=float(sums.loss_G[gs].sum()) / divisor_of[tenant.name],
                accuracy=float(sums.hit_G[gs].sum() / max(sums.count_G[gs].sum(), 1)),
                lr=hyper_rows[u]["lr"],
                grad_norm=float(update.norm_U[u]),
                tokens=tokens,
                finite=bool(update.finite_U[u]),
            )
            self._record(tenant, report)
            reports.append(report)
        return reports

    def _record(self, tenant: Tenant, report: StepReport) -> None:
        tenant.step += 1
        tenant.losses.append(report.loss)
        tenant.bad_steps = 0 if report.finite else tenant.bad_steps + 1
        if tenant.bad_steps >= MAX_BAD_STEPS:
            self.fail(tenant.name, f"{MAX_BAD_STEPS} updates in a row were not finite")
        elif tenant.step >= tenant.optimizer.total_steps:
            tenant.status = "done"
            self._mixer.remove(tenant.name)

    def evaluate(self, examples: Sequence[Example], name: str | None) -> Evaluation:
        """Loss and accuracy on these examples under a tenant's present weights, or the base's (None).

        Raises DataInvalid for an example longer than a lane, NotFound for an unknown tenant.
        """
        return self.evaluate_all([(examples, name)])[0]

    def evaluate_all(self, work: Sequence[tuple[Sequence[Example], str | None]]) -> list[Evaluation]:
        """One Evaluation per (examples, tenant or None); all of them share lanes, so eight small sets cost one large one.

        Raises as `evaluate` does, before anything runs.
        """
        lanes: list[Lane] = []
        slots: list[int] = []
        owners: list[int] = []
        divisors: list[float] = []
        for owner, (examples, name) in enumerate(work):
            packed = pack(examples, self.lane_tokens)
            lanes += packed
            slots += [NO_ADAPTER if name is None else self._tenant(name).slot] * len(packed)
            owners += [owner] * len(packed)
            divisors.append(_divisor(packed))
        totals = np.zeros((len(work), 3))  # loss, hits, targets
        for start in range(0, len(lanes), self.lanes):
            part = slice(start, start + self.lanes)
            batch = self._batch(lanes[part], slots[part])
            sums = jax.device_get(self._programs.evaluate(self.base, self._state.pool, batch))
            columns = np.stack([sums.loss_G, sums.hit_G, sums.count_G], axis=1)
            np.add.at(totals, owners[part], columns[: len(owners[part])])
        return [
            Evaluation(nll=float(loss / divisor), accuracy=float(hit / max(count, 1.0)), tokens=int(count))
            for divisor, (loss, hit, count) in zip(divisors, totals, strict=True)
        ]

    def _batch(self, lanes: Sequence[Lane], slots: Sequence[int]) -> TrainBatch:
        batch = idle_batch(self.lanes, self.lane_tokens)
        for g, (lane, slot) in enumerate(zip(lanes, slots, strict=True)):
            batch.token_GJ[g], batch.target_GJ[g], batch.weight_GJ[g] = lane.token_J, lane.target_J, lane.weight_J
            batch.position_GJ[g], batch.segment_GJ[g], batch.slot_G[g] = lane.position_J, lane.segment_J, slot
        return place_rows(self.mesh, batch)

    def _device[T](self, tree: T) -> T:
        return jax.device_put(tree, replicated(self.mesh))


def _divisor(lanes: Sequence[Lane]) -> float:
    """What losses and gradients of these lanes are divided by: the sum of the weights' sizes, within float32.

    Weights may be negative (to unlearn a token); their plain sum could be zero, or turn the gradient around.
    """
    total = sum(float(np.abs(lane.weight_J).sum(dtype=np.float64)) for lane in lanes)
    limits = np.finfo(np.float32)
    return min(max(total, float(limits.tiny)), float(limits.max))


def fresh_adapter(config: ModelConfig, ref: AdapterRef, spec: LoraSpec, seed: int, base_hash: str) -> Adapter:
    """An untrained adapter: A uniform in ±1/sqrt(features in), B zero.  A row depends on seed, target and layer alone.

    Source: the default initialisation of PEFT.
    """
    weights = {}
    for target in spec.targets:
        x, y = target_features(config, target)
        a = np.zeros((layer_count(config, target), spec.max_rank, x), np.float32)
        for layer in range(a.shape[0]):
            rank, _ = spec.module(target, layer)
            draw = np.random.default_rng([seed, ALL_TARGETS.index(target), layer])
            a[layer, :rank] = draw.uniform(-1, 1, (rank, x)).astype(np.float32) / math.sqrt(x)
        weights[target] = (a, np.zeros((a.shape[0], spec.max_rank, y), np.float32))
    return Adapter(ref=ref, spec=spec, base_hash=base_hash, weights=weights)
