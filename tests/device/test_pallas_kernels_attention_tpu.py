"""The Pallas bodies of attention, interpreted on the CPU: the reference's numbers, and nobody's NaN but one's own.

With the plugin triton_interpreter the same tests run the Triton bodies, those named after the TPU's visits aside.  Shapes
are tiny: interpretation is slow.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_pallas_kernels_attention as packed
import test_pallas_kernels_paged_attention as paged
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import (
    BF16,
    F32,
    assert_close,
    assert_no_nan,
    assert_same_bits,
    cases_of_a_body,
    floats,
    positive,
)

from pallas_kernels import dispatch, tiling_tpu
from pallas_kernels.attention.op import packed_attention
from pallas_kernels.paged_attention import pallas_tpu as paged_attention_tpu
from pallas_kernels.paged_attention.op import paged_attention

# ---- pages ------------------------------------------------------------------------------------------------------------


def interpreted_paged(*args, window):
    with dispatch.interpreted():
        return paged_attention(*args, window=window)


def run(arrays, pages, positions, window=None):
    return paged.run(arrays, pages, positions, window, f=interpreted_paged)


def hand(arrays, pages, positions, window):
    q, k, v = arrays
    return paged.by_hand(q[:, : len(positions[0])], k[1], v[1], pages, positions, window)


@pytest.mark.parametrize(
    ("pages", "positions"), cases_of_a_body(paged.CASES, "mixed lengths, prefill", "mixed lengths, decode")
)
@pytest.mark.parametrize("window", [None, 6])
def test_paged_is_the_definition_whatever_else_the_pages_hold(pages, positions, window):
    world = paged.world(1)
    got = run(paged.poisoned(world, pages, positions), pages, positions, window)
    assert_close(got, hand(world, pages, positions, window), F32)
    assert_same_bits(got, run(world, pages, positions, window))
    assert not np.asarray(got)[np.array(positions) < 0].any()


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 50])
@pytest.mark.parametrize("tokens", cases_of_a_body({"decode": 1, "prompt": 40}, "prompt"))
def test_paged_long_sequences_equal_the_oracle_whoever_is_beside(tokens, window):
    """Ragged lanes, more rows and keys than a kernel takes at once, heads that fill no tile."""
    rng = np.random.default_rng(10)
    q, k, v = floats(rng, 3, tokens, 6, 5), floats(rng, 2, 30, 16, 2, 5), floats(rng, 2, 30, 16, 2, 5)
    pages = rng.permutation(30).reshape(3, 10).astype(np.int32)
    long, short = np.arange(100, 140)[-tokens:], np.where(np.arange(tokens) < 30, np.arange(tokens), -1)
    positions = np.stack([long, np.full(tokens, -1), short]).astype(np.int32)
    got = paged.run((q, k, v), pages, positions, window, f=interpreted_paged)
    assert_close(got, paged.run((q, k, v), pages, positions, window, f=paged.paged_attention_reference), F32)
    for lane in (0, 2):
        alone = np.where(np.arange(3)[:, None] == lane, positions, -1)
        assert_same_bits(paged.run((q, k, v), pages, alone, window, f=interpreted_paged)[lane], got[lane])


LONG = np.array(
    [[2100], [40], [-1], [1024], [1023], [2559]], np.int32
)  # keys of three programs, of one, and the ends between


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 1100])
def test_paged_long_and_short_contexts_decode_together_as_alone(window):
    """Of the Triton body: the parts of a long lane are joined, and their number does not depend on the table's width."""
    rng = np.random.default_rng(11)
    q, k, v = floats(rng, 6, 1, 4, 8), floats(rng, 2, 240, 64, 2, 8), floats(rng, 2, 240, 64, 2, 8)
    pages = rng.permutation(240).reshape(6, 40).astype(np.int32)
    got = paged.run((q, k, v), pages, LONG, window, f=interpreted_paged)
    # Sums of up to 2560 terms instead of some hundred.
    close = {"rtol": 3e-5, "atol": 3e-5}
    assert_close(got, paged.run((q, k, v), pages, LONG, window, f=paged.paged_attention_reference), close)
    for lane in (0, 3):
        alone = np.where(np.arange(6)[:, None] == lane, LONG, -1)
        assert_same_bits(paged.run((q, k, v), pages, alone, window, f=interpreted_paged)[lane], got[lane])
    short = paged.run((q[1:2], k, v), pages[1:2, :2], LONG[1:2], window, f=interpreted_paged)
    assert_same_bits(short[0], got[1])


