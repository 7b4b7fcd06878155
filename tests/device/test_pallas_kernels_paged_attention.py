"""Attention over KV pages by hand: decode, chunks of a prompt, and pages that hold NaN because nobody uses them."""

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
from pallas_kernels.paged_attention.op import paged_attention, paged_attention_reference

L, P, Z, C, G, J, N, K, H = 2, 14, 4, 3, 4, 3, 9, 3, 16  # 9 query heads over 3 kv heads, 12 tokens at most

# name: (pages of each lane, positions of each lane); -1 is padding, or a column that the sequence does not reach
PREFILL = {
    "mixed lengths": (
        [[0, 1, 2], [3, -1, -1], [4, 5, -1], [6, -1, -1]],
        [[8, 9, 10], [0, 1, 2], [3, 4, 5], [0, -1, -1]],
    ),
    "unordered pages": (
        [[13, 0, 7], [5, 12, 1], [9, 2, -1], [4, 3, 11]],
        [[9, 10, 11], [8, 9, 10], [4, 5, 6], [9, 10, 11]],
    ),
    "three lanes of one sequence": (
        [[6, 2, 8], [6, 2, 8], [6, 2, 8], [1, -1, -1]],
        [[0, 1, 2], [3, 4, 5], [6, 7, 8], [1, 2, 3]],
    ),
    "a shared prefix": (
        [[6, 2, 8], [6, 2, 3], [6, 2, 4], [6, 5, -1]],
        [[8, 9, 10], [8, 9, 10], [8, -1, -1], [4, 5, -1]],
    ),
    "padding and empty lanes": (
        [[-1, -1, -1], [3, 7, -1], [-1, -1, -1], [9, -1, -1]],
        [[-1, -1, -1], [5, 6, -1], [-1, -1, -1], [2, -1, -1]],
    ),
    "nobody": ([[-1] * C] * G, [[-1] * J] * G),
    "page borders": (
        [[0, -1, -1], [1, 2, -1], [3, 4, -1], [5, 6, 7]],
        [[1, 2, 3], [2, 3, 4], [5, 6, 7], [6, 7, 8]],
    ),
}
DECODE = {name: (pages, [[max(p)] for p in positions]) for name, (pages, positions) in PREFILL.items()}
CASES = {f"{name}, prefill": v for name, v in PREFILL.items()} | {f"{name}, decode": v for name, v in DECODE.items()}
named = pytest.mark.parametrize(("pages", "positions"), CASES.values(), ids=CASES.keys())
windows = pytest.mark.parametrize("window", [None, pytest.param(1, marks=pytest.mark.slow), 6])


