"""Edits of logits: a loop over single tokens says what they are, and no row feels another's."""

from __future__ import annotations

from dataclasses import fields

import jax
import numpy as np
import pytest

from jaxlora.core.errors import InvalidRequest
from jaxlora.model.compile_cache import CompileCounter
from serve.engine.logit_edits import LogitEdits, RowEdits, edited
from serve.engine.request import MAX_LOGIT_BIAS, SamplingParams
from serve.engine.sampling import SamplingBatch, StepOutput, sample

ROWS, VOCAB, PLACES = 6, 70, 40
ENDS = (2, 9)
change = jax.jit(edited)
choose = jax.jit(sample)


def params(**values) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 30, "temperature": 0.0} | values)


def random_logits(seed: int, rows: int = ROWS, vocab: int = VOCAB) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, vocab)) * 3).astype(np.float32)


def by_hand(logits_V, p: SamplingParams, prompt: list[int], said: list[int], ends=ENDS) -> np.ndarray:
    """float64: one token at a time, from the definitions of OpenAI (presence, frequency) and of vLLM (repetition)."""
    out = logits_V.astype("f8").copy()
    bias = dict(p.logit_bias)
    for t in range(len(out)):
        out[t] += bias.get(t, 0.0)
        if t in prompt or t in said:
            out[t] = out[t] / p.repetition_penalty if out[t] > 0 else out[t] * p.repetition_penalty
        out[t] -= p.frequency_penalty * said.count(t)
        out[t] -= p.presence_penalty * (t in said)
        if t in ends and len(said) < p.min_tokens:
            out[t] = -np.inf
    return out


def row_edits(p: SamplingParams, prompt: list[int], said: list[int], vocab: int = VOCAB) -> RowEdits:
    it = RowEdits(p, prompt, ENDS, vocab)
    for token in said:
        it.take(token)
    return it


def batch_of(rows: dict[int, RowEdits], masks: dict[int, set[int]] | None = None) -> LogitEdits:
    batch = LogitEdits.idle(ROWS, PLACES, VOCAB)
    for row, it in rows.items():
        if it.used:
            it.fill(batch.tokens, row, must_end=False)
    for row, allowed in (masks or {}).items():
        bits = np.zeros(32 * batch.allowed.bits_BW.shape[1], np.uint8)
        bits[list(allowed)] = 1
        batch.allowed.bits_BW[row] = np.packbits(bits, bitorder="little").view(np.uint32)
        batch.allowed.used_B[row] = True
    return batch


