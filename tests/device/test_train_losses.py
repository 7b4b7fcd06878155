"""Each loss against its definition in NumPy: float64, token by token, its slope by central differences.

Both sides sum at most a dozen numbers of size 10; float32 leaves 1e-6 of the largest, a difference in float64 less.
"""

import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxlora.config.training import LOSSES, LossName
from train.step.losses import BRANCHES, LossInputs, token_losses

J = 12
NAMES = list(LOSSES)
FINITE = st.floats(-2, 2, width=32)
TOKEN = st.tuples(
    st.floats(-6, 0, width=32),  # log-probability
    st.floats(-1.5, 1.5, width=32),  # log of the ratio
    FINITE,  # advantage
    st.sampled_from([0.0, 1.0, 1.0, -0.5, 2.0]),  # weight
    st.booleans(),  # counts in the ratio of its sequence
)


@st.composite
def lanes(draw):
    """(log-probabilities, LossInputs) of one lane: pairs of sequences, then padding; all in NumPy."""
    tokens = draw(st.lists(TOKEN, min_size=2, max_size=J))
    cuts = sorted(draw(st.sets(st.integers(1, len(tokens) - 1), min_size=1, max_size=3)))
    if len(cuts) % 2 == 0:
        cuts = cuts[:-1]  # an even number of sequences
    tokens += [(-1.0, 0.5, 1.0, 0.0, True)] * (J - len(tokens))
    logprob, shift, advantage, weight, ratio = (np.array(column) for column in zip(*tokens, strict=True))
    segment = np.searchsorted(cuts, np.arange(J), side="right").astype(np.int32) + 1
    inputs = LossInputs(
        segment_J=segment,
        weight_J=weight.astype(np.float32),
        reference_J=(logprob - shift).astype(np.float32),
        advantage_J=advantage.astype(np.float32),
        ratio_J=ratio,
        pair_J=np.where(segment % 2 == 1, 1, -1).astype(np.int32),
        low_J=np.full(J, draw(st.sampled_from([0.0, 0.8])), np.float32),
        high_J=np.full(J, draw(st.sampled_from([1.2, 3.0])), np.float32),
        beta=np.float32(draw(st.floats(0.0625, 2, width=32))),
    )
    return logprob.astype(np.float32), inputs


def by_hand(name, lp, held, of):
    """The sum of a lane's loss; `held` is lp where no gradient flows."""
    of = jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, of)
    total, q, A, w = 0.0, of.reference_J, of.advantage_J, of.weight_J
    if name == "dpo":
        for chosen in range(1, of.segment_J.max(), 2):
            one, two = (np.flatnonzero((of.segment_J == s) & (w != 0)) for s in (chosen, chosen + 1))
            margin = sum(w[t] * (lp[t] - q[t]) for t in one) - sum(w[t] * (lp[t] - q[t]) for t in two)
            if len(one) + len(two):
                total += math.log(1 + math.exp(-of.beta * margin))
        return total
    for t in np.flatnonzero(w):
        low, high = of.low_J[t], of.high_J[t]
        log_ratio = lp[t] - q[t]
        if name == "gspo":
            inside = [i for i in range(J) if of.segment_J[i] == of.segment_J[t] and of.ratio_J[i] and w[i] != 0]
            s = math.exp(sum(held[i] - q[i] for i in inside) / len(inside)) if inside else 1.0
            log_ratio = math.log(s) + lp[t] - held[t]
        rho = math.exp(log_ratio)
        if name == "cross_entropy":
            value = lp[t]
        elif name == "importance_sampling":
            value = rho * A[t]
        elif name == "cispo":
            value = min(max(math.exp(held[t] - q[t]), low), high) * lp[t] * A[t]
        elif name == "dro":
            value = lp[t] * A[t] - 0.5 * of.beta * (lp[t] - q[t]) ** 2
        else:
            value = min(rho * A[t], min(max(rho, low), high) * A[t])
        total -= w[t] * value
    return total


