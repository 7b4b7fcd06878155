"""A pytest plugin: every test that interprets a Pallas body runs the Triton body, in Triton's own interpreter, on the CPU.

TRITON_INTERPRET=1 PYTHONPATH=tests/support:tests/device python -m pytest -n 0 -p triton_interpreter tests/device/test_pallas_kernels_tpu_bodies.py

What stands in for jax-triton hands the kernel the arguments, grid and constants that jax-triton would get, and outputs
full of NaN.  What a compiler or a GPU does with the kernel is not seen here.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from unittest import mock

import jax
import jax.numpy as jnp
import jax_triton
import numpy as np
import placement_world
import pytest
import test_pallas_kernels_counts as counts
import triton.language as tl
from triton.runtime import interpreter

from pallas_kernels import dispatch
from pallas_kernels.attention import op as attention
from pallas_kernels.cross_entropy import op as cross_entropy
from pallas_kernels.gathered_lora import op as gathered_lora
from pallas_kernels.paged_attention import op as paged_attention
from pallas_kernels.segmented_lora import op as segmented_lora
from train.step import update

ONE_AT_A_TIME = threading.Lock()  # the interpreter keeps its place in the grid in a global
CALLS = []  # names of the kernels that ran
READ = []  # (program, addresses) of the masked loads of the kernel that ran last
INPUTS = []  # of every kernel that ran: per input array, how many times each of its numbers was read
MOST = []  # likewise, how many of them a program read at most


class Memory:
    """A NumPy array, as far as the interpreter asks."""

    def __init__(self, array: np.ndarray):
        self.array, self.dtype = array, array.dtype.name

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> Memory:
        return self

    def cpu(self) -> Memory:
        return self

    def new_empty(self, size: int, device: str) -> Memory:
        return Memory(self.array)

    def set_(self, storage: Memory, offset: int, size: tuple, stride: tuple) -> None:
        assert storage.array is self.array

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple:
        return self.array.shape

    def stride(self) -> tuple:
        return self.array.strides

    def copy_(self, other: Memory) -> None:
        assert other.array is self.array


def times_read(array: np.ndarray) -> np.ndarray:
    """Of every number of the array, in the kernel that ran last."""
    places = [places_of(array, read) for _, read in READ]
    return np.bincount(np.concatenate([np.zeros(0, int), *places]), minlength=array.size).reshape(array.shape)


def places_of(array: np.ndarray, addresses: np.ndarray) -> np.ndarray:
    """The places in the flat array of those addresses that are in it."""
    offsets = addresses.astype(np.int64) - array.ctypes.data
    return offsets[(offsets >= 0) & (offsets < array.nbytes)] // array.itemsize


def most_by_a_program(array: np.ndarray) -> int:
    """How many of the array's numbers the program that read most has read, in the kernel that ran last."""
    reads = Counter()
    for program, addresses in READ:
        reads[program] += len(places_of(array, addresses))
    return max(reads.values(), default=0)


def triton_call(*args, kernel, name, out_type, grid, input_output_aliases=None, **constants):
    """input_output_aliases: input → output, both as numbers of arrays; the kernel has one argument for both."""
    own = {out: i for i, out in (input_output_aliases or {}).items()}

    def run(*args):
        inputs = jax.tree.map(lambda x: Memory(np.array(x, order="C")), args)
        given, (leaves, form) = jax.tree.leaves(inputs), jax.tree.flatten(out_type)
        outputs = [given[own[n]].array if n in own else np.full(o.shape, np.nan, o.dtype) for n, o in enumerate(leaves)]
        apart = [Memory(x) for n, x in enumerate(outputs) if n not in own]
        outputs = jax.tree.unflatten(form, outputs)
        with ONE_AT_A_TIME:
            CALLS.append(name)
            READ.clear()
            kernel[grid](*inputs, *apart, **constants)
            INPUTS.append([times_read(m.array) for m in jax.tree.leaves(inputs)])
            MOST.append([most_by_a_program(m.array) for m in jax.tree.leaves(inputs)])
        return outputs

    return jax.pure_callback(run, out_type, *args)


