"""Every Pallas kernel lowers for TPU on a machine without one, in the shapes of three models, forward and backward."""

from __future__ import annotations

import jax
import pytest
from kernel_shapes import (
    MODELS,
    PROMPT,
    ROWS,
    Model,
    decode,
    decode_shapes,
    kernels,
    lanes_attend,
    lanes_shapes,
    pages_attend,
    pages_shapes,
    train,
    train_shapes,
)

models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


def lowered(function, shapes) -> list[str]:
    return kernels(jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",)).as_text())


@models
@pytest.mark.parametrize("rank", [8, 64])
def test_decode(model: Model, rank):
    """Four reads in the loop over layers, and the head if its rows have room on every kind of TPU; else XLA's loop."""
    found = lowered(decode, decode_shapes(model, rank))
    head = (model.vocab, rank) == (49152, 8)
    assert found == ["gathered_lora"] * (4 + head)


@models
@pytest.mark.parametrize("rank", [8, 64])
def test_train(model: Model, rank):
    found = lowered(train, train_shapes(model, rank))
    count = {name: found.count(name) for name in set(found)}
    assert count == {"segmented_lora": 5, "segmented_lora_shrink_back": 5, "segmented_lora_expand_back": 8}


@models
def test_attention(model: Model):
    for lanes, tokens in ((ROWS, 1), (4, PROMPT)):
        assert lowered(pages_attend, pages_shapes(model, lanes, tokens)) == ["paged_attention"]
    found = lowered(lanes_attend, lanes_shapes(model))
    assert sorted(name.split("_segmented")[0] for name in found) == [
        "splash_mha_dkv",
        "splash_mha_dq",
        "splash_mha_fwd",
    ]
