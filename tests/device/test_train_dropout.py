"""LoRA dropout: what is dropped, that it is each tenant's own, and that nobody else notices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_world import (
    CONFIG,
    assert_same_bits,
    examples,
    host,
    lora,
    make_trainer,
    optimizer,
    strong_rows,
)

from jaxlora.core.errors import AdapterInvalid
from jaxlora.model.compile_cache import CompileCounter
from jaxlora.model.lora_pool import DropoutLora, LaneLora

G, J = 3, 40


def lanes(rates, draws=((1, 2, 3), (4, 5, 6), (7, 8, 9))):
    """(DropoutLora, LaneLora) of three lanes with strong adapters, and x [T, X]."""
    rows = [strong_rows(lora(4), seed) for seed in range(G)]
    stacked = jax.tree.map(lambda *r: jnp.stack(r, 1), *rows)
    plain = LaneLora(stacked)
    noisy = DropoutLora(
        plain, jnp.arange(CONFIG.layers), jnp.asarray(rates, jnp.float32), jnp.asarray(draws, jnp.int32)
    )
    x_TX = jnp.asarray(np.random.default_rng(0).normal(size=(G * J, CONFIG.d_model)), jnp.float32)
    return noisy, plain, x_TX


def deltas(lora, layer, targets, x_TX):
    part = jax.tree.map(lambda p: p[layer], lora.per_layer)
    return jax.jit(lambda part, x: lora.deltas(part, targets, x))(part, x_TX)


def test_what_is_kept_is_scaled_up_and_shared_by_targets_that_share_their_input():
    noisy, _, x_TX = lanes([0.25, 0.5, 0.75])
    dropped = np.asarray(noisy._dropped(noisy.per_layer[0][1], 0, jnp.ones_like(x_TX))).reshape(G, -1)
    for g, rate in enumerate([0.25, 0.5, 0.75]):
        assert set(np.unique(dropped[g])) == {0.0, np.float32(1 / (1 - rate))}
        assert (dropped[g] == 0).mean() == pytest.approx(rate, abs=0.03)
    got = deltas(noisy, 1, ("q_proj", "v_proj"), x_TX)
    by_hand = x_TX * dropped.reshape(x_TX.shape)
    want = deltas(lanes([0, 0, 0])[1], 1, ("q_proj", "v_proj"), by_hand)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())


def test_layers_inputs_steps_and_lanes_drop_different_places_and_the_same_numbers_the_same():
    def kept(layer=0, target=0, draw=(1, 2, 3)):
        noisy, _, x_TX = lanes([0.5] * G, (draw,) * G)
        return np.asarray(noisy._dropped(noisy.per_layer[0][layer], target, jnp.ones_like(x_TX))).reshape(G, -1)

    first = kept()
    assert np.array_equal(first[0], first[1])  # the same numbers in another lane
    assert np.array_equal(first, kept())
    for other in (kept(layer=1), kept(target=3), kept(draw=(2, 2, 3)), kept(draw=(1, 3, 3)), kept(draw=(1, 2, 4))):
        assert 0.4 < (other[0] == first[0]).mean() < 0.6


def test_the_numbers_are_folded_in_one_by_one():
    """A run that goes on from a checkpoint of an older version draws what it would have drawn."""
    noisy, _, x_TX = lanes([0.5] * G)
    key = jax.random.key(0)
    for number in (4, 5, 6, 1, 3):  # of the second lane, the layer, the target
        key = jax.random.fold_in(key, number)
    kept_JX = jax.random.uniform(key, (J, x_TX.shape[1])) >= 0.5
    got = np.asarray(noisy._dropped(noisy.per_layer[0][1], 3, jnp.ones_like(x_TX))).reshape(G, J, -1)[1]
    np.testing.assert_array_equal(got, np.where(kept_JX, 2.0, 0.0))


def test_a_lane_that_drops_nothing_keeps_its_bits_beside_lanes_that_do():
    noisy, plain, x_TX = lanes([0.0, 0.5, 0.0])
    targets = ("gate_proj", "up_proj")
    for got, want in zip(deltas(noisy, 0, targets, x_TX), deltas(plain, 0, targets, x_TX), strict=True):
        got, want = np.asarray(got).reshape(G, J, -1), np.asarray(want).reshape(G, J, -1)
        assert_same_bits(got[[0, 2]], want[[0, 2]])
        assert not np.array_equal(got[1], want[1])


TENANTS = {"calm": 0.0, "light": 0.1, "heavy": 0.6}  # rate by name


def join(trainer, name, **changes):
    seed = sorted(TENANTS).index(name)
    spec = dataclasses.replace(lora(3), dropout=changes.pop("dropout", TENANTS[name]))
    how = {"batch_size": 3, "seed": seed} | changes
    return trainer.add(name, spec, optimizer(), examples(seed, 9), **how)


def trained(*names, steps=4):
    trainer = make_trainer()
    for name in names:
        join(trainer, name)
    for _ in range(steps):
        trainer.step()
    return trainer


def test_a_tenants_numbers_depend_on_nothing_but_itself():
    """Together, alone, and alone in another slot, bit for bit."""
    together = trained(*TENANTS)
    for name in TENANTS:
        assert_same_bits(host(together.unseat(name)), host(trained(name).unseat(name)))
    without = make_trainer()
    join(without, "heavy", dropout=0.0)
    for _ in range(4):
        without.step()
    a, b = (host(t.unseat("heavy")).rows["q_proj"].a_LSRX for t in (together, without))
    assert not np.array_equal(a, b), "dropout changed nothing"


def test_a_resumed_tenant_drops_what_it_would_have_dropped():
    whole, first = trained("heavy"), trained("heavy", steps=2)
    cursor = first.tenants["heavy"].stream.cursor
    again = make_trainer()
    join(again, "light")
    join(again, "heavy", resume=(host(first.unseat("heavy")), 2, cursor))
    for _ in range(2):
        again.step()
    assert again.tenants["heavy"].slot != whole.tenants["heavy"].slot
    assert_same_bits(host(again.unseat("heavy")), host(whole.unseat("heavy")))


def test_evaluation_drops_nothing_and_a_change_of_rate_compiles_nothing():
    trainer = make_trainer()
    trainer.warm_up()
    data = examples(8, 5)
    with CompileCounter() as counter:
        for rate in (0.0, 0.3, 0.9):
            join(trainer, "calm", dropout=rate)
            trainer.step()
            state = trainer.unseat("calm")
            first = trainer.evaluate(data, "calm")
            trainer.remove("calm")
            join(trainer, "calm", dropout=0.0, resume=(state, 1, 3))
            assert trainer.evaluate(data, "calm") == first
            trainer.remove("calm")
    assert not counter.retraced, counter


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_an_impossible_rate_is_refused(rate):
    trainer = make_trainer()
    with pytest.raises(AdapterInvalid, match=r"dropout must be in \[0, 1\)"):
        join(trainer, "calm", dropout=rate)
    assert not trainer.tenants


def test_a_lane_with_nan_stays_alone():
    """x of a lane that holds NaN: the others keep their bits."""
    noisy, _, x_TX = lanes([0.3, 0.3, 0.3])
    sick = x_TX.at[:J].set(jnp.nan)
    for got, want in zip(deltas(noisy, 0, ("o_proj",), sick), deltas(noisy, 0, ("o_proj",), x_TX), strict=True):
        assert_same_bits(np.asarray(got)[J:], np.asarray(want)[J:])
