"""The Triton kernels: every one compiles for H100, no program makes a second pool, and the interpreter's numbers are right.

Nothing runs on a GPU.  Compiling for H100 goes through Triton, LLVM and NVIDIA's assembler, and through XLA for the rest.
"""

from __future__ import annotations

import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from cuda_world import H100, h100s, kernels
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding
from kernel_checks import gathered
from kernel_shapes import (
    LANES,
    MODELS,
    PAGE,
    PAGES,
    PROMPT,
    ROWS,
    TOKENS,
    Model,
    as_large_as_logits,
    decode,
    decode_shapes,
    lanes_attend,
    lanes_loss,
    lanes_shapes,
    loss,
    made_as_large_as,
    pages_attend,
    pages_shapes,
    shape,
    train,
    train_shapes,
    words_shapes,
    words_train,
)

from pallas_kernels import dispatch, tiling_cuda
from pallas_kernels.paged_attention.op import paged_attention
from pallas_kernels.segmented_lora.op import segmented_lora

pytestmark = [
    pytest.mark.aot_cuda,
    # Triton 3.7 on Python 3.13: its own syntax trees.
    pytest.mark.filterwarnings("ignore:AnnAssign.__init__ missing:DeprecationWarning"),
    # jax-triton wants Refs instead, of which XLA may make copies; its version is bounded.
    pytest.mark.filterwarnings("ignore:input_output_aliases is deprecated:DeprecationWarning"),
]

TESTS = Path(__file__).parents[1] / "support"


@pytest.fixture(autouse=True)
def shared_memory_of_an_h100(monkeypatch):
    """Fails a kernel that needs more: no compiler compares its shared memory with the device's."""
    from jax_triton import triton_lib

    limit, compile_kernel = (
        int(re.search(r"shared_memory_per_block_optin: (\d+)", H100)[1]),
        triton_lib.compile_ttir_inplace,
    )

    def checked(*args):
        result = compile_kernel(*args)
        assert result.shared_mem_bytes <= limit, f"{result.name}: {result.shared_mem_bytes} bytes"
        return result

    monkeypatch.setattr(triton_lib, "compile_ttir_inplace", checked)


def compiled(function, shapes) -> jax.stages.Compiled:
    """The program for one H100."""
    with h100s() as devices:
        here = SingleDeviceSharding(devices[0])
        return jax.jit(function, in_shardings=here, out_shardings=here).lower(*shapes).compile()


models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


@models
@pytest.mark.parametrize("rank", [8, 64])
def test_decode(model: Model, rank):
    shapes = decode_shapes(model, rank)
    program = compiled(decode, shapes)
    assert kernels(program) == {"gathered_lora_shrink": 5, "gathered_lora_expand": 5}
    text = program.as_text()
    assert (
        made_as_large_as([half for read in shapes[0] for row in read for half in (row.a_LNRX, row.b_LNRY)], text) == []
    )
    assert text.count(" sort(") == 1  # once per step, not per layer


@models
def test_train(model: Model):
    """Of the largest rank that the models are trained with: the most registers and shared memory."""
    shapes = train_shapes(model, 64)
    back = {"segmented_lora_shrink": 5, "segmented_lora_expand_back": 8, "segmented_lora_shrink_back": 5}
    assert kernels(compiled(train, shapes)) == back


def test_forward_of_lanes():
    program = compiled(loss, train_shapes(MODELS["Llama-3.1-8B"], 16))
    assert kernels(program) == {"segmented_lora_shrink": 5, "segmented_lora_expand": 8}


@models
def test_lanes(model: Model):
    shapes = lanes_shapes(model)
    forward = {"packed_attention_forward": 1}
    assert kernels(compiled(lanes_loss, shapes)) == forward
    back = {"packed_attention_backward_queries": 1, "packed_attention_backward_keys": 1}
    assert kernels(compiled(lanes_attend, shapes)) == forward | back


@models
@pytest.mark.parametrize(("lanes", "tokens"), [(ROWS, 1), (4, PROMPT)], ids=["decode", "prompt"])
def test_pages(model: Model, lanes, tokens):
    """Pages in the layout that they have on a device are written and read where they lie."""
    pages, *rest = pages_shapes(model, lanes, tokens)
    with h100s() as devices:
        here = SingleDeviceSharding(devices[0])
        kept = Format(Layout(major_to_minor=(0, 1, 2, 3)), here)
        placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=kept) for x in pages]
        step = jax.jit(
            pages_attend, in_shardings=(kept, here, here, here), out_shardings=(here, kept), donate_argnums=0
        )
        program = step.lower(placed, *rest).compile()
    assert kernels(program) == {"paged_attention": 1}
    made = made_as_large_as(pages, program.as_text())
    assert [line for line in made if "scatter" not in line.split(" = ")[0]] == []
    assert program.memory_analysis().alias_size_in_bytes >= 2 * math.prod(pages[0].shape) * pages[0].dtype.itemsize


