"""A pytest plugin: every test that interprets a Pallas body runs the Triton body, in Triton's own interpreter, on the CPU.

TRITON_INTERPRET=1 PYTHONPATH=tests python -m pytest -p triton_interpreter tests/test_pallas_kernels_tpu_bodies.py

What stands in for jax-triton hands the kernel the arguments, grid and constants that jax-triton would get, and outputs
full of NaN.  What a compiler or a GPU does with the kernel is not seen here.
"""

from __future__ import annotations

import os
import threading

import jax
import jax.numpy as jnp
import jax_triton
import numpy as np
import placement_world
import pytest
import triton.language as tl
from triton.runtime import interpreter

from pallas_kernels import dispatch, gathered_lora, segmented_lora

ONE_AT_A_TIME = threading.Lock()  # the interpreter keeps its place in the grid in a global
CALLS = []  # names of the kernels that ran


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


def triton_call(*args, kernel, name, out_type, grid, **constants):
    def run(*args):
        inputs = jax.tree.map(lambda x: Memory(np.array(x, order="C")), args)
        outputs = jax.tree.map(lambda o: np.full(o.shape, np.nan, o.dtype), out_type)
        with ONE_AT_A_TIME:
            CALLS.append(name)
            kernel[grid](*inputs, *map(Memory, jax.tree.leaves(outputs)), **constants)
        return outputs

    return jax.pure_callback(run, out_type, *args)


def _widened(tensor: interpreter.TensorHandle) -> interpreter.TensorHandle:
    if tensor.dtype.scalar != tl.bfloat16:
        return tensor
    return interpreter.TensorHandle((tensor.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


class Builder(interpreter.InterpreterBuilder):
    """The interpreter's own, which multiplies bfloat16 by its bits and rounds to it towards zero."""

    def create_dot(self, a, b, *rest):
        return super().create_dot(_widened(a), _widened(b), *rest)

    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return super().cast_impl(src, dst_type)
        return interpreter.TensorHandle(src.data.astype(jnp.bfloat16).view(np.uint16), tl.bfloat16)


def by_platform(op, *args, xla, pallas, triton):
    """The dispatcher's own, which finds the Triton body where it looks for the Pallas body."""
    return dispatch.by_platform(op, *args, xla=xla, pallas=triton and (lambda *a: triton(*a[:-1])), triton=None)


def interpret_triton() -> None:
    """From here on `dispatch.interpreted` runs Triton bodies."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    patch = pytest.MonkeyPatch()
    patch.setattr(jax_triton, "triton_call", triton_call)
    patch.setattr(interpreter.interpreter_builder, "__class__", Builder)
    for op in (gathered_lora, segmented_lora):
        patch.setattr(op, "by_platform", by_platform)


def pytest_configure() -> None:
    interpret_triton()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"kernels: {' '.join(sorted(set(CALLS)))}")


if __name__ == "__main__":
    interpret_triton()
    placement_world.main()
