"""The whole decode step and the whole training step compile for H100s, Triton kernels and all.

Of models with few of their layers: each is in the program on its own, and equal to the others.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from aot_world import collectives
from cuda_world import Launches, as_large_as, h100s, kernels
from kernel_shapes import as_large_as_logits, made_as_large_as
from step_shapes import (
    LANES,
    RANK,
    ROWS,
    SMOLLM2,
    TOKENS,
    base,
    decode,
    layer_steps,
    makers,
    moved,
    part,
    parts,
    reads,
    serving,
    train,
    update,
)

from jaxlora.model.lora_pool import PoolSpec
from jaxlora.model.mesh import make_mesh
from serve.bench.random_base import SHAPES

pytestmark = [
    pytest.mark.aot_cuda,
    # Triton 3.7 on Python 3.13: its own syntax trees.
    pytest.mark.filterwarnings("ignore:AnnAssign.__init__ missing:DeprecationWarning"),
    # jax-triton wants Refs instead, of which XLA may make copies; its version is bounded.
    pytest.mark.filterwarnings("ignore:input_output_aliases is deprecated:DeprecationWarning"),
]


LAYERS = 3
SMALL = replace(SMOLLM2, layers=LAYERS)
LLAMA_8B = replace(SHAPES["8b"], layers=4)
OF_LAYER = 24  # kernels: 4 products, 8 of LoRA, attention, 2 writes of the cache; norms, rotation and what joins them
LLAMA_70B = replace(SHAPES["8b"], d_model=8192, d_ff=28672, heads=64, layers=2)


def started(result: str) -> str:
    """The type of a collective that runs beside other work: operand and result."""
    return f"(({result}), {result})"


def test_decode_with_heads_split_in_three():
    """A layer has two sums, the base's own: they carry the parts of o_proj's and down_proj's adapters."""
    with h100s() as devices:
        compiled, rows, kv = decode(make_mesh(tensor=3, devices=devices[:3]), SMALL)
    of_layer = {"gathered_lora_shrink": 4, "gathered_lora_expand": 4, "paged_attention": 1}
    assert kernels(compiled) == {name: LAYERS * count for name, count in of_layer.items()}
    of_base = f"bf16[{ROWS},{SMOLLM2.d_model}]"
    # And one of the embeddings, beside other work.
    assert collectives(compiled, "jit(_packed_step)") == {of_base: 2 * LAYERS, started(of_base): 1}
    assert made_as_large_as(parts(rows), compiled.as_text()) == []
    assert makers(kv, compiled) == []


def test_prompts_read_their_adapters_where_they_lie():
    """Two kernels for each read of x, of all its targets: they alone read the pool, and nothing makes rows of it by lane."""
    with h100s() as devices:
        compiled, rows, kv = serving(make_mesh(devices=devices[:1]), SMALL, (LANES, TOKENS))
    of_layer = {"gathered_lora_shrink": 4, "gathered_lora_expand": 4, "paged_attention": 1}
    assert kernels(compiled) == {name: LAYERS * count for name, count in of_layer.items()}
    assert moved(rows, compiled) == {"triton_kernel_call reads": LAYERS * len(parts(rows))}
    assert makers(kv, compiled) == []


