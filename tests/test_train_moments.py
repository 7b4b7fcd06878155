"""Moments in bfloat16: half the bytes, the same learning, and tenants as apart as in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from train_world import assert_same_bits, examples, host, lora, make_trainer, optimizer, small_base

from jaxlora.checkpoint import restore_state, save_state
from jaxlora.compile_cache import CompileCounter
from jaxlora.errors import StateInvalid
from jaxlora.lora import ALL_TARGETS
from jaxlora.model_config import target_features
from jaxlora.pool import layer_count
from train.optimizer import IDLE, Hyper, Moments, adamw, stochastic_bfloat16
from train.parking import Parking

BF16 = np.dtype(ml_dtypes.bfloat16)
STEPS = 100
# name → (rank, optimizer settings)
TENANTS = {
    "ant": (2, {"lr": 3e-3, "total_steps": STEPS}),
    "bee": (8, {"lr": 1e-2, "total_steps": STEPS, "b2": 0.99, "weight_decay": 0.1, "schedule": "linear"}),
    "cow": (5, {"lr": 5e-3, "total_steps": STEPS, "b1": 0.99, "loraplus_ratio": 4.0, "clip": 0.1}),
}


def join(trainer, name, resume=None):
    rank, settings = TENANTS[name]
    seed = list(TENANTS).index(name)
    how, data = optimizer(**settings), examples(seed, 6)
    return trainer.add(name, lora(rank), how, data, batch_size=2, seed=seed, resume=resume)


def trainer_of(*names, moments="bfloat16"):
    trainer = make_trainer(moments=moments)
    for name in names:
        join(trainer, name)
    return trainer


def outcome(trainer, name):
    return host(trainer.unseat(name))


# rounding


def neighbours(x):
    """The bfloat16 numbers around a float32 one, towards zero and away from it, by cutting bits."""
    low = int(np.float32(x).view(np.uint32)) >> 16
    return [np.uint32((low + up) << 16).view(np.float32) for up in (0, 1)]


@pytest.mark.parametrize("x", [1.001, -1.001, 3e-9, -7.77e20, 0.9999999])
def test_rounding_goes_to_the_neighbours_by_their_nearness(x):
    """All 2^16 draws: the mean is x itself, within float64."""
    bits = jnp.arange(2**16, dtype=jnp.uint32)
    got = np.asarray(stochastic_bfloat16(jnp.full(2**16, x, jnp.float32), bits))
    assert got.dtype == BF16
    assert set(got.astype(np.float32)) == set(neighbours(x))
    assert got.astype(np.float64).mean() == pytest.approx(float(np.float32(x)), rel=1e-12)


def test_what_bfloat16_holds_is_not_rounded():
    x = np.array([0.0, -0.0, 1.0, -2.5, 1e-30, 3e38], BF16)
    for bits in (0, 1, 2**16 - 1):
        got = stochastic_bfloat16(jnp.asarray(x.astype(np.float32)), jnp.full(len(x), bits, jnp.uint32))
        assert np.asarray(got).tobytes() == x.tobytes()


def second_moment(dtype, gradients):
    """nu of 512 equal weights after these gradients, float32, and what rounding to the nearest would have made."""
    a = jnp.zeros((1, 8, 64))
    hyper = Hyper(**{k: jnp.float32(v) for k, v in (IDLE | {"b2": 0.999}).items()})
    zero = {"q_proj": (a.astype(dtype), a.astype(dtype))}
    moments = Moments(mu=zero, nu=zero, count=jnp.int32(0))
    step = jax.jit(lambda g, m: adamw({"q_proj": (a, a)}, {"q_proj": (a + g, a + g)}, m, hyper)[1])
    nearest = np.zeros((), BF16)
    for g in gradients:
        moments = step(np.float32(g), moments)
        nearest = (np.float32(0.999) * np.float32(nearest) + np.float32(1 - 0.999) * np.float32(g) ** 2).astype(BF16)
    return np.asarray(moments.nu["q_proj"][0], np.float32), float(nearest)


def test_the_second_moment_does_not_stall():
    """Gradients of 1, then of 1.3: each step moves nu by less than half of bfloat16's spacing."""
    gradients = [1.0] * 600 + [1.3] * 600
    exact, _ = second_moment(jnp.float32, gradients)
    got, nearest = second_moment(jnp.bfloat16, gradients)
    expected = exact.flat[0]
    assert got.mean() == pytest.approx(expected, rel=2e-3)
    assert np.abs(got / expected - 1).max() < 0.15
    assert nearest < 0.6 * expected  # the fault that rounding at random avoids


# learning


