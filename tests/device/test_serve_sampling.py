"""Sampling: the filters against a sort, the draw against its distribution, and no row that feels another."""

from __future__ import annotations

from dataclasses import fields

import jax
import numpy as np
import pytest

from jaxlora.model.compile_cache import CompileCounter
from serve.engine.logit_edits import LogitEdits
from serve.engine.request import MAX_TOP_LOGPROBS, SamplingParams
from serve.engine.sampling import SamplingBatch, StepOutput, sample

ROWS, VOCAB = 8, 50
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


@jax.jit
def run(logits_BV, batch):
    return sample(logits_BV, LogitEdits.idle(len(logits_BV), 1, logits_BV.shape[1]), batch)


def hot(**values) -> SamplingParams:
    return SamplingParams(max_tokens=1, **values)


def batch_of(rows: list[SamplingParams], seeds: list[int] | None = None, positions: list[int] | None = None):
    batch = SamplingBatch.idle(len(rows))
    for i, params in enumerate(rows):
        batch.fill(i, params, i if seeds is None else seeds[i], 7 if positions is None else positions[i])
    return batch


def draw(logits_BV, rows, seeds=None, positions=None) -> StepOutput:
    return jax.device_get(run(np.asarray(logits_BV, np.float32), batch_of(rows, seeds, positions)))


def random_logits(seed: int, rows: int = ROWS, vocab: int = VOCAB) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, vocab)) * 3).astype(np.float32)


def kept_by_sorting(logits_V, params: SamplingParams) -> set[int]:
    """The tokens that may be drawn: sorts, counts, adds up in float64; a tie with the last one kept is kept."""
    scaled = logits_V.astype("f8") / params.temperature
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    floor = -np.inf
    if params.top_k > 0:
        floor = scaled[order[min(params.top_k, len(order)) - 1]]
    left = [i for i in order if scaled[i] >= floor]
    if params.top_p < 1:
        mass = np.exp(scaled[left] - scaled[order[0]])
        total = mass.sum()
        count = next(n for n in range(1, len(left) + 1) if mass[:n].sum() >= params.top_p * total)
        floor = max(floor, scaled[left[count - 1]])
    if params.min_p > 0:
        floor = max(floor, scaled[order[0]] + np.log(params.min_p))
    return {i for i in range(len(scaled)) if scaled[i] >= floor}


def drawn_set(logits_V, params: SamplingParams, draws: int = 64 * 128) -> set[int]:
    """Tokens that came up; many rows with their own seeds in each call."""
    rows, tokens = 64, set()
    logits_BV = np.tile(logits_V, (rows, 1))
    for start in range(0, draws, rows):
        tokens |= set(draw(logits_BV, [params] * rows, seeds=list(range(start, start + rows))).token_B.tolist())
    return tokens


FLAT = np.array([0.0, -0.1, -0.2, -0.3, -0.4, -0.5, -0.6, -0.7], np.float32)  # all likely: what is allowed comes up
TIED = np.array([1.0, 0.5, 0.5, 0.5, 0.0, 0.0, -0.5, -0.5], np.float32)
SIGNS = np.array([-0.3, 0.3, 0.0, -0.0, 0.2, -0.2, 0.1, -0.1], np.float32)


@pytest.mark.parametrize(
    ("logits", "params"),
    [
        pytest.param(FLAT, hot(), id="all"),
        pytest.param(FLAT, hot(top_k=3), id="top_k"),
        pytest.param(FLAT, hot(top_k=1), id="top_k_one"),
        pytest.param(FLAT, hot(top_k=8), id="top_k_all"),
        pytest.param(FLAT, hot(top_k=1000), id="top_k_over_the_vocabulary"),
        pytest.param(TIED, hot(top_k=2), id="top_k_keeps_ties"),
        pytest.param(TIED, hot(top_k=5), id="top_k_keeps_ties_at_zero"),
        pytest.param(FLAT, hot(top_p=0.5), id="top_p"),
        pytest.param(FLAT, hot(top_p=1e-6), id="top_p_tiny_keeps_the_best"),
        pytest.param(FLAT, hot(top_p=0.999), id="top_p_nearly_all"),
        pytest.param(TIED, hot(top_p=0.3), id="top_p_keeps_ties"),
        pytest.param(FLAT, hot(min_p=0.75), id="min_p"),
        pytest.param(TIED, hot(min_p=1.0), id="min_p_one_keeps_the_best"),
        pytest.param(FLAT, hot(top_k=5, top_p=0.7), id="top_p_of_what_top_k_left"),
        pytest.param(FLAT, hot(top_k=6, top_p=0.9, min_p=0.7), id="all_three"),
        pytest.param(FLAT, hot(temperature=0.5, top_p=0.6), id="top_p_after_temperature"),
        pytest.param(SIGNS, hot(top_k=4), id="both_signs"),
        pytest.param(SIGNS - 5, hot(top_p=0.5), id="all_negative"),
        pytest.param(FLAT + 90, hot(top_p=0.5), id="large"),
    ],
)
def test_what_may_be_drawn_is_what_sorting_says(logits, params):
    assert drawn_set(logits, params, draws=64 * 8) == kept_by_sorting(logits, params)