CASES = {
    "nothing": {},
    "presence": {"presence_penalty": 1.5},
    "presence_negative": {"presence_penalty": -2.0},
    "frequency": {"frequency_penalty": 0.7},
    "repetition": {"repetition_penalty": 1.3},
    "repetition_below_one": {"repetition_penalty": 0.5},
    "bias": {"logit_bias": ((3, 5.0), (69, -100.0), (0, 100.0))},
    "min_tokens": {"min_tokens": 12, "stop_token_ids": (9,)},
    "min_tokens_reached": {"min_tokens": 3, "logit_bias": ((9, 4.0),)},
    "everything": {
        "presence_penalty": 0.5,
        "frequency_penalty": -0.25,
        "repetition_penalty": 1.2,
        "logit_bias": ((5, -3.0), (2, 9.0)),
        "min_tokens": 30,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_the_edited_logits_are_those_of_a_loop_over_tokens(name):
    draw, logits_BV = np.random.default_rng(len(name)), random_logits(len(name))
    p = params(**CASES[name])
    rows, expected = {}, {}
    for row in (0, 2, 5):
        prompt, said = draw.integers(0, VOCAB, 9).tolist(), draw.integers(0, VOCAB, 3 * row).tolist()
        rows[row] = row_edits(p, prompt, said)
        expected[row] = by_hand(logits_BV[row], p, prompt, said)
    out_BV = np.asarray(change(logits_BV, batch_of(rows)))
    for row in range(ROWS):
        if row in expected:
            np.testing.assert_allclose(out_BV[row], expected[row], rtol=1e-6, atol=1e-5)
        else:
            assert out_BV[row].tobytes() == logits_BV[row].tobytes()


def test_only_what_a_grammar_allows_is_left_and_min_tokens_still_holds():
    logits_BV = random_logits(1)
    allowed = {0, 2, 31, 32, 64, 69}
    edits = batch_of({3: row_edits(params(min_tokens=4), [], [])}, {1: allowed, 3: allowed})
    out_BV = np.asarray(change(logits_BV, edits))
    for row, left in ((1, allowed), (3, allowed - {2})):
        np.testing.assert_array_equal(np.flatnonzero(np.isfinite(out_BV[row])), sorted(left))
        np.testing.assert_array_equal(out_BV[row, sorted(left)], logits_BV[row, sorted(left)])
    for row in (0, 2, 4, 5):
        assert out_BV[row].tobytes() == logits_BV[row].tobytes()


def test_an_answer_that_must_end_may_although_min_tokens_are_not_reached():
    batch = LogitEdits.idle(ROWS, PLACES, VOCAB)
    row_edits(params(min_tokens=4, logit_bias=((9, 1.5),)), [], []).fill(batch.tokens, 0, must_end=True)
    logits_BV = random_logits(2)
    out_BV = np.asarray(change(logits_BV, batch))
    assert out_BV[0, 2] == logits_BV[0, 2]
    assert out_BV[0, 9] == logits_BV[0, 9] + np.float32(1.5)


def test_the_extremes_of_every_range_stay_finite():
    logits_BV = random_logits(3)
    logits_BV[0] *= np.float32(1e37)
    for repetition in (0.01, 100.0):
        p = params(repetition_penalty=repetition, logit_bias=((1, 100.0), (2, -100.0)), frequency_penalty=2.0)
        out_BV = np.asarray(change(logits_BV, batch_of({0: row_edits(p, list(range(30)), [])})))
        assert np.isfinite(out_BV).all()


def test_a_number_that_is_not_finite_stays_in_its_row_and_is_reported():
    logits_BV = random_logits(4)
    logits_BV[2, 7] = np.nan
    p = params(repetition_penalty=1.3, logit_bias=((7, 3.0),))
    edits = batch_of({2: row_edits(p, [7], []), 3: row_edits(p, [7], [])})
    out = jax.device_get(choose(logits_BV, edits, SamplingBatch.idle(ROWS)))
    assert out.finite_B.tolist() == [True, True, False, True, True, True]


def test_what_is_chosen_follows_the_edits_and_what_is_reported_does_not():
    logits_BV = random_logits(5)
    sampling = SamplingBatch.idle(ROWS)
    for row in range(ROWS):
        sampling.fill(row, params(logprobs=3), 1, 1)
    edits = batch_of({1: row_edits(params(logit_bias=((11, 100.0),)), [], [])}, {4: {33}})
    plain = jax.device_get(choose(logits_BV, batch_of({}), sampling))
    out = jax.device_get(choose(logits_BV, edits, sampling))
    assert out.token_B[[1, 4]].tolist() == [11, 33]
    raw_BV = logits_BV.astype("f8") - np.log(np.exp(logits_BV.astype("f8")).sum(-1, keepdims=True))
    np.testing.assert_allclose(out.logprob_B[[1, 4]], [raw_BV[1, 11], raw_BV[4, 33]], atol=1e-5)
    np.testing.assert_array_equal(out.top_logprob_BM, plain.top_logprob_BM)
    np.testing.assert_array_equal(out.top_token_BM, plain.top_token_BM)
    assert out.finite_B.all()


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_draws_have_the_distribution_of_the_edited_softmax(top_p):
    rows, calls = 512, 16
    logits_V = np.array([1.2, 0.9, 0.3, 0.0, -0.4, -1.0, 2.0, 1.3], np.float32)
    p = params(repetition_penalty=1.5, frequency_penalty=0.4, presence_penalty=0.3, logit_bias=((3, 1.0), (7, -2.0)))
    prompt, said, allowed = [0, 4], [1, 1, 0], [0, 1, 2, 3, 4, 5, 7]
    one = row_edits(p, prompt, said, vocab=8)
    edits = LogitEdits.idle(rows, 8, 8)
    for row in range(rows):
        one.fill(edits.tokens, row, must_end=False)
    edits.allowed.bits_BW[:] = sum(1 << t for t in allowed)
    edits.allowed.used_B[:] = True
    counts = np.zeros(8)
    for call in range(calls):
        sampling = SamplingBatch.idle(rows)
        for row in range(rows):
            sampling.fill(row, SamplingParams(max_tokens=1, top_p=top_p), call * rows + row, 3)
        counts += np.bincount(choose(np.tile(logits_V, (rows, 1)), edits, sampling).token_B, minlength=8)
    share = np.exp(by_hand(logits_V, p, prompt, said, ends=()))
    share[6] = 0.0
    order = np.argsort(-share)
    kept = order[: 1 + int(np.searchsorted(np.cumsum(share[order]), top_p * share.sum() * (1 - 1e-9)))]
    kept = kept[share[kept] > 0]
    expected = share[kept] / share[kept].sum() * rows * calls
    assert counts.sum() == counts[kept].sum()
    # 1 in 1,000 for 6 degrees of freedom is 22.5; the seeds are fixed, so this never flickers.
    assert ((counts[kept] - expected) ** 2 / expected).sum() < 22.5


def test_a_neighbour_with_every_edit_changes_no_bit_of_a_row():
    logits_BV = random_logits(6)
    sampling = SamplingBatch.idle(ROWS)
    for row in range(ROWS):
        sampling.fill(row, SamplingParams(max_tokens=1, temperature=0.7, top_p=0.8, top_k=30, logprobs=5), row, 4)
    alone = jax.device_get(choose(logits_BV, batch_of({}), sampling))
    loud = row_edits(params(**CASES["everything"]), list(range(20)), [1, 1, 2])
    out = jax.device_get(choose(logits_BV, batch_of({0: loud, 5: loud}, {0: {3, 4}, 2: {1}}), sampling))
    others = [1, 3, 4]
    for f in fields(StepOutput)[:-1]:  # without scores
        assert getattr(out, f.name)[others].tobytes() == getattr(alone, f.name)[others].tobytes(), f.name


def test_no_edit_compiles():
    logits_BV, sampling = random_logits(7), SamplingBatch.idle(ROWS)
    choose(logits_BV, batch_of({}), sampling)
    with CompileCounter() as counter:
        for values in CASES.values():
            choose(logits_BV, batch_of({1: row_edits(params(**values), [1, 2], [3])}, {2: {5}}), sampling)
    assert not counter.retraced


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("presence_penalty", 2.1, "-2"),
        ("frequency_penalty", -2.1, "-2"),
        ("repetition_penalty", 0.0, "0.01"),
        ("repetition_penalty", float("nan"), "0.01"),
        ("min_tokens", 31, "max_tokens"),
        ("min_tokens", -1, "max_tokens"),
        ("logit_bias", ((1, 100.5),), "100"),
        ("logit_bias", ((1, 1.0), (1, 2.0)), "once"),
        ("logit_bias", tuple((i, 1.0) for i in range(MAX_LOGIT_BIAS + 1)), str(MAX_LOGIT_BIAS)),
        ("stop_token_ids", tuple(range(65)), "64"),
        ("prompt_logprobs", 21, "20"),
    ],
)
def test_what_is_out_of_range_is_refused_with_the_range(name, value, wanted):
    with pytest.raises(InvalidRequest, match=wanted) as caught:
        params(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(("name", "value"), [("logit_bias", ((VOCAB, 1.0),)), ("stop_token_ids", (-1,))])
def test_a_token_that_the_model_does_not_have_is_refused(name, value):
    with pytest.raises(InvalidRequest, match=f"0 to {VOCAB - 1}") as caught:
        RowEdits(params(**{name: value}), [], ENDS, VOCAB)
    assert caught.value.param == name
