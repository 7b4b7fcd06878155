"""The TPU bodies on a simulated TPU, by the tests of `test_pallas_kernels_tpu_bodies` and its neighbours once more.

Here a block is copied from one memory to another before it is read, as late as a wait allows, memory that nobody has
written holds NaN, and what is read while it may still be written is a race.  Not run so: packed attention, which is JAX's
own kernel, and heads that are no whole blocks: the simulator refuses both.
"""

from __future__ import annotations

import functools
from types import FunctionType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_pallas_kernels_attention_tpu as attention
import test_pallas_kernels_cross_entropy_bodies as head
import test_pallas_kernels_tpu_bodies as lora
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # nothing public tells of races
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from kernel_checks import F32, assert_close

from pallas_kernels.paged_attention import pallas_tpu as paged_attention_tpu
from pallas_kernels.paged_attention.op import paged_attention_reference

RACES = interpret_pallas_call.RaceDetectionState
SIMULATED = pltpu.InterpretParams(dma_execution_mode="on_wait", detect_races=True, uninitialized_memory="nan")
AGAIN = [  # a test of each body by default, the rest with `-m slow`
    lora.test_gathered_nan_of_a_base_token_stays_away,
    lora.test_segmented_bfloat16_sums_in_float32,
    attention.test_paged_bfloat16_sums_in_float32,
    head.test_what_unwanted_positions_hold_changes_no_bit,
]
AGAIN_SLOWLY = [
    lora.test_gathered_equals_oracle_whatever_the_other_slots_hold,
    lora.test_gathered_nan_of_one_tenant_stays_with_its_tokens,
    lora.test_gathered_smallest_shapes,
    lora.test_gathered_busy_adapter_and_wide_features,
    lora.test_gathered_bfloat16_sums_in_float32,
    lora.test_segmented_equals_oracle_forward_and_backward,
    lora.test_segmented_in_many_blocks_equals_reference,
    lora.test_segmented_nan_of_a_lane_stays_in_it,
    attention.test_paged_is_the_definition_whatever_else_the_pages_hold,
    attention.test_paged_in_many_visits_is_the_definition,
    attention.test_paged_nan_of_one_sequence_stays_with_its_lanes,
    head.test_more_lanes_than_one_block_equal_the_reference,
    head.test_nan_of_a_lane_stays_in_it_forward_and_backward,
]


def slow(test: FunctionType) -> FunctionType:
    """A copy that is slow: the test itself is also that of another module."""
    copy = FunctionType(test.__code__, test.__globals__, test.__name__, test.__defaults__, test.__closure__)
    copy.__dict__.update(test.__dict__)
    return pytest.mark.slow(copy)


globals().update({test.__name__: test for test in [*AGAIN, *map(slow, AGAIN_SLOWLY)]})


@pytest.fixture
def races(monkeypatch):
    """Whether each kernel that has run had a race."""
    seen = []

    def watched(*args, **named):
        seen.append(RACES(*args, **named))
        return seen[-1]

    monkeypatch.setattr(interpret_pallas_call, "RaceDetectionState", watched)
    with pltpu.force_tpu_interpret_mode(SIMULATED):
        yield lambda: [bool(one.races_found) for one in seen]


@pytest.fixture(autouse=True)
def no_race(request, races):
    yield
    if request.function is not test_what_is_read_before_its_copy_is_there_is_seen:
        assert races() or "nobody" in request.node.name, "no kernel ran"
        assert not any(races())


@pytest.mark.parametrize(("window", "seen"), [(None, [7, 2, 5, 3, 11, 0, 8, 4]), (6, [7, 2, 5, 3, 0, 8, 4])])
def test_paged_attention_copies_the_pages_that_are_seen_and_no_others(window, seen, monkeypatch):
    """Blocks of two pages of 4 tokens; a lane of three pages, nobody, one page, three, of which a window sees two, one."""
    monkeypatch.setattr(paged_attention_tpu, "KEYS", 8)
    copied, start = [], interpret_pallas_call.dma_start

    def watched(token, device, core, space, source, at, *rest, **named):
        copied.append(tuple(int(n) for n in jax.tree.leaves(at)))
        return start(token, device, core, space, source, at, *rest, **named)

    monkeypatch.setattr(interpret_pallas_call, "dma_start", watched)
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal(s, np.float32) for s in ((5, 1, 2, 4), (3, 12, 4, 4), (3, 12, 4, 4)))
    pages = np.array([[7, 2, 5], [99, 99, 99], [3, 99, 99], [11, 0, 8], [4, 99, 99]], np.int32)
    positions = np.array([[8], [-1], [3], [10], [0]], np.int32)
    args = q, k, v, jnp.int32(1), pages, positions
    got = attention.interpreted_paged(*args, window=window)
    assert copied == [(1, page) for page in seen for _ in range(2)]  # keys and values of layer 1
    assert_close(got, jax.jit(functools.partial(paged_attention_reference, window=window))(*args), F32)


@pytest.mark.parametrize("waits", [True, False])
def test_what_is_read_before_its_copy_is_there_is_seen(races, waits):
    def body(x_ref, out_ref, near_ref, semaphore):
        copy = pltpu.make_async_copy(x_ref, near_ref, semaphore)
        copy.start()
        if waits:
            copy.wait()
        out_ref[...] = near_ref[...]
        if not waits:
            copy.wait()

    x = np.arange(1024, dtype=np.float32).reshape(8, 128)
    got = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(x.shape, jnp.float32),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM(x.shape, jnp.float32), pltpu.SemaphoreType.DMA],
    )(x)
    assert np.array_equal(got, x) if waits else np.isnan(got).all()
    assert races() == [not waits]
