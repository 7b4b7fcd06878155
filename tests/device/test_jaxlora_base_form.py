"""An array for each layer, joined where linears share their input, gives what stacked layers give: logits and gradients."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from base_shapes import LARGE
from model_world import Lane, logits_of
from small_world import tiny_expected, tiny_path
from train_world import CONFIG, LANE_TOKENS, LANES, SPEC, RandomSource, batch_of, examples, lora, strong_rows

from jaxlora.checkpoints.hf import HfSource
from jaxlora.model.base_form import JOINED, Form, form_of, layer_arrays
from jaxlora.model.compile_cache import CompileCounter
from jaxlora.model.decoder import Base, load_base
from jaxlora.model.memory_needs import BaseShape, decode_bytes
from jaxlora.model.mesh import make_mesh
from pallas_kernels import NO_ADAPTER
from train.bench import HOW, base_pass, full_lanes
from train.step.microsteps import Microsteps, MicrostepSizes
from train.step.state import empty_state, fresh_seat
from train.step.step import make_programs
from train.trainer import Trainer

TINY_ATOL = 1e-4  # as in test_jaxlora_model


def loaded(source, form: Form) -> Base:
    return load_base(source, make_mesh(), dtype="float32", form=form)


@pytest.mark.parametrize(
    ("where", "form"),
    [
        ({"platform": "gpu", "devices": 1, "native": True, "quantized": False}, Form.UNROLLED),
        ({"platform": "gpu", "devices": 8, "native": False, "quantized": False}, Form.UNROLLED),
        ({"platform": "tpu", "devices": 1, "native": True, "quantized": False}, Form.STACKED),
        ({"platform": "cpu", "devices": 1, "native": True, "quantized": False}, Form.PACKED),
        ({"platform": "cpu", "devices": 1, "native": False, "quantized": True}, Form.PACKED),
        ({"platform": "cpu", "devices": 1, "native": False, "quantized": False}, Form.STACKED),
        ({"platform": "cpu", "devices": 2, "native": True, "quantized": False}, Form.STACKED),
    ],
)
def test_the_platform_and_the_mesh_decide(where, form):
    assert form_of(**where) is form


@pytest.mark.parametrize("name", ["tiny-qwen2", "tiny-qwen3"])  # biases, and norms of queries and keys
def test_a_tiny_model_says_what_transformers_says(name):
    source, expected = HfSource(tiny_path(name)), tiny_expected(name)
    base = loaded(source, Form.UNROLLED)
    assert [set(layer) for layer in base.layers] == [set(layer_arrays(source.config))] * source.config.layers
    assert JOINED.keys() <= base.layers[0].keys()
    (got,) = logits_of(base, [Lane([e.ids_T for e in expected])], 96)
    for logits_TV, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(logits_TV, e.logits_TV, rtol=0, atol=TINY_ATOL)


def test_each_weight_is_held_once_as_a_plan_says_and_no_step_copies_one():
    shape = BaseShape(config=CONFIG, dtype="float32", kv_dtype="float32", name="base")
    gpu = replace(LARGE, platform="gpu", form=Form.UNROLLED)
    held = sum(x.nbytes for x in jax.tree.leaves(loaded(RandomSource(), Form.UNROLLED)))
    assert shape.weights_bytes(gpu) == held
    stacked = decode_bytes(1, shape, replace(gpu, form=Form.STACKED))
    assert stacked - decode_bytes(1, shape, gpu) > 4 * 3 * CONFIG.d_model * CONFIG.d_ff


def test_a_tensor_axis_leaves_each_device_the_heads_of_its_own_groups():
    """Queries of a kv head, its keys and its values lie side by side, so no device needs another's features."""
    source = RandomSource()
    qkv_XPY = np.asarray(loaded(source, Form.UNROLLED).layers[1]["qkv_proj"])
    H, group = CONFIG.head_dim, CONFIG.heads // CONFIG.kv_heads
    for kv in range(CONFIG.kv_heads):
        queries, keys = source.read("q_proj", 1), source.read("k_proj", 1)
        np.testing.assert_array_equal(qkv_XPY[:, kv, : group * H], queries[:, kv * group * H : (kv + 1) * group * H])
        np.testing.assert_array_equal(qkv_XPY[:, kv, group * H : (group + 1) * H], keys[:, kv * H : (kv + 1) * H])


