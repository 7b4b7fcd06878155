"""The pool: a slot is replaced whole, read back as written, and gathered without touching anyone else's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import F32, assert_close, assert_same_bits, floats

from jaxlora.core.errors import AdapterInvalid, AdapterNotFinite
from jaxlora.core.lora import Adapter, AdapterRef, LoraSpec, ModuleException
from jaxlora.core.model_config import ModelConfig
from jaxlora.model import serving_pool
from jaxlora.model.compile_cache import CompileCounter
from jaxlora.model.lora_pool import (
    LaneLora,
    LoraRows,
    PoolSpec,
    adapter_of_rows,
    empty_pool,
    host_rows,
    read_finite,
)
from jaxlora.model.mesh import make_mesh
from jaxlora.model.serving_pool import MixedLora, PoolLora, read_slot
from pallas_kernels import NO_ADAPTER
from pallas_kernels.gathered_lora.pool_rows import of_slots

L, D, F, V, S, R = 2, 8, 12, 11, 3, 4
TARGETS = ("q_proj", "v_proj", "down_proj", "lm_head")
FEATURES = {"q_proj": (D, 8), "v_proj": (D, 4), "down_proj": (F, D), "lm_head": (D, V)}
LAYERS = {"q_proj": L, "v_proj": L, "down_proj": L, "lm_head": 1}

CONFIG = ModelConfig(
    family="llama",
    layers=L,
    d_model=D,
    d_ff=F,
    heads=2,
    kv_heads=1,
    head_dim=4,
    vocab=V,
    context=32,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    window=None,
    qkv_bias=False,
    qk_norm=False,
    tied=True,
)
SPEC = PoolSpec(slots=S, rank=R, dtype="float32", targets=TARGETS)
REF = AdapterRef("ada", "poems", 1)


def make_adapter(seed=0, *, rank=R, alpha=6.0, targets=TARGETS, rslora=False, exceptions=()):
    """An adapter whose weights are noise."""
    rng = np.random.default_rng(seed)
    spec = LoraSpec(rank=rank, alpha=alpha, targets=targets, rslora=rslora, exceptions=exceptions)
    r = spec.max_rank
    weights = {
        t: (floats(rng, LAYERS[t], r, FEATURES[t][0]), floats(rng, LAYERS[t], r, FEATURES[t][1])) for t in targets
    }
    return Adapter(ref=REF, spec=spec, base_hash="base", weights=weights)


def noise_pool(seed=0, dtype="float32"):
    """A pool with noise in every slot, scales too."""
    rng = np.random.default_rng(seed)
    return {
        t: LoraRows(
            a_LSRX=jnp.asarray(floats(rng, LAYERS[t], S, R, FEATURES[t][0]), dtype),
            b_LSRY=jnp.asarray(floats(rng, LAYERS[t], S, R, FEATURES[t][1]), dtype),
            scale_LS=jnp.asarray(floats(rng, LAYERS[t], S)),
        )
        for t in TARGETS
    }


def serving(pool):
    """The same slots as a server holds them."""
    return {t: of_slots(r.a_LSRX, r.b_LSRY, r.scale_LS) for t, r in pool.items()}


_write = jax.jit(serving_pool.write_slot, donate_argnums=0, static_argnums=3)


def write_slot(pool, slot, rows):
    return _write(pool, slot, rows, R)


def slots_of(pool):
    """The slots of a server's pool as Rows with a slot axis."""
    return jax.tree.map(lambda *x: np.stack(x, 1), *(read_slot(pool, jnp.int32(s), R) for s in range(S)))


def host(tree):
    return jax.tree.map(np.array, tree)


def slot_of(pool, s):
    """One slot of a host pool."""
    return jax.tree.map(lambda x: x[:, s], pool)


def test_an_empty_pool_is_zeros_of_the_right_shapes():
    for dtype in ("float32", "bfloat16"):
        pool = empty_pool(CONFIG, PoolSpec(slots=S, rank=R, dtype=dtype, targets=TARGETS), make_mesh())
        assert set(pool) == set(TARGETS)
        for t, rows in pool.items():
            x, y = FEATURES[t]
            assert rows.a_LSRX.shape == (LAYERS[t], S, R, x)
            assert rows.b_LSRY.shape == (LAYERS[t], S, R, y)
            assert rows.scale_LS.shape == (LAYERS[t], S)
            assert (rows.a_LSRX.dtype, rows.b_LSRY.dtype, rows.scale_LS.dtype) == (dtype, dtype, "float32")
            assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(rows))


