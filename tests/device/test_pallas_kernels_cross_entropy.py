"""Target log-probabilities in chunks: forward and backward by hand, nothing from unwanted positions, no array of all logits."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import F32, assert_close, assert_no_nan, assert_same_bits, floats, largest_array

from jaxlora.model.compile_cache import CompileCounter
from pallas_kernels.cross_entropy.op import target_logprob, target_logprob_reference

G, J, K, D, V, R = 3, 8, 3, 10, 17, 3

CASES = {
    "all wanted": [[1] * J] * G,
    "nobody": [[0] * J] * G,
    "answers at the end": [[0] * 5 + [1] * 3, [0] * 2 + [1] * 6, [0] * 7 + [1]],
    "mixed": [[0, 1, 0, 1, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0, 0], [0] * J],
    "a lane of nothing": [[1] * J, [0] * J, [0, 1] * 4],
    "exactly one chunk": [[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1], [1, 0] * 4],
    "one token": [[0] * J, [0, 0, 0, 1, 0, 0, 0, 0], [0] * J],
}
named = pytest.mark.parametrize("wanted", CASES.values(), ids=CASES.keys())
with_and_without_lora = pytest.mark.parametrize("lora", [True, False], ids=["lora", "plain"])
chunks = pytest.mark.parametrize(
    "chunk", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow)]
)


def by_hand(x, head, target, wanted, a, b, scale, d):
    """float64 (logprob, hit, dx, da, db, dscale) of sum(d * logprob), one token at a time."""
    x, head, a, b, scale, d = (v.astype(np.float64) for v in (x, head, a, b, scale, d))
    logprob, hit = np.zeros(target.shape), np.zeros(target.shape, bool)
    dx, da, db, ds = (np.zeros(v.shape) for v in (x, a, b, scale))
    for g, j in np.argwhere(np.array(wanted)):
        h = np.array([row @ x[g, j] for row in a[g]])
        logits = np.array([x[g, j] @ head[:, t] + scale[g] * (h @ b[g][:, t]) for t in range(head.shape[1])])
        logs = logits - logits.max()
        logs -= np.log(np.exp(logs).sum())
        up = np.zeros(head.shape[1])
        for k, t in enumerate(target[g, j]):
            logprob[g, j, k], hit[g, j, k] = logs[t], all(logits[t] >= other for other in logits)
            up -= np.exp(logs) * d[g, j, k]
            up[t] += d[g, j, k]
        back = np.array([row @ up for row in b[g]])
        dx[g, j] = head @ up + scale[g] * (back @ a[g])
        for r in range(a.shape[1]):
            da[g, r] += scale[g] * back[r] * x[g, j]
            db[g, r] += scale[g] * h[r] * up
        ds[g] += h @ back
    return logprob, hit, dx, da, db, ds


@functools.cache
def program(chunk, lora):
    """jit of (logprob, hit, gradients by x, head, back and by the head's LoRA); chunk 0 is the reference, without back."""

    def step(x, head, target, wanted, a, b, scale, d):
        def forward(x, head, back, rows):
            rows = rows if lora else None
            if chunk:
                return target_logprob(x, head, back, target, wanted, rows, chunk=chunk, tied=False)
            return target_logprob_reference(x, head, target, wanted, rows)

        (logprob, hit), pull = jax.vjp(forward, x, head, head.T, (a, b, scale))
        no_gradient = np.zeros(hit.shape, jax.dtypes.float0)
        return logprob, hit, *pull((d, no_gradient))

    return jax.jit(step)


def world(seed=0):
    """(x, head, target, a, b, scale, d)"""
    rng = np.random.default_rng(seed)
    target = rng.integers(0, V, (G, J, K), dtype=np.int32)
    x, head = floats(rng, G, J, D), floats(rng, D, V)
    return x, head, target, floats(rng, G, R, D), floats(rng, G, R, V), floats(rng, G) / 2, floats(rng, G, J, K)


def run(arrays, wanted, chunk=4, lora=True):
    """(logprob, hit, dx, da, db, dscale)"""
    x, head, target, a, b, scale, d = arrays
    logprob, hit, dx, _, _, rows = program(chunk, lora)(x, head, target, np.array(wanted, bool), a, b, scale, d)
    return logprob, hit, dx, *rows


def want(arrays, wanted, lora=True):
    x, head, target, a, b, scale, d = arrays
    out = by_hand(x, head, target, wanted, a, b, scale if lora else np.zeros_like(scale), d)
    return out if lora else (*out[:3], *(np.zeros_like(v) for v in out[3:]))


@named
@with_and_without_lora
def test_oracle_is_the_definition_forward_and_backward(wanted, lora):
    assert_close(run(world(), wanted, 0, lora), want(world(), wanted, lora), F32)


@named
@with_and_without_lora
@chunks
def test_op_equals_oracle_and_hand_forward_and_backward(wanted, lora, chunk):
    got = run(world(1), wanted, chunk, lora)
    assert (got[0].dtype, got[1].dtype) == (jnp.float32, bool)
    assert_close(got, want(world(1), wanted, lora), F32)
    assert_close(got, run(world(1), wanted, 0, lora), F32)


def test_a_target_of_many_is_that_target_alone():
    """Forward bit for bit; backward the sum of the gradients of each alone."""
    x, head, target, a, b, scale, d = world(12)
    wanted = CASES["mixed"]
    together = run((x, head, target, a, b, scale, d), wanted)
    alone = [run((x, head, target[..., [k]], a, b, scale, d[..., [k]]), wanted) for k in range(K)]
    for i in range(2):
        assert_same_bits(together[i], np.concatenate([one[i] for one in alone], axis=2))
    assert_close(together[2:], [sum(parts) for parts in zip(*(one[2:] for one in alone), strict=True)], F32)
    for one, k in zip(alone, range(K), strict=True):
        assert_close(one, want((x, head, target[..., [k]], a, b, scale, d[..., [k]]), wanted), F32)


def test_the_same_target_twice_counts_twice():
    x, head, target, a, b, scale, d = world(13)
    target[..., 1] = target[..., 0]
    arrays, wanted = (x, head, target, a, b, scale, d), CASES["answers at the end"]
    assert_close(run(arrays, wanted), want(arrays, wanted), F32)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_smaller_rank_is_zero_rows_that_stay_zero(rank):
    x, head, target, a, b, scale, d = world(2)
    a[:, rank:], b[:, rank:] = 0, 0
    wanted = CASES["mixed"]
    got = run((x, head, target, a, b, scale, d), wanted)
    short = want((x, head, target, a[:, :rank], b[:, :rank], scale, d), wanted)
    assert_close(got[:3], short[:3], F32)
    assert_close((got[3][:, :rank], got[4][:, :rank]), short[3:5], F32)
    assert not np.asarray(got[3])[:, rank:].any()
    assert not np.asarray(got[4])[:, rank:].any()


@pytest.mark.parametrize("chunk", [3, 5, 16])
def test_a_chunk_that_does_not_divide_the_lane_is_refused(chunk):
    with pytest.raises(ValueError, match=f"chunk {chunk} does not divide the {J} tokens"):
        run(world(), CASES["mixed"], chunk)


@named
@chunks
def test_unwanted_positions_give_exact_zeros_and_no_gradient(wanted, chunk):
    logprob, hit, dx, da, db, ds = run(world(3), wanted, chunk)
    off = ~np.array(wanted, bool)
    for y in (logprob, hit, dx):
        assert not np.asarray(y)[off].any()
    nothing = ~np.array(wanted, bool).any(1)
    for y in (da, db, ds):
        assert not np.asarray(y)[nothing].any()


@named
@chunks
@pytest.mark.parametrize("garbage", [7.0, np.inf, np.nan])
def test_what_unwanted_positions_hold_changes_no_bit(wanted, chunk, garbage):
    """Also where they share a chunk with wanted ones, and also in the gradients of their own lane."""
    clean = run(world(4), wanted, chunk)
    x, head, target, a, b, scale, d = world(4)
    off = ~np.array(wanted, bool)
    x[off], d[off], target[off] = garbage, garbage, 0
    got = run((x, head, target, a, b, scale, d), wanted, chunk)
    assert_same_bits(got, clean)
    assert_no_nan(*got)


@chunks
@pytest.mark.parametrize("bad", ["x", "lora", "d", "all"])
def test_nan_of_a_lane_stays_in_it_forward_and_backward(chunk, bad):
    wanted = CASES["answers at the end"]
    clean = run(world(5), wanted, chunk)
    arrays = world(5)
    for i in {"x": [0], "lora": [3, 4, 5], "d": [6], "all": [0, 3, 4, 5, 6]}[bad]:
        arrays[i][1] = np.nan
    got = run(arrays, wanted, chunk)
    for g, c in zip(got, clean, strict=True):
        assert_same_bits(g[np.array([0, 2])], c[np.array([0, 2])])
    assert np.isnan(np.asarray(got[3])[1]).all()


@chunks
def test_a_lane_does_not_depend_on_neighbours_or_place(chunk):
    """A neighbour with more targets makes this lane take more trips, which must add exact zeros."""
    arrays, mine = world(6), CASES["mixed"][1]
    clean = run(arrays, [[0] * J, mine, [0] * J], chunk)
    for place in range(G):
        for neighbour in ([0] * J, [1] * J):
            other, wanted = world(7 + place), [neighbour] * G
            for i in (0, 2, 3, 4, 5, 6):
                other[i][place] = arrays[i][1]
            other = (other[0], arrays[1], *other[2:])
            wanted[place] = mine
            for g, c in zip(run(other, wanted, chunk), clean, strict=True):
                assert_same_bits(g[place], c[1])


def test_the_frozen_head_gets_no_gradient():
    x, head, target, a, b, scale, d = world(8)
    _, _, _, dhead, dback, _ = program(4, True)(x, head, target, np.ones((G, J), bool), a, b, scale, d)
    assert_same_bits((dhead, dback), (np.zeros((D, V), np.float32), np.zeros((V, D), np.float32)))


@pytest.mark.parametrize("chunk", [0, 4], ids=["reference", "op"])
def test_a_tie_for_the_likeliest_token_is_a_hit(chunk):
    """All logits are 0: no token is likelier than the target, whichever it is."""
    x, *rest = world(9)
    logprob, hit, *_ = run((np.zeros_like(x), *rest), CASES["all wanted"], chunk)
    assert np.asarray(hit).all()
    assert_close(logprob, np.full((G, J, K), -np.log(V)), F32)


@pytest.mark.parametrize("chunk", [0, 4], ids=["reference", "op"])
def test_huge_logits_do_not_overflow(chunk):
    x, head, *rest = world(10)
    got = run((x * 1e3, head * 1e3, *rest), CASES["mixed"], chunk)
    assert_no_nan(*got)
    assert_close(got[0], want((x * 1e3, head * 1e3, *rest), CASES["mixed"])[0], {"rtol": 1e-4, "atol": 1e-4})


def test_wanted_targets_and_weights_are_data():
    f = program(4, True)
    calls = []
    for seed, wanted in enumerate(CASES.values()):
        x, head, target, a, b, scale, d = world(seed)
        calls.append(jax.device_put((x, head, target, np.array(wanted, bool), a, b, scale, d)))
    jax.block_until_ready(f(*calls[0]))
    with CompileCounter() as counter:
        for call in calls:
            jax.block_until_ready(f(*call))
    assert not counter.retraced


def test_the_logits_of_all_positions_never_exist():
    """Neither forward nor backward, with LoRA on the head; the reference shows that the check sees such an array."""
    lanes, tokens, vocab, chunk = 3, 64, 401, 4
    shapes = [(lanes, tokens, D), (D, vocab), (lanes, tokens, K), (lanes, tokens), (lanes, R, D), (lanes, R, vocab)]
    kinds = [jnp.float32, jnp.float32, jnp.int32, bool, jnp.float32, jnp.float32]
    args = [jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, kinds, strict=True)]
    args += [jax.ShapeDtypeStruct((lanes,), jnp.float32), jax.ShapeDtypeStruct((lanes, tokens, K), jnp.float32)]
    logits = lanes * tokens * vocab
    sizes = {}
    for name, step in (("op", program(chunk, True)), ("reference", program(0, True))):
        compiled = step.lower(*args).compile()
        sizes[name] = largest_array(compiled.as_text()), compiled.memory_analysis().temp_size_in_bytes
    (elements, text), temp = sizes["op"]
    assert elements <= lanes * chunk * vocab, text  # nor those of a chunk, times K
    assert temp < 4 * logits / 2
    assert sizes["reference"][0][0] >= logits
    assert sizes["reference"][1] >= 4 * logits


