"""Loads the compiled bodies and calls them.

The environment variable JAXLORA_NATIVE caps the instructions that they may use: one of INSTRUCTION_SETS, of which `off` means
that XLA's bodies run.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
from collections.abc import Sequence
from hashlib import sha256
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import jax
import numpy as np

LOG = logging.getLogger("pallas_kernels")
VARIABLE = "JAXLORA_NATIVE"
INSTRUCTION_SETS = ("off", "avx2", "avx512", "avx512_bf16", "amx")  # in the order of the C++ enumeration
TARGETS = (
    "jaxlora_product",
    "jaxlora_back",
    "jaxlora_attention",
    "jaxlora_lora",
    "jaxlora_norm",
    "jaxlora_logsumexp",
    "jaxlora_draw",
)


@functools.cache
def instruction_set() -> str | None:
    """Returns the instructions that the bodies use, of INSTRUCTION_SETS; None where they were not built or are off.

    It is decided once in a process.  Raises ValueError for an unknown value of the environment variable.
    """
    most = os.environ.get(VARIABLE, INSTRUCTION_SETS[-1])
    if most not in INSTRUCTION_SETS:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(INSTRUCTION_SETS)}, got {most[:40]!r}")
    built = [p for suffix in EXTENSION_SUFFIXES if (p := Path(__file__).with_name(f"kernels{suffix}")).exists()]
    if most == "off" or not built or sys.platform != "linux":
        return None
    try:
        library = ctypes.CDLL(str(built[0]))
    except OSError as error:  # of another machine's architecture, say
        LOG.warning("%s cannot be loaded (%s): XLA's bodies run", built[0].name, error)
        return None
    library.jaxlora_source.restype = ctypes.c_char_p
    folder = Path(__file__).parent
    source = b"".join(p.read_bytes() for p in sorted([*folder.glob("*.cc"), *folder.glob("*.h")]))  # as build.py
    if source and library.jaxlora_source() != sha256(source).hexdigest().encode():
        LOG.warning("%s was built from other sources, which may not compile: XLA's bodies run", built[0].name)
        return None
    chosen = INSTRUCTION_SETS[library.jaxlora_choose(INSTRUCTION_SETS.index(most))]
    if chosen == "off":
        return None
    for target in TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    return chosen


def call(
    target: str,
    results: Sequence[tuple[tuple[int, ...], jax.typing.DTypeLike]],
    *args: jax.Array,
    **numbers: np.generic,
) -> list[jax.Array]:
    """Returns the results, of these shapes and dtypes, of a target of TARGETS.  Within a program for a CPU."""
    kinds = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results]
    return list(jax.ffi.ffi_call(target, kinds)(*args, **numbers))