def test_what_is_drawn_from_random_rows_is_allowed():
    rng = np.random.default_rng(5)
    for seed in range(40):
        logits_BV = random_logits(seed)
        rows = [
            hot(
                temperature=float(rng.uniform(0.3, 2)),
                top_k=int(rng.integers(0, 12)),
                top_p=float(rng.uniform(0.2, 1)),
                min_p=float(rng.uniform(0, 0.3)),
            )
            for _ in range(ROWS)
        ]
        out = draw(logits_BV, rows, seeds=list(rng.integers(0, 2**63, ROWS)))
        for row in range(ROWS):
            assert out.token_B[row] in kept_by_sorting(logits_BV[row], rows[row])


def test_greedy_is_the_best_and_the_first_of_equals():
    logits_BV = random_logits(1)
    logits_BV[3, [7, 20]] = 50.0
    out = draw(logits_BV, [GREEDY] * ROWS)
    assert out.token_B.tolist() == [int(np.argmax(row)) for row in logits_BV]
    assert out.token_B[3] == 7
    mixed = draw(logits_BV, [GREEDY, hot(), GREEDY, GREEDY, hot(top_k=2), hot(top_p=0.4), GREEDY, hot(min_p=0.1)])
    for row in (0, 2, 3, 6):
        assert mixed.token_B[row] == out.token_B[row]


@pytest.mark.parametrize(
    "params",
    [
        pytest.param(hot(), id="plain"),
        pytest.param(hot(temperature=2.0), id="hot"),
        pytest.param(hot(temperature=0.4), id="cool"),
        pytest.param(hot(top_k=4), id="top_k"),
        pytest.param(hot(top_p=0.8), id="top_p"),
        pytest.param(hot(min_p=0.2, choice=3), id="min_p"),
    ],
)
@pytest.mark.parametrize("vary", ["seed", "position"])
def test_the_draw_has_the_distribution_of_the_softmax(params, vary):
    logits_V = np.array([1.2, 0.9, 0.3, 0.0, -0.4, -1.0], np.float32)
    rows, calls = 512, 16
    counts = np.zeros(6)
    for call in range(calls):
        numbers, same = list(range(call * rows, (call + 1) * rows)), [11] * rows
        seeds, positions = (numbers, same) if vary == "seed" else (same, numbers)
        out = draw(np.tile(logits_V, (rows, 1)), [params] * rows, seeds, positions)
        counts += np.bincount(out.token_B, minlength=6)
    kept = sorted(kept_by_sorting(logits_V, params))
    weight = np.exp(logits_V[kept].astype("f8") / params.temperature)
    expected = weight / weight.sum() * rows * calls
    assert counts.sum() == counts[kept].sum()
    chi_square = ((counts[kept] - expected) ** 2 / expected).sum()
    # 1 in 1,000 for 5, 3, 2 degrees of freedom is 20.5, 16.3, 13.8; the seeds are fixed, so this never flickers.
    assert chi_square < 20.5


def test_a_row_draws_the_same_wherever_it_sits_and_whoever_sits_beside_it():
    logits_V = random_logits(2)[0]
    mine = hot(temperature=0.9, top_p=0.95, choice=2, logprobs=3)
    others = [GREEDY, hot(top_k=2), hot(), hot(min_p=0.5), hot(temperature=2.0, top_p=0.1, logprobs=20)]
    alone = draw(np.tile(logits_V, (ROWS, 1)), [mine] + [GREEDY] * (ROWS - 1), [99] * ROWS, [5] * ROWS)
    for row in range(ROWS):
        logits_BV = random_logits(100 + row)
        logits_BV[row] = logits_V
        rows = [others[(row + i) % len(others)] for i in range(ROWS)]
        rows[row] = mine
        seeds, positions = [1000 + i for i in range(ROWS)], list(range(ROWS))
        seeds[row], positions[row] = 99, 5
        out = draw(logits_BV, rows, seeds, positions)
        assert out.token_B[row] == alone.token_B[0]
        assert out.logprob_B[row] == alone.logprob_B[0]
        np.testing.assert_array_equal(out.top_logprob_BM[row], alone.top_logprob_BM[0])


@pytest.mark.parametrize("part", ["seed", "seed_high", "choice", "position"])
def test_seed_choice_and_position_each_change_the_draw(part):
    rows = 64
    seeds, positions, choices = [3] * rows, [3] * rows, [0] * rows
    match part:
        case "seed":
            seeds = list(range(rows))
        case "seed_high":
            seeds = [i << 32 for i in range(rows)]  # the upper half of the seed counts too
        case "position":
            positions = list(range(rows))
        case "choice":
            choices = list(range(rows))
    out = draw(np.zeros((rows, VOCAB)), [hot(choice=c) for c in choices], seeds, positions)
    assert len(set(out.token_B.tolist())) > 25