def close(got, wanted) -> None:
    """Sums of at most 96 products in float32, in another order, over two layers forward and back."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(b).max())))


def test_the_backward_pass_through_the_base_is_that_of_stacked_layers():
    """Down to the first layer's norm, through every joined product."""
    batch = full_lanes(examples(0, 2, LANE_TOKENS + 1, LANE_TOKENS + 1), [NO_ADAPTER] * 2)
    stacked, unrolled = (
        jax.device_get(base_pass(loaded(RandomSource(), form), batch)()) for form in (Form.STACKED, Form.UNROLLED)
    )
    assert np.abs(stacked[0]).max() > 0
    close(unrolled, stacked[0])


@pytest.fixture(scope="module")
def lanes():
    """A batch of two tenants, and a state in which both sit."""
    mesh = make_mesh()
    base = loaded(RandomSource(), Form.UNROLLED)
    states = (empty_state(base, SPEC, mesh),)
    seat = make_programs(states, mesh).seat
    for slot in (0, 1):
        states = seat(states, 0, jnp.int32(slot), jax.device_put(fresh_seat(strong_rows(lora(8), slot, base.config))))
    return states, batch_of([(g % 2, examples(g, 3, 10, 10)) for g in range(LANES)])


@pytest.fixture(scope="module")
def whole(lanes):
    """By form: the summed gradients and the losses of a step in one program."""
    states, batch = lanes
    found = {}
    for form in (Form.STACKED, Form.UNROLLED):
        program = make_programs(states, make_mesh()).accumulate
        after, sums = program(loaded(RandomSource(), form), jax.tree.map(jnp.copy, states), jax.device_put(batch))
        found[form] = jax.device_get((after[0].grads, sums.loss_G))
    return found


@pytest.mark.slow
def test_gradients_are_those_of_stacked_layers(whole):
    gradients, _ = whole[Form.STACKED]
    assert all(np.abs(half[:, :2]).max() > 0 for half in jax.tree.leaves(gradients))
    close(whole[Form.UNROLLED], whole[Form.STACKED])


@pytest.mark.slow
def test_microsteps_read_the_arrays_of_their_layers_alone(lanes, whole):
    states, batch = lanes

    class Holder:
        pass

    holder = Holder()
    holder.states = jax.tree.map(jnp.copy, states)
    sizes = MicrostepSizes(lanes=LANES, layers=1, targets=LANE_TOKENS)
    base = loaded(RandomSource(), Form.UNROLLED)
    steps = Microsteps(base, holder.states, sizes, "products", shortest=LANE_TOKENS)
    for _ in steps.gradients(batch, holder, lambda: batch.slot_G):
        pass
    assert steps._backward._cache_size() == 1  # one program for every layer
    close(jax.device_get(holder.states[0].grads), whole[Form.STACKED][0])


@pytest.mark.slow
def test_a_trainer_of_unrolled_layers_runs_one_program_for_all_of_them():
    """In passes too, it learns what a trainer over stacked layers learns."""
    learned = {}
    for form, passes in ((Form.STACKED, 1), (Form.UNROLLED, 1), (Form.UNROLLED, 2)):
        trainer = Trainer(
            loaded(RandomSource(), form),
            make_mesh(),
            [SPEC],
            lanes=LANES,
            lane_tokens=LANE_TOKENS,
            base_hash="base",
            passes=passes,
        )
        trainer.warm_up()
        with CompileCounter() as counter:
            trainer.add("a", lora(8), HOW, examples(0, LANES), batch_size=LANES, seed=0)
            reports = [trainer.step()[0] for _ in range(2)]
        assert not counter.retraced
        learned[form, passes] = [report.loss for report in reports]
    stacked, *others = learned.values()
    for other in others:
        np.testing.assert_allclose(other, stacked, rtol=1e-5)
