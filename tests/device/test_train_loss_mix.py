"""Tenants of every loss in one compiled step: no choice of a loss compiles anything, and data of another kind is refused."""

import dataclasses

import numpy as np
import pytest
from train_world import assert_same_bits, examples, host, lora, make_trainer, optimizer, pairs, rollouts

from jaxlora.config.training import LOSSES, Loss
from jaxlora.core.errors import DataInvalid
from jaxlora.model.compile_cache import CompileCounter

STEPS = 3
KNOBS = {
    "dpo": {"beta": 0.3},
    "ppo": {"clip_low": 0.5, "clip_high": 1.1},
    "dro": {"beta": 0.4},
    "cispo": {"clip_high": 2},
}


def data_of(name, seed=None):
    seed = list(LOSSES).index(name) if seed is None else seed
    return {"cross_entropy": examples, "dpo": pairs}.get(name, rollouts)(seed, 4)


def join(trainer, name, data=None, key=None, **knobs):
    loss = Loss(name=name, **(knobs or KNOBS.get(name, {})))
    data = data_of(name) if data is None else data
    settings = optimizer(lr=0.02, weight_decay=0.1, clip=0.5)
    return trainer.add(key or name, lora(4), settings, data, batch_size=2, seed=1, loss=loss)


def train(trainer, steps=STEPS):
    return [r for _ in range(steps) for r in trainer.step()]


def outcome(trainer, name):
    return host(trainer.unseat(name))


@pytest.fixture(scope="module")
def alone():
    """Every loss's final state and reports, each trained in a trainer of its own."""
    results = {}
    for name in LOSSES:
        trainer = make_trainer()
        join(trainer, name)
        reports = train(trainer)
        results[name] = outcome(trainer, name), reports
    return results


def test_nan_in_a_reference_stays_with_its_tenant(alone):
    trainer, data = make_trainer(), data_of("dpo")
    for name in LOSSES:
        join(trainer, name, data if name == "dpo" else None)
    trainer.step()
    trainer.evaluate(data, "dpo")
    for reference in trainer.evaluator.references._known.values():
        reference[:] = np.nan
    assert not any(r.finite for r in train(trainer, STEPS - 1) if r.tenant == "dpo")
    for name in set(LOSSES) - {"dpo"}:
        assert_same_bits(outcome(trainer, name), alone[name][0])


def test_no_loss_and_no_number_of_one_compiles_anything():
    trainer = make_trainer()
    trainer.warm_up()
    with CompileCounter() as counter:
        for i, name in enumerate(LOSSES):
            join(trainer, name)
            join(trainer, name, data_of(name, 20 + i), key="other", **dict.fromkeys(LOSSES[name], 1.5))
            trainer.step()
            trainer.evaluate_all([(data_of(name, 40), name)], tuned=i % 2 == 0)
            trainer.remove("other")
    assert not counter.retraced, counter


@pytest.mark.parametrize("name", LOSSES)
def test_data_of_another_kind_is_refused_and_leaves_no_trace(name):
    trainer = make_trainer()
    join(trainer, "cross_entropy", key="first")
    for other in {"cross_entropy", "dpo", "ppo"} - {name}:
        if data_of(other)[0].__class__ is not data_of(name)[0].__class__ or "cross_entropy" in (name, other):
            with pytest.raises(DataInvalid, match=f"loss {name} trains on"):
                join(trainer, name, [*data_of(name), *data_of(other)])
    assert list(trainer.tenants) == ["first"]
    with pytest.raises(DataInvalid, match="loss cross_entropy trains on"):
        trainer.evaluate(pairs(0, 1), None)


def test_numbers_of_a_loss_matter(alone):
    """Each of them, for each loss that has it."""
    for name, defaults in LOSSES.items():
        for knob in defaults:
            given = {k: KNOBS.get(name, {}).get(k, v) for k, v in defaults.items()}
            trainer = make_trainer()
            join(trainer, name, **(given | {knob: given[knob] + 0.3}))
            changed = [dataclasses.astuple(r) for r in train(trainer)]
            assert changed != [dataclasses.astuple(r) for r in alone[name][1]], (name, knob)
