"""AdamW in one pass: the Pallas body, interpreted on the CPU, against a loop in NumPy; whose numbers reach whom.

With the plugin triton_interpreter the same tests run the Triton body.  Shapes are tiny: interpretation is slow.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import assert_same_bits

from pallas_kernels import NO_ADAPTER, dispatch
from pallas_kernels.adamw.op import NUMBERS, SlotArrays, adamw_reference
from train.step.optimizer import IDLE, Hyper, Moments
from train.step.update import update_slots

L, S, R, X = 2, 4, 3, 5
FIELDS = ("weight_LSRX", "grad_LSRX", "mu_LSRX", "nu_LSRX")
ROWS = [  # of slot_U's places
    IDLE | {"lr": 0.1, "decay": 0.5, "b_ratio": 4.0},
    IDLE | {"lr": 0.02, "clip": 0.5, "divisor": -3.0},
    IDLE | {"lr": 0.3, "b1": 0.5, "b2": 0.9, "eps": 0.1},
]
DUE = {"two of four": [2, 0, NO_ADAPTER], "nobody": [NO_ADAPTER] * 3, "three": [3, 1, 2]}
CLOSE = {
    "rtol": 2e-5,
    "atol": 4e-5,
}  # 1 - b2^n is near 0.001: float32 leaves 1e-4 of an update, whose size is about 0.4


@jax.jit
def run(weights, grads, moments, hyper, slot_U):
    with dispatch.interpreted():
        return update_slots(weights, grads, moments, hyper, slot_U)


def drawn():
    """Weights, gradients and moments of one target, whose halves have the same shape."""
    rng = np.random.default_rng(0)
    weight, grad, mu, nu = (tuple(rng.normal(size=(L, S, R, X)).astype(np.float32) for _ in "ab") for _ in range(4))
    return weight, grad, mu, tuple(map(np.abs, nu)), np.array([0, 3, 9, 1], np.int32)


def updated(due, weight, grad, mu, nu, count):
    """What the body makes of them: the four pairs, the counts, the report."""
    moments = Moments(mu={"q_proj": mu}, nu={"q_proj": nu}, count=count)
    args = {"q_proj": weight}, {"q_proj": grad}, moments, jax.device_put(Hyper.stack(ROWS)), np.array(due, np.int32)
    weights, grads, moments, report = jax.device_get(run(*args))
    return [x["q_proj"] for x in (weights, grads, moments.mu, moments.nu)], moments.count, report


def by_hand(row, half, norm, count, weight, grad, mu, nu):
    """One slot, float64: (weight, mu, nu)."""
    g = grad.astype("f8") / row["divisor"] * min(1.0, row["clip"] / norm)
    mu, nu = (row[b] * x.astype("f8") + (1 - row[b]) * y for b, x, y in (("b1", mu, g), ("b2", nu, g * g)))
    hat = mu / (1 - row["b1"] ** count) / (np.sqrt(nu / (1 - row["b2"] ** count)) + row["eps"])
    lr = row["lr"] * (row["b_ratio"] if half else 1)
    return weight - lr * (hat + row["decay"] * weight), mu, nu


@pytest.mark.parametrize("due", DUE.values(), ids=DUE)
def test_the_body_is_what_a_loop_computes(due):
    weight, grad, mu, nu, count = drawn()
    got, counts, report = updated(due, weight, grad, mu, nu, count)
    for slot in range(S):
        if slot not in due:
            for before, after in zip((weight, grad, mu, nu), got, strict=True):
                assert_same_bits([x[:, slot] for x in after], [x[:, slot] for x in before])
            assert counts[slot] == count[slot]
            continue
        row = ROWS[due.index(slot)]
        size = math.sqrt(sum(float((x[:, slot].astype("f8") ** 2).sum()) for x in grad))
        norm = size / abs(row["divisor"])
        np.testing.assert_allclose(report.norm_U[due.index(slot)], norm, rtol=1e-6)
        assert counts[slot] == count[slot] + 1
        for half in (0, 1):
            own = [x[half][:, slot] for x in (weight, grad, mu, nu)]
            wanted = by_hand(row, half, norm, int(count[slot]) + 1, *own)
            for i, want in zip((0, 2, 3), wanted, strict=True):
                np.testing.assert_allclose(got[i][half][:, slot], want, **CLOSE)
            assert not got[1][half][:, slot].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_slot_whose_gradient_is_not_finite_stays_and_reaches_nobody(bad):
    due = DUE["three"]
    weight, grad, mu, nu, count = drawn()
    calm, *_ = updated(due, weight, grad, mu, nu, count)
    grad[1][0, 1, 2, 3] = bad
    got, counts, report = updated(due, weight, grad, mu, nu, count)
    assert report.finite_U.tolist() == [True, False, True]
    assert counts[1] == count[1]
    for i, before in ((0, weight), (2, mu), (3, nu)):
        assert_same_bits([x[:, 1] for x in got[i]], [x[:, 1] for x in before])
    assert not any(x[:, 1].any() for x in got[1])
    for slot in (0, 2, 3):
        assert_same_bits([x[:, slot] for pair in got for x in pair], [x[:, slot] for pair in calm for x in pair])


def test_the_reference_is_what_a_loop_computes():
    (weight, _), (grad, _), (mu, _), (nu, _), _ = drawn()
    slot_U, row = np.array([2, 0, NO_ADAPTER], np.int32), ROWS[0] | {"shrink": 0.25}
    turn = [[(row | {"c1": 1 - 0.9**n, "c2": 1 - 0.999**n})[k] for k in NUMBERS] for n in (1, 4, 1)]
    arrays = SlotArrays(**dict(zip(FIELDS, map(jnp.asarray, (weight, grad, mu, nu)), strict=True)))
    got = adamw_reference(arrays, slot_U, jnp.array(turn, jnp.float32))
    assert_same_bits([x[:, [1, 3]] for x in got.each()], [x[:, [1, 3]] for x in (weight, grad, mu, nu)])
    for slot, n in ((2, 1), (0, 4)):
        own = [x[:, slot] for x in (weight, grad, mu, nu)]
        wanted = by_hand(row | {"clip": 0.25}, 0, 1.0, n, *own)
        for after, want in zip((got.weight_LSRX, got.mu_LSRX, got.nu_LSRX), wanted, strict=True):
            np.testing.assert_allclose(after[:, slot], want, **CLOSE)
        assert not got.grad_LSRX[:, slot].any()