def by_hand(q, k, v, pages, positions, window):
    """float64 [G, J, N, H] of one layer's pages: one token at a time over the keys it sees."""
    out = np.zeros(q.shape)
    for g, row in enumerate(positions):
        for j, position in enumerate(row):
            if position < 0:
                continue
            first = 0 if window is None else max(0, position - window + 1)
            at = [(pages[g][place // k.shape[1]], place % k.shape[1]) for place in range(first, position + 1)]
            for n in range(q.shape[2]):
                m = n // (q.shape[2] // k.shape[2])
                query = q[g, j, n].astype(np.float64)
                score = np.array([query @ k[page, z, m].astype(np.float64) for page, z in at]) / np.sqrt(q.shape[3])
                p = np.exp(score - score.max())
                p /= p.sum()
                out[g, j, n] = sum(w * v[page, z, m].astype(np.float64) for w, (page, z) in zip(p, at, strict=True))
    return out


@functools.cache
def program(f, window):
    """The op on pages [L, P, Z, K, H], of which it sees heads and features as one axis."""

    def flat(q, k, v, *ids):
        return f(q, *(x.reshape(*x.shape[:3], -1) for x in (k, v)), *ids, window=window)

    return jax.jit(flat)


def world(seed=0):
    """(q, k pages, v pages); q has room for prefill."""
    rng = np.random.default_rng(seed)
    return floats(rng, G, J, N, H), floats(rng, L, P, Z, K, H), floats(rng, L, P, Z, K, H)


def run(arrays, pages, positions, window=None, *, layer=1, f=paged_attention):
    q, k, v = arrays
    q = q[:, : len(positions[0])]
    return program(f, window)(q, k, v, np.int32(layer), np.array(pages, np.int32), np.array(positions, np.int32))


def read(pages, positions):
    """(page, offset) of every key that anybody sees without a window."""
    return {(pages[g][p // Z], p % Z) for g, row in enumerate(positions) for p in range(max(row) + 1)}


def poisoned(arrays, pages, positions, *, layer=1):
    """The same arrays with NaN wherever `layer` is not read: other layers, unused pages, the tail of the last page."""
    q, k, v = arrays
    q, new_k, new_v = q[:, : len(positions[0])].copy(), np.full_like(k, np.nan), np.full_like(v, np.nan)
    q[np.array(positions) < 0] = np.nan
    for page, z in read(pages, positions):
        new_k[layer, page, z], new_v[layer, page, z] = k[layer, page, z], v[layer, page, z]
    return q, new_k, new_v


@named
@windows
def test_oracle_is_the_definition(pages, positions, window):
    q, k, v = world()
    got = run((q, k, v), pages, positions, window, f=paged_attention_reference)
    assert got.dtype == jnp.float32
    assert_close(got, by_hand(q[:, : len(positions[0])], k[1], v[1], pages, positions, window), F32)


@named
@windows
def test_op_equals_oracle_and_hand(pages, positions, window):
    q, k, v = world(1)
    for layer in range(L):
        got = run((q, k, v), pages, positions, window, layer=layer)
        assert_close(got, by_hand(q[:, : len(positions[0])], k[layer], v[layer], pages, positions, window), F32)
        assert_close(got, run((q, k, v), pages, positions, window, layer=layer, f=paged_attention_reference), F32)
        assert not np.asarray(got)[np.array(positions) < 0].any()


@named
@pytest.mark.parametrize("f", [paged_attention, paged_attention_reference], ids=["op", "reference"])
def test_nan_wherever_nobody_reads_changes_no_bit(pages, positions, f):
    clean = run(world(2), pages, positions, f=f)
    got = run(poisoned(world(2), pages, positions), pages, positions, f=f)
    assert_same_bits(got, clean)
    assert_no_nan(got)


@pytest.mark.parametrize("stray", [-1, 0, P - 1, P, 10**6], ids=["none", "first", "last", "one too far", "far off"])
def test_entries_past_the_end_of_a_sequence_are_read_by_nobody(stray):
    pages, positions = PREFILL["mixed lengths"]
    clean = run(world(3), pages, positions)
    arrays = poisoned(world(3), pages, positions)  # page P - 1 is all NaN
    changed = [[stray if page == -1 else page for page in row] for row in pages]
    assert_same_bits(run(arrays, changed, positions), clean)


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_nan_of_one_sequence_stays_with_its_lanes(kind):
    """Lanes 0 to 2 are one sequence; lane 3 is another tenant's."""
    pages, positions = CASES[f"three lanes of one sequence, {kind}"]
    clean = run(world(4), pages, positions)
    q, k, v = world(4)
    q[:3], k[:, [6, 2, 8]], v[:, [6, 2, 8]] = np.nan, np.nan, np.nan
    got = run((q, k, v), pages, positions)
    assert_same_bits(got[3], clean[3])
    assert np.isnan(np.asarray(got)[:3]).all()
    q, k, v = world(4)
    q[3], k[:, 1], v[:, 1] = np.nan, np.nan, np.nan
    got = run((q, k, v), pages, positions)
    assert_same_bits(got[:3], clean[:3])
    assert np.isnan(np.asarray(got)[3]).all()


@pytest.mark.parametrize("kind", ["prefill", "decode"])
@windows
def test_a_lane_does_not_depend_on_neighbours_place_or_pages(kind, window):
    """A longer neighbour makes this lane visit more columns, which must add exact zeros."""
    tokens = J if kind == "prefill" else 1
    q, k, v = world(5)
    mine, place = [3, 9], [4, 5, 6][:tokens]
    empty = [[-1] * C] * G, [[-1] * tokens] * G
    long = [8, 9, 10][:tokens]
    want = None
    for lane in range(G):
        for neighbours in (empty, ([[0, 1, 2]] * G, [long] * G)):
            for where in (mine, [11, 5]):
                pages, positions = ([list(row) for row in rows] for rows in neighbours)
                pages[lane], positions[lane] = [*where, -1], place
                new_q, new_k, new_v = q.copy(), k.copy(), v.copy()
                new_q[lane] = q[0]
                new_k[:, where], new_v[:, where] = k[:, mine], v[:, mine]
                got = run((new_q, new_k, new_v), pages, positions, window)[lane]
                want = got if want is None else want
                assert_same_bits(got, want)


def test_chunks_of_a_prompt_equal_the_prompt_token_by_token():
    pages, positions = PREFILL["three lanes of one sequence"]
    q, k, v = world(6)
    whole = np.asarray(run((q, k, v), pages, positions))
    for lane in range(G):
        for j in range(J):
            one = np.repeat(q[lane, j][None, None], G, axis=0)
            (got,) = np.asarray(run((one, k, v), [pages[lane]] * G, [[positions[lane][j]]] * G))[0]
            assert_close(got, whole[lane, j], F32)


def test_huge_scores_do_not_overflow():
    q, k, v = world(7)
    pages, positions = PREFILL["unordered pages"]
    got = run((q * 1e3, k * 1e3, v), pages, positions)
    assert_no_nan(got)
    assert_close(got, by_hand(q * 1e3, k[1] * 1e3, v[1], pages, positions, None), {"rtol": 1e-2, "atol": 1e-2})


@pytest.mark.parametrize("cases", [PREFILL, DECODE], ids=["prefill", "decode"])
def test_pages_positions_and_layers_are_data(cases):
    f = program(paged_attention, 6)
    calls = []
    for i, (pages, positions) in enumerate(cases.values()):
        q, k, v = world(i)
        ids = np.int32(i % L), np.array(pages, np.int32), np.array(positions, np.int32)
        calls.append(jax.device_put((q[:, : len(positions[0])], k, v, *ids)))
    jax.block_until_ready(f(*calls[0]))
    with CompileCounter() as counter:
        for call in calls:
            jax.block_until_ready(f(*call))
    assert not counter.retraced


def test_bfloat16_sums_in_float32():
    """512 keys of equal weight, on pages of 128: a bfloat16 sum stops growing at 256 terms."""
    rng = np.random.default_rng(8)
    v = np.asarray(jnp.asarray(rng.random((1, 4, 128, 1, H)) + 0.5, jnp.bfloat16))
    q = np.zeros((1, 1, 1, H), v.dtype)
    got = run((q, np.zeros_like(v), v), [[2, 0, 3, 1]], [[511]], layer=0)
    assert got.dtype == jnp.bfloat16
    assert_close(got[0, 0, 0], v.astype("f8").mean((0, 1, 2, 3)), BF16)


@named
def test_bfloat16_equals_float64_of_the_rounded_inputs(pages, positions):
    q, k, v = (np.asarray(jnp.asarray(x, jnp.bfloat16)) for x in world(9))
    got = run((q, k, v), pages, positions)
    # q is scaled in bfloat16: scores of about 3 move by 3 * 2**-8; weights and output are rounded to 2**-8 of about 3.
    want = by_hand(q[:, : len(positions[0])], k[1], v[1], pages, positions, None)
    assert_close(got, want, {"rtol": 2**-6, "atol": 2**-5})


@st.composite
def tables(draw):
    """(pages, positions): every lane a sequence of its own, any length, on pages that nobody shares."""
    order = draw(st.permutations(range(P)))
    pages, positions, taken = [], [], 0
    for _ in range(G):
        start = draw(st.integers(-1, C * Z - 1))
        count = draw(st.integers(1, J)) if start >= 0 else 0
        row = [start + j if j < count and start + j < C * Z else -1 for j in range(J)]
        columns = max(row) // Z + 1 if start >= 0 else 0
        pages.append([*order[taken : taken + columns], *[-1] * (C - columns)])
        taken += columns
        positions.append(row)
    return pages, positions


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), table=tables(), window=st.sampled_from([None, 1, 6]))
def test_any_table(seed, table, window):
    q, k, v = world(seed)
    got = run(poisoned((q, k, v), *table), *table, window)
    loose = {"rtol": 1e-4, "atol": 1e-4}  # some draws cancel
    assert_close(got, by_hand(q, k[1], v[1], *table, window), loose)
