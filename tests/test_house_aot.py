"""The whole decode step and the whole training step of SmolLM2-135M compile for four TPU chips, kernels and all."""

from __future__ import annotations

import pytest
from aot_world import chips, collectives, kernels
from kernel_shapes import made_as_large_as
from step_shapes import LANES, RANK, ROWS, SMOLLM2, TOKENS, decode, parts, train

from jaxlora.mesh import make_mesh

pytestmark = pytest.mark.aot


def test_decode_with_heads_split_in_three():
    """Of a layer's four sums two are the base's own, two are h of the row-parallel o_proj and down_proj."""
    with chips("v5e") as devices:
        compiled, rows = decode(make_mesh(tensor=3, devices=devices))
    assert kernels(compiled) == {"gathered_lora": 2, "gathered_lora_shrink": 2, "gathered_lora_expand": 2}
    in_layers = collectives(compiled, "jit(_serve_step)/while/body")
    assert in_layers == {f"f32[{ROWS},1,{RANK}]": 2, f"bf16[{ROWS},{SMOLLM2.d_model}]": 2}
    assert made_as_large_as(parts(rows), compiled.as_text()) == []


def test_decode_with_rows_and_features_split():
    with chips("v6e") as devices:
        compiled, rows = decode(make_mesh(data=2, fsdp=2, devices=devices))
    assert kernels(compiled) == {"gathered_lora": 2, "gathered_lora_shrink": 2, "gathered_lora_expand": 2}
    assert made_as_large_as(parts(rows), compiled.as_text()) == []


def test_training_with_heads_split_in_three():
    """Forward h of o_proj and down_proj, backward dh of gate and up together and of q, k and v together."""
    with chips("v6e") as devices:
        compiled = train(make_mesh(tensor=3, devices=devices))
    assert kernels(compiled) == {"segmented_lora": 2, "segmented_lora_expand_back": 7, "segmented_lora_shrink_back": 4}
    sums = collectives(compiled, "shard_map/psum")
    assert sums == {f"f32[{LANES},{TOKENS},{n * RANK}]": count for n, count in ((1, 2), (2, 1), (3, 1))}


def test_training_with_lanes_and_features_split():
    """Features are gathered with the base's, so no product is summed over devices."""
    with chips("v5e") as devices:
        compiled = train(make_mesh(data=2, fsdp=2, devices=devices))
    assert kernels(compiled) == {"segmented_lora": 4, "segmented_lora_expand_back": 7, "segmented_lora_shrink_back": 4}
    assert collectives(compiled, "shard_map/psum") == {}