@pytest.mark.parametrize(("slots", "rank"), [(0, 4), (3, 0), (-1, 4)])
def test_an_impossible_pool_is_refused(slots, rank):
    with pytest.raises(AdapterInvalid, match="at least one slot and rank 1"):
        PoolSpec(slots=slots, rank=rank, dtype="float32")


# ---- host_rows ----------------------------------------------------------------------------------------------------------


def test_host_rows_are_padded_with_zeros_and_carry_every_target():
    adapter = make_adapter(1, rank=2, targets=("q_proj", "lm_head"))
    rows = host_rows(CONFIG, SPEC, adapter)
    assert set(rows) == set(TARGETS)
    for t in TARGETS:
        a, b = rows[t].a_LSRX, rows[t].b_LSRY
        assert (a.shape, b.shape) == ((LAYERS[t], R, FEATURES[t][0]), (LAYERS[t], R, FEATURES[t][1]))
        if t in adapter.weights:
            assert_same_bits((a[:, :2], b[:, :2]), adapter.weights[t])
            assert not a[:, 2:].any()
            assert not b[:, 2:].any()
        else:
            assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(rows[t]))


@pytest.mark.parametrize(
    ("rslora", "want"),
    [
        # alpha 6 over rank 4 but for layer 1 of q_proj (5 over 2) and layer 0 of v_proj (not adapted)
        (False, {"q_proj": [1.5, 2.5], "v_proj": [0, 1.5], "down_proj": [1.5, 1.5], "lm_head": [1.5]}),
        (True, {"q_proj": [3, 5 / 2**0.5], "v_proj": [0, 3], "down_proj": [3, 3], "lm_head": [3]}),
    ],
    ids=["plain", "rslora"],
)
def test_scale_is_per_layer_by_the_true_rank(rslora, want):
    exceptions = (
        ModuleException(target="q_proj", layer=1, rank=2, alpha=5.0),
        ModuleException(target="v_proj", layer=0, rank=0, alpha=6.0),
    )
    wide = PoolSpec(slots=S, rank=16, dtype="float32", targets=TARGETS)  # padding must not enter the scale
    for spec in (SPEC, wide):
        rows = host_rows(CONFIG, spec, make_adapter(2, alpha=6.0, rslora=rslora, exceptions=exceptions))
        for t in TARGETS:
            assert_same_bits(rows[t].scale_LS, np.array(want[t], np.float32))


def test_an_adapter_that_does_not_fit_is_refused():
    with pytest.raises(AdapterInvalid, match="rank 5 exceeds the limit 4"):
        host_rows(CONFIG, SPEC, make_adapter(rank=5))
    big = (ModuleException(target="q_proj", layer=0, rank=9, alpha=1.0),)
    with pytest.raises(AdapterInvalid, match="rank 9 exceeds the limit 4"):
        host_rows(CONFIG, SPEC, make_adapter(exceptions=big))
    narrow = PoolSpec(slots=S, rank=R, dtype="float32", targets=("q_proj",))
    with pytest.raises(AdapterInvalid, match="v_proj, down_proj, lm_head is not supported"):
        host_rows(CONFIG, narrow, make_adapter())


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_non_finite_adapter_is_refused_by_name(half, value):
    adapter = make_adapter()
    adapter.weights["v_proj"][half][1, 2, 3] = value
    with pytest.raises(AdapterNotFinite, match=f"lora_{'AB'[half]} of v_proj"):
        host_rows(CONFIG, SPEC, adapter)


@pytest.mark.parametrize("rank", [R, 2])
def test_rounding_on_the_host_leaves_the_same_bits_in_a_slot(rank):
    """Numbers between two, ties, the least and the largest; and rows of a true rank below the slot's."""
    adapter = make_adapter(31, rank=rank)
    a = adapter.weights["q_proj"][0]
    a.reshape(-1)[:8] = np.array(
        [0x3F808000, 0x3F818000, 0x3F808001, 0xBF807FFF, 0x7F7F0000, 0x00800001, 0x80000000, 0x3FFFFFFF], np.uint32
    ).view(np.float32)
    spec = PoolSpec(slots=S, rank=rank, dtype="bfloat16", targets=TARGETS)
    exact, rounded = host_rows(CONFIG, spec, adapter), host_rows(CONFIG, spec, adapter.rounded())
    assert {x.a_LSRX.dtype.name for x in rounded.values()} == {"bfloat16"}
    halves = [[x for r in rows.values() for x in (r.a_LSRX, r.b_LSRY)] for rows in (exact, rounded)]
    assert sum(x.nbytes for x in halves[1]) * 2 == sum(x.nbytes for x in halves[0])
    slots = [write_slot(serving(noise_pool(7, "bfloat16")), jnp.int32(1), rows) for rows in (exact, rounded)]
    assert_same_bits(*(host(slot) for slot in slots))


