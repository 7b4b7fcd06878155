"""The whole decode step and the whole training step of SmolLM2-135M compile for four TPU chips, kernels and all."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from aot_world import chips, collectives, kernels
from kernel_shapes import as_large_as_logits, made_as_large_as
from offload_world import compiled as moves
from step_shapes import (
    LANES,
    PAGES,
    RANK,
    ROWS,
    SMOLLM2,
    TOKENS,
    base,
    decode,
    makers,
    moved,
    part,
    parts,
    reads,
    remade,
    serving,
    train,
    update,
)

from jaxlora.core.model_config import LINEARS
from jaxlora.model.kv_cache import KVPages, page_format
from jaxlora.model.lora_pool import PoolSpec
from jaxlora.model.mesh import make_mesh
from serve.bench.random_base import SHAPES

pytestmark = pytest.mark.aot

DECODE_KERNELS = {"gathered_lora": 2, "gathered_lora_shrink": 2, "gathered_lora_expand": 2, "paged_attention": 1}
SPLASH = dict.fromkeys(  # the forward kernel once: what it gave is kept for the backward pass
    [f"splash_mha_{name}residuals" for name in ("fwd_segmented_", "dkv_segmented_no_", "dq_segmented_no_")], 1
)
WORDS = {"target_logprob": 1, "target_logprob_back": 1}


LARGE = {"4b": SHAPES["4b"], "8b": SHAPES["8b"], "70b": replace(SHAPES["8b"], d_model=8192, d_ff=28672, heads=64)}
ARRAY = re.compile(r"\w+\[[\d,]*\]")  # in the type of a collective, of one array or several


def test_decode_on_one_chip_leaves_pool_and_pages_where_they_lie():
    """Writing a token's keys and reading a sequence's pages agree with the compiler on one layout; weights are read in place."""
    with chips("v5e") as devices:
        mesh = make_mesh(devices=devices[:1])
        compiled, rows, kv = decode(mesh)
    assert kernels(compiled) == {"gathered_lora": 4, "paged_attention": 1}
    linears = [x for name, x in base(mesh).layers.items() if name in LINEARS]
    assert made_as_large_as(linears, compiled.as_text()) == []
    assert made_as_large_as(parts(rows), compiled.as_text()) == []
    assert makers(kv, compiled) == []


def test_prompt_chunks_and_decode_rows_share_each_read_of_the_weights():
    with chips("v5e") as devices:
        mesh = make_mesh(devices=devices[:1])
        compiled, rows, kv = serving(mesh, SMOLLM2, (LANES, 128), (ROWS, 1))
    linears = [x for name, x in base(mesh).layers.items() if name in LINEARS]
    assert reads(linears, compiled) == len(linears)
    assert made_as_large_as(linears, compiled.as_text()) == []
    assert made_as_large_as(parts(rows), compiled.as_text()) == []
    assert makers(kv, compiled) == []


@pytest.mark.parametrize("split", [1, 3], ids=["one chip", "heads split in three"])
def test_prompts_read_their_adapters_where_they_lie(split):
    """The kernels alone read the pool, and nothing makes rows of it by lane.  Split, o_proj and down_proj sum h over chips."""
    with chips("v5e") as devices:
        compiled, rows, kv = serving(make_mesh(tensor=split, devices=devices[:split]), SMOLLM2, (LANES, TOKENS))
    apart = {"gathered_lora": 2, "gathered_lora_shrink": 2, "gathered_lora_expand": 2}
    found = {"gathered_lora": 4} if split == 1 else apart
    assert kernels(compiled) == found | {"paged_attention": 1}
    read = moved(rows, compiled)
    assert read.keys() == {f"{name} reads" for name in found}
    assert read.total() == len(parts(rows))
    assert makers(kv, compiled) == []


def test_decode_with_heads_split_in_three():
    """A layer has two sums, the base's own: they carry the parts of o_proj's and down_proj's adapters."""
    with chips("v5e") as devices:
        compiled, rows, kv = decode(make_mesh(tensor=3, devices=devices))
    assert kernels(compiled) == {"gathered_lora": 4, "paged_attention": 1}
    in_layers = collectives(compiled, "jit(_packed_step)/while/body")
    assert in_layers == {f"bf16[{ROWS},{SMOLLM2.d_model}]": 2}
    assert made_as_large_as(parts(rows), compiled.as_text()) == []
    assert makers(kv, compiled) == []


