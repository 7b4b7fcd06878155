"""Every Pallas kernel compiles for real TPUs that are not here, and no program makes a second pool.

Compiling finds what lowering does not: memory that does not suffice,
slices that are not aligned, copies made for a layout.  Nothing runs.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from aot_world import TOPOLOGIES, chips, kernels
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding
from kernel_shapes import (
    COLUMNS,
    LANES,
    MODELS,
    PAGE,
    PROMPT,
    TOKENS,
    Model,
    as_large_as_logits,
    decode,
    decode_shapes,
    lanes_attend,
    lanes_shapes,
    made_as_large_as,
    pages_attend,
    pages_shapes,
    train,
    train_shapes,
    words_shapes,
    words_train,
)

from pallas_kernels import tiling_tpu

pytestmark = pytest.mark.aot

RANK = 16


def compiled_for(kind: str, function, shapes, in_order: bool = False) -> jax.stages.Compiled:
    """The program for one chip of that kind.  in_order: arrays lie by rows, as a server's pool does."""
    with chips(kind) as devices:
        assert devices[0].device_kind in tiling_tpu.TABLE
        here = SingleDeviceSharding(devices[0])
        if in_order:
            shapes = jax.tree.map(lambda x: ordered(x, here), shapes)
            return jax.jit(function, out_shardings=here).lower(*shapes).compile()
        return jax.jit(function, in_shardings=here, out_shardings=here).lower(*shapes).compile()


def ordered(x: jax.ShapeDtypeStruct, here: SingleDeviceSharding) -> jax.ShapeDtypeStruct:
    """This shape, laid out by rows on the device."""
    place = Format(Layout(major_to_minor=tuple(range(x.ndim))), here)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


kinds = pytest.mark.parametrize("kind", TOPOLOGIES)
models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())

heads = pytest.mark.parametrize("model", list(MODELS.values())[:2], ids=["SmolLM2-135M", "Qwen3-4B and Llama-3.1-8B"])


@kinds
@models
def test_decode(model: Model, kind):
    shapes = decode_shapes(model, RANK)
    compiled = compiled_for(kind, decode, shapes, in_order=True)
    assert kernels(compiled) == {"gathered_lora": 5}
    text = compiled.as_text()
    assert (
        made_as_large_as([half for read in shapes[0] for row in read for half in (row.a_LNRX, row.b_LNRY)], text) == []
    )
    assert text.count(" sort(") == 1  # once per step, not per layer


@kinds
@models
def test_train(model: Model, kind):
    compiled = compiled_for(kind, train, train_shapes(model, RANK))
    assert kernels(compiled) == {
        "segmented_lora": 5,
        "segmented_lora_shrink_back": 5,
        "segmented_lora_expand_back": 8,
    }


@kinds
@heads
@pytest.mark.parametrize(
    ("lanes", "tokens", "columns"),
    [(256, 1, 131072 // PAGE), (4, PROMPT, COLUMNS)],
    ids=["decode of 256 rows of 131k tokens", "prompt"],
)
def test_pages(model: Model, kind, lanes, tokens, columns):
    """Pages in the layout that they have on a device are written and read where they lie."""
    pages, *rest = pages_shapes(model, lanes, tokens, columns)
    with chips(kind) as devices:
        here = SingleDeviceSharding(devices[0])
        kept = Format(Layout(major_to_minor=(0, 1, 2, 3)), here)
        placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=kept) for x in pages]
        step = jax.jit(
            pages_attend, in_shardings=(kept, here, here, here), out_shardings=(here, kept), donate_argnums=0
        )
        compiled = step.lower(placed, *rest).compile()
    assert kernels(compiled) == {"paged_attention": 1}
    made = made_as_large_as(pages, compiled.as_text())
    assert [line for line in made if "scatter" not in line.split(" = ")[0]] == []


@kinds
@heads
def test_lanes(model: Model, kind):
    found = kernels(compiled_for(kind, lanes_attend, lanes_shapes(model)))
    assert sorted(name.split("_segmented")[0] for name in found) == [
        "splash_mha_dkv",
        "splash_mha_dq",
        "splash_mha_fwd",
    ]


@kinds
@models
@pytest.mark.parametrize(
    ("rank", "targets", "dtype"),
    [(64, 4, jnp.bfloat16), (RANK, 1, jnp.float32)],
    ids=["four targets", "float32"],
)
def test_words(model: Model, kind, rank, targets, dtype):
    """The head is read where it lies, and all that is made together is less than a byte for each logit.

    Without LoRA on the head the kernels are those of the whole training step.
    """
    shapes = words_shapes(model, rank, targets, dtype)
    compiled = compiled_for(kind, functools.partial(words_train, model), shapes)
    assert kernels(compiled) == {"target_logprob": 1, "target_logprob_back": 1}
    text, stored = compiled.as_text(), shapes[3]
    assert made_as_large_as([stored, jax.ShapeDtypeStruct(stored.shape[::-1], dtype)], text) == []
    head = {f"{model.d},{model.vocab}", f"{model.vocab},{model.d}"}
    assert as_large_as_logits(LANES * TOKENS, model.vocab, text) <= head
    assert compiled.memory_analysis().temp_size_in_bytes < LANES * TOKENS * model.vocab


def test_a_second_pool_would_be_seen():
    """The check of `test_decode` on a program that does copy its pool."""
    pool, x_TD, slot_T = decode_shapes(MODELS["SmolLM2-135M"], RANK)

    def copies(pool, x_TD, slot_T):
        return decode(jax.tree.map(lambda p: p * 2, pool), x_TD, slot_T)

    halves = [half for read in pool for row in read for half in (row.a_LNRX, row.b_LNRY)]
    assert made_as_large_as(halves, compiled_for("v5e", copies, (pool, x_TD, slot_T)).as_text())
