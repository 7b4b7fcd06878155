"""Nothing of one tenant's training touches another's, bit for bit, whoever joins, waits, fails or overflows beside it.

All differences at once, and all losses: test_train_sixteen.
"""

import dataclasses

import jax
import numpy as np
import pytest
from train_world import LANES, assert_same_bits, examples, host, lora, make_trainer, optimizer

from jaxlora.model.compile_cache import CompileCounter
from train.trainer import MAX_BAD_STEPS

STEPS = 5
# name → (rank, targets or all, batch size, optimizer settings); `wide` and `long` need two of the ten lanes.
TENANTS = {
    "r1": (1, None, 1, {"lr": 0.05, "schedule": "linear", "total_steps": STEPS, "weight_decay": 0.5}),
    "r2": (2, None, 2, {"lr": 0.002, "b1": 0.5, "b2": 0.9}),
    "r4": (4, None, 3, {"lr": 0.02, "schedule": "cosine", "warmup_steps": 2, "total_steps": 6, "eps": 1e-3}),
    "wide": (8, None, 6, {"lr": 0.01, "clip": 1e-3}),
    "r3": (3, ("q_proj", "lm_head"), 2, {"lr": 0.1, "weight_decay": 0.1, "clip": None}),
    "r5": (5, ("up_proj", "down_proj"), 1, {"lr": 0.03, "b1": 0.0, "b2": 0.0}),
    "long": (6, None, 5, {"lr": 0.3, "clip": 100.0}),
    "still": (7, None, 2, {"lr": 0.0, "weight_decay": 1.0}),
}


def data_of(name):
    seed = list(TENANTS).index(name)
    return examples(seed, 7, longest=12 if name in ("wide", "long") else 9)


def join(trainer, name, data=None):
    rank, targets, batch_size, settings = TENANTS[name]
    spec = lora(rank) if targets is None else lora(rank, targets)
    seed = list(TENANTS).index(name)
    data = data_of(name) if data is None else data
    return trainer.add(name, spec, optimizer(**settings), data, batch_size=batch_size, seed=seed)


def fill_noise(trainer, slot, value=None):
    """Every array of this slot, gradients too, full of noise, or of one value; its count is 7.  Nobody sits there."""
    rng = np.random.default_rng(slot)

    def put(x):
        if x.ndim == 1:
            return x.at[slot].set(7)
        part = x[:, slot]
        noise = rng.normal(size=part.shape) if value is None else np.full(part.shape, value)
        return x.at[:, slot].set(noise.astype(np.float32))

    trainer.states = (jax.tree.map(put, trainer.states[0]),)


def whole_slot(trainer, slot):
    """Weights, moments, count and open gradients of a slot."""
    return host(jax.tree.map(lambda x: x[:, slot] if x.ndim > 1 else x[slot], trainer.states[0]))


def outcome(trainer, name):
    return host(trainer.unseat(name))


@pytest.fixture(scope="module")
def alone():
    """Every tenant's final state and reports, each trained in a trainer of its own."""
    results = {}
    for name in TENANTS:
        trainer = make_trainer()
        join(trainer, name)
        reports = [trainer.step() for _ in range(STEPS)]
        results[name] = outcome(trainer, name), [r for step in reports for r in step]
    return results


def test_other_slots_other_order_and_turns_change_nothing(alone):
    """The same tenants joined in reverse, late and with one leaving between: fewer lanes for each, the same numbers."""
    trainer = make_trainer()
    trainer.add("first", lora(8), optimizer(lr=1.0), examples(50, 9, 33, 20), batch_size=5, seed=9)  # 5 lanes
    trainer.step()
    for name in reversed(TENANTS):
        join(trainer, name)
    steps = dict.fromkeys(TENANTS, 0)
    rounds = 0
    while steps:
        due = {r.tenant for r in trainer.step()}
        for name in due & set(steps):
            steps[name] += 1
            if steps[name] == STEPS:
                assert_same_bits(outcome(trainer, name), alone[name][0])
                trainer.remove(name)
                del steps[name]
        rounds += 1
        assert rounds < 10 * STEPS
    assert rounds > STEPS  # they took turns


# a slot that is not in the batch


@pytest.mark.fault("N1")
@pytest.mark.parametrize("value", [None, np.nan, -0.0], ids=["noise", "nan", "minus zero"])
def test_a_slot_that_is_not_in_the_batch_comes_back_bit_for_bit(alone, value):
    """Slot 0, which safe indices of idle lanes also point to, and the last slot, which index -1 would reach."""
    trainer = make_trainer()
    trainer.add("holder", lora(1), optimizer(), examples(0, 1), batch_size=1, seed=0)
    join(trainer, "r1")  # weight decay 0.5
    trainer.remove("holder")
    for slot in (0, 8):
        fill_noise(trainer, slot, value)
    before = [whole_slot(trainer, s) for s in range(9)]
    for _ in range(STEPS):
        trainer.step()
    for slot in range(9):
        if slot != 1:
            assert_same_bits(whole_slot(trainer, slot), before[slot])
    assert_same_bits(outcome(trainer, "r1"), alone["r1"][0])


def test_a_tenant_that_waits_its_turn_comes_back_bit_for_bit():
    """Two tenants of six lanes each never fit one step: one moves, the other does not."""
    trainer = make_trainer()
    for i, name in enumerate("ab"):
        trainer.add(name, lora(4), optimizer(weight_decay=0.5), examples(i, 8, 33, 20), batch_size=6, seed=i)
    for _ in range(4):
        before = {name: whole_slot(trainer, t.slot) for name, t in trainer.tenants.items()}
        (report,) = trainer.step()
        (other,) = {"a", "b"} - {report.tenant}
        assert_same_bits(whole_slot(trainer, trainer.tenants[other].slot), before[other])