@pytest.mark.parametrize(("kind", "shape", "tensor"), [("v5e", "4b", 1), ("v6e", "8b", 1), ("v6e", "70b", 4)], ids=str)
def test_a_large_base_is_read_where_it_lies(kind, shape, tensor):
    """64 rows under adapters, of all layers: no weight, no half of the pool and no page is made anew."""
    config = LARGE[shape]
    with chips(kind) as devices:
        mesh = make_mesh(tensor=tensor, devices=devices[:tensor])
        compiled, rows, kv = decode(mesh, config, 64)
    linears = [part(x) for name, x in base(mesh, config).layers.items() if name in LINEARS]
    assert made_as_large_as(linears, compiled.as_text()) == []
    assert made_as_large_as(parts(rows), compiled.as_text()) == []
    assert makers(kv, compiled) == []
    assert collectives(compiled, "jit(_packed_step)/while/body").total() == 2 * (tensor > 1)


def test_decode_with_rows_and_features_split():
    with chips("v6e") as devices:
        compiled, rows, kv = decode(make_mesh(data=2, fsdp=2, devices=devices))
    assert kernels(compiled) == DECODE_KERNELS
    assert made_as_large_as(parts(rows), compiled.as_text()) == []
    assert makers(kv, compiled) == []


@pytest.mark.parametrize("kind", ["v5e", "v6e"])
def test_preempted_pages_are_moved_without_a_copy_of_the_cache(kind):
    with chips(kind) as devices:
        mesh = make_mesh(tensor=3, devices=devices)
        pages = jax.ShapeDtypeStruct(PAGES, jnp.bfloat16, sharding=page_format(mesh))
        kv = KVPages(k_LPZF=pages, v_LPZF=pages)
        for program in moves(mesh, kv):
            assert [line for line in makers(kv, program) if "dynamic-update-slice" not in line] == []


def test_training_with_heads_split_in_three():
    """Forward h of o_proj and down_proj, backward dh of gate and up together and of q, k and v together.

    Of the loss each token's largest logit, sum and own logit, and dx, as of any column-parallel product.
    """
    with chips("v6e") as devices:
        compiled = train(make_mesh(tensor=3, devices=devices))
    assert kernels(compiled) == SPLASH | WORDS | {
        "segmented_lora": 2,
        "segmented_lora_expand_back": 7,
        "segmented_lora_shrink_back": 4,
    }
    sums = collectives(compiled, "shard_map/psum")
    assert sums == {f"f32[{LANES},{TOKENS},{n * RANK}]": count for n, count in ((1, 2), (2, 1), (3, 1))}
    of_loss = [x for types in collectives(compiled, "target_logprob").elements() for x in ARRAY.findall(types)]
    statistics, own, dx = (
        f"f32[{LANES},{TOKENS}]",
        f"f32[{LANES},{TOKENS},1]",
        f"bf16[{LANES},{TOKENS},{SMOLLM2.d_model}]",
    )
    assert sorted(of_loss) == sorted(
        [statistics, statistics, own, dx]
    )  # how they are combined is the compiler's choice
    assert as_large_as_logits(LANES * TOKENS, SMOLLM2.vocab // 3, compiled.as_text()) == set()


def test_training_with_lanes_and_features_split():
    """Features are gathered with the base's, so no product is summed over devices."""
    with chips("v5e") as devices:
        compiled = train(make_mesh(data=2, fsdp=2, devices=devices))
    assert kernels(compiled) == SPLASH | WORDS | {
        "segmented_lora": 4,
        "segmented_lora_expand_back": 7,
        "segmented_lora_shrink_back": 4,
    }
    assert collectives(compiled, "shard_map/psum") == {}


def test_moments_in_8_bits_take_on_a_chip_what_the_formula_says():
    """The chip pads features to whole blocks, and scales by half a percent; with a short last axis it were two percent."""
    spec = PoolSpec(slots=64, rank=RANK, dtype="float32", targets=("down_proj",))  # too large for the chip's own memory
    with chips("v5e") as devices:
        compiled, rows = update(make_mesh(devices=devices[:1]), spec, "uint8")
    blocks = -(-SMOLLM2.d_ff // 128) + -(-SMOLLM2.d_model // 128)
    slot = SMOLLM2.layers * RANK * blocks * (10 * 128 + 8)
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes == pytest.approx(spec.slots * slot, rel=0.005)
    assert memory.alias_size_in_bytes > 0.99 * memory.argument_size_in_bytes  # all is updated where it lies
    assert memory.temp_size_in_bytes < 2 * slot
    assert remade(rows, compiled) == []


def test_an_update_reads_and_writes_each_array_once():
    """36 bytes a number: weights, gradients and both moments by one kernel, and the gradients by the norm before it."""
    with chips("v6e") as devices:
        compiled, rows = update(
            make_mesh(tensor=3, devices=devices), PoolSpec(slots=64, rank=RANK, dtype="float32"), "float32"
        )
    arrays = len(parts(rows))
    assert moved(rows, compiled) == {
        "adamw reads": 4 * arrays,
        "adamw writes": 4 * arrays,
        "other reads": arrays,
    }
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes > 0.99 * memory.argument_size_in_bytes
