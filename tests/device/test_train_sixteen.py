"""Sixteen tenants that differ in everything, over three buckets: each trains as if alone, bit for bit, in one compiled step.

Ranks (also by module), alpha, rsLoRA, targets, dropout, losses and their numbers, schedules, warm-up, clip, decay, betas,
eps, LoRA+, batch sizes, lengths, seeds.
"""

import dataclasses

import jax
import numpy as np
import pytest
from train_world import (
    BASE_HASH,
    LANE_TOKENS,
    assert_same_bits,
    examples,
    host,
    optimizer,
    pairs,
    rollouts,
    small_base,
)

from jaxlora.config.training import CROSS_ENTROPY, LOSSES, Loss, Optimizer
from jaxlora.core.lora import ALL_TARGETS, ATTENTION_TARGETS, LAYER_TARGETS, MLP_TARGETS, LoraSpec, ModuleException
from jaxlora.model.compile_cache import CompileCounter
from jaxlora.model.lora_pool import PoolSpec
from jaxlora.model.mesh import make_mesh
from train.trainer import Trainer

pytestmark = pytest.mark.slow  # by default: isolation in one bucket, the mix of losses, and buckets each have tests

STEPS = 4
BUCKETS = {2: 5, 4: 5, 8: 6}  # slots by rank: full with the sixteen
LANES = 24


@dataclasses.dataclass(frozen=True)
class Asked:
    """What one tenant asks for."""

    spec: LoraSpec
    optimizer: Optimizer
    batch: int
    loss: Loss = CROSS_ENTROPY
    longest: int = 10


def spec(rank, alpha, targets=ALL_TARGETS, **changes):
    return LoraSpec(rank=rank, alpha=alpha, targets=targets, **changes)


MIXED_RANKS = (
    ModuleException(target="up_proj", layer=0, rank=7, alpha=3.0),
    ModuleException(target="k_proj", layer=1, rank=0, alpha=1.0),
)
TENANTS = {
    "r1": Asked(spec(1, 1.0), optimizer(lr=0.05, schedule="linear", total_steps=STEPS, weight_decay=0.5), 1),
    "r2": Asked(spec(2, 5.0, ATTENTION_TARGETS), optimizer(lr=0.002, b1=0.5, b2=0.9), 2, longest=6),
    "head": Asked(spec(1, 3.0, ("lm_head",), rslora=True), optimizer(lr=0.1, weight_decay=0.2, loraplus_ratio=4.0), 3),
    "dpo2": Asked(spec(2, 4.0, dropout=0.3), optimizer(lr=0.02, clip=0.1), 2, Loss(name="dpo", beta=0.3)),
    "still": Asked(spec(2, 2.0, MLP_TARGETS), optimizer(lr=0.0, weight_decay=1.0), 1, longest=14),
    "r3": Asked(spec(3, 6.0, ("q_proj", "lm_head")), optimizer(lr=0.1, weight_decay=0.1, clip=None), 2),
    "r4": Asked(spec(4, 4.0), optimizer(lr=0.02, schedule="cosine", warmup_steps=2, total_steps=6, eps=1e-3), 3),
    "is": Asked(spec(4, -8.0, dropout=0.5), optimizer(lr=0.01, weight_decay=0.3), 2, Loss(name="importance_sampling")),
    "ppo": Asked(
        spec(3, 9.0, rslora=True), optimizer(lr=0.03, clip=1e-3), 3, Loss(name="ppo", clip_low=0.2, clip_high=9.0)
    ),
    "dro": Asked(spec(4, 1.0, LAYER_TARGETS), optimizer(lr=0.2, b1=0.0, b2=0.5), 1, Loss(name="dro", beta=0.4)),
    "wide": Asked(spec(8, 16.0, dropout=0.1), optimizer(lr=0.01, clip=1e-3, loraplus_ratio=16.0), 6, longest=12),
    "long": Asked(spec(6, 12.0), optimizer(lr=0.3, clip=100.0, warmup_steps=3), 2, longest=33),
    "mixed": Asked(spec(5, 7.0, exceptions=MIXED_RANKS), optimizer(lr=0.02, weight_decay=0.4), 2),
    "cispo": Asked(spec(7, 7.0), optimizer(lr=0.02, schedule="linear", total_steps=9), 2, Loss(name="cispo")),
    "gspo": Asked(
        spec(8, 32.0, LAYER_TARGETS), optimizer(lr=0.02, weight_decay=0.1), 4, Loss(name="gspo", clip_low=0.1)
    ),
    "dpo5": Asked(spec(5, 5.0, ("v_proj", "down_proj")), optimizer(lr=0.05, eps=0.1), 1, Loss(name="dpo")),
}