def one_page_a_visit(monkeypatch, tokens_of_a_run):
    monkeypatch.setattr(paged_attention_tpu, "KEYS", 4)
    monkeypatch.setattr(paged_attention_tpu, "ROWS", 3 * tokens_of_a_run)
    return jax.jit(functools.partial(interpreted_paged, window=6))


def flat(arrays):
    q, k, v = arrays
    return q, *(x.reshape(*x.shape[:3], -1) for x in (k, v))


@pytest.mark.parametrize("name", cases_of_a_body({name: name for name in paged.PREFILL}, "mixed lengths"))
def test_paged_in_many_visits_is_the_definition(name, monkeypatch):
    """A run is one token of its lane, a visit one page, and the window's past is not visited."""
    pages, positions = paged.PREFILL[name]
    world, ids = paged.world(2), (np.array(pages, np.int32), np.array(positions, np.int32))
    f = one_page_a_visit(monkeypatch, 1)
    assert paged_attention_tpu.cut(world[0], flat(world)[1], ids[0]) == paged_attention_tpu.Cut(tokens=1, pages=1)
    got = f(*flat(paged.poisoned(world, pages, positions)), np.int32(1), *ids)
    assert_close(got, hand(world, pages, positions, 6), F32)


def test_paged_runs_without_tokens_are_not_visited():
    """Runs at positions 8 to 10, nobody, 4 and 5, nobody, 0 alone."""
    positions = np.array([[8, 9, 10], [-1, -1, -1], [4, 5, -1], [-1, -1, -1], [0, -1, -1]], np.int32)
    order, least, last, count = paged_attention_tpu.visited(positions)
    assert (order.tolist(), count) == ([0, 2, 4, 1, 3], 3)
    assert [(int(least[s]), int(last[s])) for s in (0, 2, 4)] == [(8, 10), (4, 5), (0, 0)]
    assert paged_attention_tpu.visited(np.full((2, 3), -1, np.int32))[-1] == 0


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_paged_nan_of_one_sequence_stays_with_its_lanes(kind):
    pages, positions = paged.CASES[f"three lanes of one sequence, {kind}"]
    clean = run(paged.world(4), pages, positions)
    q, k, v = paged.world(4)
    q[:3], k[:, [6, 2, 8]], v[:, [6, 2, 8]] = np.nan, np.nan, np.nan
    got = run((q, k, v), pages, positions)
    assert_same_bits(got[3], clean[3])
    assert np.isnan(np.asarray(got)[:3]).all()


def test_paged_bfloat16_sums_in_float32():
    """512 keys of equal weight: a bfloat16 sum stops growing at 256 terms."""
    rng = np.random.default_rng(8)
    v = np.asarray(jnp.asarray(rng.random((1, 4, 128, 1, 4)) + 0.5, jnp.bfloat16))
    q = np.zeros((1, 1, 1, 4), v.dtype)
    got = paged.run((q, np.zeros_like(v), v), [[2, 0, 3, 1]], [[511]], layer=0, f=interpreted_paged)
    assert got.dtype == jnp.bfloat16
    assert_close(got[0, 0, 0], v.astype("f8").mean((0, 1, 2, 3)), BF16)


def test_paged_huge_scores_do_not_overflow():
    q, k, v = paged.world(7)
    pages, positions = paged.PREFILL["unordered pages"]
    assert_no_nan(run((q * 1e3, k * 1e3, v), pages, positions))


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), table=paged.tables(), window=st.sampled_from([None, 6]))
def test_paged_any_table(seed, table, window):
    world = paged.world(seed)
    loose = {"rtol": 1e-4, "atol": 1e-4}  # some draws cancel
    assert_close(run(paged.poisoned(world, *table), *table, window), hand(world, *table, window), loose)


def test_paged_blocks_shrink_until_they_have_room(monkeypatch):
    """Longer tables than scalar memory, and one token's heads larger than the chip, are refused."""

    def cut(columns, heads=32, tokens=1):
        shapes = (4, tokens, heads, 128), (2, 9, 64, heads * 32), (4, columns)
        return paged_attention_tpu.cut(*(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes))

    assert cut(128) == cut(2**13) == paged_attention_tpu.Cut(tokens=1, pages=8)
    assert cut(128, tokens=512) == paged_attention_tpu.Cut(tokens=64, pages=8)
    assert cut(2**15) is None
    monkeypatch.setitem(tiling_tpu.TABLE, "any TPU", tiling_tpu.Blocks(vmem_bytes=2**21, tokens=16))
    assert cut(128) == paged_attention_tpu.Cut(tokens=1, pages=2)
    monkeypatch.setitem(tiling_tpu.TABLE, "any TPU", tiling_tpu.Blocks(vmem_bytes=2**19, tokens=16))
    assert cut(128) is None


