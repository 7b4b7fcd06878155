"""Launches a Triton kernel within a program for an NVIDIA GPU: the one place, with two routes.

    jax-triton   Triton's own compiler makes a cubin while the program is lowered, which jax-triton's custom call starts
    xla          XLA is given the kernel's Triton IR, and its own Triton compiles it with the program, as of XLA's fusions

The environment variable JAXLORA_TRITON chooses, and jax-triton is the default.  Route `xla` needs the package triton alone,
and depends on the version of Triton in XLA instead of jax-triton's private use of JAX.  With programmatic dependent launch
XLA's compiler (jaxlib 0.11.2) ends the process over these kernels, so the flag that turns it off is required.  Neither route
has run on a GPU; both compile for H100.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Hashable
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np

VARIABLE = "JAXLORA_TRITON"
FLAG = "--xla_gpu_enable_pdl=false"  # in XLA_FLAGS, for route `xla`
ROUTES = {"jax-triton": ("jax_triton", "triton"), "xla": ("triton",)}  # the packages that each needs
TARGET = "__gpu$xla.gpu.triton"  # of XLA's custom call
POINTERS = {"bfloat16": "*bf16", "float32": "*fp32", "int32": "*i32"}  # of arrays, by dtype
USUAL = {"num_warps": 4, "num_stages": 3}  # Triton's defaults
ALIGNED = 16  # bytes: where arrays begin
CAPABILITY = 90  # what Triton's front end is told, which asks it for little; XLA compiles for the GPU that is there


def packages() -> tuple[str, ...]:
    """Returns the packages that the chosen route needs.  Imports none of them.

    Raises ValueError for an unknown value of the environment variable, and where route `xla` lacks its flag.
    """
    return ROUTES[_route()]


def _route() -> str:
    chosen = os.environ.get(VARIABLE, "jax-triton")
    if chosen not in ROUTES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(ROUTES)}, got {chosen[:40]!r}")
    if chosen == "xla" and FLAG not in os.environ.get("XLA_FLAGS", "").split():
        raise ValueError(f"{VARIABLE}=xla needs {FLAG} in XLA_FLAGS before the process starts: add it")
    return chosen


@overload
def launch(
    *args: jax.Array | tuple[jax.Array, ...],
    kernel: Hashable,
    name: str,
    out_type: jax.ShapeDtypeStruct,
    grid: tuple[int, ...],
    **constants: Hashable,
) -> jax.Array: ...


@overload
def launch(
    *args: jax.Array | tuple[jax.Array, ...],
    kernel: Hashable,
    name: str,
    out_type: tuple[jax.ShapeDtypeStruct, ...],
    grid: tuple[int, ...],
    **constants: Hashable,
) -> tuple[jax.Array, ...]: ...


def launch(*args, kernel, name, out_type, grid, **constants):
    """Returns what the kernel writes: arrays of these shapes and dtypes.

    kernel: a function that `triton.jit` has decorated; it takes args, then a pointer of each result, then the constants.
    grid: programs along each of up to three axes.
    constants: its own, and num_warps and num_stages where they are not Triton's defaults.
    """
    if _route() == "jax-triton":
        import jax_triton  # ty: ignore[import-not-found]

        return jax_triton.triton_call(*args, kernel=kernel, name=name, out_type=out_type, grid=grid, **constants)
    results, structure = jax.tree.flatten(out_type)
    types = jax.tree.map(lambda x: POINTERS[jnp.dtype(x.dtype).name], (*args, *results))
    options = {option: constants.pop(option, usual) for option, usual in USUAL.items()}
    ir, entry = _triton_ir(kernel, types, tuple(constants.items()), tuple(options.items()))
    sizes = {f"grid_{axis}": n for axis, n in zip("xyz", (*grid, 1, 1), strict=False)}
    numbers = {what: np.int32(n) for what, n in (sizes | options).items()}
    call = jax.ffi.ffi_call(TARGET, results)
    return jax.tree.unflatten(
        structure, call(*jax.tree.leaves(args), name=entry, ir=ir, debug=np.bool_(False), **numbers)
    )


@functools.cache
def _triton_ir(
    kernel: Hashable, types: tuple, constants: tuple[tuple[str, Hashable], ...], options: tuple[tuple[str, int], ...]
) -> tuple[str, str]:
    """Returns (the kernel's Triton IR, as its front end makes it, its function's name)."""
    import triton  # ty: ignore[import-not-found]
    from triton.backends.compiler import GPUTarget  # ty: ignore[import-not-found]
    from triton.compiler.compiler import ASTSource, make_backend  # ty: ignore[import-not-found]

    target = GPUTarget("cuda", CAPABILITY, 32)
    backend = make_backend(target)
    parsed = backend.parse_options(dict(options))
    context = triton._C.libtriton.ir.context()
    triton._C.libtriton.ir.load_dialects(context)
    backend.load_dialects(context)
    pointers = [name for name in kernel.arg_names if name not in dict(constants)]  # ty: ignore[missing-attribute]
    places = [tuple(key.idx for key in path) for path, _ in jax.tree.leaves_with_path(types)]
    source = ASTSource(
        fn=kernel,
        signature=dict(zip(pointers, types, strict=True)) | dict.fromkeys(dict(constants), "constexpr"),
        constexprs=dict(constants),
        attrs={place: [["tt.divisibility", ALIGNED]] for place in places},
    )
    more = backend.get_codegen_implementation(parsed), backend.get_module_map(), context
    module = source.make_ir(target, parsed, *more)
    return str(module), module.get_entry_func_name()
