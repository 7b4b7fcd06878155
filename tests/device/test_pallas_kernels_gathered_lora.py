"""LoRA of decode steps: the reference by hand, the op against both, and nobody's NaN anywhere but with its owner."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import BF16, F32, assert_close, assert_no_nan, assert_same_bits, floats, gathered, positive

from jaxlora.model.compile_cache import CompileCounter
from pallas_kernels.gathered_lora.op import gathered_lora_reference
from pallas_kernels.gathered_lora.xla_cpu import COLUMNS, FEWEST, UNROLLED_RANK

L, S, R, X, Y, Y2, T = 2, 4, 4, 12, 8, 5, 7

CASES = {
    "mixed": [0, 2, -1, 1, 3, 2, 0],
    "one adapter": [2] * T,
    "nobody": [-1] * T,
    "base beside tuned": [-1, 1, -1, -1, 1, -1, 1],
    "first and last slot": [0, 3, 0, 3, 3, 0, 0],
    "last token tuned": [-1, -1, -1, -1, -1, -1, 3],
}
named = pytest.mark.parametrize("slots", CASES.values(), ids=CASES.keys())
# The forms of A's half on a CPU.
forms = pytest.mark.parametrize("features", [X, FEWEST * COLUMNS], ids=["one product", "blocks"])
run = jax.jit(gathered)
reference = jax.jit(gathered_lora_reference)


def by_hand(x, a, b, scale, slots):
    """float64 [T, Y] from one layer's a [S][R, X], b [S][R, Y]; ranks may differ by slot."""
    y = np.zeros((len(x), b[0].shape[1]))
    for t, s in enumerate(slots):
        if s >= 0:
            for r in range(len(a[s])):
                h = sum(float(x[t][i]) * float(a[s][r][i]) for i in range(len(x[t])))
                y[t] += float(scale[s]) * h * b[s][r].astype(np.float64)
    return y


def world(seed=0, features=X):
    """x [T, features] and two targets of rows (a, b, scale) that share it."""
    rng = np.random.default_rng(seed)
    rows = [(floats(rng, L, S, R, features), floats(rng, L, S, R, y), floats(rng, L, S)) for y in (Y, Y2)]
    return floats(rng, T, features), rows


def ids(slots):
    return np.array(slots, np.int32)


@named
def test_oracle_is_the_definition(slots):
    x, [(a, b, scale), _] = world()
    got = reference(x, a[1], b[1], scale[1], ids(slots))
    assert got.dtype == jnp.float32
    assert_close(got, by_hand(x, a[1], b[1], scale[1], slots), F32)


@forms
@named
def test_op_equals_oracle_and_hand(slots, features):
    x, rows = world(features=features)
    for layer in range(L):
        got = run(x, rows, jnp.int32(layer), ids(slots))
        for y, (a, b, scale) in zip(got, rows, strict=True):
            assert_close(y, reference(x, a[layer], b[layer], scale[layer], ids(slots)), F32)
            assert_close(y, by_hand(x, a[layer], b[layer], scale[layer], slots), F32)
            assert not np.asarray(y)[ids(slots) == -1].any()


@pytest.mark.parametrize(("tokens", "rank"), [(1, R), (T, 1), (1, 1)], ids=["one token", "rank 1", "both"])
def test_smallest_shapes(tokens, rank):
    x, [(a, b, scale), _] = world(1)
    a, b, slots = a[:, :, :rank], b[:, :, :rank], [3, -1, 0, 2, 2, 1, 3][:tokens]
    (got,) = run(x[:tokens], [(a, b, scale)], jnp.int32(0), ids(slots))
    assert_close(got, by_hand(x[:tokens], a[0], b[0], scale[0], slots), F32)
    assert_close(reference(x[:tokens], a[0], b[0], scale[0], ids(slots)), got, F32)


@pytest.mark.parametrize("rank", [UNROLLED_RANK, UNROLLED_RANK + 1, 7], ids=["last", "first not", "odd"])
def test_ranks_whose_second_product_is_written_out_and_others(rank):
    rng = np.random.default_rng(10)
    x, a, b, scale = floats(rng, T, X), floats(rng, 1, S, rank, X), floats(rng, 1, S, rank, Y), floats(rng, 1, S)
    (got,) = run(x, [(a, b, scale)], jnp.int32(0), ids(CASES["mixed"]))
    assert_close(got, by_hand(x, a[0], b[0], scale[0], CASES["mixed"]), {"rtol": 1e-5, "atol": 1e-4})


def test_mixed_ranks_are_zero_rows():
    x, [(a, b, scale), _] = world(2)
    ranks = [1, 4, 2, 3]
    for s, r in enumerate(ranks):
        a[:, s, r:], b[:, s, r:] = 0, 0
    short_a, short_b = [a[0, s, :r] for s, r in enumerate(ranks)], [b[0, s, :r] for s, r in enumerate(ranks)]
    (got,) = run(x, [(a, b, scale)], jnp.int32(0), ids(CASES["mixed"]))
    assert_close(got, by_hand(x, short_a, short_b, scale[0], CASES["mixed"]), F32)


@forms
def test_targets_together_equal_targets_alone(features):
    x, rows = world(3, features)
    together = run(x, rows, jnp.int32(1), ids(CASES["mixed"]))
    alone = [run(x, [row], jnp.int32(1), ids(CASES["mixed"]))[0] for row in rows]
    assert_same_bits(together, tuple(alone))


