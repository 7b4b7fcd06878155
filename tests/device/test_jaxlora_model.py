"""The decoder: logits of every family and of the demo model equal those of transformers, packed as well as alone."""

from __future__ import annotations

import numpy as np
import pytest
from model_world import FORMS, Lane, base_of, first_fit, logits_alone, logits_of, pool_of, smollm2_base
from serve_world import random_weights
from small_world import TINY_MODELS, smollm2_prompts, tiny_expected, tiny_path

from jaxlora.checkpoints.hf import HfSource
from jaxlora.core.lora import ALL_TARGETS, Adapter, AdapterRef, LoraSpec
from jaxlora.model.decoder import Base

# float32 sums of 32 to 96 products over two layers, logits up to 30: a few units in the last place.
TINY_ATOL = 1e-4
# The same over 30 layers and up to 1536 products, activations of some hundreds: 1.4e-4 by XLA's bodies, 1.8e-4 by those for
# AVX-512, 2.3e-4 by those for AVX2, which sum in another order.
SMOLLM2_ATOL = 4e-4
# bfloat16 keeps 8 bits.  transformers itself, run in bfloat16 on the same tokens, is as far from its own float32: a root
# mean square of up to 0.026 standard deviations of the logits for the tiny models; for SmolLM2 0.29 over all 488 tokens
# (logits have a standard deviation of 3 to 8), of which the first position of a sequence, an attention sink, has most.
TINY_BFLOAT16 = 0.04
SMOLLM2_BFLOAT16 = 0.4


def rms(difference: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(difference, dtype="f8"))))


def largest(got: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """The largest difference of a logit."""
    assert [g.shape for g in got] == [w.shape for w in wanted]
    return max(float(np.abs(g - w).max()) for g, w in zip(got, wanted, strict=True))


def of_one_family(argument: str, **how: bool) -> pytest.MarkDecorator:
    """One family by default, the others with `-m slow`."""
    names = [pytest.param(name, marks=() if name == "tiny-qwen3" else pytest.mark.slow) for name in TINY_MODELS]
    return pytest.mark.parametrize(argument, names, **how)


@pytest.fixture(scope="module", params=TINY_MODELS)
def tiny(request):
    """(base in float32, four sequences with the logits of transformers)."""
    return base_of(HfSource(tiny_path(request.param))), tiny_expected(request.param)


def test_a_tiny_model_says_what_transformers_says_alone_and_packed(tiny):
    base, expected = tiny
    sequences, wanted = [e.ids_T for e in expected], [e.logits_TV for e in expected]
    assert largest(logits_alone(base, sequences, 64), wanted) < TINY_ATOL
    (packed,) = logits_of(base, [Lane(sequences)], 96)
    assert largest(packed, wanted) < TINY_ATOL
    (other_way_round,) = logits_of(base, [Lane(sequences[::-1])], 96)
    assert largest(other_way_round[::-1], wanted) < TINY_ATOL


@of_one_family("name")
def test_a_tiny_model_in_bfloat16(name):
    expected = tiny_expected(name)
    base = base_of(HfSource(tiny_path(name)), "bfloat16")
    assert base.dtype == "bfloat16"
    (packed,) = logits_of(base, [Lane([e.ids_T for e in expected])], 96)
    for got, e in zip(packed, expected, strict=True):
        assert got.dtype == np.float32
        assert rms(got - e.logits_TV) < TINY_BFLOAT16 * e.logits_TV.std()


def smollm2_logits(base: Base) -> list[np.ndarray]:
    """[T, V] of the 20 prompts, packed into lanes of 64 tokens."""
    prompts = smollm2_prompts()
    lanes = first_fit([p.ids_T for p in prompts], 64)
    assert max(len(lane.sequences) for lane in lanes) >= 3
    found = {
        tuple(ids_T): logits
        for lane, several in zip(lanes, logits_of(base, lanes, 64), strict=True)
        for ids_T, logits in zip(lane.sequences, several, strict=True)
    }
    return [found[tuple(p.ids_T)] for p in prompts]


def test_smollm2_says_what_transformers_says():
    prompts = smollm2_prompts()
    got = smollm2_logits(smollm2_base("float32"))
    assert largest([g[:, p.sampled_ids] for g, p in zip(got, prompts, strict=True)], [p.logits_TV for p in prompts]) < (
        SMOLLM2_ATOL
    )
    whole = [(g[-1], p.last_V) for g, p in zip(got, prompts, strict=True) if p.last_V is not None]
    assert len(whole) == 3
    assert largest([g for g, _ in whole], [w for _, w in whole]) < SMOLLM2_ATOL


@pytest.mark.slow
def test_smollm2_in_bfloat16():
    prompts = smollm2_prompts()
    got = smollm2_logits(smollm2_base("bfloat16"))
    wrong = [g[:, p.sampled_ids] - p.logits_TV for g, p in zip(got, prompts, strict=True)]
    assert rms(np.concatenate(wrong)) < SMOLLM2_BFLOAT16
    same = [g[:, p.sampled_ids].argmax(1) == p.logits_TV.argmax(1) for g, p in zip(got, prompts, strict=True)]
    assert np.concatenate(same).mean() > 0.9  # the best of 256 sampled tokens at each of 488 places


def adapters_of(base: Base, seed: int) -> list[Adapter]:
    """Three adapters of other ranks."""
    return [
        Adapter(
            ref=AdapterRef("acme", "it", 1),
            spec=LoraSpec(rank=rank, alpha=2.0 * rank, targets=ALL_TARGETS),
            base_hash="",
            weights=random_weights(base.config, rank, ALL_TARGETS, seed + rank),
        )
        for rank in (1, 3, 8)
    ]


@of_one_family("tiny", indirect=True)
@pytest.mark.parametrize("form", FORMS)
def test_base_rows_do_not_see_the_adapters_beside_them(tiny, form):
    base, expected = tiny
    sequences = [e.ids_T for e in expected]
    lanes = [Lane(sequences[:3], slot) for slot in (-1, 2, -1, 0)]
    some, others = pool_of(base, adapters_of(base, 1)), pool_of(base, adapters_of(base, 100))
    broken = {t: type(r)(a_LSRX=r.a_LSRX * np.nan, b_LSRY=r.b_LSRY, scale_LS=r.scale_LS) for t, r in some.items()}
    got, got_others, got_broken = (logits_of(base, lanes, 64, pool, form) for pool in (some, others, broken))
    for g in (0, 2):  # bit for bit
        for i in range(3):
            assert got[g][i].tobytes() == got_others[g][i].tobytes() == got_broken[g][i].tobytes()
        assert largest(got[g], [e.logits_TV for e in expected[:3]]) < TINY_ATOL
    for g in (1, 3):
        assert largest(got[g], got_others[g]) > 0.1
        assert largest(got[g], got[0]) > 0.1
        assert all(np.isnan(x).all() for x in got_broken[g])


def test_both_forms_of_lora_agree(tiny):
    base, expected = tiny
    lanes = [Lane([e.ids_T for e in expected[:3]], slot) for slot in (1, -1, 2, 0)]
    pool = pool_of(base, adapters_of(base, 1))
    one, other = (logits_of(base, lanes, 64, pool, form) for form in FORMS)
    for g in range(len(lanes)):
        assert largest(one[g], other[g]) < 5 * TINY_ATOL  # these adapters make activations several times larger
