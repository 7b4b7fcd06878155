"""Every Pallas kernel compiles for real TPUs that are not here, and no program makes a second pool.

Compiling finds what lowering does not: memory that does not suffice,
slices that are not aligned, copies made for a layout.  Nothing runs.
"""

from __future__ import annotations

import jax
import pytest
from aot_world import TOPOLOGIES, chips, kernels
from jax.sharding import SingleDeviceSharding
from kernel_shapes import MODELS, Model, decode, decode_shapes, made_as_large_as, train, train_shapes

from pallas_kernels import tpu_blocks

pytestmark = pytest.mark.aot

RANK = 16


def compiled_for(kind: str, function, shapes) -> jax.stages.Compiled:
    """The program for one chip of that kind."""
    with chips(kind) as devices:
        assert devices[0].device_kind in tpu_blocks.TABLE
        here = SingleDeviceSharding(devices[0])
        return jax.jit(function, in_shardings=here, out_shardings=here).lower(*shapes).compile()


kinds = pytest.mark.parametrize("kind", TOPOLOGIES)
models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


@kinds
@models
def test_decode(model: Model, kind):
    shapes = decode_shapes(model, RANK)
    compiled = compiled_for(kind, decode, shapes)
    assert kernels(compiled) == {"gathered_lora": 5}
    text = compiled.as_text()
    assert made_as_large_as([half for read in shapes[0] for a, b, _ in read for half in (a, b)], text) == []
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


def test_a_second_pool_would_be_seen():
    """The check of `test_decode` on a program that does copy its pool."""
    pool, x_TD, slot_T = decode_shapes(MODELS["SmolLM2-135M"], RANK)

    def copies(pool, x_TD, slot_T):
        return decode(jax.tree.map(lambda p: p * 2, pool), x_TD, slot_T)

    halves = [half for read in pool for a, b, _ in read for half in (a, b)]
    assert made_as_large_as(halves, compiled_for("v5e", copies, (pool, x_TD, slot_T)).as_text())
