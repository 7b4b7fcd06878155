"""LoRA of training and prefill: forward and backward by hand, and a lane's NaN stays in the lane."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import BF16, F32, assert_close, assert_no_nan, assert_same_bits, floats, positive

from jaxlora.model.compile_cache import CompileCounter
from pallas_kernels.segmented_lora.op import segmented_lora, segmented_lora_reference, take_rows

G, J, S, R, X, Y, Y2 = 4, 6, 3, 4, 12, 8, 5

CASES = {
    "mixed": [0, 2, 1, 0],
    "one adapter": [1] * G,
    "nobody": [-1] * G,
    "base beside tuned": [-1, 2, -1, 2],
    "all distinct and base": [2, 1, 0, -1],
}
named = pytest.mark.parametrize("slots", CASES.values(), ids=CASES.keys())


def by_hand(x, a, b, scale):
    """float64 [G, J, Y]; a and b are lists of one array per lane, ranks may differ."""
    y = np.zeros((x.shape[0], x.shape[1], b[0].shape[1]))
    for g in range(x.shape[0]):
        for j in range(x.shape[1]):
            for r in range(len(a[g])):
                h = sum(float(x[g, j, i]) * float(a[g][r][i]) for i in range(x.shape[2]))
                y[g, j] += float(scale[g]) * h * b[g][r].astype(np.float64)
    return y


def by_hand_gradients(x, a, b, scale, w):
    """float64 gradients of sum(w * y) by (x, a, b, scale)."""
    dx, da, db, ds = (np.zeros(v.shape) for v in (x, a, b, scale))
    for g in range(len(x)):
        xg, ag, bg, wg, s = (v[g].astype(np.float64) for v in (x, a, b, w, scale))
        for j in range(len(xg)):
            for r in range(len(ag)):
                h, up = xg[j] @ ag[r], bg[r] @ wg[j]
                dx[g, j] += s * up * ag[r]
                da[g, r] += s * up * xg[j]
                db[g, r] += s * h * wg[j]
                ds[g] += h * up
    return dx, da, db, ds


def op(x, a, b, scale):
    return segmented_lora(x, [(a, b, scale)])[0]


def with_gradients(f):
    """jit of (y, gradients of sum(w * y) by x, a, b, scale)."""

    def both(x, a, b, scale, w):
        y, pull = jax.vjp(f, x, a, b, scale)
        return y, pull(w.astype(y.dtype))

    return jax.jit(both)


run, run_reference = with_gradients(op), with_gradients(segmented_lora_reference)


def world(slots, seed=0):
    """(x, a, b, scale, w) as NumPy; lanes of -1 have zero rows, as take_rows gives them."""
    rng = np.random.default_rng(seed)
    pool = floats(rng, S, R, X), floats(rng, S, R, Y), floats(rng, S)
    a, b, scale = (np.stack([p[s] if s >= 0 else np.zeros_like(p[0]) for s in slots]) for p in pool)
    return floats(rng, G, J, X), a, b, scale, floats(rng, G, J, Y)


@named
def test_oracle_is_the_definition_forward_and_backward(slots):
    x, a, b, scale, w = world(slots)
    y, gradients = run_reference(x, a, b, scale, w)
    assert y.dtype == jnp.float32
    assert_close(y, by_hand(x, a, b, scale), F32)
    assert_close(gradients, by_hand_gradients(x, a, b, scale, w), F32)


@named
def test_op_equals_oracle_and_hand_forward_and_backward(slots):
    x, a, b, scale, w = world(slots, 1)
    y, gradients = run(x, a, b, scale, w)
    assert_close((y, gradients), run_reference(x, a, b, scale, w), F32)
    assert_close(y, by_hand(x, a, b, scale), F32)
    assert_close(gradients, by_hand_gradients(x, a, b, scale, w), F32)
    base = np.array(slots) == -1
    assert not np.asarray(y)[base].any()
    assert not np.asarray(gradients[0])[base].any()


@pytest.mark.parametrize(("tokens", "rank"), [(1, R), (J, 1), (1, 1)], ids=["one token", "rank 1", "both"])
def test_smallest_shapes(tokens, rank):
    x, a, b, scale, w = world(CASES["mixed"], 2)
    args = x[:, :tokens], a[:, :rank], b[:, :rank], scale
    y, gradients = run(*args, w[:, :tokens])
    assert_close(y, by_hand(*args), F32)
    assert_close(gradients, by_hand_gradients(*args, w[:, :tokens]), F32)


def test_mixed_ranks_are_zero_rows_that_stay_zero():
    x, a, b, scale, w = world(CASES["mixed"], 3)
    ranks = [1, 4, 2, 3]
    for g, r in enumerate(ranks):
        a[g, r:], b[g, r:] = 0, 0
    y, (_, da, db, _) = run(x, a, b, scale, w)
    assert_close(
        y, by_hand(x, [a[g, :r] for g, r in enumerate(ranks)], [b[g, :r] for g, r in enumerate(ranks)], scale), F32
    )
    for g, r in enumerate(ranks):
        assert not np.asarray(da)[g, r:].any()
        assert not np.asarray(db)[g, r:].any()
        assert np.asarray(da)[g, :r].all()
        assert np.asarray(db)[g, :r].all()


def test_targets_of_different_rank_share_one_read():
    x, a, b, scale, _ = world(CASES["mixed"], 4)
    rng = np.random.default_rng(5)
    a2, b2, scale2 = floats(rng, G, 2, X), floats(rng, G, 2, Y2), floats(rng, G)
    first, second = jax.jit(segmented_lora)(x, [(a, b, scale), (a2, b2, scale2)])
    assert_close(first, by_hand(x, a, b, scale), F32)
    assert_close(second, by_hand(x, a2, b2, scale2), F32)


@pytest.mark.parametrize("bad", ["adapter", "input", "cotangent", "everything"])
def test_nan_of_a_lane_stays_in_it_forward_and_backward(bad):
    args = world(CASES["all distinct and base"], 6)
    clean = run(*args)
    poisoned = [v.copy() for v in args]
    which = {"adapter": (1, 2, 3), "input": (0,), "cotangent": (4,), "everything": (0, 1, 2, 3, 4)}[bad]
    for i in which:
        poisoned[i][1] = np.nan
    got = run(*poisoned)
    others = np.array([0, 2, 3])
    assert_same_bits(jax.tree.map(lambda v: v[others], got), jax.tree.map(lambda v: v[others], clean))
    assert any(np.isnan(np.asarray(leaf)[1]).all() for leaf in jax.tree.leaves(got))


def test_padding_tokens_of_a_lane_change_no_bit_of_its_other_tokens():
    x, a, b, scale, w = world(CASES["mixed"], 7)
    w[:, 4:] = 0
    clean_y, (clean_dx, *clean_rows) = run(x, a, b, scale, w)
    x[:, 4:] = 1e3
    y, (dx, *rows) = run(x, a, b, scale, w)
    assert_same_bits((y[:, :4], dx[:, :4], rows), (clean_y[:, :4], clean_dx[:, :4], clean_rows))


def test_a_lane_does_not_depend_on_its_place_or_neighbours():
    x, a, b, scale, w = world(CASES["all distinct and base"], 8)
    y, gradients = run(x, a, b, scale, w)
    for place in range(G):
        new = [v.copy() for v in world(CASES["one adapter"], 9 + place)]
        for to, of in zip(new, (x, a, b, scale, w), strict=True):
            to[place] = of[0]
        got = run(*new)
        assert_same_bits(jax.tree.map(lambda v, p=place: v[p], got), jax.tree.map(lambda v: v[0], (y, gradients)))


# ---- take_rows --------------------------------------------------------------------------------------------------------

take = jax.jit(take_rows)


@named
@pytest.mark.parametrize("tail", [(R, X), ()], ids=["weights", "scale"])
def test_take_rows_by_hand(slots, tail):
    pool = floats(np.random.default_rng(10), 2, S, *tail)
    want = np.zeros((2, G, *tail), np.float32)
    for layer in range(2):
        for g, s in enumerate(slots):
            if s >= 0:
                want[layer, g] = pool[layer, s]
    assert_same_bits(take(pool, np.array(slots, np.int32)), want)


def test_no_adapter_is_zeros_whatever_any_slot_holds():
    """Index -1 would read the last slot, a clamped one the first."""
    got = take(np.full((2, S, R, X), np.nan, np.float32), np.full(G, -1, np.int32))
    assert_same_bits(got, np.zeros((2, G, R, X), np.float32))


def test_unused_slots_may_hold_nan():
    pool = floats(np.random.default_rng(11), 2, S, R, X)
    slots = np.array([1, -1, 1, -1], np.int32)
    clean = take(pool, slots)
    pool[:, [0, 2]] = np.nan
    assert_same_bits(take(pool, slots), clean)


def test_gradient_of_take_rows_reaches_the_slots_present_only():
    w = floats(np.random.default_rng(12), 2, G, R, X)
    pool = np.full((2, S, R, X), np.nan, np.float32)
    slots = np.array([1, -1, 1, -1], np.int32)
    (got,) = jax.jit(lambda p, w: jax.vjp(lambda q: take_rows(q, slots), p)[1](w))(pool, w)
    assert_close(got[:, 1], w[:, 0].astype("f8") + w[:, 2].astype("f8"), F32)
    assert not np.asarray(got)[:, [0, 2]].any()


# ---- compiles, dtypes, any values -------------------------------------------------------------------------------------


def test_slots_scales_and_weights_are_data():
    @jax.jit
    def step(x, pool, slots):
        a, b, scale = (take_rows(p, slots)[0] for p in pool)
        return segmented_lora(x, [(a, b, scale)])[0]

    calls = []
    for seed, slots in enumerate(CASES.values()):
        rng = np.random.default_rng(seed)
        pool = floats(rng, 1, S, R, X), floats(rng, 1, S, R, Y), floats(rng, 1, S)
        calls.append(jax.device_put((floats(rng, G, J, X), pool, np.array(slots, np.int32))))
    jax.block_until_ready(step(*calls[0]))
    with CompileCounter() as counter:
        for call in calls:
            jax.block_until_ready(step(*call))
    assert not counter.retraced


def test_bfloat16_sums_in_float32():
    """512 positive terms, in the sums over features and over the tokens of a lane: bfloat16 stops growing at 256."""
    rng = np.random.default_rng(13)
    x, a, b, w = positive(rng, 2, 512, 16), positive(rng, 2, 2, 16), positive(rng, 2, 2, Y), positive(rng, 2, 512, Y)
    scale = np.array([0.5, 2.0], np.float32)
    y, gradients = run(x, a, b, scale, w)
    assert [v.dtype for v in (y, *gradients)] == [jnp.bfloat16] * 4 + [jnp.float32]
    wide = [v.astype(np.float64) for v in (x, a, b, scale, w)]
    assert_close(y, by_hand(*wide[:4]), BF16)
    assert_close(gradients, by_hand_gradients(*wide), BF16)
    x, a = positive(rng, 2, 1, 512), positive(rng, 2, 2, 512)
    assert_close(jax.jit(op)(x, a, b, scale), by_hand(*(v.astype(np.float64) for v in (x, a, b, scale))), BF16)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), slots=st.lists(st.integers(-1, S - 1), min_size=G, max_size=G))
def test_any_slots(seed, slots):
    x, a, b, scale, w = world(slots, seed)
    y, gradients = run(x, a, b, scale, w)
    loose = {"rtol": 1e-4, "atol": 1e-4}  # some draws cancel
    assert_close(y, by_hand(x, a, b, scale), loose)
    assert_close(gradients, by_hand_gradients(x, a, b, scale, w), loose)
    assert_no_nan(y, *gradients)