def test_logprobs_are_the_raw_log_softmax():
    logits_BV = random_logits(3)
    wide = logits_BV.astype("f8")
    expected_BV = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    out = draw(logits_BV, [hot(temperature=0.3, top_k=5, logprobs=20)] * ROWS)
    count = min(MAX_TOP_LOGPROBS, VOCAB)
    assert out.top_token_BM.shape == (ROWS, count)
    for row in range(ROWS):
        np.testing.assert_allclose(out.logprob_B[row], expected_BV[row, out.token_B[row]], atol=1e-5)
        order = np.argsort(-expected_BV[row], kind="stable")[:count]
        assert out.top_token_BM[row].tolist() == order.tolist()
        np.testing.assert_allclose(out.top_logprob_BM[row], expected_BV[row, order], atol=1e-5)
    silent = draw(logits_BV, [GREEDY] * ROWS)
    assert not silent.top_token_BM.any()
    np.testing.assert_allclose(silent.logprob_B, expected_BV.max(-1), atol=1e-5)


def test_a_vocabulary_smaller_than_the_best_reported():
    out = draw(random_logits(4, vocab=6), [hot(logprobs=20)] * ROWS)
    assert out.top_token_BM.shape == (ROWS, 6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=["nan", "inf", "minus_inf"])
@pytest.mark.parametrize("whole_row", [False, True])
def test_a_bad_row_is_reported_and_changes_no_other(bad, whole_row):
    rows = [GREEDY, hot(), hot(top_k=3), hot(top_p=0.5), hot(min_p=0.2), hot(logprobs=5), hot(temperature=2.0), GREEDY]
    clean_BV = random_logits(6)
    clean = draw(clean_BV, rows)
    assert clean.finite_B.all()
    for row in range(ROWS):
        logits_BV = clean_BV.copy()
        logits_BV[row, slice(None) if whole_row else 17] = bad
        out = draw(logits_BV, rows)
        assert out.finite_B.tolist() == [i != row for i in range(ROWS)]
        others = np.arange(ROWS) != row
        for f in fields(StepOutput)[:-1]:  # without scores
            assert getattr(out, f.name)[others].tobytes() == getattr(clean, f.name)[others].tobytes(), f.name


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1.3e-38, 1e-42, 1e-300])
def test_a_tiny_temperature_is_nearly_greedy(temperature):
    logits_BV = random_logits(7)
    best = logits_BV.argmax(-1)
    for params in (hot(temperature=temperature), hot(temperature=temperature, top_k=5, top_p=0.5, min_p=0.1)):
        out = draw(logits_BV, [params] * ROWS)
        assert out.token_B.tolist() == best.tolist()


def test_numbers_at_the_edge_of_their_types_are_taken():
    params = hot(top_k=2**31 - 1, choice=2**32 - 1, seed=2**63 - 1)
    out = draw(random_logits(8), [params] * ROWS, seeds=[2**63 - 1] * ROWS, positions=[2**32 - 1] * ROWS)
    assert out.finite_B.all()
    assert drawn_set(FLAT, hot(top_k=2**40), draws=64 * 8) == set(range(8))


def test_an_idle_row_is_greedy_and_silent():
    batch = SamplingBatch.idle(2)
    out = jax.device_get(run(random_logits(9, rows=2), batch))
    assert out.token_B.tolist() == random_logits(9, rows=2).argmax(-1).tolist()
    batch.fill(0, hot(temperature=1.5, top_k=3, top_p=0.5, min_p=0.1, choice=4, logprobs=2), (5 << 32) + 6, 9)
    assert (batch.temperature_B[0], batch.top_k_B[0], batch.choice_B[0], batch.position_B[0]) == (1.5, 3, 4, 9)
    assert batch.seed_BE[0].tolist() == [5, 6]
    assert batch.logprobs_B.tolist() == [True, False]
    assert batch.temperature_B[1] == 0


def test_nothing_a_request_says_compiles():
    logits_BV = random_logits(10)
    draw(logits_BV, [GREEDY] * ROWS)
    variants = [hot(), hot(top_k=5), hot(top_p=0.2), hot(min_p=0.4), hot(logprobs=20), hot(choice=9), GREEDY]
    with CompileCounter() as counter:
        for params in variants:
            draw(logits_BV, [params] * ROWS, seeds=[2**62 + 1] * ROWS, positions=[31] * ROWS)
    assert not counter.retraced
    with CompileCounter() as counter:
        draw(random_logits(10, rows=3), [GREEDY] * 3)  # another shape does
    assert counter.retraced