@pytest.mark.slow
def test_curves_of_100_steps_are_those_of_float32():
    """Each tenant's loss, step by step: within 0.005 nats, while it falls from 7 or 8 to less than 0.1."""
    curves = {}
    for moments in ("float32", "bfloat16"):
        trainer = trainer_of(*TENANTS, moments=moments)
        while trainer.has_work:
            trainer.step()
        curves[moments] = {name: np.array(t.losses) for name, t in trainer.tenants.items()}
    for name in TENANTS:
        wanted, got = curves["float32"][name], curves["bfloat16"][name]
        assert len(got) == STEPS
        assert got[0] == wanted[0]
        assert not np.array_equal(got, wanted)
        assert wanted[0] > 7
        assert wanted[-1] < 0.1
        assert np.abs(got - wanted).max() < 0.005


def test_together_is_alone_bit_for_bit_in_any_slot():
    together = trainer_of(*reversed(TENANTS))
    for _ in range(4):
        assert {r.tenant for r in together.step()} == set(TENANTS)
    for name in TENANTS:
        alone = trainer_of(name)
        for _ in range(4):
            alone.step()
        state = outcome(alone, name)
        assert {x.dtype for x in jax.tree.leaves((state.moments.mu, state.moments.nu))} == {BF16}
        assert {x.dtype for x in jax.tree.leaves(state.rows)} == {np.dtype(np.float32)}
        assert_same_bits(outcome(together, name), state)


def test_a_neighbour_with_nan_changes_nobody_and_keeps_its_own():
    clean, sick = trainer_of(*TENANTS), trainer_of(*TENANTS)
    for example in sick.tenants["bee"].stream.examples:
        example.weights[-1] = np.nan
    start = outcome(sick, "bee")
    for _ in range(3):
        clean.step()
        assert {r.tenant: r.finite for r in sick.step()} == {name: name != "bee" for name in TENANTS}
    assert_same_bits(outcome(sick, "bee"), start)
    for name in ("ant", "cow"):
        assert_same_bits(outcome(sick, name), outcome(clean, name))


def test_slots_that_are_not_due_come_back_bit_for_bit():
    trainer = trainer_of(*TENANTS)
    trainer.step()
    trainer.fail("bee", "stays behind")
    before = outcome(trainer, "bee")
    for _ in range(2):
        assert {r.tenant for r in trainer.step()} == {"ant", "cow"}
    assert_same_bits(outcome(trainer, "bee"), before)


# keeping


@pytest.mark.parametrize("place", ["checkpoint", "file", "ram"])
def test_what_goes_on_elsewhere_equals_what_was_never_interrupted(tmp_path, place):
    """Saved after three steps and seated in another slot; nothing compiles."""
    whole, trainer = trainer_of("bee"), trainer_of("bee")
    for _ in range(6):
        whole.step()
    for _ in range(3):
        trainer.step()
    state, cursor = outcome(trainer, "bee"), trainer.tenants["bee"].stream.cursor
    if place == "checkpoint":
        save_state(tmp_path / "state", 3, state, {})
        like = trainer_of().fresh(lora(8), 0)
        found = restore_state(tmp_path / "state", like).arrays
    else:
        parking = Parking(tmp_path, host_bytes=0 if place == "file" else 10**9)
        parking.put("bee", state)
        parking.spill()
        found = parking.get("bee")
    assert_same_bits(host(found), state)
    other = trainer_of("ant")
    other.warm_up()
    with CompileCounter() as counter:
        join(other, "bee", resume=(found, 3, cursor))
        join(other, "cow")
        for _ in range(3):
            other.step()
    assert not counter.retraced, counter
    assert_same_bits(outcome(other, "bee"), outcome(whole, "bee"))


def test_a_checkpoint_in_the_other_dtype_is_refused(tmp_path):
    save_state(tmp_path / "state", 1, trainer_of(moments="float32").fresh(lora(8), 0), {})
    with pytest.raises(StateInvalid, match=r"saved by another configuration: .*'float32'.*'bfloat16'"):
        restore_state(tmp_path / "state", trainer_of().fresh(lora(8), 0))


def test_memory_of_a_slot_is_the_formula():
    """Weights and gradients in float32, two moments: 12 bytes a parameter of a slot, 16 in float32; a scale and a count."""
    config = small_base().config
    features = sum(layer_count(config, t) * sum(target_features(config, t)) for t in ALL_TARGETS)
    scales = 4 * sum(layer_count(config, t) for t in ALL_TARGETS)
    for moments, nbytes in (("bfloat16", 12), ("float32", 16)):
        (state,) = trainer_of(moments=moments).states
        live = sum(x.nbytes for x in jax.tree.leaves(state))
        assert live == 9 * (nbytes * 8 * features + scales + 4)
