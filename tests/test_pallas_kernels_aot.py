"""Every Pallas kernel compiles for real TPUs that are not here, and no program makes a second pool.

The compiler comes with the dependency group `aot`.  Compiling finds what lowering does not: memory that does not suffice,
slices that are not aligned, copies made for a layout.  Nothing runs.
"""

from __future__ import annotations

import importlib.util
from collections import Counter

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding
from kernel_shapes import MODELS, Model, decode, decode_shapes, made_as_large_as, train, train_shapes

from pallas_kernels import tpu_blocks

pytestmark = pytest.mark.aot

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
RANK = 16


@pytest.fixture(scope="module")
def compiler():
    """(function, shapes, kind of TPU) → the program compiled for one chip of that kind."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.fail("libtpu is not installed: run `uv run --isolated --group aot pytest -m aot`")
    patch = pytest.MonkeyPatch()
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    }.items():
        patch.setenv(name, value)

    def compile_for(function, shapes, kind: str):
        chip = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[kind]).devices[0]
        assert chip.device_kind in tpu_blocks.TABLE
        described = AbstractDevice(device_kind=chip.device_kind, num_cores=1, platform="tpu")
        here = SingleDeviceSharding(chip)
        program = jax.jit(function, in_shardings=here, out_shardings=here)
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=described)):
            return program.lower(*shapes).compile()

    yield compile_for
    patch.undo()


def kernels(compiled) -> Counter:
    """Mosaic kernels of a compiled program, by name."""
    lines = [line for line in compiled.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    return Counter(line.strip().removeprefix("ROOT ").removeprefix("%").split(" = ")[0].split(".")[0] for line in lines)


kinds = pytest.mark.parametrize("kind", TOPOLOGIES)
models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


@kinds
@models
def test_decode(compiler, model: Model, kind):
    shapes = decode_shapes(model, RANK)
    compiled = compiler(decode, shapes, kind)
    assert kernels(compiled) == {"gathered_lora": 5}
    text = compiled.as_text()
    assert made_as_large_as([half for read in shapes[0] for a, b, _ in read for half in (a, b)], text) == []
    assert text.count(" sort(") == 1  # once per step, not per layer


@kinds
@models
def test_train(compiler, model: Model, kind):
    compiled = compiler(train, train_shapes(model, RANK), kind)
    assert kernels(compiled) == {
        "segmented_lora": 5,
        "segmented_lora_shrink_back": 5,
        "segmented_lora_expand_back": 8,
    }


def test_a_second_pool_would_be_seen(compiler):
    """The check of `test_decode` on a program that does copy its pool."""
    pool, x_TD, slot_T = decode_shapes(MODELS["SmolLM2-135M"], RANK)

    def copies(pool, x_TD, slot_T):
        return decode(jax.tree.map(lambda p: p * 2, pool), x_TD, slot_T)

    halves = [half for read in pool for a, b, _ in read for half in (a, b)]
    assert made_as_large_as(halves, compiler(copies, (pool, x_TD, slot_T), "v5e").as_text())
