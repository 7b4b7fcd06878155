"""A batch in one array: every bit of every field comes through."""

from __future__ import annotations

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engine.step import Layout, StepBatch


@settings(max_examples=25)
@given(lanes=st.integers(1, 5), tokens=st.sampled_from([1, 3]), pages=st.integers(1, 4), seed=st.integers(0, 99))
def test_every_bit_comes_back(lanes, tokens, pages, seed):
    random = np.random.default_rng(seed)

    def noise(x: np.ndarray) -> np.ndarray:  # floats of any bits, NaN among them
        bits = random.integers(0, 2**32, x.shape, np.uint32)
        return bits % 2 == 0 if x.dtype == bool else bits.view(x.dtype)

    batch = jax.tree.map(noise, StepBatch.idle(lanes, tokens, pages))
    layout = Layout.of(batch)
    assert layout == Layout.of(StepBatch.idle(9, tokens, pages))
    back = jax.jit(layout.unpack)(layout.pack(batch))
    for sent, got in zip(jax.tree.leaves(batch), jax.tree.leaves(back), strict=True):
        assert sent.dtype == got.dtype
        assert sent.tobytes() == np.asarray(got).tobytes()


def test_another_shape_is_another_layout():
    assert Layout.of(StepBatch.idle(2, 1, 3)) != Layout.of(StepBatch.idle(2, 2, 3))
    assert hash(Layout.of(StepBatch.idle(2, 1, 3))) == hash(Layout.of(StepBatch.idle(4, 1, 3)))