# NaN


def nan_data(name):
    data = data_of(name)
    for example in data:
        example.weights[-1] = np.nan  # after the checks of Example, as a bug would
    return data


def poison_adapter(trainer, name, half):
    """A NaN in one weight of the tenant."""
    slot = trainer.tenants[name].slot
    rows = trainer.states[0].pool["v_proj"]
    key = "a_LSRX" if half == "a" else "b_LSRY"
    changed = dataclasses.replace(rows, **{key: getattr(rows, key).at[0, slot, 0, 0].set(np.nan)})
    (state,) = trainer.states
    trainer.states = (dataclasses.replace(state, pool=state.pool | {"v_proj": changed}),)


def poison_gradient(trainer, name):
    """An infinity in the tenant's open gradients: as if one micro-batch had overflowed."""
    slot = trainer.tenants[name].slot
    (state,) = trainer.states
    a, b = state.grads["v_proj"]
    grads = state.grads | {"v_proj": (a, b.at[1, slot, 0, 0].set(np.inf))}
    trainer.states = (dataclasses.replace(state, grads=grads),)


@pytest.mark.fault("A3")
@pytest.mark.parametrize("sick", ["r4", "wide"])
@pytest.mark.parametrize("how", ["data", "adapter a", "adapter b"])
def test_a_tenant_with_nan_changes_nobody_and_stops(alone, how, sick):
    trainer = make_trainer()
    for name in TENANTS:
        join(trainer, name, nan_data(name) if name == sick and how == "data" else None)
    if how != "data":
        poison_adapter(trainer, sick, how[-1])
    start = outcome(trainer, sick)
    for n in range(1, STEPS + 1):
        (report,) = (r for r in trainer.step() if r.tenant == sick)
        assert not report.finite
        assert not np.isfinite(report.loss)
        assert report.step == n
    assert_same_bits(outcome(trainer, sick), start)  # weights, moments and count
    assert trainer.tenants[sick].status == "failed"
    for name in set(TENANTS) - {sick}:
        assert_same_bits(outcome(trainer, name), alone[name][0])
    assert {r.tenant for r in trainer.step()} == set(TENANTS) - {sick, "r1"}  # r1 is done; the failed one is out
    assert_same_bits(outcome(trainer, sick), start)


def test_it_fails_at_the_limit_and_not_before():
    trainer = make_trainer()
    join(trainer, "r2", nan_data("r2"))
    for n in range(1, MAX_BAD_STEPS + 1):
        assert trainer.tenants["r2"].status == "running"
        trainer.step()
        assert trainer.tenants["r2"].bad_steps == n
    assert trainer.tenants["r2"].status == "failed"
    assert not trainer.has_work


def test_a_poisoned_gradient_costs_one_update(alone):
    """Its window is dropped with the update, so the tenant goes on; nobody else notices."""
    trainer = make_trainer()
    for name in TENANTS:
        join(trainer, name)
    poison_gradient(trainer, "r4")
    start = outcome(trainer, "r4")
    reports = [next(r for r in trainer.step() if r.tenant == "r4")]
    assert_same_bits(outcome(trainer, "r4"), start)
    for _ in range(STEPS - 1):
        reports += [r for r in trainer.step() if r.tenant == "r4"]
    assert [r.finite for r in reports] == [False] + [True] * (STEPS - 1)
    assert trainer.tenants["r4"].status == "running"
    assert trainer.tenants["r4"].bad_steps == 0
    for name in set(TENANTS) - {"r4"}:
        assert_same_bits(outcome(trainer, name), alone[name][0])


def test_a_huge_gradient_clips_only_its_owner(alone):
    """One global norm over tenants would shrink everybody."""
    trainer = make_trainer()
    for name in TENANTS:
        data = data_of(name)
        if name == "r2":
            for example in data:
                example.weights[-1] = 1e9
                example.weights[1:-1] = -1e3
        join(trainer, name, data)
    for _ in range(STEPS):
        trainer.step()
    for name in set(TENANTS) - {"r2"}:
        assert_same_bits(outcome(trainer, name), alone[name][0])


# compiles


def test_joining_leaving_and_every_setting_compile_and_trace_nothing():
    trainer = make_trainer()
    trainer.warm_up()
    settings = [
        {"lr": 0.5},
        {"schedule": "linear", "total_steps": 3},
        {"schedule": "cosine", "warmup_steps": 1},
        {"weight_decay": 0.3},
        {"b1": 0.3},
        {"b2": 0.5},
        {"eps": 0.1},
        {"clip": None},
        {"clip": 0.5},
    ]
    with CompileCounter() as counter:
        for i, changes in enumerate(settings):
            targets = ("q_proj",) if i % 2 else ("q_proj", "lm_head")
            data = examples(i, 3 + i)
            trainer.add(f"t{i}", lora(1 + i % 8, targets), optimizer(**changes), data, batch_size=1 + i % 3, seed=i)
            trainer.step()
            if i % 3 == 2:
                state = host(trainer.unseat(f"t{i}"))
                trainer.evaluate(data, f"t{i}")
                trainer.evaluate(data[:1], None)
                trainer.remove(f"t{i}")
                resume = (state, 1, 3)
                trainer.add(f"t{i}", lora(1 + i % 8, targets), optimizer(), data, batch_size=2, seed=i, resume=resume)
        for _ in range(4):
            trainer.step()
    assert not counter.retraced, counter
    assert len(trainer.tenants) == len(settings) < LANES
