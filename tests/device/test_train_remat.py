"""What a step keeps of a layer for its gradient is a choice of memory against time: the gradient is the same."""

from __future__ import annotations

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_world import (
    CONFIG,
    LANE_TOKENS,
    LANES,
    SPEC,
    RandomSource,
    assert_same_bits,
    batch_of,
    examples,
    host,
    lora,
    strong_rows,
)

from jaxlora.config.training import Remat
from jaxlora.model.decoder import REMAT, load_base
from jaxlora.model.mesh import make_mesh
from train.step.state import empty_state, fresh_seat
from train.step.step import make_programs

pytestmark = pytest.mark.slow  # three compiles of a step of so many layers
LAYERS = 8  # what is kept grows with them, what the step needs besides does not


@pytest.fixture(scope="module")
def steps():
    """By choice: the gradients of two tenants in full lanes, and the bytes that the compiled program needs besides."""
    mesh = make_mesh()
    base = load_base(RandomSource(dataclasses.replace(CONFIG, layers=LAYERS)), mesh, dtype="float32")
    states = (empty_state(base, SPEC, mesh),)
    seat = make_programs(states, mesh).seat
    for slot in (0, 1):
        states = seat(states, 0, jnp.int32(slot), jax.device_put(fresh_seat(strong_rows(lora(8), slot, base.config))))
    batch = jax.device_put(batch_of([(g % 2, examples(g, 3, 10, 10)) for g in range(LANES)]))
    found = {}
    for remat in REMAT:
        program = make_programs(states, mesh, remat=remat).accumulate.lower(base, states, batch).compile()
        after, sums = program(base, jax.tree.map(jnp.copy, states), batch)
        found[remat] = host((after[0].grads, sums)), program.memory_analysis().temp_size_in_bytes
    return found


def test_every_choice_gives_the_same_gradient_bit_for_bit(steps):
    expected, _ = steps["products"]
    assert all(np.any(g[:, :2]) for g in jax.tree.leaves(expected[0]))
    for remat in ("nothing", "everything"):
        assert_same_bits(steps[remat][0], expected)


def test_what_keeps_less_needs_less_memory(steps):
    """In the order of the table.  `products` is above `nothing` by the arrays that a GEMM or the attention makes."""
    assert tuple(REMAT) == ("everything", "products", "nothing")
    everything, products, nothing = (nbytes for _, nbytes in steps.values())
    c = CONFIG
    attn, kv, ranks = c.heads * c.head_dim, c.kv_heads * c.head_dim, 7 * SPEC.rank
    floats = attn + 2 * kv + (attn + c.heads) + c.d_model + 2 * c.d_ff + ranks  # q k v, attention, x, gate up, A's
    of_layer = 4 * LANES * LANE_TOKENS * floats
    assert LAYERS - 1 < (products - nothing) / of_layer <= LAYERS  # all have one layer's while its gradient is made
    assert everything - products > LAYERS / 2 * of_layer


def test_the_setting_has_the_names_of_the_table():
    assert set(get_args(Remat)) == set(REMAT)
