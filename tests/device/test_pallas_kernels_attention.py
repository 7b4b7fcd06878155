"""Packed causal attention: forward and backward by hand, block by block, and a lane's NaN stays in the lane."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import BF16, F32, assert_close, assert_no_nan, assert_same_bits, floats

from jaxlora.model.compile_cache import CompileCounter
from pallas_kernels.attention.op import packed_attention, packed_attention_reference

G, J, N, K, H = 3, 16, 9, 3, 4  # the heads of SmolLM2: 9 query heads over 3 kv heads

ONE = [1] * J
CASES = {
    "one segment": [ONE, ONE, ONE],
    "ragged": [[1] * 5 + [2] * 11, [1] * 1 + [2] * 2 + [3] * 13, [1] * 7 + [2] * 8 + [3]],
    "padding at the end": [[1] * 9 + [0] * 7, [1] * 3 + [2] * 4 + [0] * 9, [1] + [0] * 15],
    "padding in front and between": [[0] * 3 + [1] * 13, [1] * 4 + [0] * 5 + [2] * 7, [0] * 8 + [1] * 8],
    "empty lanes": [[0] * J, ONE, [0] * J],
    "nobody": [[0] * J] * 3,
    "one token each": [list(range(1, J + 1)), [1] + [0] * 15, [0] * 15 + [1]],
    "on block borders": [[1] * 4 + [2] * 8 + [3] * 4, [1] * 8 + [2] * 8, [1] * 12 + [2] * 4],
}
named = pytest.mark.parametrize("segments", CASES.values(), ids=CASES.keys())
windows = pytest.mark.parametrize("window", [None, pytest.param(1, marks=pytest.mark.slow), 5])


def by_hand(q, k, v, segment, window, d):
    """float64 (out, dq, dk, dv): one query at a time over the keys it sees; d is the gradient of out."""
    q, k, v, d = (x.astype(np.float64) for x in (q, k, v, d))
    out, dq, dk, dv = np.zeros(q.shape), np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    lanes, tokens, heads, features = q.shape
    for g in range(lanes):
        for i in range(tokens):
            if segment[g][i] == 0:
                continue
            keys = [j for j in range(i + 1) if segment[g][j] == segment[g][i]]
            if window is not None:
                keys = [j for j in keys if i - j < window]
            for n in range(heads):
                m = n // (heads // k.shape[2])
                score = np.array([q[g, i, n] @ k[g, j, m] for j in keys]) / np.sqrt(features)
                p = np.exp(score - score.max())
                p /= p.sum()
                out[g, i, n] = sum(w * v[g, j, m] for w, j in zip(p, keys, strict=True))
                dp = np.array([d[g, i, n] @ v[g, j, m] for j in keys])
                ds = p * (dp - p @ dp) / np.sqrt(features)
                for w, s, j in zip(p, ds, keys, strict=True):
                    dv[g, j, m] += w * d[g, i, n]
                    dq[g, i, n] += s * k[g, j, m]
                    dk[g, j, m] += s * q[g, i, n]
    return out, dq, dk, dv


@functools.cache
def program(window, block):
    """jit of (out, dq, dk, dv); block 0 is the reference."""

    def both(q, k, v, segment, d):
        if block:
            f = functools.partial(packed_attention, window=window, block=block)
        else:
            f = functools.partial(packed_attention_reference, window=window)
        out, pull = jax.vjp(lambda q, k, v: f(q, k, v, segment), q, k, v)
        return out, *pull(d.astype(out.dtype))

    return jax.jit(both)


def world(seed=0):
    """(q, k, v) and the gradient of the output."""
    rng = np.random.default_rng(seed)
    return floats(rng, G, J, N, H), floats(rng, G, J, K, H), floats(rng, G, J, K, H), floats(rng, G, J, N, H)


def run(arrays, segments, window=None, block=4):
    """(out, dq, dk, dv) of (q, k, v, d)."""
    q, k, v, d = arrays
    return program(window, block)(q, k, v, np.array(segments, np.int32), d)


def lanes(tree, index):
    return jax.tree.map(lambda x: np.asarray(x)[index], tree)


@named
@windows
def test_oracle_is_the_definition_forward_and_backward(segments, window):
    q, k, v, d = world()
    assert_close(run((q, k, v, d), segments, window, 0), by_hand(q, k, v, segments, window, d), F32)


@named
@windows
@pytest.mark.parametrize("block", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_op_equals_oracle_and_hand_forward_and_backward(segments, window, block):
    q, k, v, d = world(1)
    got = run((q, k, v, d), segments, window, block)
    assert_close(got, by_hand(q, k, v, segments, window, d), F32)
    assert_close(got, run((q, k, v, d), segments, window, 0), F32)
    padding = np.array(segments) == 0
    for x in got:
        assert not np.asarray(x)[padding].any()


def test_a_lane_shorter_than_the_block_is_one_block():
    arrays = world(2)
    assert_same_bits(run(arrays, CASES["ragged"], None, 64), run(arrays, CASES["ragged"], None, 16))
    one = [x[:, :1] for x in arrays]
    got = run(one, [[1], [0], [1]], None, 32)
    assert_close(got, by_hand(*one[:3], [[1], [0], [1]], None, one[3]), F32)


@pytest.mark.parametrize("block", [3, 5, 12])
def test_a_block_that_does_not_divide_the_lane_is_refused(block):
    with pytest.raises(ValueError, match=f"block {block} does not divide the {J} tokens"):
        run(world(), CASES["ragged"], None, block)


@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (4, 1)], ids=["a kv head each", "one kv head"])
def test_other_head_groups(heads, kv):
    q, k, v, d = world(3)
    arrays = q[:, :, :heads], k[:, :, :kv], v[:, :, :kv], d[:, :, :heads]
    if kv == 4:
        arrays = arrays[0], q[:, :, 4:8], q[:, :, 5:9], arrays[3]
    got = run(arrays, CASES["ragged"])
    assert_close(got, by_hand(*arrays[:3], CASES["ragged"], None, arrays[3]), F32)


@pytest.mark.parametrize("block", [4, 16])
@windows
def test_nan_of_a_lane_stays_in_it_forward_and_backward(block, window):
    clean = run(world(4), CASES["ragged"], window, block)
    poisoned = world(4)
    for x in poisoned:
        x[1] = np.nan
    got = run(poisoned, CASES["ragged"], window, block)
    assert_same_bits(lanes(got, [0, 2]), lanes(clean, [0, 2]))
    assert np.isnan(np.asarray(got[0])[1]).all()


@pytest.mark.parametrize("block", [4, 16])
@pytest.mark.parametrize(
    "case", ["padding at the end", "padding in front and between", "empty lanes", "one token each"]
)
@pytest.mark.parametrize("garbage", [7.0, np.inf, np.nan])
def test_what_padding_holds_changes_no_bit(block, case, garbage):
    """A weight of zero times NaN is NaN: padding must be selected away, forward and backward."""
    segments = CASES[case]
    clean = run(world(5), segments, None, block)
    poisoned = world(5)
    for x in poisoned:
        x[np.array(segments) == 0] = garbage
    got = run(poisoned, segments, None, block)
    assert_same_bits(got, clean)
    assert_no_nan(*got)


def test_the_oracle_selects_padding_too():
    segments = CASES["padding in front and between"]
    clean = run(world(5), segments, None, 0)
    poisoned = world(5)
    for x in poisoned:
        x[np.array(segments) == 0] = np.nan
    assert_same_bits(run(poisoned, segments, None, 0), clean)


@pytest.mark.parametrize("block", [4, 16])
def test_a_lane_does_not_depend_on_its_neighbours_or_place(block):
    """A neighbour whose segment starts earlier makes this lane visit more blocks, which must add exact zeros."""
    arrays = world(6)
    short = CASES["on block borders"][0]
    want = lanes(run(arrays, [short, [0] * J, [0] * J], None, block), 0)
    for place in range(G):
        for neighbour in ([0] * J, ONE, CASES["ragged"][1]):
            other = world(7 + place)
            for to, of in zip(other, arrays, strict=True):
                to[place] = of[0]
            segments = [neighbour] * G
            segments[place] = short
            assert_same_bits(lanes(run(other, segments, None, block), place), want)


def test_a_token_sees_nothing_of_later_tokens_and_other_segments():
    segments = [[1] * 6 + [2] * 10] * G
    clean = run(world(8), segments)
    changed = world(8)
    for x in changed[:3]:
        x[:, :6] += 1
        x[:, 12:] += 1
    assert_same_bits(run(changed, segments)[0][:, 6:12], clean[0][:, 6:12])
    assert (np.asarray(run(changed, segments)[0])[:, :6] != np.asarray(clean[0])[:, :6]).all()


def test_segment_numbers_are_names_only():
    arrays = world(9)
    renamed = [[{0: 0, 1: 4, 2: 7, 3: 900}[s] for s in lane] for lane in CASES["ragged"]]
    assert_same_bits(run(arrays, renamed), run(arrays, CASES["ragged"]))


def test_huge_scores_do_not_overflow():
    q, k, v, d = world(10)
    got = run((q * 1e3, k * 1e3, v, d), CASES["ragged"])
    assert_no_nan(*got)
    assert_close(got[0], by_hand(q * 1e3, k * 1e3, v, CASES["ragged"], None, d)[0], {"rtol": 1e-2, "atol": 1e-2})


def test_segments_are_data():
    f = jax.jit(lambda *a: packed_attention(*a, window=5, block=4))
    calls = [jax.device_put((*world(i)[:3], np.array(s, np.int32))) for i, s in enumerate(CASES.values())]
    jax.block_until_ready(f(*calls[0]))
    with CompileCounter() as counter:
        for call in calls:
            jax.block_until_ready(f(*call))
    assert not counter.retraced


def test_bfloat16_sums_in_float32():
    """512 keys of equal weight: a bfloat16 sum of their weights stops growing at 256."""
    rng = np.random.default_rng(11)
    q, k = np.zeros((1, 512, 1, H)), np.zeros((1, 512, 1, H))
    v, d = rng.random((2, 1, 512, 1, H)) + 0.5
    q, k, v, d = (np.asarray(jnp.asarray(x, jnp.bfloat16)) for x in (q, k, v, d))
    got = run((q, k, v, d), [[1] * 512], None, 32)
    assert {x.dtype for x in got} == {jnp.dtype(jnp.bfloat16)}
    out = np.cumsum(v.astype("f8"), 1) / np.arange(1, 513)[None, :, None, None]
    dv = np.cumsum((d.astype("f8") / np.arange(1, 513)[None, :, None, None])[:, ::-1], 1)[:, ::-1]
    assert_close((got[0], got[3]), (out, dv), BF16)


def test_bfloat16_equals_float64_of_the_rounded_inputs():
    q, k, v, d = (np.asarray(jnp.asarray(x, jnp.bfloat16)) for x in world(12))
    got = run((q, k, v, d), CASES["ragged"])
    # Outputs are rounded once, 2**-9 of up to about 3; the backward pass also reads the rounded output.
    assert_close(got, by_hand(q, k, v, CASES["ragged"], None, d), {"rtol": 2**-8, "atol": 2**-6})


@st.composite
def segment_rows(draw):
    """Per lane: runs of random length, numbered from 1, any of them padding."""
    rows = []
    for _ in range(G):
        row, number = [], 0
        while len(row) < J:
            length, padding = draw(st.integers(1, J)), draw(st.booleans())
            number += not padding
            row += [0 if padding else number] * length
        rows.append(row[:J])
    return rows


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), segments=segment_rows(), window=st.sampled_from([None, 1, 5]))
def test_any_segments(seed, segments, window):
    arrays = world(seed)
    got = run(arrays, segments, window)
    for x in arrays:
        x[np.array(segments) == 0] = np.nan
    assert_same_bits(run(arrays, segments, window), got)
    loose = {"rtol": 1e-4, "atol": 1e-4}  # some draws cancel
    for x in arrays:
        x[np.array(segments) == 0] = 0
    assert_close(got, run(arrays, segments, window, 0), loose)
