"""The draw of a token: the definition against a loop, the bodies against the definition, and what a row depends on."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.native import library
from pallas_kernels.sampling.op import (
    FEW_PASSES,
    FEW_SUMS,
    TILE_ROWS,
    Choices,
    _floor,
    _in_blocks,
    draw,
    draw_reference,
)


def body(op, **how):
    """The tokens that a body draws, int32 [B]."""
    return jax.jit(lambda x_BV, of: op(x_BV, x_BV.max(axis=1), of, **how)[0])


SEARCHES = {"few passes": FEW_PASSES, "few sums": FEW_SUMS}
GROUPS = {"few passes": TILE_ROWS, "few sums": 1}
BODIES = {name: body(_in_blocks, search=search, group=GROUPS[name]) for name, search in SEARCHES.items()}
BODIES["dispatched"] = body(draw, filtered=True)
V = 700  # two whole blocks and a part of one
FILTERS = {
    "none": {},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "all": {"top_k": 20, "top_p": 0.8, "min_p": 0.05},
    "one": {"top_k": 1},
}


def choices(uniforms, temperature=0.8, top_p=1.0, top_k=0, min_p=0.0):
    B = len(uniforms)
    return Choices(
        temperature_B=jnp.full(B, temperature, jnp.float32),
        top_p_B=jnp.full(B, top_p, jnp.float32),
        top_k_B=jnp.full(B, top_k, jnp.int32),
        min_p_B=jnp.full(B, min_p, jnp.float32),
        uniform_B=jnp.asarray(uniforms, jnp.float32),
    )


def by_hand(x_V, temperature=0.8, top_p=1.0, top_k=0, min_p=0.0):
    """Float64 shares of the tokens that are kept, in plain words: sort, keep k, keep the least that reach p, drop what is small."""
    share = np.exp((x_V.astype(np.float64) - x_V.max()) / temperature)
    order = np.argsort(-share, kind="stable")
    kept = np.zeros(len(x_V), bool)
    kept[order[: top_k or len(x_V)]] = True
    if top_p < 1:
        total = share[kept].sum()
        reached = np.cumsum(share[order] * kept[order]) - share[order] * kept[order]
        kept[order[reached >= top_p * total]] = False
    return np.where(kept & (share >= min_p), share, 0.0)


def logits(rows, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, V)).astype(np.float32) * 3


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_the_definition_is_a_loops(filters):
    uniforms = np.linspace(0.003, 0.997, 40)
    x_BV = logits(len(uniforms))
    got, logit = draw_reference(jnp.asarray(x_BV), choices(uniforms, **filters))
    assert np.asarray(logit).tolist() == x_BV[np.arange(len(x_BV)), np.asarray(got)].tolist()
    for x_V, uniform, token in zip(x_BV, uniforms, np.asarray(got), strict=True):
        upto = np.cumsum(by_hand(x_V, **filters))
        assert abs(np.searchsorted(upto, uniform * upto[-1], side="right") - token) == 0, (uniform, token)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_a_body_draws_what_the_definition_draws(filters, body):
    """But where the uniform number lies within rounding of the end of a token's share."""
    uniforms = np.random.default_rng(1).uniform(size=300)
    x_BV = logits(len(uniforms), 1)
    got = np.asarray(BODIES[body](jnp.asarray(x_BV), choices(uniforms, **filters)))
    for x_V, uniform, token in zip(x_BV, uniforms, got, strict=True):
        share = by_hand(x_V, **filters)
        upto = np.cumsum(share) / share.sum()
        assert share[token] > 0
        assert upto[token] - share[token] / share.sum() - 1e-5 <= uniform <= upto[token] + 1e-5


@pytest.mark.parametrize("body", BODIES)
def test_the_ends_of_the_unit_interval_draw_tokens_that_are_kept(body):
    x_BV = np.full((4, V), -np.inf, np.float32)
    x_BV[:, 300], x_BV[:, 310] = 0.0, 1.0
    nearly_one = np.nextafter(np.float32(1), np.float32(0))
    got = BODIES[body](jnp.asarray(x_BV), choices([0.0, nearly_one, 0.0, nearly_one], top_p=0.999))
    assert np.asarray(got).tolist() == [300, 310, 300, 310]


@pytest.mark.parametrize("body", BODIES)
def test_equal_logits_are_kept_together(body):
    x_BV = np.zeros((64, V), np.float32)
    x_BV[:, [3, 400, 699]] = 2.0
    got = BODIES[body](jnp.asarray(x_BV), choices(np.linspace(0, 0.999, 64), top_k=2))
    assert set(np.asarray(got).tolist()) == {3, 400, 699}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("filters", [FILTERS["none"], FILTERS["top_p"]], ids=["none", "top_p"])
def test_many_draws_follow_the_distribution(filters, body):
    """Chi-square of 2^13 draws over the tokens that are expected five times and the rest."""
    x_V = logits(1, 2)[0]
    share = by_hand(x_V, **filters)
    expected = share / share.sum() * 2**13
    run, counts = BODIES[body], np.zeros(V)
    for seed in range(4):
        uniforms = np.random.default_rng(seed).uniform(size=2048).astype(np.float32)
        counts += np.bincount(run(jnp.asarray(np.tile(x_V, (2048, 1))), choices(uniforms, **filters)), minlength=V)
    often = expected >= 5
    seen, wanted = np.append(counts[often], counts[~often].sum()), np.append(expected[often], expected[~often].sum())
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    assert ((seen - wanted) ** 2 / wanted).sum() < freedom + 5 * np.sqrt(2 * freedom)
    assert not counts[share == 0].any()