def test_what_is_too_large_for_bfloat16_is_refused():
    adapter = make_adapter()
    adapter.weights["v_proj"][1][1, 2, 3] = np.finfo(np.float32).max
    with pytest.raises(AdapterNotFinite, match="lora_B of v_proj"):
        adapter.rounded().check_finite()
    adapter.weights["v_proj"][0][1, 2, 3] = np.nan
    with pytest.raises(AdapterNotFinite, match="lora_A of v_proj"):
        adapter.rounded()


# ---- write_slot -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slot", range(S))
@pytest.mark.parametrize(
    "adapter",
    [
        pytest.param(make_adapter(3), id="all of it"),
        pytest.param(make_adapter(4, rank=1), id="smaller rank"),
        pytest.param(make_adapter(5, targets=("v_proj",)), id="fewer targets"),
        pytest.param(make_adapter(6, rank=2, targets=("lm_head", "q_proj")), id="both"),
    ],
)
def test_a_slot_is_replaced_whole_and_no_other_moves(slot, adapter):
    """Noise was there before; nothing of it stays, not in rank rows, targets or scales."""
    before = host(noise_pool(7))
    rows = host_rows(CONFIG, SPEC, adapter)
    pool = write_slot(serving(noise_pool(7)), jnp.int32(slot), rows)
    ranks = {t: rows_of.rank_S.tolist() for t, rows_of in pool.items()}
    held = {t: adapter.spec.rank if t in adapter.spec.targets else 0 for t in TARGETS}
    assert ranks == {t: [held[t] if s == slot else R for s in range(S)] for t in TARGETS}
    after = slots_of(pool)
    assert_same_bits(slot_of(after, slot), rows)
    for other in set(range(S)) - {slot}:
        assert_same_bits(slot_of(after, other), slot_of(before, other))


def test_writing_over_nan_leaves_no_nan():
    pool = serving(jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), noise_pool()))
    rows = host_rows(CONFIG, SPEC, make_adapter(8, rank=1, targets=("q_proj",)))
    pool = slots_of(write_slot(pool, jnp.int32(1), rows))
    assert_same_bits(slot_of(pool, 1), rows)
    read_finite(slot_of(pool, 1))
    with pytest.raises(AdapterNotFinite, match="not published"):
        read_finite(slot_of(pool, 2))


def test_rows_of_a_smaller_pool_are_padded_and_missing_targets_zeroed():
    """A trainer's pool may be of smaller rank and fewer targets than the server's."""
    rng = np.random.default_rng(9)
    small = {"q_proj": LoraRows(a_LSRX=floats(rng, L, 2, D), b_LSRY=floats(rng, L, 2, 8), scale_LS=floats(rng, L))}
    got = slot_of(slots_of(write_slot(serving(noise_pool(10)), jnp.int32(2), small)), 2)
    assert_same_bits(
        (got["q_proj"].a_LSRX[:, :2], got["q_proj"].b_LSRY[:, :2]), (small["q_proj"].a_LSRX, small["q_proj"].b_LSRY)
    )
    assert_same_bits(got["q_proj"].scale_LS, small["q_proj"].scale_LS)
    assert not got["q_proj"].a_LSRX[:, 2:].any()
    assert not got["q_proj"].b_LSRY[:, 2:].any()
    for t in TARGETS[1:]:
        assert not any(leaf.any() for leaf in jax.tree.leaves(got[t]))


def test_a_bfloat16_pool_rounds_weights_once_and_keeps_scale_in_float32():
    rows = host_rows(CONFIG, SPEC, make_adapter(11, rank=3, alpha=1.0))
    got = slot_of(slots_of(write_slot(serving(noise_pool(12, "bfloat16")), jnp.int32(0), rows)), 0)
    for t in TARGETS:
        assert_same_bits(got[t].a_LSRX, rows[t].a_LSRX.astype(jnp.bfloat16))
        assert_same_bits(got[t].b_LSRY, rows[t].b_LSRY.astype(jnp.bfloat16))
        assert_same_bits(got[t].scale_LS, np.full(LAYERS[t], 1 / 3, np.float32))


