"""Products with packed weights: against a loop, against XLA's body, and row by row the same bits whatever the company."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from kernel_checks import BF16, F32, assert_close, assert_same_bits, floats

from pallas_kernels.native import library
from pallas_kernels.paged_attention.op import paged_attention
from pallas_kernels.product.op import (
    BLOCK,
    FEW_ROWS,
    Packed,
    outputs,
    pack,
    packed_shape,
    product,
    product_back,
    product_back_reference,
    product_reference,
    unpacked,
    unpacked_back,
)

L = 3
SHAPES = [(64, 96), (32, 1), (1, 33), (70, 31), (576, 192)]  # features in, out
TOLERANCE = {"float32": F32, "bfloat16": BF16}
WHOLE = {"atol": 1e-3}  # where x has two digits in base 128: 1 / 32512 of a row's largest, summed
SUMMED = {"rtol": 0.02, "atol": 0.02}  # where what is summed was rounded to bfloat16
KINDS = [(dtype, bits) for dtype in TOLERANCE for bits in ("as x", "int8")]  # x, weights
kinds = pytest.mark.parametrize(("dtype", "bits"), KINDS)
native = pytest.mark.skipif(
    library.instruction_set() is None, reason="the native bodies are not built or not for this CPU"
)


def packed(w_LXY: np.ndarray, dtype: str) -> Packed:
    count, X, Y = w_LXY.shape
    host = np.empty((count, *packed_shape(X, Y, dtype)), jnp.dtype(dtype))
    scale = np.empty((*host.shape[:2], BLOCK), np.float32) if dtype == "int8" else None
    for layer in range(count):
        pack(w_LXY[layer], host[layer], None if scale is None else scale[layer])
    return Packed(
        blocks=jnp.asarray(host),
        scale=None if scale is None else jnp.asarray(scale),
        features_in=X,
        features_out=Y,
    )


def stored(w_LXY: np.ndarray, dtype: str) -> np.ndarray:
    """Weights as they are rounded to the dtype, in float32."""
    if dtype != "int8":
        return np.asarray(jnp.asarray(w_LXY, dtype).astype(jnp.float32))
    scale = np.abs(w_LXY).max(axis=1, keepdims=True) / np.float32(127)
    whole = np.zeros_like(w_LXY)
    for layer, feature in np.ndindex(w_LXY.shape[0], w_LXY.shape[2]):
        column = w_LXY[layer, :, feature]
        if np.any(column):
            whole[layer, :, feature] = np.round(column * (np.float32(127) / np.abs(column).max()))
    return whole * scale


def limit(dtype: str, bits: str) -> dict[str, float]:
    """The tolerance of a product."""
    return TOLERANCE[dtype] | (WHOLE if bits == "int8" else {})


def made(
    rows: int, X: int, *outs: int, dtype: str, bits: str = "as x"
) -> tuple[jax.Array, list[np.ndarray], list[Packed]]:
    """x, and weights of L layers as they are rounded, plain and packed."""
    rng = np.random.default_rng(X + rows)
    kind = dtype if bits == "as x" else bits
    weights = [floats(rng, L, X, Y) / np.float32(np.sqrt(X)) for Y in outs]
    for w in weights:
        w[..., 0] = 0  # an output feature without weights
    return (
        jnp.asarray(floats(rng, rows, X), dtype),
        [stored(w, kind) for w in weights],
        [packed(w, kind) for w in weights],
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_packing_loses_nothing(shape, dtype):
    _, (w_LXY,), (weight,) = made(1, *shape, dtype=dtype)
    for layer in range(L):
        assert_same_bits(unpacked(weight, layer).astype(jnp.float32), w_LXY[layer])
        assert_same_bits(unpacked_back(weight, layer).astype(jnp.float32), w_LXY[layer].T)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_eight_bits_are_the_nearest_of_255(shape, dtype):
    w_LXY = floats(np.random.default_rng(0), L, *shape)
    weight = packed(w_LXY, "int8")
    most = np.abs(w_LXY).max(axis=1, keepdims=True)
    got = np.stack([np.asarray(unpacked(weight, layer)) for layer in range(L)])
    scale = np.asarray(weight.scale).reshape(L, 1, -1)[..., : shape[1]]
    assert got.dtype == np.int8
    assert np.abs(got).max() == 127
    assert np.all(np.abs(got * scale - w_LXY) <= most / 254 * (1 + 1e-5))
    rows = jnp.asarray([shape[1] - 1, 0])
    assert_close(outputs(weight, rows, dtype), (got[0] * scale[0])[:, rows].T, TOLERANCE[dtype])


@kinds
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 33, 70])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_is_a_loops(shape, rows, dtype, bits):
    x_TX, (w_LXY,), weights = made(rows, *shape, dtype=dtype, bits=bits)
    for layer in range(L):
        want = np.zeros((rows, shape[1]))
        for t in range(rows):
            want[t] = np.asarray(x_TX[t], np.float64) @ w_LXY[layer].astype(np.float64)
        for kind in (dtype, "float32"):
            (got,) = jax.jit(product, static_argnames="dtype")(x_TX, weights, jnp.int32(layer), dtype=kind)
            assert got.dtype == kind
            assert_close(got, want, limit(kind, bits))
        assert_close(product_reference(x_TX, weights, jnp.int32(layer))[0], want, F32)


@kinds
@pytest.mark.parametrize("rows", [1, 3, 16, FEW_ROWS, FEW_ROWS + 1, 70, 129])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_transposed_product_is_numpys(shape, rows, dtype, bits):
    _, (w_LXY,), (weight,) = made(1, *shape, dtype=dtype, bits=bits)
    d_TY = jnp.asarray(floats(np.random.default_rng(rows), rows, shape[1]), dtype)
    want = np.asarray(d_TY, np.float64) @ w_LXY[2].T.astype(np.float64)
    assert_close(product_back_reference(d_TY, weight, jnp.int32(2)), want, F32 | {"atol": 1e-5})
    limit = (
        SUMMED if (dtype, bits) == ("bfloat16", "int8") else TOLERANCE[dtype] | {"atol": 1e-5}
    )  # d * scale is rounded
    assert_close(jax.jit(product_back)(d_TY, weight, jnp.int32(2)), want, limit)


@kinds
def test_targets_share_one_read(dtype, bits):
    x_TX, plain, weights = made(9, 64, 96, 1, 40, dtype=dtype, bits=bits)
    got = product(x_TX, weights, jnp.int32(1))
    for y_TY, w_LXY in zip(got, plain, strict=True):
        assert_close(y_TY, np.asarray(x_TX, np.float64) @ w_LXY[1], limit(dtype, bits))


@kinds
def test_the_gradient_is_the_transposed_product(dtype, bits):
    x_TX, plain, weights = made(5, 64, 96, 33, dtype=dtype, bits=bits)
    d = [floats(np.random.default_rng(1), 5, w.shape[2]) for w in plain]
    d = [jnp.asarray(y, dtype) for y in d]
    _, pull = jax.vjp(lambda x: tuple(product(x, weights, jnp.int32(2))), x_TX)
    want = sum(np.asarray(y, np.float64) @ w[2].T.astype(np.float64) for y, w in zip(d, plain, strict=True))
    assert_close(
        pull(tuple(d))[0], want, SUMMED if dtype == "bfloat16" else F32
    )  # each target's part is rounded on its own


@native
@kinds
@pytest.mark.parametrize("shape", [(64, 96), (70, 31)])
def test_a_rows_bits_do_not_depend_on_its_company(shape, dtype, bits):
    x_TX, _, weights = made(70, *shape, dtype=dtype, bits=bits)
    run = jax.jit(lambda x: product(x, weights, jnp.int32(1))[0])
    whole = run(x_TX)
    for rows in (1, 2, 3, 8, 17, 33, 64):
        for start in (0, 5, 70 - rows):
            if start + rows <= 70:
                assert_same_bits(run(x_TX[start : start + rows]), whole[start : start + rows])
    assert_same_bits(run(x_TX.at[3].set(jnp.nan))[4:], whole[4:])


@native
@kinds
def test_a_scan_over_layers_copies_no_weights(dtype, bits):
    x_TX, _, weights = made(4, 576, 576, dtype=dtype, bits=bits)

    @jax.jit
    def layers(x_TX: jax.Array, weight: Packed) -> jax.Array:
        return lax.scan(lambda x, layer: (product(x, [weight], layer)[0], None), x_TX, jnp.arange(L))[0]

    used = layers.lower(x_TX, weights[0]).compile().memory_analysis()
    assert used.temp_size_in_bytes < weights[0].blocks.nbytes / L / 2


@native
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 9])
def test_a_querys_bits_do_not_depend_on_lane_chunk_or_company(dtype, window):
    G, J, N, K, H, Z, C = 3, 8, 4, 2, 32, 4, 10
    rng = np.random.default_rng(0)
    pages = jnp.asarray(rng.permutation(G * C).reshape(G, C), jnp.int32)
    k, v = (jnp.asarray(floats(rng, 1, G * C, Z, K * H), dtype) for _ in range(2))
    q = jnp.asarray(floats(rng, G, J, N, H), dtype)
    position = jnp.asarray(np.array([[0], [13], [31]]) + np.arange(J), jnp.int32)
    run = jax.jit(lambda q, page, position: paged_attention(q, k, v, jnp.int32(0), page, position, window=window))
    whole = run(q, pages, position)
    for g in range(G):
        for j in range(J):
            one = run(q[g : g + 1, j : j + 1], pages[g : g + 1], position[g : g + 1, j : j + 1])
            assert_same_bits(one[0, 0], whole[g, j])


@native
@pytest.mark.slow
@pytest.mark.parametrize("most", library.INSTRUCTION_SETS[:-1])
def test_every_instruction_set_passes_these(most):
    """In a process of its own, as it is chosen once."""
    tests = ("product", "paged_attention", "rows", "sampling")
    files = [os.path.join(os.path.dirname(__file__), f"test_pallas_kernels_{name}.py") for name in tests]
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "-m", "not slow", *files]
    ran = subprocess.run(
        command, env=os.environ | {library.VARIABLE: most}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout[-4000:]


def test_an_unknown_instruction_set_is_told():
    code = "from pallas_kernels.native.library import instruction_set; instruction_set()"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {library.VARIABLE: "sse"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "JAXLORA_NATIVE must be one of off, avx2, avx512, avx512_bf16, amx, got 'sse'" in ran.stderr


def test_a_server_says_so_in_one_line(tmp_path):
    command = [sys.executable, "-m", "serve.cli.main", "serve", "--model", "smollm2", "--port", "0"]
    env = os.environ | {library.VARIABLE: "sse"}
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1), ran.stderr
    assert "JAXLORA_NATIVE must be one of" in ran.stderr
