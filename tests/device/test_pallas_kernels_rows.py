"""RMS norm and log-sum-exp against NumPy, and row by row the same bits whatever the company."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import BF16, F32, assert_close, assert_same_bits, floats

from pallas_kernels.native.library import instruction_set
from pallas_kernels.rows.op import (
    _joint_reduction,
    _reductions,
    _top_of_blocks,
    logsumexp,
    logsumexp_reference,
    rms_norm,
    rms_norm_reference,
    top_k,
)

EPS = 1e-5
TOLERANCE = {"float32": F32, "bfloat16": BF16}
SIZES = [1, 8, 31, 64, 576]
sized = pytest.mark.parametrize("size", SIZES)
native = pytest.mark.skipif(instruction_set() is None, reason="the native bodies are not built or not for this CPU")


@pytest.mark.parametrize("dtype", TOLERANCE)
@sized
def test_the_norm_is_numpys(size, dtype):
    rng = np.random.default_rng(size)
    x, weight = jnp.asarray(floats(rng, 9, size), dtype), jnp.asarray(floats(rng, size), dtype)
    wide = np.asarray(x, np.float64)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPS) * np.asarray(weight, np.float64)
    for op in (rms_norm, rms_norm_reference):
        assert_close(op(x, weight, EPS), want, TOLERANCE[dtype])


@sized
def test_the_norms_gradient_is_that_of_the_definition(size):
    rng = np.random.default_rng(size)
    x, weight, d = (jnp.asarray(floats(rng, *shape)) for shape in ((9, size), (size,), (9, size)))
    got, want = (jax.vjp(lambda *a, op=op: op(*a, EPS), x, weight)[1](d) for op in (rms_norm, rms_norm_reference))
    assert_close(got, want, F32)


@sized
def test_the_log_of_the_sum_is_numpys(size):
    x = floats(np.random.default_rng(size), 9, size) * 30
    x[3] = -np.inf
    x[3, 0] = 2.0
    wide = x.astype(np.float64)
    want = np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1)) + wide.max(-1)
    for op in (logsumexp, logsumexp_reference):
        assert_close(op(jnp.asarray(x)), want, F32)


def test_nan_stays_in_its_row():
    x = jnp.asarray(floats(np.random.default_rng(0), 9, 64))
    bad = x.at[4, 5].set(jnp.nan)
    others = np.arange(9) != 4
    for op in (logsumexp, lambda x: rms_norm(x, jnp.ones(64), EPS)):
        got = np.asarray(op(bad))
        assert np.isnan(got[4]).all()
        assert_same_bits(got[others], np.asarray(op(x))[others])


@native
@pytest.mark.parametrize("dtype", TOLERANCE)
@sized
def test_a_rows_bits_do_not_depend_on_its_company(size, dtype):
    x = jnp.asarray(floats(np.random.default_rng(size), 70, size), dtype)
    weight = jnp.ones(size, dtype)
    norm, log = jax.jit(lambda x: rms_norm(x, weight, EPS)), jax.jit(lambda x: logsumexp(x.astype(jnp.float32)))
    for rows in (1, 2, 13, 32):
        assert_same_bits(norm(x[5 : 5 + rows]), norm(x)[5 : 5 + rows])
        assert_same_bits(log(x[5 : 5 + rows]), log(x)[5 : 5 + rows])


BODIES = {"joint": _joint_reduction, "one_by_one": _reductions}


@pytest.mark.parametrize("body", BODIES)
def test_a_summary_is_numpys(body):
    """Of equal elements the first; of a row with -inf, and of one that is far from 0."""
    x = floats(np.random.default_rng(0), 6, 700) * 30
    x[1, [40, 41, 600]] = 200.0
    x[2, 5:] = -np.inf
    x[3] += 1e4
    got = jax.jit(BODIES[body])(x)
    assert_same_bits(np.asarray(got.most_T), x.max(-1))
    assert np.asarray(got.best_T).tolist() == x.argmax(-1).tolist()
    assert np.asarray(got.finite_T).tolist() == [True, True, False, True, True, True]
    wide = x.astype(np.float64)
    assert_close(got.logsumexp_T, np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1)) + wide.max(-1), F32)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_summary_of_a_bad_row_says_so_and_changes_no_other(body, bad):
    x = floats(np.random.default_rng(1), 5, 300)
    good = jax.jit(BODIES[body])(x)
    x[1, 7], x[3] = bad, bad
    got = jax.jit(BODIES[body])(x)
    assert np.asarray(got.finite_T).tolist() == [True, False, True, False, True]
    assert ((np.asarray(got.best_T) >= 0) & (np.asarray(got.best_T) < 300)).all()
    for name in ("most_T", "best_T", "logsumexp_T"):
        assert_same_bits(np.asarray(getattr(got, name))[::2], np.asarray(getattr(good, name))[::2])


@pytest.mark.parametrize("size", [32, 64])
def test_the_best_of_blocks_are_those_of_the_whole_row(size):
    """In order, the first of equals first: half of the elements are equal to another one."""
    x = np.random.default_rng(2).integers(0, 400, (7, 64 * 12)).astype(np.float32)
    x[6] = 3.0
    place = np.argsort(-x, axis=-1, kind="stable")[:, :9]
    for value_TM, place_TM in (jax.jit(_top_of_blocks, static_argnums=(1, 2))(x, 9, size), top_k(jnp.asarray(x), 9)):
        assert np.asarray(place_TM).tolist() == place.tolist()
        assert_same_bits(np.asarray(value_TM), np.take_along_axis(x, place, 1))