def _widened(tensor: interpreter.TensorHandle) -> interpreter.TensorHandle:
    if tensor.dtype.scalar != tl.bfloat16:
        return tensor
    return interpreter.TensorHandle((tensor.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


class Builder(interpreter.InterpreterBuilder):
    """The interpreter's own, which multiplies bfloat16 by its bits and rounds to it towards zero.  Remembers what is read."""

    def create_masked_load(self, ptrs, mask, *rest):
        READ.append((tuple(self.grid_idx), ptrs.data[mask.data]))
        return super().create_masked_load(ptrs, mask, *rest)

    def create_dot(self, a, b, *rest):
        return super().create_dot(_widened(a), _widened(b), *rest)

    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return super().cast_impl(src, dst_type)
        return interpreter.TensorHandle(src.data.astype(jnp.bfloat16).view(np.uint16), tl.bfloat16)


def by_platform(op, *args, xla, native=None, pallas=None, triton=None):
    """The dispatcher's own, which finds the Triton body where it looks for the Pallas body."""
    return dispatch.by_platform(
        op, *args, xla=xla, native=native, pallas=triton and (lambda interpret: triton()), triton=None
    )


def interpret_triton() -> None:
    """From here on `dispatch.interpreted` runs Triton bodies."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    patch = pytest.MonkeyPatch()
    patch.setattr(jax_triton, "triton_call", triton_call)
    patch.setattr(interpreter.interpreter_builder, "__class__", Builder)
    for op in (attention, cross_entropy, gathered_lora, paged_attention, segmented_lora, update):
        patch.setattr(op, "by_platform", by_platform)


def pytest_configure() -> None:
    interpret_triton()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"kernels: {' '.join(sorted(set(CALLS)))}")


def count_reads(tokens: int) -> int:
    """How many cases read the rows of each adapter's rank, no others, and the tokens with an adapter once.

    tokens: of a lane.  Where it is 1 an adapter's rows are read once, else once by each of its lanes, which are of one tile.
    """
    for case in (counts.case(slots) for slots in counts.SLOTS):
        case = np.repeat(case[0], tokens, axis=0), *case[1:]
        INPUTS.clear()
        with dispatch.interpreted():
            jax.block_until_ready(jax.jit(gathered_lora.gathered_lora)(*case))
        adapters, _ = counts.expected(case[3])
        lanes = {slot: 1 if tokens == 1 else int((case[3] == slot).sum()) for _, slot in adapters}
        (x, _, _, _, _, a, _), (_, _, _, _, _, b, _, _) = INPUTS
        ranks = np.asarray(case[1][0].rank_S)
        for half in (a, b):
            wanted = np.zeros((counts.L, len(ranks), counts.R, half.shape[3]), int)
            for layer, slot in adapters:
                wanted[layer, slot, : ranks[slot]] = lanes[slot]
            assert (half == wanted.reshape(half.shape)).all()
        assert (x == np.repeat(case[3] >= 0, tokens)[:, None]).all()
    return len(counts.SLOTS)


def count_blocks() -> int:
    """How many kernels of packed attention read the blocks that meet, of their own lane, and no others."""
    block, J, N, K, H, window = 32, 300, 6, 2, 4, 70
    rng = np.random.default_rng(0)
    q, k, v, d = (rng.standard_normal((2, J, n, H), dtype=np.float32) for n in (N, K, K, N))
    segments = np.array([[1] * 40 + [2] * 130 + [0] * 30 + [3] * 100, [0] * 20 + [1] * 30 + [2] * 250], np.int32)
    with dispatch.interpreted():
        CALLS.clear()
        INPUTS.clear()
        _, pull = jax.vjp(lambda *qkv: attention.packed_attention(*qkv, segments, window=window, block=J), q, k, v)
        jax.block_until_ready(pull(d))
    i, j = np.arange(J)[:, None], np.arange(J)[None, :]
    seen = (segments[:, :, None] == segments[:, None, :]) & (segments != 0)[:, :, None] & (j <= i) & (j > i - window)
    blocks = np.arange(0, J, block)
    meet = np.logical_or.reduceat(np.logical_or.reduceat(seen, blocks, axis=1), blocks, axis=2)
    times = {"keys": N // K * meet.sum(1), "queries": meet.sum(2)}  # programs that read a block, by lane and block
    for name, of, what in (("forward", 1, "keys"), ("backward_queries", 1, "keys"), ("backward_keys", 0, "queries")):
        (reads,) = (
            inputs[of] for call, inputs in zip(CALLS, INPUTS, strict=True) if call == f"packed_attention_{name}"
        )
        assert (reads == times[what].repeat(block, axis=1)[:, :J, None, None]).all()
    return len(CALLS)


def count_pages() -> int:
    """How many cases read, in one layer, each key and value that a lane's tokens see together once, and nothing else.

    No program reads more than the keys of a part, and the join reads a part's result for each part that a token sees.
    """
    from pallas_kernels.paged_attention import triton as paged_attention_cuda

    rng, decode, prompt = np.random.default_rng(0), paged_attention_cuda.PART_KEYS, 256
    k, v = rng.standard_normal((2, 2, 160, 16, 2 * 4), dtype=np.float32)
    page = rng.permutation(160).reshape(2, 80).astype(np.int32)
    cases = [
        ([[130], [-1]], None),
        ([[1200], [9]], 50),
        ([[1100, 1101, 1102], [7, 8, -1]], 500),
        ([[1277], [30]], None),
    ]
    for positions, window in cases:
        INPUTS.clear()
        MOST.clear()
        q = rng.standard_normal((2, len(positions[0]), 6, 4), dtype=np.float32)
        args = (q, k, v, jnp.int32(1), page, np.array(positions, np.int32))
        with dispatch.interpreted(), mock.patch.object(paged_attention_cuda, "PROMPT_PART_KEYS", prompt):
            got = jax.block_until_ready(paged_attention.paged_attention(*args, window=window))
            with mock.patch.object(paged_attention_cuda, "ATTENDING", 1):  # a program has all parts of its run
                same = paged_attention.paged_attention(*args, window=window)
            np.testing.assert_array_equal(got, same)
        want = paged_attention.paged_attention_reference(*args, window=window)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        seen, parts, part = np.zeros(k.shape, int), [], decode if q.shape[1] == 1 else prompt
        for lane, row in enumerate(positions):
            real = [p for p in row if p >= 0]
            for place in range(max(0, min(real) - (window or 1280) + 1), max(real) + 1) if real else ():
                seen[1, page[lane, place // 16], place % 16] = 1
            parts += [p // part - max(0, p - (window or 1280) + 1) // part + 1 if p >= 0 else 0 for p in row]
        (_, k_reads, v_reads, *_), (out_reads, lse_reads, _), *_ = INPUTS
        assert (k_reads == seen).all()
        assert (v_reads == seen).all()
        assert max(MOST[0][1:3]) <= part * 4
        assert (lse_reads.sum(0).reshape(-1, 6) == np.array(parts)[:, None]).all()
        assert (out_reads == lse_reads[..., None]).all()
    return len(cases)


if __name__ == "__main__":
    interpret_triton()
    placement_world.main(interpreted=True)
    print(count_reads(1), count_reads(5), count_blocks(), count_pages())
