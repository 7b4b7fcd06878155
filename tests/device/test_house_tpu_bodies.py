"""Whole steps of a small model with the kernels interpreted (the TPU's, or as the plugin triton_interpreter has it the
GPU's) do what the XLA bodies do."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import assert_close
from serve_world import World, ask, run_all

from jaxlora.core.lora import ALL_TARGETS
from jaxlora.model.decoder import load_base
from jaxlora.model.lora_pool import PoolSpec
from pallas_kernels import dispatch
from train.step.batch import idle_batch
from train.step.state import TrainState, empty_state
from train.step.step import make_programs

pytest_plugins = ["serve_fixtures"]

# Two layers of sums with at most 100 terms in float32, in another order.
STEP = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def world(world: World) -> World:
    """The world with plain weights, as a device has them."""
    with patch("jaxlora.model.decoder.instruction_set", lambda: None):
        return replace(world, base=load_base(world.source, world.mesh, dtype="float32"))


@pytest.mark.slow
def test_engine_with_pallas_bodies(world):
    """Prefill and decode, five adapters and the base in one batch, the head adapted too."""
    requests = [ask(f"r{i}", a, max_tokens=3, logprobs=0) for i, a in enumerate([None, *world.adapters[:3]])]
    plain = run_all(world.engine(), requests)
    with dispatch.interpreted():
        interpreted = run_all(world.engine(), requests)
    for id in plain:
        assert interpreted[id].tokens == plain[id].tokens
        got, want = ([t.logprob for t in a[id].logprobs] for a in (interpreted, plain))
        assert_close(got, want, STEP)


def test_an_interpreted_engine_leaves_nothing_to_choose(world):
    with dispatch.interpreted():
        engine = world.engine()
        packed, edits = (engine._idle.make(2, 1),), engine._edits.make(2, tokens=False, allowed=False)
        state = (engine.base, engine._pool, engine._kv, engine._newest)
        traced = str(engine._programs.step.trace(*state, packed, edits).jaxpr)
    assert "pallas_call" in traced
    assert not any(choice in traced for choice in ("platform_index", "lowered_only_for"))


@pytest.mark.slow
def test_training_with_pallas_bodies(world):
    """Losses and gradients; the optimizer has no kernels."""
    rng = np.random.default_rng(0)
    spec = PoolSpec(slots=3, rank=4, dtype="float32", targets=ALL_TARGETS)
    batch = idle_batch(4, 32)
    batch.token_GJ[:], batch.target_GJ[:] = rng.integers(0, 300, (2, 4, 32))
    batch.weight_GJ[:], batch.segment_GJ[:], batch.position_GJ[:] = 1, 1, np.arange(32)[None]
    batch.slot_G[:] = [0, 2, -1, 0]
    first = jax.tree.map(
        lambda p: rng.standard_normal(p.shape).astype(np.float32) * 0.1, empty_state(world.base, spec, world.mesh).pool
    )

    def step():
        empty = empty_state(world.base, spec, world.mesh)
        state = TrainState(pool=jax.tree.map(jnp.asarray, first), grads=empty.grads, moments=empty.moments)
        (state,), sums = make_programs((empty,), world.mesh).accumulate(world.base, (state,), batch)
        return sums, state.grads

    want = step()
    with dispatch.interpreted():
        got = step()
    assert_close(got, want, STEP)
    assert all(np.asarray(g)[:, [0, 2]].any() for g in jax.tree.leaves(got[1]))