def test_the_old_pool_is_given_away():
    pool = serving(noise_pool(13))
    write_slot(pool, jnp.int32(1), host_rows(CONFIG, SPEC, make_adapter(14)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(pool))


def test_slots_and_adapters_are_data():
    pool = serving(noise_pool(15))
    loads = []
    for seed, (rank, alpha, targets) in enumerate([(4, 1.0, TARGETS), (1, 8.0, TARGETS[:1]), (3, 2.0, TARGETS[2:])]):
        rows = host_rows(CONFIG, SPEC, make_adapter(seed, rank=rank, alpha=alpha, targets=targets))
        loads.append(jax.device_put((np.int32(seed), rows)))
    pool = write_slot(pool, *loads[0])
    jax.block_until_ready(pool)
    with CompileCounter() as counter:
        for slot, rows in loads:
            pool = jax.block_until_ready(write_slot(pool, slot, rows))
    assert not counter.retraced


@pytest.mark.parametrize("rank", [1, 3, R])
def test_an_adapter_comes_back_from_its_rows(rank):
    adapter = make_adapter(16, rank=rank, targets=("q_proj", "lm_head"))
    pool = write_slot(serving(noise_pool(17)), jnp.int32(1), host_rows(CONFIG, SPEC, adapter))
    back = adapter_of_rows(read_slot(pool, jnp.int32(1), R), adapter.spec, "base")
    assert (back.spec, back.base_hash) == (adapter.spec, adapter.base_hash)
    assert_same_bits(dict(back.weights), dict(adapter.weights))


@settings(max_examples=25)
@given(
    loads=st.lists(
        st.tuples(
            st.integers(0, S - 1),
            st.integers(1, R),
            st.sets(st.sampled_from(TARGETS), min_size=1).map(lambda t: tuple(sorted(t))),
        ),
        max_size=6,
    )
)
def test_after_any_loads_every_slot_holds_its_last_adapter(loads):
    pool = serving(noise_pool(18))
    held = {s: slot_of(slots_of(pool), s) for s in range(S)}
    for seed, (slot, rank, targets) in enumerate(loads):
        held[slot] = host_rows(CONFIG, SPEC, make_adapter(seed, rank=rank, targets=targets))
        pool = write_slot(pool, jnp.int32(slot), held[slot])
    for s in range(S):
        assert_same_bits(slot_of(slots_of(pool), s), held[s])


# ---- LaneLora and PoolLora ---------------------------------------------------------------------------------------------------

gather = jax.jit(LaneLora.gather)
SLOTS = np.array([2, -1, 0, 2], np.int32)


def by_hand(pool, target, layer, x, slots):
    """float64 [T, Y]: each token through its slot's rows."""
    rows = pool[target]
    y = np.zeros((len(x), rows.b_LSRY.shape[-1]))
    for t, s in enumerate(slots):
        if s >= 0:
            a, b = rows.a_LSRX[layer, s].astype(np.float64), rows.b_LSRY[layer, s].astype(np.float64)
            y[t] = float(rows.scale_LS[layer, s]) * (b.T @ (a @ x[t].astype(np.float64)))
    return y


def test_gather_takes_each_lanes_slot():
    pool = host(noise_pool(19))
    got = host(gather(pool, SLOTS))
    for g, s in enumerate(SLOTS):
        want = jax.tree.map(np.zeros_like, slot_of(pool, 0)) if s < 0 else slot_of(pool, s)
        assert_same_bits(slot_of(got, g), want)


def test_gather_of_no_adapter_is_zeros_whatever_any_slot_holds():
    pool = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), noise_pool())
    got = host(gather(pool, np.array([-1, -1, -1, -1], np.int32)))
    assert_same_bits(got, jax.tree.map(np.zeros_like, got))


def test_gather_reads_nothing_of_unused_slots():
    pool = host(noise_pool(20))
    clean = gather(pool, SLOTS)
    for leaf in jax.tree.leaves(pool):
        leaf[:, 1] = np.nan
    assert_same_bits(gather(pool, SLOTS), clean)