@pytest.mark.parametrize("body", BODIES)
def test_a_row_without_a_temperature_or_with_nan_hurts_nobody(body):
    uniforms = np.linspace(0.1, 0.9, 5)
    x_BV = logits(5, 3)
    want = BODIES[body](jnp.asarray(x_BV), choices(uniforms, top_p=0.9, top_k=30))
    x_BV[1], x_BV[3, 7] = np.nan, np.inf
    of = choices(uniforms, top_p=0.9, top_k=30)
    cold = replace(of, temperature_B=of.temperature_B.at[0].set(0.0))
    got = np.asarray(BODIES[body](jnp.asarray(x_BV), cold))
    assert ((got >= 0) & (got < V)).all()
    assert got[[2, 4]].tolist() == np.asarray(want)[[2, 4]].tolist()


@pytest.mark.skipif(library.instruction_set() is None, reason="only the native body promises it")
def test_a_row_draws_the_same_in_any_row_and_company():
    x_BV, uniforms = logits(33, 4), np.random.default_rng(5).uniform(size=33)
    run = BODIES["dispatched"]
    whole = np.asarray(run(jnp.asarray(x_BV), choices(uniforms, top_p=0.9)))
    for rows in (1, 2, 7, 32):
        for start in (0, 33 - rows):
            part = slice(start, start + rows)
            got = run(jnp.asarray(x_BV[part]), choices(uniforms[part], top_p=0.9))
            assert np.asarray(got).tolist() == whole[part].tolist()


@pytest.mark.parametrize("search", SEARCHES)
def test_without_filters_both_forms_draw_the_same(search):
    """Rows with min-p and without, one of them beside a row that filters: which program ran is nobody's to see."""
    x_BV, uniforms = logits(40, 6), np.random.default_rng(7).uniform(size=40)
    of = choices(uniforms)
    of = replace(of, min_p_B=jnp.where(jnp.arange(40) % 3 == 0, 0.05, 0.0), temperature_B=jnp.linspace(0.2, 2, 40))
    mixed = replace(of, top_k_B=of.top_k_B.at[1].set(3), top_p_B=of.top_p_B.at[2].set(0.5))
    plain = np.asarray(body(_in_blocks, search=None, group=GROUPS[search])(x_BV, of))
    assert np.asarray(BODIES[search](x_BV, of)).tolist() == plain.tolist()
    others = np.arange(40) > 2
    assert np.asarray(BODIES[search](x_BV, mixed))[others].tolist() == plain[others].tolist()


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 1e-6}, {"top_k": 600, "top_p": 1e-6}, {"min_p": 1.0}])
def test_the_best_alone_is_told_from_one_that_is_nearly_as_good(filters, search):
    x_BV = np.full((2, V), -1.0, np.float32)
    x_BV[:, 500], x_BV[:, 20] = 10.0, np.nextafter(np.float32(10), np.float32(0))
    assert np.asarray(BODIES[search](x_BV, choices([0.0, 0.999], **filters))).tolist() == [500, 500]


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_more_is_kept_than_should_be_only_within_a_thousandth_of_the_temperature(search):
    """Top-k and top-p together, of rows whose k is everything from 2 to all."""
    rng = np.random.default_rng(8)
    x_BV = logits(200, 9)
    k_B, p_B = rng.integers(2, V, 200), rng.uniform(0.05, 1, 200).astype(np.float32)
    of = replace(choices(np.zeros(200)), top_k_B=jnp.asarray(k_B, jnp.int32), top_p_B=jnp.asarray(p_B))
    floor_B = np.asarray(jax.jit(partial(_floor, search=search))(x_BV, x_BV.max(1), of))
    for x_V, k, p, floor in zip(x_BV, k_B, p_B, floor_B, strict=True):
        kept_V = by_hand(x_V, top_k=int(k), top_p=float(p)) > 0
        least = x_V[kept_V].min()
        assert floor <= least
        extra_V = (x_V >= floor) & ~kept_V
        assert (x_V[extra_V] > least - 0.8e-3).all()


@pytest.mark.slow
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_a_million_draws_follow_the_distribution_of_the_definition(filters):
    """Chi-square of what an accelerator's form draws: the tokens that are expected ten times, and the rest."""
    x_V, count = logits(1, 10)[0, :96], 0  # three blocks
    x_BV = jnp.asarray(np.tile(x_V, (4096, 1)))
    share = by_hand(x_V, **filters)
    counts = np.zeros(96)
    for seed in range(245):
        drawn = BODIES["few passes"](x_BV, choices(np.random.default_rng(seed).random(4096, np.float32), **filters))
        counts += np.bincount(drawn, minlength=96)
        count += len(drawn)
    assert count > 10**6
    expected = share / share.sum() * count
    assert not counts[share == 0].any()
    often = expected >= 10
    seen, wanted = np.append(counts[often], counts[~often].sum()), np.append(expected[often], expected[~often].sum())
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    assert ((seen - wanted) ** 2 / wanted).sum() < freedom + 4 * np.sqrt(2 * freedom) + 1e-9