def slope(name, logprob, of):
    """Central differences of `by_hand`, [J]."""
    found = np.zeros(J)
    for t in range(J):
        step = np.zeros(J)
        step[t] = 1e-6
        found[t] = (by_hand(name, logprob + step, logprob, of) - by_hand(name, logprob - step, logprob, of)) / 2e-6
    return found


@jax.jit
def run(logprob_GJ, loss_G, of):
    """(loss by token, gradient of its sum)."""
    loss_GJ, pull = jax.vjp(lambda x: token_losses(x, loss_G, of), logprob_GJ)
    return loss_GJ, pull(jnp.ones_like(logprob_GJ))[0]


def alone(name, logprob, of):
    """(loss [J], gradient [J]) of one lane in NumPy."""
    found = run(logprob[None], np.array([NAMES.index(name)], np.int32), jax.tree.map(lambda x: x[None], of))
    return tuple(np.asarray(x[0]) for x in found)


def no_corner(name, logprob, of):
    """Whether no token's ratio lies where min or clip bends, where there are two slopes."""
    log_ratio = (logprob - of.reference_J).astype(np.float64)
    if name == "gspo":
        for s in set(of.segment_J):
            inside = (of.segment_J == s) & of.ratio_J & (of.weight_J != 0)
            log_ratio[of.segment_J == s] = log_ratio[inside].mean() if inside.any() else 0.0
    ratio = np.exp(log_ratio)
    near = np.minimum(np.abs(ratio - of.low_J), np.abs(ratio - of.high_J)) < 1e-3
    return name not in ("ppo", "gspo") or not near.any()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(lane=lanes())
def test_value_and_gradient_are_those_of_the_definition(name, lane):
    logprob, of = lane
    assume(no_corner(name, logprob, of))
    loss, gradient = alone(name, logprob, of)
    exact = logprob.astype(np.float64)
    scale = 1 + np.abs(loss).sum()
    np.testing.assert_allclose(loss.sum(dtype=np.float64), by_hand(name, exact, exact, of), atol=2e-6 * scale)
    np.testing.assert_allclose(gradient, slope(name, exact, of), rtol=1e-5, atol=1e-5)
    assert not loss[of.weight_J == 0].any()
    assert not gradient[of.weight_J == 0].any()


def test_the_definition_meets_both_sides_of_the_clip_and_both_signs():
    """PPO where the ratio is 1.5 and 0.5 and the advantage of either sign: two of four are cut."""
    logprob = np.full(J, -1, np.float32)
    of = inputs(
        reference_J=logprob - np.log(np.float32([1.5, 1.5, 0.5, 0.5] * 3)),
        advantage_J=np.float32([1, -1, 1, -1] * 3),
        low_J=np.full(J, 0.8, np.float32),
        high_J=np.full(J, 1.2, np.float32),
    )
    loss, gradient = alone("ppo", logprob, of)
    np.testing.assert_allclose(loss[:4], [-1.2, 1.5, -0.5, 0.8], rtol=1e-6)
    np.testing.assert_allclose(gradient[:4], [0, 1.5, -0.5, 0], rtol=1e-6)