def make_trainer():
    buckets = [
        PoolSpec(slots=slots, rank=rank, dtype="float32", targets=ALL_TARGETS) for rank, slots in BUCKETS.items()
    ]
    return Trainer(small_base(), make_mesh(), buckets, lanes=LANES, lane_tokens=LANE_TOKENS, base_hash=BASE_HASH)


def data_of(name, heldout=False):
    asked, seed = TENANTS[name], list(TENANTS).index(name) + 100 * heldout
    made = {"cross_entropy": examples, "dpo": pairs}.get(asked.loss.name, rollouts)
    return made(seed, 7, longest=asked.longest)


def join(trainer, name, data=None, resume=None):
    asked, data = TENANTS[name], data_of(name) if data is None else data
    seed = 1 + 37 * list(TENANTS).index(name)
    how = {"batch_size": asked.batch, "seed": seed, "loss": asked.loss, "resume": resume}
    return trainer.add(name, asked.spec, asked.optimizer, data, **how)


def outcome(trainer, name):
    return host(trainer.unseat(name))


def by_tenant(reports):
    """The reports of each tenant, in order."""
    return {name: [r for r in reports if r.tenant == name] for name in TENANTS}


@dataclasses.dataclass(frozen=True)
class Alone:
    """One tenant's training in a trainer of its own."""

    states: list  # at the start and after each step
    reports: list
    evaluation: object

    @property
    def last(self):
        return self.states[-1]


@pytest.fixture(scope="module")
def alone():
    found = {}
    for name in TENANTS:
        trainer, reports = make_trainer(), []
        join(trainer, name)
        states = [outcome(trainer, name)]
        for _ in range(STEPS):
            reports += trainer.step()
            states.append(outcome(trainer, name))
        found[name] = Alone(states, reports, trainer.evaluate(data_of(name, heldout=True), name))
    return found


def test_the_sixteen_differ_and_learn(alone):
    """What the tests below compare is not the start, and no two are the same."""
    assert len(TENANTS) == sum(BUCKETS.values()) == 16
    assert {asked.loss.name for asked in TENANTS.values()} == set(LOSSES)
    for name, of in alone.items():
        assert [r.step for r in of.reports] == list(range(1, STEPS + 1))
        assert all(r.finite and np.isfinite(r.loss) and r.grad_norm > 0 for r in of.reports)
        first, last = ([x.tobytes() for x in jax.tree.leaves(of.states[i].rows)] for i in (0, -1))
        assert (first != last) == (name != "still")
        assert of.last.moments.count == STEPS
    assert len({tuple(r.loss for r in of.reports) for of in alone.values()}) == 16


@pytest.mark.parametrize("order", ["as listed", "reversed"])
def test_together_each_is_as_alone_and_nothing_compiles(alone, order):
    trainer, reports = make_trainer(), []
    trainer.warm_up()
    with CompileCounter() as counter:
        for name in TENANTS if order == "as listed" else reversed(TENANTS):
            join(trainer, name)
        for _ in range(STEPS):
            step = trainer.step()
            assert {r.tenant for r in step} == set(TENANTS)  # all in one program
            reports += step
        found = trainer.evaluate_all([(data_of(name, heldout=True), name) for name in TENANTS])
    assert not counter.retraced, counter
    for (name, of), evaluation in zip(alone.items(), found, strict=True):
        assert_same_bits(outcome(trainer, name), of.last)
        assert by_tenant(reports)[name] == of.reports
        assert evaluation == of.evaluation


# what a step touches


def slots(trainer):
    """(bucket, slot) → weights, scales, open gradients, moments and count of every slot of a trainer, taken or not."""
    return {
        (b, s): jax.tree.map(lambda x, s=s: np.array(x[:, s] if x.ndim > 1 else x[s]), state)
        for b, state in enumerate(host(trainer.states))
        for s in range(state.moments.count.shape[0])
    }


