"""The kernels of target log-probabilities, interpreted on the CPU: the definition's numbers, and nobody's NaN but one's own.

The Pallas bodies, or with the plugin triton_interpreter the Triton bodies.  Shapes are tiny: interpretation is slow.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_pallas_kernels_cross_entropy as loss
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import F32, assert_close, assert_no_nan, assert_same_bits, cases_of_a_body, floats

from pallas_kernels import dispatch, tiling_tpu
from pallas_kernels.cross_entropy import pallas_tpu as cross_entropy_tpu
from pallas_kernels.cross_entropy.op import target_logprob, target_logprob_reference

G, J = loss.G, loss.J
named = pytest.mark.parametrize("wanted", cases_of_a_body(loss.CASES, "mixed"))
both_heads = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def step(form, lora, x, head, target, wanted, a, b, scale, d):
    """(logprob, hit, gradients by x, head, back and by the head's LoRA); form: tied or not, None is the reference."""

    def forward(x, head, back, rows):
        rows = rows if lora else None
        if form is None:
            return target_logprob_reference(x, head, target, wanted, rows)
        return target_logprob(x, head, back, target, wanted, rows, chunk=1, tied=form)

    with dispatch.interpreted():  # the backward pass is traced when the gradient is taken, so inside as well
        (logprob, hit), pull = jax.vjp(forward, x, head, head.T, (a, b, scale))
        return logprob, hit, *pull((d, np.zeros(hit.shape, jax.dtypes.float0)))


program = functools.cache(lambda form, lora: jax.jit(functools.partial(step, form, lora)))


def run(arrays, wanted, form=False, lora=True, program=program):
    """(logprob, hit, dx, da, db, dscale)"""
    x, head, target, a, b, scale, d = arrays
    logprob, hit, dx, _, _, rows = program(form, lora)(x, head, target, np.array(wanted, bool), a, b, scale, d)
    return logprob, hit, dx, *rows


@named
@loss.with_and_without_lora
@both_heads
def test_equals_oracle_and_hand_forward_and_backward(wanted, lora, tied):
    got = run(loss.world(1), wanted, tied, lora)
    assert [(v.dtype, v.shape) for v in got[:2]] == [(jnp.float32, (G, J, loss.K)), (bool, (G, J, loss.K))]
    assert_close(got, loss.want(loss.world(1), wanted, lora), F32)
    assert_close(got, run(loss.world(1), wanted, None, lora), F32)


def wide_world(seed, targets, dtype=jnp.float32):
    """Three lanes of 40 tokens over 1000 words, logits of size about 1."""
    rng = np.random.default_rng(seed)
    D, V, R, tokens = 96, 1000, 5, 40
    x, head = (np.asarray(v, dtype) for v in (floats(rng, G, tokens, D), floats(rng, D, V) / 10))
    rows = floats(rng, G, R, D) / 10, floats(rng, G, R, V) / 2, floats(rng, G)
    target = rng.integers(0, V, (G, tokens, targets), dtype=np.int32)
    target[:, ::3, 0] = rng.choice([0, 127, 128, 895, 896, 999], target[:, ::3, 0].shape)  # ends of tiles
    return (x, head, target, *rows, floats(rng, G, tokens, targets)), rng.random((G, tokens)) < [[0.4], [1], [0.1]]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of two lanes, 16 tokens of each, and 128 words."""
    monkeypatch.setattr(cross_entropy_tpu, "WIDEST", 1)
    monkeypatch.setitem(tiling_tpu.TABLE, "any TPU", tiling_tpu.Blocks(vmem_bytes=16 * 2**20, tokens=32))
    return lambda form, lora: jax.jit(functools.partial(step, form, lora))


@pytest.mark.parametrize("targets", [pytest.param(1, marks=pytest.mark.slow), 4])
@loss.with_and_without_lora
@both_heads
def test_in_many_blocks_equals_the_reference(targets, lora, tied, small_blocks):
    """Every loop turns: three trips, blocks of lanes of which the last is not full, tiles that end past the vocabulary.

    Gradients of rows are sums of 40 products and of 1000, of size 1: F32, which is for some hundred terms, times 3.
    """
    arrays, wanted = wide_world(2, targets)
    by_word = cross_entropy_tpu.by_word(tied, 96)
    cut = cross_entropy_tpu.cut(*arrays[:2], targets, arrays[4] if lora else None, by_word=by_word, back=True)
    assert (cut.lanes, cut.tokens, cut.words) == (2, 16, 128)
    got = run(arrays, wanted, tied, lora, small_blocks)
    assert_close(got, run(arrays, wanted, None, lora), {"rtol": 3e-5, "atol": 3e-5})


def test_a_head_by_word_in_many_blocks_equals_the_reference(small_blocks):
    """Features of whole tiles of 128, tied: read as [V, D]."""
    arrays, wanted = wide_world(3, 2)
    x, head, target, a, *rest = arrays
    arrays = (*(np.pad(v, [(0, 32 if n == 96 else 0) for n in v.shape]) for v in (x, head, target, a)), *rest)
    assert cross_entropy_tpu.by_word(True, arrays[0].shape[2])
    got = run(arrays, wanted, True, True, small_blocks)
    assert_close(got, run(arrays, wanted, None, True), {"rtol": 3e-5, "atol": 3e-5})


@loss.with_and_without_lora
def test_more_lanes_than_one_block_equal_the_reference(lora):
    """Ten lanes: of the Triton bodies two blocks, the last not full."""
    worlds, wanted = [loss.world(seed) for seed in range(20, 24)], [*loss.CASES.values()][:4]
    _, head, *_ = worlds[0]
    x, _, *rest = (np.concatenate(parts)[:10] for parts in zip(*worlds, strict=True))
    arrays, wanted = (x, head, *rest), np.concatenate(wanted)[:10]
    assert_close(run(arrays, wanted, False, lora), run(arrays, wanted, None, lora), F32)


@loss.with_and_without_lora
def test_bfloat16_is_the_oracle_of_the_same_numbers(lora):
    """Logits: products of bfloat16 numbers in float32, but h of LoRA is rounded first: 2**-8 of five terms of size 1.

    Gradients: d_logits and dh too are rounded, then sums of up to 1000 terms whose roundings cancel; dx and da end in
    bfloat16.  So the largest error is compared with the largest value: 3 roundings, 3 * 2**-8.
    """
    arrays, wanted = wide_world(4, 2, jnp.bfloat16)
    got = run(arrays, wanted, False, lora)
    x, head, *rest = arrays
    want = run((x.astype(np.float32), head.astype(np.float32), *rest), wanted, None, lora)
    assert got[2].dtype == jnp.bfloat16
    assert_close(got[0], want[0], {"rtol": 0, "atol": 5 * 2**-8 if lora else 1e-4})
    for g, w in zip(got[2:], want[2:], strict=True):
        assert_close(g, w, {"rtol": 0, "atol": 3 * 2**-8 * np.abs(w).max() + 1e-6})


def test_bfloat16_sums_in_float32():
    """Equal terms over 512 features, and a log-sum over 600 tokens: a bfloat16 sum stops growing at 256 terms."""
    rng = np.random.default_rng(11)
    x = np.asarray(jnp.full((1, 2, 512), 0.125, jnp.bfloat16))
    head = np.asarray(jnp.asarray(rng.random((512, 600)) / 8, jnp.bfloat16))
    a, b = np.zeros((1, 1, 512), np.float32), np.zeros((1, 1, 600), np.float32)
    target, d, scale = np.array([[[3], [599]]], np.int32), np.ones((1, 2, 1), np.float32), np.ones(1, np.float32)
    got = run((x, head, target, a, b, scale, d), [[1, 1]])
    hand = loss.by_hand(x, head, target, [[1, 1]], a, b, scale, d)
    assert_close(got[0], hand[0], F32)
    # The gradient of the logits is rounded: 2**-8 of entries that sum to at most 2, each times at most 1/8; dx once more.
    assert_close(got[2], hand[2], {"rtol": 0, "atol": 2 * 2**-8 / 8 + 2**-8 / 8})


@named
@pytest.mark.parametrize("garbage", [np.inf, np.nan])
def test_what_unwanted_positions_hold_changes_no_bit(wanted, garbage):
    clean = run(loss.world(4), wanted)
    x, head, target, a, b, scale, d = loss.world(4)
    off = ~np.array(wanted, bool)
    x[off], d[off], target[off] = garbage, garbage, 0
    got = run((x, head, target, a, b, scale, d), wanted)
    assert_same_bits(got, clean)
    assert_no_nan(*got)
    for y in got[:3]:
        assert not np.asarray(y)[off].any()


@pytest.mark.parametrize("bad", ["x", "lora", "d", "all"])
def test_nan_of_a_lane_stays_in_it_forward_and_backward(bad):
    """Lanes share a block, and with it a product."""
    wanted = loss.CASES["answers at the end"]
    clean, arrays = run(loss.world(5), wanted), loss.world(5)
    for i in {"x": [0], "lora": [3, 4, 5], "d": [6], "all": [0, 3, 4, 5, 6]}[bad]:
        arrays[i][1] = np.nan
    got = run(arrays, wanted)
    for g, c in zip(got, clean, strict=True):
        assert_same_bits(g[np.array([0, 2])], c[np.array([0, 2])])
    assert np.isnan(np.asarray(got[3])[1]).all()


def test_a_lane_does_not_depend_on_neighbours_or_place():
    arrays, mine = loss.world(6), loss.CASES["mixed"][1]
    clean = run(arrays, [[0] * J, mine, [0] * J])
    for place in range(G):
        for neighbour in ([0] * J, [1] * J):
            other, wanted = loss.world(7 + place), [neighbour] * G
            for i in (0, 2, 3, 4, 5, 6):
                other[i][place] = arrays[i][1]
            wanted[place] = mine
            for g, c in zip(run((other[0], arrays[1], *other[2:]), wanted), clean, strict=True):
                assert_same_bits(g[place], c[1])


def test_a_smaller_rank_is_zero_rows_that_stay_zero():
    arrays = loss.world(2)
    arrays[3][:, 1:], arrays[4][:, 1:] = 0, 0
    got = run(arrays, loss.CASES["mixed"])
    for half in got[3:5]:
        assert not np.asarray(half)[:, 1:].any()
        assert np.asarray(half)[0, :1].all()


def test_the_frozen_head_gets_no_gradient():
    x, head, target, a, b, scale, d = loss.world(8)
    _, _, _, dhead, dback, _ = program(False, True)(x, head, target, np.ones((G, J), bool), a, b, scale, d)
    assert_same_bits((dhead, dback), (np.zeros_like(head), np.zeros_like(head.T)))


def test_a_tie_for_the_likeliest_token_is_a_hit():
    """All logits are 0: no token is likelier than the target, whichever it is."""
    x, *rest = loss.world(9)
    logprob, hit, *_ = run((np.zeros_like(x), *rest), loss.CASES["all wanted"])
    assert np.asarray(hit).all()
    assert_close(logprob, np.full(hit.shape, -np.log(loss.V)), F32)


def test_huge_logits_do_not_overflow():
    x, head, *rest = loss.world(10)
    got = run((x * 1e3, head * 1e3, *rest), loss.CASES["mixed"])
    assert_no_nan(*got)
    want = loss.want((x * 1e3, head * 1e3, *rest), loss.CASES["mixed"])
    assert_close(got[0], want[0], {"rtol": 1e-4, "atol": 1e-4})


@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**32 - 1),
    wanted=st.lists(st.lists(st.booleans(), min_size=J, max_size=J), min_size=G, max_size=G),
    tied=st.booleans(),
)
def test_any_wanted(seed, wanted, tied):
    x, *rest = loss.world(seed)
    clean = loss.want((x, *rest), wanted)
    x[~np.array(wanted)] = np.nan
    assert_close(run((x, *rest), wanted, tied), clean, {"rtol": 1e-4, "atol": 1e-4})  # some draws cancel
