"""A base of 8 bits is the base with rounded weights: the same logits and gradients, a quarter of the memory."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_world import Lane, logits_of
from small_world import tiny_path
from train_world import SPEC, OneBucket, RandomSource, batch_of, examples, host, lora, strong_rows

from jaxlora.checkpoints.hf import HfSource
from jaxlora.checkpoints.load import head_of, open_base
from jaxlora.config.base import ONE_DEVICE, ModelSection
from jaxlora.core.errors import ConfigInvalid
from jaxlora.core.model_config import LINEARS
from jaxlora.model.decoder import load_base
from jaxlora.model.mesh import make_mesh
from serve.server.build import read_head
from train.step.state import empty_state, fresh_seat

TINY = ["tiny-llama-tied", "tiny-qwen2", "tiny-qwen3"]


class Rounded:
    """A checkpoint with its linears, head and tied embeddings rounded to 8 bits by output feature, in floats."""

    def __init__(self, source):
        self.source, self.config = source, source.config

    def read(self, name, layer):
        w = np.asarray(self.source.read(name, layer), np.float32)
        if name == "embed" and self.config.tied:
            return rounded(w.T).T
        return rounded(w) if name in LINEARS else w


def rounded(w_XY):
    found = np.zeros_like(w_XY)
    for feature in range(w_XY.shape[1]):
        most = np.abs(w_XY[:, feature]).max()
        if most:
            found[:, feature] = np.round(w_XY[:, feature] * (np.float32(127) / most)) * (most / np.float32(127))
    return found


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_rounded_weights(name):
    source, mesh = HfSource(tiny_path(name)), make_mesh()
    lanes = [Lane([np.random.default_rng(n).integers(1, 100, 12)]) for n in range(3)]
    small = load_base(source, mesh, dtype="float32", quantization="int8")
    plain = load_base(Rounded(source), mesh, dtype="float32")
    float_base = load_base(source, mesh, dtype="float32")
    assert {w.blocks.dtype for w in small.packed.values()} == {np.dtype(np.int8)}
    assert set(small.packed) == LINEARS
    assert ("embed" in small.arrays) == (not source.config.tied)
    got, want, full = (np.stack([x for (x,) in logits_of(base, lanes, 16)]) for base in (small, plain, float_base))
    assert np.abs(got - want).max() < 2e-3 * np.abs(want).max()
    assert np.abs(full - want).max() > 5 * np.abs(got - want).max()  # the rounding is what changes something


@pytest.mark.parametrize(
    ("dtype", "tied"),
    [
        ("float32", True),
        ("bfloat16", False),
        pytest.param("float32", False, marks=pytest.mark.slow),
        pytest.param("bfloat16", True, marks=pytest.mark.slow),
    ],
)
def test_adapters_get_the_gradient_of_rounded_weights(dtype, tied):
    source, mesh = RandomSource(replace(RandomSource().config, tied=tied)), make_mesh()
    found = []
    for base in (
        load_base(source, mesh, dtype=dtype, quantization="int8"),
        load_base(Rounded(source), mesh, dtype="float32"),
    ):
        state = empty_state(base, SPEC, mesh)
        programs = OneBucket(state, mesh)
        rows = jax.device_put(fresh_seat(strong_rows(lora(8), 0)))
        state = programs.seat(state, jax.device_put(np.int32(0)), rows)
        state, sums = programs.accumulate(base, state, jax.device_put(batch_of([(0, examples(1, 3))])))
        grads = np.concatenate([np.ravel(g) for g in jax.tree.leaves(host(state.grads))]).astype("f8")
        found.append((grads, np.asarray(sums.loss_G)))
    (got, loss), (want, exact) = found
    assert got @ want / np.linalg.norm(got) / np.linalg.norm(want) > (0.9999 if dtype == "float32" else 0.99)
    np.testing.assert_allclose(np.linalg.norm(got), np.linalg.norm(want), rtol=1e-3 if dtype == "float32" else 0.03)
    np.testing.assert_allclose(loss, exact, rtol=1e-3 if dtype == "float32" else 0.02)


def test_it_takes_a_quarter_of_float32():
    source, mesh = RandomSource(), make_mesh()
    base = load_base(source, mesh, dtype="float32", quantization="int8")
    exact = sum(np.prod(w.shape) * 4 * w.blocks.shape[0] for w in base.packed.values())
    held = sum(x.nbytes for x in jax.tree.leaves(base.packed))
    assert (
        held < 0.32 * exact
    )  # these have 64 and 96 features, of which the scales take a larger part than of real ones


def test_a_head_to_compare_with_is_the_checkpoints():
    """An adapter's copy of the head must be exact, and a rounded head is not."""
    path = tiny_path("tiny-llama-tied")
    opened = open_base(ModelSection(path=str(path), dtype="bfloat16", quantization="int8"), ONE_DEVICE)
    assert opened.base.dtype == jnp.bfloat16
    np.testing.assert_array_equal(read_head(opened), head_of(HfSource(path)))


@pytest.mark.parametrize(("platform", "fsdp"), [("cpu", 2), ("gpu", 1)])
def test_elsewhere_than_on_one_cpu_device_it_is_refused(platform, fsdp):
    devices = np.array([SimpleNamespace(platform=platform)] * fsdp)
    mesh = SimpleNamespace(shape={"data": 1, "fsdp": fsdp, "tensor": 1}, size=fsdp, devices=devices)
    with pytest.raises(ConfigInvalid, match=f"int8 is for one CPU device, got {fsdp} of {platform}; leave it out"):
        load_base(RandomSource(), mesh, dtype="float32", quantization="int8")
