"""What the kernel tests share: random arrays and comparisons.  Nothing here computes what an op computes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gathered_lora.op import gathered_lora
from pallas_kernels.gathered_lora.pool_rows import of_slots

# float32 has 24 bits.  The sums of these tests have at most a few hundred terms of size about 1, whose rounding errors
# grow like the root of their number: some 1e-6.  Ten times that passes; a wrong index, mask or scale is off by 0.1.
F32 = {"rtol": 1e-5, "atol": 1e-5}

# bfloat16 has 8 bits: one rounding is up to 2**-8 of the value.  An op rounds its output and at most two inner values
# (h of LoRA, q and the weights of attention), so 3 * 2**-8 for sums without cancellation.
# A sum in bfloat16 is off by far more: from 256 equal terms on it does not even grow.
BF16 = {"rtol": 3 * 2**-8, "atol": 1e-6}


def cases_of_a_body(cases: Mapping[str, object], *fast: str) -> list:
    """Parameters of a test that interprets a kernel, which is slow: those named run by default, the rest with `-m slow`."""
    return [
        pytest.param(*(v if isinstance(v, tuple) else (v,)), id=name, marks=() if name in fast else pytest.mark.slow)
        for name, v in cases.items()
    ]


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """float32 standard normal numbers."""
    return rng.standard_normal(shape, dtype=np.float32)


def positive(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """bfloat16 numbers in [0.5, 1.5): their sums do not cancel."""
    return np.asarray(jnp.asarray(rng.random(shape, dtype=np.float32) + 0.5, jnp.bfloat16))


def bits_differ(got: object, want: object) -> list[str]:
    """Leaves of two pytrees that are not equal bit for bit (NaN equals itself, -0.0 is not 0.0)."""
    wrong = []
    for (path, g), w in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g), np.asarray(w)
        if g.shape != w.shape or g.dtype != w.dtype or g.tobytes() != w.tobytes():
            line = f"leaf {jax.tree_util.keystr(path)}: {g.dtype}{list(g.shape)} is not {w.dtype}{list(w.shape)}"
            if g.shape == w.shape:
                places = np.argwhere(~((g == w) | (np.isnan(g.astype("f8")) & np.isnan(w.astype("f8")))))
                line += f" at {len(places)} of {g.size} places, first {places[:3].tolist()}"
            wrong.append(line)
    return wrong


def assert_same_bits(got: object, want: object) -> None:
    """Both pytrees are equal bit for bit."""
    wrong = bits_differ(got, want)
    assert not wrong, "\n".join(wrong)


def assert_close(got: object, want: object, tolerance: Mapping[str, float]) -> None:
    """Leaf by leaf in float64."""
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(g, np.float64), np.asarray(w, np.float64), **tolerance)


def assert_no_nan(*arrays: jax.Array | np.ndarray) -> None:
    """Every number is finite."""
    for x in arrays:
        assert np.isfinite(np.asarray(x, np.float64)).all()


def largest_array(hlo_text: str) -> tuple[int, str]:
    """(elements, type and shape) of the largest array that a compiled program names."""
    found = re.findall(r"\b(?:f64|s64|f32|s32|u32|bf16|f16|pred)\[[0-9,]*\]", hlo_text)
    return max((int(np.prod([int(n) for n in re.findall(r"\d+", text.split("[")[1])] or [1])), text) for text in found)


def gathered(x, rows: Sequence[tuple], layer, slots, **options) -> tuple[jax.Array, ...]:
    """`gathered_lora` of slots of one rank that are full: (a_LSRX, b_LSRY, scale_LS) of each target."""
    return gathered_lora(x, [of_slots(*row) for row in rows], layer, slots, **options)
