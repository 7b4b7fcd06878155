"""Moments in 8 bits against a loop in NumPy that looks every number up in the published map."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.step.moments_8bit import BLOCK, Blocks, mu_of, nu_of, quantised_mu, quantised_nu, scale_shape
from train.step.optimizer import IDLE, Hyper, Moments
from train.step.update import update_slots

ROWS = 3
quantise_mu, quantise_nu, read_mu, read_nu = (jax.jit(f) for f in (quantised_mu, quantised_nu, mu_of, nu_of))


def published_map(signed):
    """float64, ascending: in each of seven decades the middles of equal parts, twice as many as in the one before; 0 and 1."""
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, (1 if signed else 2) * 2**decade + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        levels += [*middles, *(-middles if signed else ())]
    return np.sort(levels)


MAPS = {"mu": published_map(True), "nu": published_map(False)}
READ = {"mu": read_mu, "nu": read_nu}


@pytest.mark.parametrize("moment", ["mu", "nu"])
def test_the_256_codes_are_the_published_map(moment):
    every = np.arange(256, dtype=np.uint8)[None, :, None]
    got = np.asarray(READ[moment](Blocks(every, np.ones((1, 256), np.float32))))[0, :, 0]
    assert np.array_equal(np.sort(got), MAPS[moment].astype(np.float32))
    assert got[0] == 0  # arrays of zeros are moments of zero


def drawn(seed, features, moment):
    """[2, ROWS, features] over ten decades, both signs for mu; a whole row and single numbers are zero."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, ROWS, features)) * 10.0 ** rng.uniform(-9, 1, (2, ROWS, features))
    x = x if moment == "mu" else x**2
    x[:, :, 5::11] = 0
    x[1, 2] = 0
    return x.astype(np.float32)


def scale_by_hand(block):
    return block[np.abs(block).argmax()]


def mu_by_hand(block):
    """float32: each number's nearest level of the map, times the scale."""
    scale = scale_by_hand(block)
    levels = MAPS["mu"]
    return [
        np.float32(levels[np.abs(levels - np.float64(x) / scale).argmin()]) * scale if scale else 0.0 for x in block
    ]


def nu_by_hand(block, bits):
    """float32: of the two levels around each number the upper one with the probability that keeps the mean; never zero."""
    scale, levels, found = scale_by_hand(block), MAPS["nu"], []
    for x, draw in zip(block, bits, strict=True):
        share = np.float64(x) / scale if scale else 0.0
        below = np.flatnonzero(levels <= share).max()
        if share > levels[below]:
            part = (share - levels[below]) / (levels[below + 1] - levels[below])
            below += part * 2**16 > draw or below == 0
        found.append(np.float32(levels[below]) * scale)
    return found


