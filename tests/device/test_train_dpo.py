"""Preference pairs: the loss of a policy model and a reference model computed apart, learning, resuming, the reference."""

import math

import jax
import numpy as np
import pytest
from train_world import CONFIG, LANES, assert_same_bits, host, lora, make_trainer, optimizer, pairs, plain_loss

from jaxlora.config.training import Loss
from train.data.examples import Pair

BETA = 0.5


def join(trainer, data, name="a", *, batch_size=3, seed=0, resume=None, **settings):
    loss = Loss(name="dpo", beta=BETA)
    changes = optimizer(**{"lr": 0.02, "clip": None} | settings)
    return trainer.add(name, lora(4), changes, data, batch_size=batch_size, seed=seed, loss=loss, resume=resume)


@jax.jit
def plain(weights, scale, tokens, token_weights):
    return jax.value_and_grad(plain_loss)(weights, scale, tokens, token_weights)


def two_models(adapter, data):
    """(mean loss, norm of its gradient, margins) from the merged policy and the bare base, each run by itself."""
    weights = dict(adapter.weights)
    scale = {
        t: np.float32([adapter.spec.scale(t, i) for i in range(1 if t == "lm_head" else CONFIG.layers)])
        for t in weights
    }
    total, gradient, margins = 0.0, None, []
    for pair in data:
        policy = [plain(weights, scale, e.tokens, e.weights) for e in pair.segments]
        base = [float(plain({}, {}, e.tokens, e.weights)[0]) for e in pair.segments]
        margin = (base[0] - float(policy[0][0])) - (base[1] - float(policy[1][0]))
        total += math.log(1 + math.exp(-BETA * margin))
        slope = BETA / (1 + math.exp(BETA * margin)) / len(data)
        part = jax.tree.map(lambda c, r, s=slope: s * (np.float64(c) - np.float64(r)), policy[0][1], policy[1][1])
        gradient = part if gradient is None else jax.tree.map(np.add, gradient, part)
        margins.append(margin)
    norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradient)))
    return total / len(data), norm, np.array(margins)


@pytest.mark.slow
def test_loss_gradient_and_accuracy_are_those_of_two_models():
    """At the start, where every margin is 0, and when the policy has moved.

    Margins are differences of sums near 30 in float32, so 1e-5 of them is left after rounding.
    """
    trainer, data = make_trainer(), pairs(3, 3)
    join(trainer, data)
    for _ in range(6):
        loss, norm, margins = two_models(trainer.adapter("a"), data)
        evaluation = trainer.evaluate(data, "a")
        (report,) = trainer.step()
        assert report.loss == pytest.approx(loss, rel=3e-5)
        assert report.grad_norm == pytest.approx(norm, rel=3e-5)
        assert evaluation.nll == pytest.approx(report.loss, rel=1e-5)
        if report.step == 1:
            assert loss == pytest.approx(math.log(2), abs=1e-5)
        else:
            assert np.abs(margins).min() > 1e-3
            assert report.accuracy == evaluation.accuracy == (margins > 0).mean()
    assert report.tokens == sum(p.predictions for p in data)
    assert evaluation.tokens == sum(int(e.weights.sum()) for p in data for e in p.segments)


def test_training_prefers_the_chosen_answers():
    trainer, data = make_trainer(), pairs(4, 6)
    join(trainer, data, batch_size=6, total_steps=20)
    while trainer.has_work:
        trainer.step()
    (after,), (base,) = (trainer.evaluate_all([(data, "a")], tuned=tuned) for tuned in (True, False))
    assert (base.nll, base.accuracy, base.tokens) == (math.log(2), 0, after.tokens)
    assert after.accuracy == 1
    assert after.nll < 0.1
    swapped = [Pair(p.rejected, p.chosen) for p in data]
    other_way = trainer.evaluate(swapped, "a")
    assert other_way.accuracy == 0
    assert other_way.nll > 1


def references(trainer, data):
    return [trainer.evaluator.references._known[p].tobytes() for p in data]


def test_the_reference_of_a_pair_depends_on_nothing_but_the_pair():
    """Alone, in another lane, beside others and after training: the same bits, so that a resumed run finds them again."""
    data = pairs(5, LANES + 3)
    whole = make_trainer()
    join(whole, data, batch_size=8)
    whole.step()
    whole.evaluate(data, "a")
    for place in (0, 4, LANES + 1):
        one = make_trainer()
        join(one, data[place : place + 1], batch_size=1)
        one.step()
        assert references(one, data[place : place + 1]) == references(whole, data[place : place + 1])


def test_the_base_is_asked_once_for_a_pair():
    trainer, data = make_trainer(), pairs(6, LANES + 1)
    asked, evaluate = [], trainer.evaluator._evaluate
    trainer.evaluator._evaluate = lambda *a: asked.append(1) or evaluate(*a)
    join(trainer, data, batch_size=3)
    for _ in range(2 * len(data)):
        trainer.step()
    assert 0 < len(asked) <= math.ceil(len(data) / 3)
    assert len(trainer.evaluator.references._known) == len(data)
    trainer.remove("a")
    del data
    assert not trainer.evaluator.references._known  # nobody has these pairs any more


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_resumed_run_is_the_uninterrupted_run(stop_after):
    """In another slot, beside others, with nothing kept of the references."""
    data = pairs(7, 5)
    whole = make_trainer()
    join(whole, data, total_steps=5)
    expected = [r for _ in range(5) for r in whole.step()]
    first = make_trainer()
    tenant = join(first, data, total_steps=5)
    got = [r for _ in range(stop_after) for r in first.step()]
    resume = (host(first.unseat("a")), tenant.step, tenant.stream.cursor)
    second = make_trainer()
    join(second, pairs(8, 4), "other")
    join(second, pairs(7, 5), resume=resume, total_steps=5)
    while len(got) < 5:
        got += [r for r in second.step() if r.tenant == "a"]
    assert got == expected
    assert_same_bits(host(second.unseat("a")), host(whole.unseat("a")))