@pytest.mark.parametrize("layer", range(L))
def test_lanes_and_tokens_compute_what_the_pool_says(layer):
    """Training and prefill go by lanes, decode by tokens; both must be the same adapter."""
    pool = host(noise_pool(21))
    x = floats(np.random.default_rng(22), 8, D)
    targets = ("q_proj", "k_proj", "v_proj")  # the pool has no k_proj
    lanes = LaneLora(gather(pool, SLOTS))
    rows = jax.tree.map(lambda p: p[layer], lanes.per_layer)
    tokens = PoolLora(serving(pool), jnp.asarray(np.repeat(SLOTS, 2)), 1, L)
    assert_same_bits(tokens.per_layer, np.arange(L, dtype=np.int32))
    by_lane = jax.jit(lambda rows, x: lanes.deltas(rows, targets, x))(rows, x)
    prompts = PoolLora(serving(pool), jnp.asarray(SLOTS), 2, L)
    by_token = jax.jit(lambda layer, x: tokens.deltas(layer, targets, x))(tokens.per_layer[layer], x)
    by_prompt = jax.jit(lambda layer, x: prompts.deltas(layer, targets, x))(prompts.per_layer[layer], x)
    assert_same_bits(by_prompt, by_lane)
    for got in (by_lane, by_token):
        assert got[1] is None
        for i, t in ((0, "q_proj"), (2, "v_proj")):
            assert_close(got[i], by_hand(pool, t, layer, x, np.repeat(SLOTS, 2)), F32)


def test_prompts_read_nothing_of_other_slots_and_layers():
    pool = host(noise_pool(25))
    x = floats(np.random.default_rng(26), 8, D)

    def product(pool):
        return PoolLora(serving(pool), jnp.asarray(SLOTS), 2, L).product(jnp.int32(1), ["q_proj", "v_proj"], x)

    clean = jax.jit(product)(pool)
    for leaf in jax.tree.leaves(pool):
        leaf[:, 1], leaf[0] = np.nan, np.nan
    assert_same_bits(jax.jit(product)(pool), clean)


def test_targets_that_the_pool_lacks_have_no_delta():
    pool = noise_pool(23)
    x = jnp.zeros((4, D))
    lanes = LaneLora(LaneLora.gather(pool, SLOTS))
    layer = jax.tree.map(lambda p: p[0], lanes.per_layer)
    assert lanes.deltas(layer, ("gate_proj", "up_proj"), x) == (None, None)
    for tokens in (1, 2):
        assert PoolLora(serving(pool), jnp.asarray(SLOTS), tokens, L).deltas(
            jnp.int32(0), ("gate_proj", "up_proj"), x
        ) == (None, None)


@pytest.mark.parametrize("layer", range(L))
def test_lanes_before_rows_add_what_each_adds_alone(layer):
    """Of the layers T = 2 lanes of three tokens and two rows; of the head one token a lane."""
    pool, rng = serving(host(noise_pool(27))), np.random.default_rng(28)
    prompts = PoolLora(pool, jnp.asarray([2, NO_ADAPTER]), 3, L)
    rows = PoolLora(pool, jnp.asarray([0, 2]), 1, L)
    mixed, targets = MixedLora(prompts, rows), ("q_proj", "k_proj", "v_proj")
    assert_same_bits(mixed.per_layer, rows.per_layer)
    for tokens in (3, 1):
        x = floats(rng, 2 * tokens + 2, D)
        got = jax.jit(lambda layer, x: mixed.deltas(layer, targets, x))(layer, x)
        first = jax.jit(lambda layer, x: prompts.deltas(layer, targets, x))(layer, x[: 2 * tokens])
        last = jax.jit(lambda layer, x: rows.deltas(layer, targets, x))(layer, x[2 * tokens :])
        assert got[1] is None
        for i in (0, 2):
            assert_close(got[i], np.concatenate([first[i], last[i]]), F32)
    assert mixed.deltas(layer, ("gate_proj", "up_proj"), x) == (None, None)


def test_the_head_is_kept_out_of_the_layers():
    pool = host(noise_pool(24))
    lanes = LaneLora(gather(pool, SLOTS))
    assert set(lanes.per_layer) == {"q_proj", "v_proj", "down_proj"}
    head = lanes.head_rows()
    assert head is not None
    for got, whole in zip(
        head, (pool["lm_head"].a_LSRX, pool["lm_head"].b_LSRY, pool["lm_head"].scale_LS), strict=True
    ):
        assert_same_bits(np.asarray(got)[0], whole[0, 2])
        assert not np.asarray(got)[1].any()
    assert LaneLora({t: r for t, r in pool.items() if t != "lm_head"}).head_rows() is None
