"""Adapters in our model give the logits that PEFT computes: of every fixture, of adapters trained here, of the demo model.

All at rank 8 with padding beside adapters of other ranks, through both forms of LoRA (see model_world.FORMS).
"""

from __future__ import annotations

import functools

import numpy as np
import peft_world as world
import pytest
from model_world import FORMS, Lane, base_of, logits_of, pool_of

from jaxlora.hf import HfSource
from jaxlora.model import Base

ATOL = 1e-4  # float32, logits of order one to ten; peft-format.md's smallest silent error is 2e-3


@functools.cache
def tiny_base(name: str) -> Base:
    return base_of(HfSource(world.base_folder(name)))


def largest(got: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """The largest difference of a logit."""
    return max(float(np.abs(g - w).max()) for g, w in zip(got, wanted, strict=True))


def test_the_bases_alone():
    for name in ("llama", "llama-tied", "qwen3"):
        tokens, wanted = world.base_logits(name)
        (got,) = logits_of(tiny_base(name), [Lane(tokens)], 32)
        assert largest(got, wanted) < ATOL


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", ["llama", "llama-tied", "qwen3"])
def test_every_fixture_gives_the_logits_of_peft(base, form):
    fixtures = [f for f in map(world.load_fixture, world.ACCEPTED) if f.base == base]
    head = world.base_head(base)
    adapters = [world.read_folder(f.folder, base, head=head)[0] for f in fixtures]
    _, alone = world.base_logits(base)
    lanes = [Lane(f.tokens, slot) for slot, f in enumerate(fixtures)] + [Lane(fixtures[0].tokens)]
    got = logits_of(tiny_base(base), lanes, 32, pool_of(tiny_base(base), adapters), form)
    for g, fixture in enumerate(fixtures):
        assert largest(got[g], fixture.logits) < ATOL, fixture.folder.name
        assert largest(got[g], alone) > 100 * ATOL, fixture.folder.name
    assert largest(got[-1], alone) < ATOL  # the base beside them


def test_all_fixtures_are_seen():
    assert {world.load_fixture(name).base for name in world.ACCEPTED} == {"llama", "llama-tied", "qwen3"}