def test_training_with_heads_split_in_three():
    """Of one layer: forward h of o_proj and down_proj, backward dh of gate and up together and of q, k and v together.

    Nothing is computed twice: two reads of x forward, whose h the backward pass finds kept, and attention once.  Of the loss
    each token's largest logit, sum and own logit, and dx, as of any column-parallel product.
    """
    with h100s() as devices:
        compiled = train(make_mesh(tensor=3, devices=devices[:3]), replace(SMOLLM2, layers=1))
    of_layer = {
        "segmented_lora_shrink": 2,
        "segmented_lora_expand": 5,
        "segmented_lora_expand_back": 7,
        "segmented_lora_shrink_back": 4,
        "packed_attention_forward": 1,
        "packed_attention_backward_queries": 1,
        "packed_attention_backward_keys": 1,
    }
    of_head = {"target_logprob": 1, "target_logprob_back": 1}
    assert kernels(compiled) == of_layer | of_head
    of_lora = {started(f"f32[{LANES},{TOKENS},{n * RANK}]"): count for n, count in ((1, 2), (2, 1), (3, 1))}
    sum_and_own, dx = f"f32[{2 * LANES * TOKENS}]", started(f"f32[{LANES},{TOKENS},{SMOLLM2.d_model}]")
    assert collectives(compiled, "shard_map/psum") == of_lora | {sum_and_own: 1, dx: 1}
    assert collectives(compiled, "shard_map/pmax") == {started(f"f32[{LANES},{TOKENS}]"): 1}
    assert as_large_as_logits(LANES * TOKENS, SMOLLM2.vocab // 3, compiled.as_text()) == set()


@pytest.mark.parametrize(("config", "devices"), [(LLAMA_8B, 1), (LLAMA_70B, 8)], ids=["8b", "70b on 8"])
def test_a_large_base_is_read_where_it_lies(config, devices, tmp_path):
    """64 rows under adapters: no weight is made anew, and on one device the layers are one CUDA graph."""
    with h100s(8) as found:
        mesh = make_mesh(tensor=devices, devices=found[:devices])
        compiled, _, _ = decode(mesh, config, 64, Launches.dump_to(tmp_path))
    weights = [part(x) for x in base(mesh, config).layers[0].values() if x.ndim > 1]
    assert made_as_large_as(weights, compiled.as_text()) == []
    assert as_large_as(4 * 64 * config.vocab + 1, compiled) == []  # nor anything larger than logits, whatever its axes
    assert compiled.memory_analysis().temp_size_in_bytes < 200e6
    launches = Launches.read(tmp_path)
    if devices == 1:  # XLA leaves sums over devices out of graphs
        assert launches.entries.keys() <= {"CommandBuffer", "Conditional"}  # the latter are sampling's
        assert launches.of_layer(config.layers) == OF_LAYER


def test_prompt_chunks_and_decode_rows_share_each_read_of_the_weights(tmp_path):
    """512 tokens of prompts and 64 rows of 8B in one program, which is one CUDA graph: half the weights' bytes of two."""
    config = replace(LLAMA_8B, layers=2)
    with h100s(1) as devices:
        mesh = make_mesh(devices=devices)
        compiled, _, kv = serving(mesh, config, (4, 128), (64, 1), options=Launches.dump_to(tmp_path))
    weights = [x for x in base(mesh, config).layers[0].values() if x.ndim > 1]
    assert reads(weights, compiled) == 2 * len(weights)
    assert reads([base(mesh, config).arrays["head"]], compiled) == 1
    assert made_as_large_as(weights, compiled.as_text()) == []
    assert as_large_as(4 * 68 * config.vocab + 1, compiled) == []
    assert makers(kv, compiled) == []
    assert Launches.read(tmp_path).entries == {"CommandBuffer": 1}


def test_a_step_of_8b_in_two_passes_holds_less_than_20_gb():
    """16 lanes of 512 tokens, eight at a time: what every layer keeps for its gradient, and what the largest program needs."""
    with h100s() as devices:
        mesh = make_mesh(devices=devices[:1])
        forward, backward = layer_steps(mesh, LLAMA_8B, (8, 512))
    kept, work = forward.memory_analysis(), backward.memory_analysis()
    held = 32 * kept.output_size_in_bytes + max(kept.temp_size_in_bytes, work.temp_size_in_bytes)
    assert 10e9 < held < 20e9


def test_an_update_reads_and_writes_each_array_once():
    """36 bytes a number: weights, gradients and both moments by one kernel, and the gradients by the norm before it."""
    with h100s() as devices:
        compiled, rows = update(
            make_mesh(tensor=3, devices=devices), PoolSpec(slots=64, rank=RANK, dtype="float32"), "float32"
        )
    arrays = len(parts(rows))
    assert kernels(compiled) == {"adamw": arrays}
    once = {"triton_kernel_call reads": 4 * arrays, "triton_kernel_call writes": 4 * arrays, "other reads": arrays}
    assert moved(rows, compiled) == once
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes > 0.99 * memory.argument_size_in_bytes
    assert memory.temp_size_in_bytes < 2**20