def poisoned(rows, keep):
    """Rows in which only the (layer, slot) pairs of `keep` are numbers."""
    out = []
    for row in rows:
        new = tuple(np.full_like(x, np.nan) for x in row)
        for layer, slot in keep:
            for to, of in zip(new, row, strict=True):
                to[layer, slot] = of[layer, slot]
        out.append(new)
    return out


@forms
@named
def test_nan_in_unused_slots_and_other_layers_changes_no_bit(slots, features):
    x, rows = world(4, features)
    clean = run(x, rows, jnp.int32(1), ids(slots))
    got = run(x, poisoned(rows, [(1, s) for s in set(slots) if s >= 0]), jnp.int32(1), ids(slots))
    assert_same_bits(got, clean)
    assert_no_nan(*got)


@forms
@pytest.mark.parametrize("poison", range(S))
def test_nan_of_one_tenant_stays_with_its_tokens(poison, features):
    x, rows = world(5, features)
    slots = CASES["mixed"]
    clean = run(x, rows, jnp.int32(0), ids(slots))
    got = run(x, poisoned(rows, [(0, s) for s in range(S) if s != poison]), jnp.int32(0), ids(slots))
    others = ids(slots) != poison
    for g, c in zip(got, clean, strict=True):
        assert_same_bits(g[others], c[others])
        assert np.isnan(g[~others]).all()


@forms
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("token", [2, 3, T - 1], ids=["first of two", "second of two", "alone"])
def test_a_wrong_number_in_one_tokens_input_stays_there(token, wrong, features):
    x, rows = world(6, features)
    clean = run(x, rows, jnp.int32(0), ids([1] * T))
    x[token] = wrong
    got = run(x, rows, jnp.int32(0), ids([1] * T))
    others = np.arange(T) != token
    for g, c in zip(got, clean, strict=True):
        assert_same_bits(g[others], c[others])
        assert not np.isfinite(g[token]).any()
        assert np.isnan(g[token]).all() or np.isinf(wrong)


def test_no_adapter_reads_no_slot():
    """Index -1 would read the last row."""
    x, rows = world(7)
    got = run(x, poisoned(rows, []), jnp.int32(0), ids(CASES["nobody"]))
    assert_same_bits(got, (np.zeros((T, Y), np.float32), np.zeros((T, Y2), np.float32)))
    a, b, scale = poisoned(rows, [])[0]
    alone = reference(x, a[0], b[0], scale[0], ids(CASES["nobody"]))
    assert_same_bits(alone, np.zeros((T, Y), np.float32))


@forms
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_output_does_not_depend_on_place_slot_or_neighbours(dtype, features):
    """Nor on whether another token of its slot is visited with it."""
    x, rows = jax.tree.map(lambda p: np.asarray(p, dtype), world(8, features))
    token = x[0].copy()
    (want, _) = run(x, rows, jnp.int32(0), ids([2] + [-1] * 6))
    for place in range(T):
        for slot, neighbours in ((2, -1), (2, 2), (2, 1), (0, 3)):
            batch = np.asarray(floats(np.random.default_rng(place), *x.shape), dtype)
            moved = jax.tree.map(np.copy, rows)
            batch[place] = token
            for to, of in zip(moved, rows, strict=True):
                for t, o in zip(to, of, strict=True):
                    t[:, slot] = o[:, 2]
            slots = [neighbours] * T
            slots[place] = slot
            assert_same_bits(run(batch, moved, jnp.int32(0), ids(slots))[0][place], want[0])


def test_slots_layers_scales_and_weights_are_data():
    f = jax.jit(gathered)
    calls = []
    for seed, slots in enumerate(CASES.values()):
        x, rows = world(seed)
        calls.append(jax.device_put((x, rows, np.int32(seed % L), ids(slots))))
    jax.block_until_ready(f(*calls[0]))
    with CompileCounter() as counter:
        for call in calls:
            jax.block_until_ready(f(*call))
    assert not counter.retraced


def test_bfloat16_sums_in_float32():
    """512 positive terms: a bfloat16 sum stops growing at 256."""
    rng = np.random.default_rng(9)
    x, a, b = positive(rng, 3, 512), positive(rng, 1, 2, 16, 512), positive(rng, 1, 2, 16, Y)
    scale = np.array([[0.5, 2.0]], np.float32)
    slots = [1, -1, 0]
    (got,) = run(x, [(a, b, scale)], jnp.int32(0), ids(slots))
    assert got.dtype == jnp.bfloat16
    wide = [v.astype(np.float64) for v in (x, a[0], b[0])]
    assert_close(got, by_hand(*wide, scale[0], slots), BF16)
    assert_close(reference(x, a[0], b[0], scale[0], ids(slots)), by_hand(*wide, scale[0], slots), F32)


@forms
@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    layer=st.integers(0, L - 1),
    slots=st.lists(st.integers(-1, S - 1), min_size=T, max_size=T),
)
def test_any_slots_any_layer(features, seed, layer, slots):
    x, rows = world(seed, features)
    got = run(x, poisoned(rows, [(layer, s) for s in set(slots) if s >= 0]), jnp.int32(layer), ids(slots))
    for y, (a, b, scale) in zip(got, rows, strict=True):
        assert_close(y, by_hand(x, a[layer], b[layer], scale[layer], slots), {"rtol": 1e-4, "atol": 1e-4})