@pytest.mark.fault("N1")
def test_one_tenants_step_leaves_the_base_and_all_others_as_they_were(alone):
    """All sit there, with moments and decay on; each in turn takes a step on its own."""
    trainer = make_trainer()
    base = host(trainer.base)
    for name in TENANTS:
        join(trainer, name)
    for _ in range(STEPS - 1):
        trainer.step()
    cursors = {name: tenant.stream.cursor for name, tenant in trainer.tenants.items()}
    for name in TENANTS:
        trainer.fail(name, "not its turn")
    for name in TENANTS:
        state, slot = outcome(trainer, name), trainer.tenants[name].slot
        trainer.remove(name)
        assert join(trainer, name, resume=(state, STEPS - 1, cursors[name])).slot == slot
        before = slots(trainer)
        assert trainer.step() == alone[name].reports[-1:]
        own = trainer.seats.place(slot)
        for place, after in slots(trainer).items():
            if place != own:
                assert_same_bits(after, before[place])
        assert_same_bits(outcome(trainer, name), alone[name].last)
        if trainer.has_work:
            trainer.fail(name, "not its turn")
    assert_same_bits(host(trainer.base), base)


def ranks(name):
    """(target, layer) → rank, 0 where the tenant adapts nothing, for every module of the pool."""
    asked, layers = TENANTS[name].spec, small_base().config.layers
    modules = [(t, layer) for t in ALL_TARGETS for layer in range(1 if t == "lm_head" else layers)]
    return {(t, layer): asked.module(t, layer)[0] if t in asked.targets else 0 for t, layer in modules}


@pytest.mark.fault("N4")
@pytest.mark.parametrize("name", TENANTS)
def test_every_targeted_module_has_a_gradient_and_nothing_else_moves(alone, name):
    """B from the first step, A from the second, since B starts at zero (and stays so without a learning rate).

    Past a module's rank weights and moments stay exactly +0.
    """
    start, first, second = alone[name].states[:3]
    last, learns = alone[name].last, TENANTS[name].optimizer.lr > 0
    for (target, layer), rank in ranks(name).items():

        def of(halves, target=target, layer=layer):
            return [x[layer] for x in halves[target]]

        def weights(state, target=target, layer=layer):
            return [x[layer] for x in (state.rows[target].a_LSRX, state.rows[target].b_LSRY)]

        (a0, b0), (a1, b1), (a2, b2) = (of(s.moments.mu) for s in (start, first, second))
        assert not a0.any()
        assert not b0.any()
        assert not a1.any()
        assert all(b1[:rank].any(1))
        assert all(a2[:rank].any(1)) == (learns or rank == 0)
        assert all(b2[:rank].any(1))
        for before, after in zip(weights(start), weights(last), strict=True):
            assert all((before != after)[:rank].any(1)) == (learns or rank == 0)
        for x in (*weights(last), *of(last.moments.mu), *of(last.moments.nu)):
            assert x[rank:].tobytes() == bytes(x[rank:].nbytes)


# neighbours that go wrong


def sick_data(name, field):
    """The tenant's data with NaN in each example, after their checks, as a bug would."""
    data = data_of(name)
    for example in data:
        (example.weights if field == "weights" else getattr(example.rollout, field))[-1] = np.nan
    return data


def sick_state(state, half):
    """A state with a NaN in one weight of one half of v_proj."""
    rows = state.rows["v_proj"]
    key = "a_LSRX" if half == "a" else "b_LSRY"
    spoiled = getattr(rows, key).copy()
    spoiled[-1, 0, 0] = np.nan
    return dataclasses.replace(state, rows=state.rows | {"v_proj": dataclasses.replace(rows, **{key: spoiled})})


@pytest.mark.parametrize(
    ("sick", "where"),
    [
        ("r2", "weights"),
        ("wide", "weights"),
        ("dpo5", "adapter a"),
        ("r4", "adapter b"),
        ("ppo", "advantages"),
        ("gspo", "logprobs"),
    ],
)
def test_a_neighbour_with_nan_changes_nobody_and_moves_nowhere(alone, sick, where):
    trainer, reports = make_trainer(), []
    for name in TENANTS:
        if name != sick:
            join(trainer, name)
        elif where.startswith("adapter"):
            join(trainer, name, resume=(sick_state(alone[name].states[0], where[-1]), 0, 0))
        else:
            join(trainer, name, sick_data(name, where))
    start = outcome(trainer, sick)
    for _ in range(STEPS):
        reports += trainer.step()
    reports = by_tenant(reports)
    assert [(r.finite, np.isfinite(r.grad_norm)) for r in reports[sick]] == [(False, False)] * STEPS
    assert_same_bits(outcome(trainer, sick), start)
    for name in set(TENANTS) - {sick}:
        assert_same_bits(outcome(trainer, name), alone[name].last)
        assert reports[name] == alone[name].reports
