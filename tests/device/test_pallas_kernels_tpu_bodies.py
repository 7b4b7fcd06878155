"""The Pallas bodies, interpreted on the CPU, against the references: what they compute, and whose numbers reach whom.

With the plugin triton_interpreter the same tests run the Triton bodies.  Shapes are tiny: interpretation is slow.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
    gathered,
    positive,
)

from pallas_kernels import dispatch, tiling_tpu
from pallas_kernels.gathered_lora import pallas_tpu as gathered_lora_tpu
from pallas_kernels.gathered_lora.op import gathered_lora, gathered_lora_reference
from pallas_kernels.gathered_lora.pool_rows import PoolRows, of_slots
from pallas_kernels.gathered_lora.rank_classes import ROW_TILE, first_rows, tile_count
from pallas_kernels.segmented_lora import pallas_tpu as segmented_lora_tpu
from pallas_kernels.segmented_lora.op import segmented_lora, segmented_lora_reference

# ---- gathered ---------------------------------------------------------------------------------------------------------

L, S, R, X, Y, Y2, T = 2, 4, 4, 12, 8, 5, 7

SLOTS = {
    "mixed": [0, 2, -1, 1, 3, 2, 0],
    "one adapter": [2] * T,
    "nobody": [-1] * T,
    "base beside tuned": [-1, 1, -1, -1, 1, -1, 1],
    "last slot first": [3, 0, 3, 0, 0, 3, 3],
    "last token tuned": [-1, -1, -1, -1, -1, -1, 3],
}
named = pytest.mark.parametrize("slots", cases_of_a_body(SLOTS, "mixed"))


@jax.jit
def run(x, rows, layer, slots):
    with dispatch.interpreted():
        return gathered(x, rows, layer, slots)


def pool(seed):
    """x [T, X] and two targets of rows (a, b, scale) that share it."""
    rng = np.random.default_rng(seed)
    rows = [(floats(rng, L, S, R, X), floats(rng, L, S, R, y), floats(rng, L, S)) for y in (Y, Y2)]
    return floats(rng, T, X), rows


def ids(slots):
    return np.array(slots, np.int32)


def without(rows, keep, layer):
    """Rows in which only the slots of `keep`, in one layer, are numbers."""
    out = []
    for row in rows:
        new = tuple(np.full_like(x, np.nan) for x in row)
        for slot in keep:
            for to, of in zip(new, row, strict=True):
                to[layer, slot] = of[layer, slot]
        out.append(new)
    return out


@named
def test_gathered_equals_oracle_whatever_the_other_slots_hold(slots):
    x, rows = pool(0)
    got = run(x, without(rows, {s for s in slots if s >= 0}, 1), jnp.int32(1), ids(slots))
    for y, (a, b, scale) in zip(got, rows, strict=True):
        assert_close(y, gathered_lora_reference(x, a[1], b[1], scale[1], ids(slots)), F32)
        assert not np.asarray(y)[ids(slots) == -1].any()


@pytest.mark.parametrize("poison", range(S))
def test_gathered_nan_of_one_tenant_stays_with_its_tokens(poison):
    x, rows = pool(1)
    clean = run(x, rows, jnp.int32(0), ids(SLOTS["mixed"]))
    got = run(x, without(rows, set(range(S)) - {poison}, 0), jnp.int32(0), ids(SLOTS["mixed"]))
    others = ids(SLOTS["mixed"]) != poison
    for g, c in zip(got, clean, strict=True):
        assert_same_bits(g[others], c[others])
        assert np.isnan(g[~others]).all()


def test_gathered_nan_of_a_base_token_stays_away():
    x, rows = pool(2)
    clean = run(x, rows, jnp.int32(0), ids(SLOTS["mixed"]))
    x[2] = np.nan
    assert_same_bits(run(x, rows, jnp.int32(0), ids(SLOTS["mixed"])), clean)


@pytest.mark.parametrize("poison", [0, 3, 4])
def test_gathered_slots_of_several_ranks_share_tiles_and_no_numbers(poison):
    """Slots of rank 16, 8, 8, 4, 4 and 4: two of the last lie in one tile.  Adapters may fill less than their slot."""
    classes, owned, ranks = ((1, 16), (2, 8), (3, 4)), [16, 8, 8, 4, 4, 4], [11, 8, 5, 4, 3, 1]
    rng, first = np.random.default_rng(9), np.cumsum([0, *owned])
    x, scale = floats(rng, T, X), floats(rng, L, 6)
    slots = ids([3, 4, 0, -1, 5, 2, 3])
    targets, wanted = [], []
    for features in (Y, Y2):
        a, b = (np.zeros((L, 48, n), np.float32) for n in (X, features))
        by_slot = [(floats(rng, L, rank, X), floats(rng, L, rank, features)) for rank in ranks]
        for i, (own_a, own_b) in enumerate(by_slot):
            for whole, own in ((a, own_a), (b, own_b)):
                whole[:, first[i] : first[i] + owned[i]] = np.nan if i == poison else 0
                if i != poison:
                    whole[:, first[i] : first[i] + ranks[i]] = own
        a_LNRX, b_LNRY = (jnp.asarray(half.reshape(L, 6, 8, -1)) for half in (a, b))
        targets.append(
            PoolRows(
                a_LNRX=a_LNRX,
                b_LNRY=b_LNRY,
                scale_LS=jnp.asarray(scale),
                rank_S=jnp.array(ranks, jnp.int32),
                classes=classes,
            )
        )
        wanted.append(
            [x[t] @ by_slot[s][0][1].T @ by_slot[s][1][1] * scale[1, s] if s >= 0 else 0 for t, s in enumerate(slots)]
        )
    with dispatch.interpreted():
        got = jax.jit(gathered_lora)(x, targets, jnp.int32(1), slots)
    for y, rows in zip(got, wanted, strict=True):
        for t in range(T):
            if slots[t] != poison:
                assert_close(y[t], np.broadcast_to(rows[t], y[t].shape).astype(np.float32), F32)


def test_gathered_smallest_shapes():
    x, [(a, b, scale), _] = pool(3)
    a, b = a[:, :, :1], b[:, :, :1]
    (got,) = run(x[:1], [(a, b, scale)], jnp.int32(0), ids([3]))
    assert_close(got, gathered_lora_reference(x[:1], a[0], b[0], scale[0], ids([3])), F32)


def test_gathered_busy_adapter_and_wide_features():
    """More tokens of one adapter, and more features, than fit into one block."""
    rng = np.random.default_rng(7)
    slots = rng.permutation(ids([1] * 35 + [3] * 2 + [-1] * 3))
    x, y_sizes = floats(rng, len(slots), 700), (300, Y)
    rows = [(floats(rng, 1, S, R, 700), floats(rng, 1, S, R, y), floats(rng, 1, S)) for y in y_sizes]
    got = run(x, rows, jnp.int32(0), slots)
    for y, (a, b, scale) in zip(got, rows, strict=True):
        # Sums of 700 products, then of 4: up to 1e3, each rounded to 2**-24 of it, some 40 times over at worst.
        assert_close(y, gathered_lora_reference(x, a[0], b[0], scale[0], slots), {"rtol": 1e-4, "atol": 2e-3})


def test_gathered_features_out_in_parts_are_those_of_one(monkeypatch):
    """As the head's of a large rank are: no kernel has room for all of a vocabulary's columns at once."""
    x, rows = pool(3)
    rng = np.random.default_rng(3)
    head = [(rows[0][0], floats(rng, L, S, R, 300), rows[0][2])]
    slots = ids(SLOTS["mixed"])
    want = run(x, head, jnp.int32(1), slots)[0]
    fits_in = gathered_lora_tpu._fits_in
    monkeypatch.setattr(gathered_lora_tpu, "_fits_in", lambda *args: args[-1] == 128 and fits_in(*args))
    with dispatch.interpreted():
        got = jax.jit(lambda *args: gathered(*args))(x, head, jnp.int32(1), slots)[0]
    assert gathered_lora_tpu._parts(x, [of_slots(*head[0])], gathered_lora_tpu.TOKENS) == (0, 128, 256, 300)
    assert_same_bits(got, want)


def test_gathered_bfloat16_sums_in_float32():
    """512 positive terms: a bfloat16 sum stops growing at 256."""
    rng = np.random.default_rng(4)
    x, a, b = positive(rng, 2, 512), positive(rng, 1, 1, R, 512), positive(rng, 1, 1, R, Y)
    (got,) = run(x, [(a, b, np.ones((1, 1), np.float32))], jnp.int32(0), ids([0, 0]))
    assert got.dtype == jnp.bfloat16
    assert_close(got, gathered_lora_reference(x, a[0], b[0], np.ones(1, np.float32), ids([0, 0])), BF16)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), slots=st.lists(st.integers(-1, S - 1), min_size=T, max_size=T))
def test_gathered_any_slots(seed, slots):
    x, rows = pool(seed)
    got = run(x, rows, jnp.int32(0), ids(slots))
    for y, (a, b, scale) in zip(got, rows, strict=True):
        want = gathered_lora_reference(x, a[0], b[0], scale[0], ids(slots))
        assert_close(y, want, {"rtol": 1e-4, "atol": 1e-4})  # some draws cancel


LANES = {  # slots of lanes, tokens of each
    "parts of lanes": ([1, -1, 3, 0, 1], 48),
    "odd": ([2, 2, -1], 5),
    "nobody": ([-1, -1], 16),
    "one lane": ([3], 2),
}


@pytest.mark.parametrize(("slots", "tokens"), cases_of_a_body(LANES, "parts of lanes"))
def test_gathered_of_prompts_equals_oracle_whatever_the_other_slots_hold(slots, tokens, monkeypatch):
    """Adapters of all ranks, in slots of two sizes that begin inside of tiles; one lacks the first target."""
    monkeypatch.setattr(gathered_lora_tpu, "MOST_TOKENS", (16,))  # three parts of the longest lane
    rng = np.random.default_rng(11)
    x = floats(rng, len(slots) * tokens, X)
    classes, ranks = ((2, 11), (2, 5)), ([0, 7, 5, 2], [11, 10, 1, 0])
    own = [[(floats(rng, r, X), floats(rng, r, y)) for r in of] for of, y in zip(ranks, (Y, Y2), strict=True)]
    scales = [floats(rng, L, S) for _ in own]
    active = {s for s in slots if s >= 0}
    rows = [mixed(o, s, classes, active) for o, s in zip(own, scales, strict=True)]
    with dispatch.interpreted():
        got = jax.jit(lambda *args: gathered_lora(*args))(x, rows, jnp.int32(1), ids(slots))
    for y, halves, scale, of in zip(got, own, scales, rows, strict=True):
        want = np.zeros(y.shape)
        for t, s in enumerate(np.repeat(slots, tokens)):
            if s >= 0:
                a, b = (half.astype("f8") for half in halves[s])
                want[t] = float(scale[1, s]) * (x[t].astype("f8") @ a.T) @ b
        assert_close(y, want, {"rtol": 1e-4, "atol": 1e-4})
        plain = jax.jit(lambda *args: gathered_lora(*args))(x, [of], jnp.int32(1), ids(slots))[0]
        assert_close(plain, want, {"rtol": 1e-4, "atol": 1e-4})


def mixed(halves, scale_LS, classes, keep):
    """The second of two layers of a pool: only the own rows of the slots of `keep` are numbers."""
    count = tile_count(classes) * ROW_TILE
    a, b = (np.full((L, count, half.shape[1]), np.nan, np.float32) for half in halves[0])
    for slot, first in enumerate(first_rows(classes)):
        for whole, half in zip((a, b), halves[slot], strict=True):
            if slot in keep:
                whole[1, first : first + len(half)] = half
    a, b = (half.reshape(L, -1, ROW_TILE, half.shape[2]) for half in (a, b))
    rank_S = np.array([len(half) for half, _ in halves], np.int32)
    return PoolRows(a_LNRX=a, b_LNRY=b, scale_LS=scale_LS, rank_S=rank_S, classes=classes)


@pytest.mark.parametrize("poison", cases_of_a_body({str(s): s for s in range(S)}, "2"))
def test_gathered_nan_of_one_tenants_prompt_stays_in_its_lanes(poison):
    x, rows = pool(12)
    x, slots = np.repeat(x, 3, axis=0), ids(SLOTS["mixed"])
    clean = run(x, rows, jnp.int32(0), slots)
    x[6:9] = np.nan  # the lane of the base
    got = run(x, without(rows, set(range(S)) - {poison}, 0), jnp.int32(0), slots)
    others = np.repeat(slots != poison, 3)
    for g, c in zip(got, clean, strict=True):
        assert_same_bits(g[others], c[others])
        assert np.isnan(g[~others]).all()


# ---- segmented --------------------------------------------------------------------------------------------------------

G, J = 3, 32
RANKS, WIDTHS = (4, 2), (512, 256)


def loss(f):
    def weighted(x, rows, w):
        return sum((v.astype(jnp.float32) * u).sum() for v, u in zip(f(x, rows), w, strict=True))

    return weighted


def values_and_gradients(x, rows, w):
    with dispatch.interpreted():  # the backward pass is traced when the gradient is taken, so inside as well
        return segmented_lora(x, rows), jax.grad(loss(segmented_lora), argnums=(0, 1))(x, rows, w)


run_lanes = jax.jit(values_and_gradients)


@jax.jit
def oracle_lanes(x, rows, w):
    def reference(x, rows):
        return tuple(segmented_lora_reference(x, *row) for row in rows)

    return reference(x, rows), jax.grad(loss(reference), argnums=(0, 1))(x, rows, w)


def lanes(seed, tokens=J, features=X):
    """x [G, J, X], two targets (a, b, scale), a weight of each output."""
    rng = np.random.default_rng(seed)
    rows = [
        (floats(rng, G, r, features), floats(rng, G, r, y), floats(rng, G)) for r, y in zip(RANKS, WIDTHS, strict=True)
    ]
    return floats(rng, G, tokens, features), rows, [floats(rng, G, tokens, y) for y in WIDTHS]


# Sums of up to 1000 products of size 10 or less, values up to some 1000: a float32 ends 2**-24 * 1000 * sqrt(1000) off at
# worst, 2e-3.  A wrong index, mask or scale is off by 1 and more.
SUMS = {"rtol": 1e-5, "atol": 2e-3}


@pytest.mark.parametrize("tokens", cases_of_a_body({"one token": 1, "odd": 5, "two tiles": J}, "two tiles"))
def test_segmented_equals_oracle_forward_and_backward(tokens):
    args = lanes(0, tokens)
    assert_close(run_lanes(*args), oracle_lanes(*args), SUMS)


def test_segmented_in_many_blocks_equals_reference(monkeypatch):
    """Every loop of the kernels turns: three blocks of tokens, several of features."""
    small = tiling_tpu.Blocks(vmem_bytes=240 * 1024, tokens=16)
    monkeypatch.setitem(tiling_tpu.TABLE, "any TPU", small)
    x, rows, w = lanes(1, tokens=48, features=384)
    assert segmented_lora_tpu.forward_cut(x, rows) == (16, 2)
    assert segmented_lora_tpu.expand_back_cut(48, x.dtype, rows[0][1]) == (16, 2)
    assert segmented_lora_tpu.shrink_back_cut(x, [a for a, _, _ in rows]) == (16, 3)
    fresh = jax.jit(lambda *args: values_and_gradients(*args))
    assert_close(fresh(x, rows, w), oracle_lanes(x, rows, w), SUMS)


@pytest.mark.parametrize("bad", ["adapter", "input", "cotangent"])
def test_segmented_nan_of_a_lane_stays_in_it(bad):
    x, rows, w = lanes(2)
    clean = run_lanes(x, rows, w)
    for array in {"adapter": [v for row in rows for v in row], "input": [x], "cotangent": w}[bad]:
        array[1] = np.nan
    got = run_lanes(x, rows, w)
    others = np.array([0, 2])
    assert_same_bits(jax.tree.map(lambda v: v[others], got), jax.tree.map(lambda v: v[others], clean))
    assert any(np.isnan(np.asarray(leaf)[1]).all() for leaf in jax.tree.leaves(got))


def test_segmented_zero_rows_of_smaller_ranks_get_no_gradient():
    x, rows, w = lanes(3)
    for a, b, _ in rows:
        a[1, 1:], b[1, 1:] = 0, 0
    _, (_, drows) = run_lanes(x, rows, w)
    for da, db, _ in drows:
        assert not np.asarray(da)[1, 1:].any()
        assert not np.asarray(db)[1, 1:].any()
        assert np.asarray(da)[1, :1].all()


def test_segmented_bfloat16_sums_in_float32():
    """512 positive terms over features and over tokens."""
    rng = np.random.default_rng(5)
    x, a, b, w = positive(rng, 1, 512, 512), positive(rng, 1, 2, 512), positive(rng, 1, 2, Y), positive(rng, 1, 512, Y)
    rows = [(a, b, np.array([0.5], np.float32))]
    got, want = run_lanes(x, rows, [w]), oracle_lanes(x, rows, [w])
    assert [v.dtype for v in jax.tree.leaves(got)] == [jnp.bfloat16] * 4 + [jnp.float32]
    assert_close(got, want, BF16)
    assert_no_nan(*jax.tree.leaves(got))
