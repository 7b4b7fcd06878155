"""On a mesh: each device runs the kernels on its part, and the collectives are those that Placement's table names.

Here programs are lowered on abstract meshes; that the numbers stay the same is checked on virtual devices.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from kernel_checks import gathered as full_slots
from kernel_shapes import kernels, shape

from pallas_kernels.attention.op import packed_attention
from pallas_kernels.cross_entropy.op import target_logprob
from pallas_kernels.dispatch import traced_for
from pallas_kernels.paged_attention.op import paged_attention
from pallas_kernels.segmented_lora.op import segmented_lora
from pallas_kernels.sharding import Placement

TESTS = Path(__file__).parents[1] / "support"
MESH = AbstractMesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
COLUMN = Placement(mesh=MESH, rows=("data",), y="tensor")
ROW = Placement(mesh=MESH, rows=("data",), x="tensor")
T, X, Y, R, G, J = 8, 512, 1024, 16, 4, 64
TARGETS = 3


def lowered(function, *args) -> tuple[Counter, dict[str, list[str]]]:
    """(Mosaic kernels by name, result types of each kind of collective) of the program for TPU."""
    with traced_for("tpu"):
        text = jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
    collectives = {}
    kinds = "all_reduce|all_gather|all_to_all|collective_permute|reduce_scatter"
    for match in re.finditer(rf'"?stablehlo\.({kinds})"?.*?-> \(?(tensor<[^>]*>)', text, re.DOTALL):
        collectives.setdefault(match[1], []).append(match[2])
    return Counter(kernels(text)), collectives


def decode():
    f32 = jnp.float32
    row = shape(2, 4, R, X), shape(2, 4, R, Y), shape(2, 4, dtype=f32)
    return shape(T, X), [row] * TARGETS, shape(dtype=jnp.int32), shape(T, dtype=jnp.int32)


def train():
    f32 = jnp.float32
    return shape(G, J, X), [(shape(G, R, X, dtype=f32), shape(G, R, Y, dtype=f32), shape(G, dtype=f32))] * TARGETS


def gathered(placement):
    return functools.partial(full_slots, placement=placement)


def gradient(placement):
    def loss(x, ab, scales):
        rows = [(a, b, s) for (a, b), s in zip(ab, scales, strict=True)]
        return sum(y.astype(jnp.float32).sum() for y in segmented_lora(x, rows, placement))

    def of(x, rows):
        return jax.grad(loss, argnums=(0, 1))(x, [(a, b) for a, b, _ in rows], [s for _, _, s in rows])

    return of


def test_decode_column_parallel_needs_no_collective():
    assert lowered(gathered(COLUMN), *decode()) == ({"gathered_lora": 1}, {})


def test_decode_row_parallel_sums_h():
    """One [tokens, R] per target, of the tokens of one part of the mesh."""
    found, collectives = lowered(gathered(ROW), *decode())
    assert found == {"gathered_lora_shrink": 1, "gathered_lora_expand": 1}
    assert collectives == {"all_reduce": [f"tensor<{T // 2}x{R}xf32>"] * TARGETS}


def test_decode_row_parallel_kept_apart_needs_no_collective():
    """Each device's part comes back; the sum of the base's product carries them."""
    assert lowered(gathered(replace(ROW, apart=True)), *decode()) == ({"gathered_lora": 1}, {})


def test_lanes_column_parallel_sums_dh_of_all_targets_at_once():
    forward = lowered(lambda *args: segmented_lora(*args, COLUMN), *train())
    assert forward == ({"segmented_lora": 1}, {})
    found, collectives = lowered(gradient(COLUMN), *train())
    assert found == {"segmented_lora": 1, "segmented_lora_expand_back": TARGETS, "segmented_lora_shrink_back": 1}
    assert collectives == {"all_reduce": [f"tensor<{G // 2}x{J}x{TARGETS * R}xf32>"]}


def test_lanes_row_parallel_sum_h_of_all_targets_at_once():
    """Forward only: the sum that the gradient of scale needs is dropped where nobody asks for it."""
    h = f"tensor<{G // 2}x{J}x{TARGETS * R}xf32>"
    assert lowered(lambda *args: segmented_lora(*args, ROW), *train()) == ({}, {"all_reduce": [h]})
    found, collectives = lowered(gradient(ROW), *train())
    assert found == {"segmented_lora_expand_back": TARGETS, "segmented_lora_shrink_back": 1}
    assert collectives == {"all_reduce": [h]}


def test_attention_needs_no_collective():
    """Neither of pages, nor of lanes forward and backward."""
    heads = Placement(mesh=MESH, rows=("data",), heads="tensor")
    ids = [shape(*sizes, dtype=jnp.int32) for sizes in ((), (T, 2), (T, 1))]
    pages = shape(2, 9, 64, 4 * 64)
    found = lowered(
        functools.partial(paged_attention, window=None, placement=heads), shape(T, 1, 8, 64), pages, pages, *ids
    )
    assert found == ({"paged_attention": 1}, {})

    def loss(q, k, v, segment):
        return packed_attention(q, k, v, segment, window=None, placement=heads).astype(jnp.float32).sum()

    q, k, segment = shape(G, J, 8, 64), shape(G, J, 4, 64), shape(G, J, dtype=jnp.int32)
    found, collectives = lowered(jax.grad(loss, (0, 1, 2)), q, k, k, segment)
    assert {n.split("_segmented")[0] for n in found} == {"splash_mha_fwd", "splash_mha_dkv", "splash_mha_dq"}
    assert collectives == {}


def words(placement, lora: bool):
    """A program of the loss over 2048 words and its gradient, and its arguments."""
    f32, V, K = jnp.float32, 2048, 2

    def loss(x, halves, scale, head, target, wanted):
        rows = (*halves, scale) if lora else None
        return target_logprob(x, head, head.T, target, wanted, rows, chunk=32, tied=False, placement=placement)[0].sum()

    halves = shape(G, R, X, dtype=f32), shape(G, R, V, dtype=f32)
    ids = shape(G, J, K, dtype=jnp.int32), shape(G, J, dtype=bool)
    return loss, (shape(G, J, X), halves, shape(G, dtype=f32), shape(X, V), *ids)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "plain"])
def test_a_vocabulary_split_over_devices_sums_statistics_of_tokens(lora):
    """Forward each token's largest logit, sum and own logits; backward dx, and dh where the head has LoRA.  Never logits."""
    tokens, K = f"{G // 2}x{J}", 2
    of_tokens = [f"tensor<{tokens}xf32>", f"tensor<{tokens}x{K}xf32>", f"tensor<{tokens}xf32>"]
    loss, args = words(COLUMN, lora)
    assert lowered(loss, *args) == ({"target_logprob": 1}, {"all_reduce": of_tokens})
    found, collectives = lowered(jax.value_and_grad(loss, (0, 1)), *args)
    assert found == {"target_logprob": 1, "target_logprob_back": 1}
    back = [f"tensor<{tokens}x{X}xf32>"] + [f"tensor<{tokens}x{R}xf32>"] * lora
    assert collectives == {"all_reduce": of_tokens + back}


def test_features_split_over_devices_take_the_xla_body():
    """Each device would have a part of every logit."""
    loss, args = words(ROW, True)
    assert lowered(jax.grad(loss, (0, 1)), *args)[0].keys() <= {
        "segmented_lora_expand_back",
        "segmented_lora_shrink_back",
    }


def test_without_a_placement_a_mesh_is_refused():
    """Nothing is gathered behind anybody's back."""
    x, rows, layer, slots = decode()
    split = jax.sharding.NamedSharding(MESH, jax.sharding.PartitionSpec("data"))
    x, slots = (jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=split) for v in (x, slots))
    with pytest.raises(NotImplementedError, match="shard_map"):
        lowered(gathered(None), x, rows, layer, slots)


@pytest.mark.parametrize("bodies", ["xla", pytest.param("interpreted", marks=pytest.mark.slow)])
def test_numbers_are_those_of_one_device(bodies):
    """All bodies on eight virtual devices, in a process of its own."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    }
    command = [sys.executable, "-W", "error", str(TESTS / "placement_world.py"), bodies]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["16"]