# ---- packed lanes -----------------------------------------------------------------------------------------------------


@functools.cache
def program(window):
    """jit of (out, dq, dk, dv)."""

    def both(q, k, v, segment, d):
        with dispatch.interpreted():
            out, pull = jax.vjp(lambda q, k, v: packed_attention(q, k, v, segment, window=window), q, k, v)
            return out, *pull(d.astype(out.dtype))

    return jax.jit(both)


def run_packed(arrays, segments, window=None):
    q, k, v, d = arrays
    return program(window)(q, k, v, np.array(segments, np.int32), d)


@pytest.mark.parametrize("segments", cases_of_a_body(packed.CASES, "padding in front and between"))
@pytest.mark.parametrize("window", [None, 5])
def test_packed_is_the_definition_whatever_padding_holds(segments, window):
    q, k, v, d = packed.world()
    want, clean = packed.by_hand(q, k, v, segments, window, d), run_packed((q, k, v, d), segments, window)
    padding = np.array(segments) == 0
    for x in (q, k, v, d):
        x[padding] = np.nan
    got = run_packed((q, k, v, d), segments, window)
    assert_close(got, want, F32)
    assert_same_bits(got, clean)
    assert not any(np.asarray(x)[padding].any() for x in got)


@pytest.mark.parametrize(
    ("heads", "kv", "features"),
    [(9, 3, 64), *(pytest.param(*n, marks=pytest.mark.slow) for n in ((4, 1, 5), (2, 2, 24)))],
)
def test_packed_of_other_heads_equals_the_reference(heads, kv, features):
    """Query heads that are no power of two, and features that fill no tile; of fewer tokens than a tile has."""
    rng = np.random.default_rng(3)
    arrays = [floats(rng, 2, 13, n, features) for n in (heads, kv, kv, heads)]
    segments = np.array([[1] * 4 + [0] * 2 + [2] * 7, [1] * 13], np.int32)

    def definition(q, k, v, d):
        out, pull = jax.vjp(lambda *qkv: packed.packed_attention_reference(*qkv, segments, window=6), q, k, v)
        return out, *pull(d)

    assert_close(run_packed(arrays, segments, 6), jax.jit(definition)(*arrays), F32)


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 100])
def test_packed_in_many_blocks_equals_the_xla_body(window, monkeypatch):
    """300 tokens are three blocks of 128, the last not full; segments and the window end inside blocks."""
    monkeypatch.setitem(tiling_tpu.TABLE, "any TPU", tiling_tpu.Blocks(vmem_bytes=2**24, tokens=128))
    rng = np.random.default_rng(1)
    q, k, v, d = (floats(rng, 2, 300, n, 4) for n in (4, 2, 2, 4))
    segments = np.array([[1] * 190 + [2] * 110, [1] * 40 + [2] * 250 + [0] * 10], np.int32)

    def values(q, k, v, d):
        out, pull = jax.vjp(lambda *qkv: packed_attention(*qkv, segments, window=window, block=300), q, k, v)
        return out, *pull(d)

    want = jax.jit(values)(q, k, v, d)
    with dispatch.interpreted():
        got = jax.jit(values)(q, k, v, d)
    assert_close(got, want, {"rtol": 1e-4, "atol": 1e-5})  # sums of up to 250 terms


@pytest.mark.parametrize("bad", range(4), ids=["q", "k", "v", "cotangent"])
def test_packed_nan_of_a_lane_stays_in_it(bad):
    segments = packed.CASES["ragged"]
    clean = run_packed(packed.world(2), segments)
    arrays = packed.world(2)
    arrays[bad][1] = np.nan
    got = run_packed(arrays, segments)
    others = np.array([0, 2])
    assert_same_bits(packed.lanes(got, others), packed.lanes(clean, others))
    assert any(np.isnan(np.asarray(x)[1]).all() for x in got)


def test_packed_bfloat16_sums_in_float32():
    """512 keys of equal weight: a bfloat16 sum stops growing at 256 terms."""
    rng = np.random.default_rng(8)
    v = positive(rng, 1, 512, 1, 4)
    q = np.zeros((1, 512, 1, 4), v.dtype)
    with dispatch.interpreted():
        got = packed_attention(q, np.zeros_like(v), v, np.ones((1, 512), np.int32), window=None)
    assert got.dtype == jnp.bfloat16
    want = np.cumsum(v.astype("f8"), 1) / np.arange(1, 513)[None, :, None, None]
    assert_close(got, want, BF16)