def inputs(**changes):
    """One sequence of weight 1, sampled at the present log-probability -1 with advantage 1, unless told otherwise."""
    ones = np.ones(J, np.float32)
    fields = {
        "segment_J": np.ones(J, np.int32),
        "weight_J": ones,
        "reference_J": -ones,
        "advantage_J": ones,
        "ratio_J": np.ones(J, bool),
        "pair_J": np.zeros(J, np.int32),
        "low_J": 0 * ones,
        "high_J": 4 * ones,
        "beta": np.float32(0.1),
    }
    return LossInputs(**(fields | changes))


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_at_a_token_without_weight_changes_no_bit(name):
    rng = np.random.default_rng(3)
    weight = np.float32([1, 0, -2, 0] * 3)
    segment = np.repeat(np.int32([1, 2]), J // 2)
    of = inputs(
        weight_J=weight,
        segment_J=segment,
        pair_J=np.where(segment == 1, 1, -1).astype(np.int32),
        reference_J=-rng.random(J, np.float32),
        advantage_J=rng.normal(size=J).astype(np.float32),
    )
    logprob = -rng.random(J, np.float32)
    expected = alone(name, logprob, of)
    assert expected[1].any()
    for bad in (np.nan, np.inf, -np.inf):
        poison = {k: np.where(weight == 0, np.float32(bad), getattr(of, k)) for k in ("reference_J", "advantage_J")}
        got = alone(name, np.where(weight == 0, np.float32(bad), logprob), inputs(**vars(of) | poison))
        for g, e in zip(got, expected, strict=True):
            assert g.tobytes() == e.tobytes()


@pytest.mark.parametrize("name", ["ppo", "gspo"])
def test_an_infinite_ratio_that_is_clipped_has_a_finite_loss_and_no_gradient(name):
    loss, gradient = alone(name, np.full(J, -1, np.float32), inputs(reference_J=np.full(J, -200, np.float32)))
    np.testing.assert_array_equal(loss, -4)
    np.testing.assert_array_equal(gradient, 0)


def test_a_sequence_without_counted_tokens_has_ratio_one_in_gspo():
    of = inputs(reference_J=np.full(J, -3, np.float32), ratio_J=np.zeros(J, bool))
    loss, gradient = alone("gspo", np.full(J, -1, np.float32), of)
    np.testing.assert_array_equal(loss, -1)
    np.testing.assert_array_equal(gradient, -1)


def test_bounds_may_differ_by_token():
    of = inputs(reference_J=np.full(J, -1 - np.log(3), np.float32), high_J=np.float32([1.5, 2.5, 4] * 4))
    loss, _ = alone("ppo", np.full(J, -1, np.float32), of)
    np.testing.assert_allclose(loss[:3], [-1.5, -2.5, -3], rtol=1e-6)


def test_a_lane_has_the_same_bits_whatever_losses_and_numbers_the_others_have():
    """Every loss in one batch, in two orders, and beside lanes of NaN."""
    rng = np.random.default_rng(5)
    G = len(NAMES)
    logprob_GJ = -rng.exponential(size=(G, J)).astype(np.float32)
    segment = np.repeat(np.int32([1, 2, 3, 4]), J // 4)
    rows = [
        inputs(
            segment_J=segment,
            pair_J=np.where(segment % 2 == 1, 1, -1).astype(np.int32),
            reference_J=-rng.exponential(size=J).astype(np.float32),
            advantage_J=rng.normal(size=J).astype(np.float32),
            beta=np.float32(0.1 * (g + 1)),
        )
        for g in range(G)
    ]
    of = jax.tree.map(lambda *x: np.stack(x), *rows)
    loss_G = np.arange(G, dtype=np.int32)
    expected = [np.asarray(x) for x in run(logprob_GJ, loss_G, of)]
    assert len({row.tobytes() for row in expected[1]}) == G
    for g in range(G):
        sick = jax.tree.map(lambda x, g=g: np.where(np.arange(G).reshape(-1, *[1] * (x.ndim - 1)) == g, x, bad(x)), of)
        others = np.where(loss_G == g, loss_G, (loss_G + 3) % G).astype(np.int32)
        got = [np.asarray(x) for x in run(logprob_GJ, others, sick)]
        for a, e in zip(got, expected, strict=True):
            assert a[g].tobytes() == e[g].tobytes()
    order = rng.permutation(G)
    shuffled = run(logprob_GJ[order], loss_G[order], jax.tree.map(lambda x: x[order], of))
    for a, e in zip(shuffled, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a), e[order])


def bad(x):
    return np.full_like(x, np.nan) if x.dtype == np.float32 else x


def test_the_settings_name_every_loss_of_the_table_in_its_order():
    assert [branch.__name__ for branch in BRANCHES] == NAMES == list(get_args(LossName))
