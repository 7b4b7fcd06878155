"""RMS norm and log-sum-exp against NumPy, and row by row the same bits whatever the company."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import BF16, F32, assert_close, assert_same_bits, floats

from pallas_kernels.native.library import instruction_set
from pallas_kernels.rows.op import logsumexp, logsumexp_reference, rms_norm, rms_norm_reference

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
