"""Every Pallas kernel lowers for TPU on a machine without one, in the shapes of three models, forward and backward."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from kernel_shapes import (
    MODELS,
    PAGE,
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
    words_shapes,
    words_train,
)

from pallas_kernels.dispatch import traced_for

HEAD_PARTS = {(49152, 8): 1, (49152, 64): 2, (128256, 8): 1, (128256, 64): 4, (151936, 8): 2, (151936, 64): 5}
models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


def lowered(function, shapes) -> list[str]:
    with traced_for("tpu"):
        return kernels(jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",)).as_text())


@models
@pytest.mark.parametrize("rank", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_decode(model: Model, rank):
    """Four reads in the loop over layers, and the head in as many parts of the vocabulary as have room on every kind of TPU."""
    found = lowered(decode, decode_shapes(model, rank))
    assert found == ["gathered_lora"] * (4 + HEAD_PARTS[model.vocab, rank])


@models
@pytest.mark.parametrize("rank", [8, 64])
def test_train(model: Model, rank):
    found = lowered(train, train_shapes(model, rank))
    count = {name: found.count(name) for name in set(found)}
    assert count == {"segmented_lora": 5, "segmented_lora_shrink_back": 5, "segmented_lora_expand_back": 8}


@models
def test_attention(model: Model):
    for lanes, tokens, columns in ((ROWS, 1, 16), (64, 1, 131072 // PAGE), (4, PROMPT, 16)):
        assert lowered(pages_attend, pages_shapes(model, lanes, tokens, columns)) == ["paged_attention"]
    found = lowered(lanes_attend, lanes_shapes(model))
    assert sorted(name.split("_segmented")[0] for name in found) == [
        "splash_mha_dkv",
        "splash_mha_dq",
        "splash_mha_fwd",
    ]


@models
@pytest.mark.parametrize(
    ("rank", "targets", "dtype"),
    [(0, 1, jnp.bfloat16), (8, 1, jnp.bfloat16), (64, 4, jnp.bfloat16), (16, 1, jnp.float32)],
)
def test_words(model: Model, rank, targets, dtype):
    found = lowered(functools.partial(words_train, model), words_shapes(model, rank, targets, dtype))
    assert found == ["target_logprob", "target_logprob_back"]