def test_bfloat16_sums_in_float32():
    """Equal terms over 512 features, and a log-sum over 600 tokens: a bfloat16 sum stops growing at 256 terms."""
    rng = np.random.default_rng(11)
    x = np.asarray(jnp.full((1, 2, 512), 0.125, jnp.bfloat16))
    head = np.asarray(jnp.asarray(rng.random((512, 600)) / 8, jnp.bfloat16))
    a, b = np.zeros((1, 1, 512), x.dtype), np.zeros((1, 1, 600), x.dtype)
    target, d, scale = np.array([[[3], [599]]], np.int32), np.ones((1, 2, 1), np.float32), np.ones(1, np.float32)
    args = x, head, target, [[1, 1]], a, b, scale, d
    logprob, _, dx, *_ = program(1, True)(*(np.array(v, bool) if v is args[3] else v for v in args))
    hand = by_hand(*args)
    assert_close(logprob, hand[0], F32)
    # The gradient of the logits is rounded to bfloat16 before it meets the head: 2**-8 of entries that sum to at most 2,
    # each times at most 1/8.
    assert_close(dx, hand[2], {"rtol": 0, "atol": 2 * 2**-8 / 8 + 2**-8 / 8})


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    wanted=st.lists(st.lists(st.booleans(), min_size=J, max_size=J), min_size=G, max_size=G),
)
def test_any_wanted(seed, wanted):
    x, *rest = world(seed)
    clean = want((x, *rest), wanted)
    x[~np.array(wanted)] = np.nan
    assert_close(run((x, *rest), wanted), clean, {"rtol": 1e-4, "atol": 1e-4})  # some draws cancel