@pytest.mark.parametrize("features", [1, 128, 300])
@pytest.mark.parametrize("moment", ["mu", "nu"])
def test_a_moment_is_what_a_loop_over_its_blocks_makes_of_it(moment, features):
    """Exact, up to the last bit of the product with the scale: no number here lies within rounding of a boundary."""
    x = drawn(features, features, moment)
    bits = np.random.default_rng(1).integers(0, 2**16, x.shape).astype(np.uint32)
    blocks = quantise_mu(x) if moment == "mu" else quantise_nu(x, bits)
    assert (blocks.code_LRX.dtype, blocks.code_LRX.shape) == (np.uint8, x.shape)
    assert (blocks.scale_LE.dtype, blocks.scale_LE.shape) == (np.float32, scale_shape(x.shape))
    assert blocks.scale_LE.shape[1] == ROWS * -(-features // 128)
    got = np.asarray(READ[moment](blocks))
    for layer in range(2):
        for row in range(ROWS):
            for number, start in enumerate(range(0, features, 128)):
                at = slice(start, start + 128)
                block = x[layer, row, at]
                want = mu_by_hand(block) if moment == "mu" else nu_by_hand(block, bits[layer, row, at])
                np.testing.assert_allclose(got[layer, row, at], want, rtol=2e-7, atol=0)
                scale = blocks.scale_LE[layer, number * ROWS + row]
                assert scale == scale_by_hand(block)
                assert scale in got[layer, row, at]  # the largest comes back as it was


@pytest.mark.parametrize("share", [0.5, 0.0999, 3e-4, 4.4e-7])
def test_the_mean_of_all_draws_of_nu_is_what_was_rounded(share):
    """2^16 draws: within a draw of the two levels' distance, and a float32's rounding."""
    x = np.full((2**16, 1, 2), share, np.float32)
    x[:, :, 1] = 1
    bits = np.repeat(np.arange(2**16, dtype=np.uint32), 2).reshape(x.shape)
    got = np.asarray(read_nu(quantise_nu(x, bits)), np.float64)
    levels = np.unique(got[:, 0, 0])
    assert len(levels) == 2
    assert levels[0] < x[0, 0, 0] < levels[1]
    assert got[:, 0, 0].mean() == pytest.approx(float(x[0, 0, 0]), abs=np.ptp(levels) / 2**15, rel=1e-6)
    assert (got[:, 0, 1] == 1).all()


def test_no_second_moment_above_zero_becomes_zero_and_zero_stays():
    x = np.zeros((1, 1, 300), np.float32)
    x[0, 0, :3] = [4.0, 1e-9, 1e-30]
    for draw in (0, 2**16 - 1):
        got = np.asarray(read_nu(quantise_nu(x, np.full(x.shape, draw, np.uint32))))
        assert got[0, 0, 0] == 4
        assert (got[0, 0, 1:3] == np.float32(3.25e-7) * 4).all()
        assert got[0, 0, 3:].tobytes() == bytes(4 * 297)


@pytest.mark.parametrize("moment", ["mu", "nu"])
def test_a_block_depends_on_nothing_beside_it(moment):
    """Not on other rows, other blocks of its row, nor on how many rank rows there are, whatever lies there."""
    x = drawn(4, 300, moment)
    bits = np.zeros(x.shape, np.uint32)

    def quantised(x, bits):
        blocks = quantise_mu(x) if moment == "mu" else quantise_nu(x, bits)
        return np.asarray(blocks.code_LRX), np.asarray(blocks.scale_LE).reshape(2, 3, -1)  # [L, N, R]

    code, scale = quantised(x, bits)
    for strange in (np.nan, 1e30, 0.0):
        other = np.full((2, 5, 300), strange, np.float32)
        other[:, 1, BLOCK : 2 * BLOCK] = x[:, 1, BLOCK : 2 * BLOCK]
        got_code, got_scale = quantised(other, np.zeros(other.shape, np.uint32))
        assert np.array_equal(got_code[:, 1, BLOCK : 2 * BLOCK], code[:, 1, BLOCK : 2 * BLOCK])
        assert np.array_equal(got_scale[:, 1, 1], scale[:, 1, 1])


def test_the_second_moment_follows_gradients_that_change():
    """Gradients of 1, later of 1.3, beside one of 10: each step moves nu by a hundredth of the distance of two levels.

    1,016 numbers with the random rounding of 600 steps: each has a standard deviation below 0.5 of its size, their mean
    of 0.016.
    """
    zero = np.zeros((1, 1, 8, 128), np.float32)
    pattern = np.ones_like(zero)
    pattern[..., 0] = 0
    large = 10 * (1 - pattern)
    hyper, slot = jax.device_put(Hyper.stack([IDLE])), jnp.zeros(1, jnp.int32)
    none = Blocks(zero.astype(np.uint8), np.zeros((1, 1, 8), np.float32))
    moments = Moments(mu={"q_proj": (none, none)}, nu={"q_proj": (none, none)}, count=slot)

    @jax.jit
    def step(g, m):
        grads = pattern * g + large
        return update_slots({"q_proj": (zero, zero)}, {"q_proj": (grads, grads)}, m, hyper, slot)[2]

    expected, nearest, levels = 0.0, 0.0, MAPS["nu"]
    for n, g in enumerate([1.0] * 600 + [1.3] * 600, start=1):
        moments = step(np.float32(g), moments)
        expected = 0.999 * expected + 0.001 * g**2
        largest = 100 * (1 - 0.999**n)
        share = (0.999 * nearest + 0.001 * g**2) / largest
        nearest = largest * levels[np.abs(levels - share).argmin()]
    got = np.asarray(nu_of(jax.tree.map(lambda x: x[:, 0], moments.nu["q_proj"][0])))[0, :, 1:]
    assert got.mean() == pytest.approx(expected, rel=0.05)
    assert nearest < 0.85 * expected  # the fault that rounding at random avoids