def test_pages_of_long_contexts_are_read_in_parts_and_joined():
    """Of 64 rows and a table for 32k tokens the parts' results are 32 of each row's output in float32, and their log-sums."""
    lanes, i32 = 64, jnp.int32
    q, page = shape(lanes, 1, 32, 128), shape(2, PAGES, PAGE, 8 * 128)
    ids = shape(dtype=i32), shape(lanes, 32768 // PAGE, dtype=i32), shape(lanes, 1, dtype=i32)
    program = compiled(functools.partial(paged_attention, window=None), (q, page, page, *ids))
    assert kernels(program) == {"paged_attention": 1, "paged_attention_join": 1}
    parts = 32 * lanes * 32 * (128 + 1) * 4
    assert parts <= program.memory_analysis().temp_size_in_bytes <= parts + 2**20


def programs(function, *args) -> int:
    """Of the one kernel that the function launches."""
    (call,) = [e for e in jax.make_jaxpr(function)(*args).eqns if e.primitive.name == "triton_kernel_call"]
    return math.prod(call.params["grid"])


def test_few_tokens_of_lanes_are_shrunk_on_all_processors_and_many_in_one_part():
    from pallas_kernels.segmented_lora.triton import _shrunk

    few, many = (programs(_shrunk, shape(G, J, 4096), [shape(G, 16, 4096)] * 3) for G, J in ((8, 64), (16, 512)))
    assert 132 <= few <= 2 * 132
    assert many == 16 * 512 // 32


def test_a_program_through_xlas_own_triton(monkeypatch):
    """Pointers in a tuple, constants that are tuples and dtypes, arrays of three dtypes; jax-triton is not asked."""
    monkeypatch.setenv("JAXLORA_TRITON", "xla")
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_pdl=false")  # read by ours: XLA has read them and is told below
    monkeypatch.setattr("jax_triton.triton_call", None)

    def both(x_TX, rows, index, slot_T, q_GJNH, pages, page_GC):
        attended = paged_attention(q_GJNH, pages, pages, index, page_GC, slot_T[:, None], window=None)
        return gathered(x_TX, rows, index, slot_T), attended

    ids, table = (shape(dtype=jnp.int32), shape(8, dtype=jnp.int32)), shape(8, 128, dtype=jnp.int32)
    args = shape(8, 256), [row(16), row(8)], *ids, shape(8, 1, 4, 64), shape(2, PAGES, 16, 2 * 64), table
    with h100s() as devices:
        here = SingleDeviceSharding(devices[0])
        lowered = jax.jit(both, in_shardings=here, out_shardings=here).lower(*args)
        program = lowered.compile(compiler_options={"xla_gpu_enable_pdl": False})
    names = "gathered_lora_shrink", "gathered_lora_expand", "paged_attention", "paged_attention_join"
    assert kernels(program) == dict.fromkeys(names, 1)
    assert "triton_kernel_call_ffi" not in program.as_text()


attention_takes = pytest.mark.parametrize(
    ("head", "dtypes", "taken"),
    [
        (256, ("bfloat16",) * 3, True),
        (256, ("float32",) * 3, True),
        (5, ("bfloat16",) * 3, True),
        (257, ("bfloat16",) * 3, False),
        (64, ("float16",) * 3, False),
        (64, ("float32", "bfloat16", "bfloat16"), False),
    ],
)


@attention_takes
def test_the_table_routes_lanes_of_attention_by_head_and_dtype(head, dtypes, taken):
    q, k, v = (shape(2, 96, n, head, dtype=dtype) for n, dtype in zip((6, 2, 2), dtypes, strict=True))
    function = lanes_attend if taken else lanes_loss  # the gradient is not defined for mixed dtypes
    found = kernels(compiled(function, (q, k, v, shape(2, 96, dtype=jnp.int32))))
    assert sum(found.values()) == (3 if taken else 0)


@attention_takes
def test_the_table_routes_pages_by_head_and_dtype(head, dtypes, taken):
    i32 = jnp.int32
    sizes = (2, 3, 6, head), (2, 9, 16, 2 * head), (2, 9, 16, 2 * head)
    arrays = [shape(*size, dtype=dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
    ids = shape(dtype=i32), shape(2, 4, dtype=i32), shape(2, 3, dtype=i32)
    found = kernels(compiled(functools.partial(paged_attention, window=20), (*arrays, *ids)))
    assert sum(found.values()) == taken


@models
@pytest.mark.parametrize(
    ("rank", "targets", "dtype"), [(64, 4, jnp.bfloat16), (0, 1, jnp.float32)], ids=["LoRA and four targets", "float32"]
)
def test_words(model: Model, rank, targets, dtype):
    """The head is read where it lies; of the gradient of the logits a part is in memory, of the logits nothing."""
    shapes = words_shapes(model, rank, targets, dtype)
    program = compiled(functools.partial(words_train, model), shapes)
    rows = {"segmented_lora_expand_back": 1} if rank else {}
    assert kernels(program) == {"target_logprob": 1, "target_logprob_back": 1} | rows
    text, stored = program.as_text(), shapes[3]
    assert made_as_large_as([stored, shape(*stored.shape[::-1])], text) == []
    head = {f"{model.d},{model.vocab}", f"{model.vocab},{model.d}"}
    assert as_large_as_logits(LANES * TOKENS, model.vocab, text) <= head


def row(rank: int, dtype=jnp.bfloat16):
    return shape(2, 4, rank, 256, dtype=dtype), shape(2, 4, rank, 384, dtype=dtype), shape(2, 4, dtype=jnp.float32)


def lane_row(rank: int):
    return tuple(shape(*sizes, dtype=jnp.float32) for sizes in ((2, rank, 256), (2, rank, 384), (2,)))


@pytest.mark.parametrize(("tokens", "rank", "taken"), [(1024, 256, True), (1025, 16, False), (8, 257, False)])
def test_the_table_routes_decode_by_tokens_and_rank(tokens, rank, taken):
    index, slots = shape(dtype=jnp.int32), shape(tokens, dtype=jnp.int32)
    program = compiled(gathered, (shape(tokens, 256), [row(rank)], index, slots))
    assert bool(kernels(program)) is taken


@pytest.mark.parametrize(("ranks", "taken"), [([128, 128], True), ([128, 129], False)])
def test_the_table_routes_lanes_by_the_rank_of_all_targets(ranks, taken):
    def both(x, rows):
        return segmented_lora(x, rows), jax.grad(lambda x: segmented_lora(x, rows)[0].astype(jnp.float32).sum())(x)

    program = compiled(both, (shape(2, 100, 256), [lane_row(rank) for rank in ranks]))
    assert bool(kernels(program)) is taken


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_float32_is_taken_and_float16_is_not(dtype):
    args = (shape(8, 256, dtype=dtype), [row(16, dtype)], shape(dtype=jnp.int32), shape(8, dtype=jnp.int32))
    assert bool(kernels(compiled(gathered, args))) is (dtype == jnp.float32)


def test_the_extra_decides(monkeypatch):
    args = (shape(8, 256), [row(16)], shape(dtype=jnp.int32), shape(8, dtype=jnp.int32))
    assert dispatch.cuda_body() == "triton"
    monkeypatch.setattr(tiling_cuda, "installed", lambda: False)
    assert dispatch.cuda_body() == "xla"
    assert not kernels(compiled(lambda *args: gathered(*args), args))


def interpreter(*command: str) -> str:
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TRITON_INTERPRET": "1",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parents[2], TESTS, Path(__file__).parent))),
    }
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


LANE_KERNELS = {f"segmented_lora_{half}{back}" for half in ("expand", "shrink") for back in ("", "_back")}
LORA_KERNELS = {"gathered_lora_expand", "gathered_lora_shrink"} | LANE_KERNELS
ATTENTION_KERNELS = {"packed_attention_backward_keys", "packed_attention_backward_queries", "packed_attention_forward"}
ATTENTION_KERNELS |= {"paged_attention"}
HEAD_KERNELS = {"target_logprob", "target_logprob_back"}


@pytest.mark.parametrize(
    ("name", "kernels", "passed"),
    [
        ("test_pallas_kernels_tpu_bodies", LORA_KERNELS, 36),
        ("test_pallas_kernels_attention_tpu", ATTENTION_KERNELS | {"paged_attention_join"}, 67),
        ("test_pallas_kernels_cross_entropy_bodies", LANE_KERNELS | HEAD_KERNELS, 66),
        ("test_pallas_kernels_adamw", {"adamw"}, 6),
        ("test_house_tpu_bodies", LORA_KERNELS | ATTENTION_KERNELS | HEAD_KERNELS, 2),
    ],
    ids=["lora", "attention", "head", "update", "steps"],
)
def test_interpreted_bodies_pass_the_tests_of_the_tpu_bodies(name, kernels, passed):
    """Kernels against references, then the whole decode and training step of a small model against the XLA form."""
    path = str(Path(__file__).parent / f"{name}.py")
    of_pallas = "not leaves_nothing_to_choose and not visits and not no_room"
    out = interpreter("-m", "pytest", "-n", "0", "-p", "triton_interpreter", path, "-m", "", "-k", of_pallas)
    assert re.search(r"kernels: (.*)", out)[1].split() == sorted(kernels)
    assert f" {passed} passed" in f" {out}"


def test_interpreted_on_a_mesh_and_counted():
    """On eight virtual devices the numbers are those of one; nothing is read that the step does not need.

    LoRA: of 8 to 512 slots those of the step, once, of prompts once by each lane.  Packed attention: in each kernel the blocks that meet.  Paged
    attention: of all pages and layers the keys that a lane sees, once.
    """
    assert interpreter(str(TESTS / "triton_interpreter.py")).split() == ["16", "3", "3", "3", "4"]
