"""Many tenants, one step at a time: seats, mixing, the compiled step, and what each tenant learns of it.

    add ──▶ seat in a slot        step: mixer ─▶ lanes ─▶ train_step, or its parts ─▶ one StepReport per tenant in the batch

Joining, leaving and every setting are data.  Owned by one thread.

Shape letters: G lanes, J positions of a lane, U due slots, L layers, R LoRA rank, X Y features in, out.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections import Counter
from collections.abc import Generator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlora.config.training import CROSS_ENTROPY, Loss, MomentsDtype, Optimizer, Remat, check_lane_tokens
from jaxlora.core.errors import AlreadyExists, ConfigInvalid, DataInvalid, InvalidRequest, NotFound, StateInvalid
from jaxlora.core.host_memory import give_back
from jaxlora.core.lora import AdapterWeights, LoraSpec
from jaxlora.core.progress import Counted, uncounted
from jaxlora.model.decoder import Base
from jaxlora.model.lora_pool import PoolSpec, Rows, adapter_of_rows, host_rows
from jaxlora.model.mesh import check_lanes, place, place_rows, replicated
from pallas_kernels import NO_ADAPTER
from train.data.examples import CheckedExamples, ExampleStream, Unit, fitting_length, real_tokens
from train.data.mixer import Batches, Mixer
from train.evaluate import EvaluatedLane, Evaluator, HeldLanes
from train.slot_buckets import SlotBuckets
from train.step.batch import LaneSums, TrainBatch, idle_batch, idle_sums, put_dropout, put_sums
from train.step.microsteps import KINDS, Microsteps, MicrostepSizes, by_layers
from train.step.state import SlotState, States, UpdateReport, empty_state, fresh_adapter, fresh_seat
from train.step.step import check_passes, make_programs
from train.tenant import (
    MAX_BAD_STEPS,
    Evaluation,
    MixedStep,
    StepReport,
    Tenant,
    TenantStatus,
    Window,
    batch_weight,
    divisor,
    is_device_loss,
    target_count,
    whole,
)

FIRST_PART = "mix"  # of a step
LOG = logging.getLogger("train")


class Trainer:
    """Trains every tenant that has a seat.  Not thread-safe: one thread owns it."""

    def __init__(
        self,
        base: Base,
        mesh: Mesh,
        buckets: Sequence[PoolSpec],
        *,
        lanes: int,
        lane_tokens: int | Sequence[int],
        base_hash: str,
        moments: MomentsDtype = "float32",
        remat: Remat = "products",
        passes: int = 1,
        parts: MicrostepSizes | None = None,
    ):
        """`buckets`: slots by largest rank, from the smallest on.  A tenant sits in the first bucket that its rank fits.

        lane_tokens: positions of a lane, or of short, longer, ... and the longest lanes: a tenant's lanes all have the first
        length that its examples fit, and what one of them computes depends on nothing else.
        moments: the dtype that AdamW's moments are kept in (see `train.step.optimizer`, for uint8 `train.step.moments_8bit`).
        remat: what a step keeps of a layer for its gradient (see `jaxlora.model.decoder.REMAT`).
        passes: a step's lanes go through the model in so many groups (see `train.step.step.accumulate`).
        parts: how small the parts of a step are, for a trainer that shares its device; None: a step is one program, or of a
        base with an array for each layer one for each layer.
        Raises ConfigInvalid for lane_tokens that are not whole blocks, for lanes that do not divide over the mesh or into
        passes, for passes of a step in parts, for parts that do not divide lanes or layers and for buckets that do not
        grow in rank or differ in more; InvalidRequest for fewer than one lane.
        """
        self.lengths = (lane_tokens,) if isinstance(lane_tokens, int) else tuple(sorted(set(lane_tokens)))
        for length in self.lengths:
            check_lane_tokens(length)
        if len(self.lengths) > 1 and parts is None:
            raise ConfigInvalid("a step in one program has lanes of one length; give one", param="lane_tokens")
        check_lanes(mesh, lanes, "training lanes")
        check_passes(mesh, lanes, passes)
        if passes > 1 and parts is not None:
            raise ConfigInvalid(f"passes = {passes} is for a step in one program; leave it out", param="passes")
        if parts is None and isinstance(base.layers, tuple):
            parts = by_layers(lanes // passes)
        self.seats = SlotBuckets(buckets, lanes)
        self.base, self.mesh, self.base_hash = base, mesh, base_hash
        self.lanes, self.lane_tokens, self.moments = lanes, self.lengths[-1], moments
        self.tenants: dict[str, Tenant] = {}
        self.trained_tokens = self.updates = 0  # since the start
        self._mixer = Mixer(lanes, self.lane_tokens)
        self.states: States = tuple(empty_state(base, spec, mesh, moments) for spec in self.seats.buckets)
        self._programs = make_programs(self.states, mesh, remat=remat, passes=passes)
        if parts is not None:
            parts.check(base.config, mesh, lanes)
        shortest = self.lengths[0]
        self._parts = None if parts is None else Microsteps(base, self.states, parts, remat, shortest=shortest)
        self.evaluator = Evaluator(base, self._programs.evaluate, self, self._parts, lanes=lanes, lengths=self.lengths)
        self._step: Generator[str] | None = None  # under way
        self._reports: list[StepReport] = []  # of the part that runs
        self.part = FIRST_PART  # what `advance` runs next

    def warm_up(self, compiling: Counted = uncounted) -> None:
        """Compiles and runs what `add`, `step`, `evaluate` and `unseat` run, once, on idle lanes.

        compiling: called before each of these programs.
        """
        of = 1 if self._parts is None else len(KINDS) * len(self.lengths) + 1
        of += len(self.seats.buckets) + len(self.lengths)
        numbers = itertools.count(1)

        def begins() -> None:
            compiling(next(numbers), of)

        due = self._device(self.seats.due([], [])[1])
        if self._parts is None:
            begins()
            batch = place_rows(self.mesh, idle_batch(self.lanes, self.lane_tokens))
            self.states, *_ = self._programs.train_step(self.base, self.states, batch, due)
        else:
            for length in self.lengths:
                self._parts.warm_up(length, self, begins)
            begins()
            self.states, _ = self._programs.apply(self.states, due)
        slot = self._device(np.int32(0))
        for bucket in range(len(self.seats.buckets)):
            begins()
            seat = self._device(jax.device_get(self._programs.unseat(self.states, bucket, slot)))
            self.states = self._programs.seat(self.states, bucket, slot, seat)
        self.evaluator.warm_up(begins)
        give_back()

    @property
    def has_work(self) -> bool:
        """Whether a step would train a tenant: those who are held wait."""
        return len(self._mixer) > 0

    # ---- tenants --------------------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        spec: LoraSpec,
        optimizer: Optimizer,
        examples: Sequence[Unit] | Batches,
        *,
        batch_size: int,
        seed: int,
        weight: float = 1.0,
        loss: Loss = CROSS_ENTROPY,
        per_target: bool = False,
        resume: tuple[SlotState, int, int] | None = None,
        stream: ExampleStream | None = None,
    ) -> Tenant:
        """A tenant joins from the next step on, with fresh weights drawn from its seed, or with (state, step, cursor).
        examples: those that `check` returned take no time in proportion to their number.
        stream: of these examples from this seed and cursor on, where it is made already.
        per_target: its loss is divided by the number of its target tokens instead of the sum of their weights' sizes.
        One that comes back after its last step is `done` and trains no more.
        Raises AlreadyExists, AdapterInvalid (rank or targets), DataInvalid (no examples, one too long, or of another kind
        than the loss trains on), InvalidRequest (batch size), StateInvalid when every slot is taken.
        """
        if name in self.tenants:
            raise AlreadyExists(f"tenant {name} is already training; remove it first", param="name")
        self.seats.check(spec)
        batches = examples if isinstance(examples, Batches) else self.check(spec, examples, batch_size, loss)
        slot = self.seats.first_free(spec, self._taken)
        state, step, cursor = resume if resume is not None else (self.fresh(spec, seed), 0, 0)
        if stream is None:
            stream = ExampleStream(batches.examples.units, seed, cursor)
        running = step < optimizer.total_steps
        if running:
            self._mixer.add(name, batches, stream, weight=weight, split=len(batches.worst) > self.lanes)
        self.states = self._programs.seat(self.states, *self._at(slot), self._device(jax.device_get(state)))
        status = TenantStatus.RUNNING if running else TenantStatus.DONE
        self.tenants[name] = Tenant(name, slot, spec, optimizer, stream, loss, step, per_target, status=status)
        return self.tenants[name]

    def remove(self, name: str) -> None:
        """The tenant leaves and its slot is free.  Raises NotFound."""
        tenant = self._tenant(name)
        self._mixer.release(name)
        if tenant.status is TenantStatus.RUNNING:
            self._mixer.remove(name)
        del self.tenants[name]

    def fail(self, name: str, reason: str, fault: Exception | None = None) -> None:
        """The tenant trains no more; its slot keeps what it learned until it is removed.  Raises NotFound.

        fault: what was raised for this tenant alone.
        """
        tenant = self._tenant(name)
        self._mixer.release(name)
        if tenant.status is TenantStatus.RUNNING:
            self._mixer.remove(name)
        tenant.status, tenant.failure, tenant.fault = TenantStatus.FAILED, reason, fault

    def _tenant(self, name: str) -> Tenant:
        if name not in self.tenants:
            raise NotFound(f"no tenant {name} in training", param="name")
        return self.tenants[name]

    @property
    def _taken(self) -> set[int]:
        return {t.slot for t in self.tenants.values()}

    def free_slots(self, spec: LoraSpec) -> int:
        """How many tenants with such adapters may join."""
        return self.seats.count_free(spec, self._taken)

    def check(self, spec: LoraSpec, examples: Sequence[Unit], batch_size: int, loss: Loss) -> Batches:
        """Returns the examples as `add` takes them.  Raises as `add` would, whoever sits here now.  From any thread."""
        self.seats.check(spec)
        if not examples:
            raise DataInvalid("no examples to train on; give at least one")
        return Batches(CheckedExamples(examples, loss.name, fitting_length(self.lengths, examples)), batch_size)

    def set_weight(self, name: str, weight: float) -> None:
        """A running tenant's share of the tokens, from the next step on.  Raises NotFound, InvalidRequest."""
        self._mixer.set_weight(name, weight)

    def set_optimizer(self, name: str, optimizer: Optimizer) -> None:
        """How a running tenant learns from its next step on; its moments and the place in the schedule stay.

        Raises NotFound, StateInvalid when it trains no more, InvalidRequest when it has done so many steps already.
        """
        tenant = self._tenant(name)
        if tenant.status is not TenantStatus.RUNNING:
            raise StateInvalid(f"tenant {name} is {tenant.status} and trains no more; only a running one can change")
        if optimizer.total_steps <= tenant.step:
            raise InvalidRequest(
                f"total_steps must be more than the {tenant.step} steps that tenant {name} has done, "
                f"got {optimizer.total_steps}; remove the tenant to stop it",
                param="total_steps",
            )
        tenant.optimizer = optimizer

    def _at(self, slot: int) -> tuple[int, jax.Array]:
        """Bucket and slot, for the programs."""
        bucket, own = self.seats.place(slot)
        return bucket, self._device(np.array(own, np.int32))  # ty: ignore[invalid-explicit-return]

    def _pools(self) -> tuple[Rows, ...]:
        return tuple(state.pool for state in self.states)

    def fresh(self, spec: LoraSpec, seed: int) -> SlotState:
        """What a new tenant starts with, in NumPy.  From any thread."""
        return self.seat_of(fresh_adapter(self.base.config, spec, seed, self.base_hash))

    def seat_of(self, adapter: AdapterWeights) -> SlotState:
        """What a tenant starts with that goes on from an adapter, in NumPy.  From any thread.

        Raises AdapterInvalid when it does not fit, AdapterNotFinite.
        """
        return fresh_seat(host_rows(self.base.config, self.seats.spec_for(adapter.spec), adapter), self.moments)

    def unseat(self, name: str) -> SlotState:
        """A device copy of all the tenant's state, as it is now."""
        return self._programs.unseat(self.states, *self._at(self._tenant(name).slot))

    def bucket_rows(self) -> list[Rows]:
        """A device copy of one slot of each bucket, whoever has it: what `rows` gives has one of these shapes."""
        first = self._device(np.int32(0))
        return [self._programs.unseat(self.states, b, first).rows for b in range(len(self.states))]

    def rows(self, name: str) -> Rows:
        """A device copy of the tenant's weights and scales."""
        return self.unseat(name).rows

    def adapter(self, name: str) -> AdapterWeights:
        """The tenant's adapter on the host."""
        return adapter_of_rows(self.rows(name), self._tenant(name).spec, self.base_hash)

    # ---- steps ----------------------------------------------------------------------------------------------------

    def step(self) -> list[StepReport]:
        """One optimizer step for every tenant whose batch is complete with it; finishes one that is under way.

        A batch that has no room in a step is accumulated over several; until the last there is no report of it.
        A tenant whose last step this was becomes `done`, one with too many skipped updates in a row `failed`.
        Raises StateInvalid when nobody trains.
        """
        reports = self.advance()
        while self._step is not None:
            reports += self.advance()
        return reports

    def advance(self) -> list[StepReport]:
        """Runs the next part of a step, `part`, and waits for it: the reports of the updates that it made.
        Between two parts everything else may be called.  A tenant's state is always that of its last update; one that
        leaves meanwhile takes no further part.  Raises StateInvalid when nobody trains.
        """
        if self._step is None:
            self._step = self._run_step()
        try:
            self.part = next(self._step)
        except BaseException as end:
            self._forget_step()
            if not isinstance(end, StopIteration):
                raise
        if not self.has_work:  # whoever it was for has left
            self._forget_step()
        reports, self._reports = self._reports, []
        return reports

    def _forget_step(self) -> None:
        self._step, self.part = None, FIRST_PART

    def _run_step(self) -> Generator[str]:
        """One step; yields the name of each part before it runs."""
        mixed = self._mixer.next()
        for name, error in mixed.faults:
            with self._answers(self.tenants[name]):
                raise error
        lanes, owners = [lane for _, lane in mixed.lanes], [self.tenants[name] for name, _ in mixed.lanes]
        due: list[tuple[Tenant, dict[str, float]]] = []
        for tenant in dict.fromkeys(owners):
            own = [lane for lane, owner in zip(lanes, owners, strict=True) if owner is tenant]
            with self._answers(tenant):
                tenant.window.weight += target_count(own) if tenant.per_target else batch_weight(own, tenant.loss)
                if tenant.name in mixed.due:
                    due.append((tenant, tenant.optimizer.row(tenant.step, divisor(tenant.window.weight))))
        draws = [(tenant.stream.seed, tenant.step) for tenant in owners]
        yield from self.evaluator.learn(lanes)
        step = MixedStep(lanes, owners, draws, due)
        yield from self._run_whole(step) if self._parts is None else self._run_parts(self._parts, step)

    @contextlib.contextmanager
    def _answers(self, tenant: Tenant) -> Generator[None]:
        """Inside, the host works for one tenant, which answers for what is raised: it fails, its lanes go nowhere."""
        try:
            yield
        except Exception as error:
            if is_device_loss(error):
                raise
            LOG.error("tenant %s fails", tenant.name, exc_info=error)
            self.fail(tenant.name, f"an internal error ({type(error).__name__})", error)

    def _batch(self, step: MixedStep, some: Sequence[int], lanes: int, length: int) -> TrainBatch:
        """These lanes of a step, all of one length, among so many, in NumPy."""
        rows = [(step.lanes[g], step.owners[g].slot, step.owners[g].loss) for g in some]
        batch = self.evaluator.batch(rows, lanes, length)
        for row, g in enumerate(some):
            put_dropout(batch, row, step.lanes[g], step.owners[g].spec.dropout, *step.draws[g])
        return batch

    def _run_whole(self, step: MixedStep) -> Generator[str]:
        """The step in one program."""
        batch = self._batch(step, range(len(step.lanes)), self.lanes, self.lane_tokens)
        yield "step"
        batch.slot_G[:] = self._slots_of(step.owners, self.lanes)
        due = [(tenant, hyper) for tenant, hyper in step.due if self._trains(tenant)]
        places, updates_due = self.seats.due([t.slot for t, _ in due], [hyper for _, hyper in due])
        placed = place_rows(self.mesh, batch)
        self.states, *news = self._programs.train_step(self.base, self.states, placed, self._device(updates_due))
        sums, updates = jax.device_get(news)
        self._count(step, sums)
        for (tenant, hyper), (bucket, u) in zip(due, places, strict=True):
            with self._answers(tenant):
                self._report(tenant, hyper, updates[bucket], u)

    def _run_parts(self, parts: Microsteps, step: MixedStep) -> Generator[str]:
        """The step in parts: passes of all lanes, each of lanes of one length, then one update after the other."""
        sums, size = idle_sums(self.lanes, self.lane_tokens), parts.sizes.lanes
        for length in self.lengths:
            same = [g for g, lane in enumerate(step.lanes) if len(lane.token_J) == length]
            for start in range(0, len(same), size):
                some = same[start : start + size]
                owners = [step.owners[g] for g in some]
                if any(map(self._trains, owners)):
                    ask = functools.partial(self._slots_of, owners, size)
                    put_sums(sums, some, (yield from parts.gradients(self._batch(step, some, size, length), self, ask)))
        self._count(step, sums)
        for tenant, hyper in step.due:
            if self._trains(tenant):
                yield "update"
            if self._trains(tenant):  # still
                [(bucket, u)], due = self.seats.due([tenant.slot], [hyper])
                self.states, updates = self._programs.apply(self.states, self._device(due))
                with self._answers(tenant):
                    self._report(tenant, hyper, jax.device_get(updates)[bucket], u)

    def _trains(self, tenant: Tenant) -> bool:
        """Whether it still takes part in a step that was mixed with it."""
        return self.tenants.get(tenant.name) is tenant and tenant.status is TenantStatus.RUNNING

    def _slots_of(self, owners: Sequence[Tenant], lanes: int) -> np.ndarray:
        """int32 [lanes]: where the gradients of their lanes go; those of whoever has left go nowhere."""
        slot_G = np.full(lanes, NO_ADAPTER, np.int32)
        slot_G[: len(owners)] = [tenant.slot if self._trains(tenant) else NO_ADAPTER for tenant in owners]
        return slot_G

    def _count(self, step: MixedStep, sums: LaneSums) -> None:
        """Adds what the lanes summed to (NumPy) to their tenants' windows."""
        for tenant in filter(self._trains, dict.fromkeys(step.owners)):
            gs = [g for g, owner in enumerate(step.owners) if owner is tenant]
            with self._answers(tenant):
                hits = np.sum([self.evaluator.hits(step.lanes[g], tenant.loss, sums, g) for g in gs], axis=0)
                tenant.window.add(sums, gs, hits, tokens := real_tokens([step.lanes[g] for g in gs]))
                self.trained_tokens += tokens

    def _report(self, tenant: Tenant, hyper: dict[str, float], update: UpdateReport, u: int) -> None:
        """The tenant's window has become an update."""
        window, tenant.window = tenant.window, Window()
        report = StepReport(
            tenant=tenant.name,
            step=tenant.step + 1,
            loss=window.loss / divisor(window.weight),
            accuracy=float(window.hits / max(window.count, 1)),
            lr=hyper["lr"],
            grad_norm=float(update.norm_U[u]),
            tokens=window.tokens,
            finite=bool(update.finite_U[u]),
            nll=window.nll,
            targets=window.targets,
        )
        tenant.step, self.updates = tenant.step + 1, self.updates + 1
        tenant.losses.append(report.loss)
        tenant.bad_steps = 0 if report.finite else tenant.bad_steps + 1
        if tenant.bad_steps >= MAX_BAD_STEPS:
            self.fail(tenant.name, f"{MAX_BAD_STEPS} updates in a row were not finite")
        elif tenant.step >= tenant.optimizer.total_steps:
            tenant.status = TenantStatus.DONE
            self._mixer.remove(tenant.name)
        self._reports.append(report)

    def evaluate(self, examples: Sequence[Unit], name: str | None) -> Evaluation:
        """Loss and accuracy on these examples under a tenant's present weights, by its loss; or the base's (None).

        Raises DataInvalid for an example too long for a lane or of another kind than the loss takes, NotFound.
        """
        return self.evaluate_all([(examples, name)])[0]

    def evaluate_all(
        self, work: Sequence[tuple[Sequence[Unit], str | None]], *, tuned: bool = True
    ) -> list[Evaluation]:
        """One Evaluation per (examples, tenant or None); all of them share lanes, so eight small sets cost one large one.

        Not tuned: the base in place of the adapters, by the tenants' losses.
        Raises as `evaluate` does, before anything runs.
        """
        return whole(self.evaluation(work, tuned=tuned))

    def evaluation(
        self, work: Sequence[tuple[Sequence[Unit], str | None]], *, tuned: bool = True
    ) -> Generator[str, None, list[Evaluation]]:
        """The same in parts: yields the name of each before it runs, and returns what `evaluate_all` does."""
        asked: list[tuple[Sequence[Unit], int, Loss]] = []
        for examples, name in work:
            tenant = None if name is None else self._tenant(name)
            slot, loss = (NO_ADAPTER, CROSS_ENTROPY) if tenant is None else (tenant.slot, tenant.loss)
            asked.append((examples, slot, loss))
        return (yield from self.evaluator.evaluation(asked, tuned=tuned))

    # ---- evaluations between steps --------------------------------------------------------------------------------

    def hold(self, name: str) -> None:
        """The tenant takes no part in steps until `release`, so its weights stay; its share goes on.  Raises NotFound."""
        self._tenant(name)
        self._mixer.hold(name)

    def release(self, name: str) -> None:
        """The tenant goes on."""
        self._mixer.release(name)

    def held_turn(self) -> list[str]:
        """Names of the held tenants, first come first, if one of them goes before the next step; else none."""
        return self._mixer.held_turn()

    def evaluate_held(self, work: Sequence[HeldLanes]) -> Generator[str, None, Mapping[str, int]]:
        """Evaluates the next lanes of tenants who are held, as many as a step has; returns what each is charged, in tokens.

        What lanes the first does not take go to the next.  Pairs whose references are not known are learned first, in
        place of lanes.  Yields the name of each part before it runs; between two parts a tenant may leave.
        """
        rows: list[tuple[HeldLanes, EvaluatedLane]] = []
        for held in work:
            tenant = self._tenant(held.name)
            last = min(len(held.packed), held.sums.lanes + self.lanes - len(rows))
            with self._answers(tenant):
                for number in range(held.sums.lanes, last):
                    rows.append((held, EvaluatedLane(held.packed.lane(number), tenant.slot, tenant.loss, held.sums)))
        if not rows:
            return {}
        owner = {unit: held.name for held, row in rows for unit in row.lane.units}
        asks = self.evaluator.references.asks([row.lane for _, row in rows])
        if asks:
            yield from self.evaluator.learn_pairs(asks[0])
        else:
            yield from self.evaluator.evaluate([row for _, row in rows])
        spent: Counter[str] = Counter()
        for lane in asks[0] if asks else [row.lane for _, row in rows]:
            spent[owner[lane.units[0]]] += real_tokens([lane])
        self._mixer.charge(spent)
        return spent

    def _device[T](self, tree: T) -> T:
        """NumPy arrays, whole on every device."""
        return place(tree, replicated(self.mesh))
