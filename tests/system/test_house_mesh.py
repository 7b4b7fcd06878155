"""A mesh changes where arrays live and nothing else: virtual CPU devices against one, and sizes that do not divide.

Tolerances: float32 on both sides, sums over up to 1536 features split over devices.  Losses, gradient norms and
log-probabilities agree to 1e-5 of the largest of their kind, trained weights to 2e-5 where a step moves them by up to 0.02
or so.  Greedy tokens are equal.
"""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from mesh_world import ENGINE, NEW_TOKENS, SMALL, SMOLLM2_CUT, SPEC, TENANTS, UINT8
from train_world import RandomSource

from jaxlora.core.errors import ConfigInvalid
from jaxlora.core.model_config import ModelConfig
from jaxlora.model.decoder import load_base
from jaxlora.model.mesh import MESH_AXES, check_lanes, check_model, describe, make_mesh
from serve.engine.engine import Engine
from train.trainer import Trainer

TESTS = Path(__file__).parents[1] / "support"


def on_virtual_devices(script: str, *arguments: str) -> str:
    """What the script prints, in a process with eight virtual devices where every warning is an error."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": path,
    }
    command = [sys.executable, "-W", "error", str(TESTS / script), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def results(world, folder):
    """Mesh → what it computed."""
    on_virtual_devices("mesh_world.py", world, str(folder))
    return {file.stem: dict(np.load(file)) for file in folder.glob("*.npz")}


@pytest.mark.parametrize(
    ("world", "mesh", "parts"),
    [
        pytest.param("small", "2x2x2", [1, 2, 4], marks=pytest.mark.slow),
        pytest.param("unrolled", "2x2x2", [1, 2, 4], marks=pytest.mark.slow),
        pytest.param("uint8", "2x2x2", [1, 2, 4], marks=pytest.mark.slow),
        pytest.param("smollm2-cut", "1x2x3", [1, 2, 3, 6], marks=pytest.mark.slow),
        pytest.param("smollm2", "1x2x3", [1, 2, 3, 6], marks=pytest.mark.soak),
    ],
)
def test_training_and_decoding_on_a_mesh_are_those_of_one_device(tmp_path, world, mesh, parts):
    """The world itself checks that nothing compiles after warm-up, on either mesh."""
    found = results(world, tmp_path)
    assert set(found) == {"1x1x1", mesh}
    one, many = found["1x1x1"], found[mesh]
    assert one.keys() == many.keys()
    assert one["parts"].tolist() == [1]
    assert many["parts"].tolist() == parts  # arrays really are split, the embedding over both axes
    names = {kind: [n for n in one if n.split()[0] == kind] for kind in ("train", "evaluate", "logprobs", "weights")}
    assert [len(n) for n in names.values()][:3] == [3 * len(TENANTS), len(TENANTS) + 1, len(TENANTS) + 1]
    for kind in ("train", "evaluate", "logprobs"):
        largest = max(np.abs(one[n]).max() for n in names[kind])
        for n in names[kind]:
            np.testing.assert_allclose(many[n], one[n], rtol=0, atol=1e-5 * largest, err_msg=n)
    np.testing.assert_allclose(many["resumed"], one["resumed"], rtol=1e-5)
    far = [(np.abs(many[n] - one[n]) > 2e-5).ravel() for n in names["weights"]]
    assert np.concatenate(far).mean() <= (1e-3 if world == "uint8" else 0)  # between two codes it may go to either
    for n in names["weights"]:
        assert np.abs(many[n] - one[n]).max() < 1e-3, n
        assert np.abs(one[n]).max() > 1e-3
    answers = [one[f"tokens {n}"].tolist() for n in (*TENANTS, "base")]
    assert [many[f"tokens {n}"].tolist() for n in (*TENANTS, "base")] == answers
    assert {len(a) for a in answers} == {NEW_TOKENS}

    config = {
        "small": SMALL,
        "unrolled": SMALL,
        "uint8": UINT8,
        "smollm2-cut": SMOLLM2_CUT,
        "smollm2": dataclasses.replace(SMOLLM2_CUT, layers=30, vocab=49152),
    }
    for sizes, of in (("1x1x1", one), (mesh, many)):
        _, fsdp, tensor = map(int, sizes.split("x"))
        expected = slot_bytes(config[world], fsdp, tensor, 10 if world == "uint8" else 16)
        if world == "uint8":  # blocks of 64, 192 and 512 features: 1 lies whole on each device, 2 and 4 are split
            whole, split = 2 * (4 * 2 + 3) + 1, 2 * (3 * 2) + 4
            expected += 8 * SPEC.rank * (whole + split // tensor)
        assert set(of["state bytes"]) == {SPEC.slots * expected}


@pytest.mark.slow
def test_prompt_chunks_and_decode_rows_in_one_program_with_heads_split(tmp_path):
    assert int(on_virtual_devices("mixed_mesh_world.py", str(tmp_path))) > 5


def slot_bytes(config, fsdp, tensor, of_number):
    """What one device keeps of a training slot of rank 4 with all targets, by hand, without blocks' scales.

    16 bytes a number (weight, open gradient, two moments, each float32), or 10 where each moment takes one, of its part of
    the features; scales and a count whole.
    """
    d, f, v = config.d_model // fsdp, config.d_ff // tensor, config.vocab // tensor
    q, k = config.heads * config.head_dim // tensor, config.kv_heads * config.head_dim // tensor
    layer = (d + q) + 2 * (d + k) + (q + d) + 2 * (d + f) + (f + d)
    return of_number * 4 * (config.layers * layer + d + v) + 4 * (7 * config.layers + 1) + 4


# sizes that do not divide


def mesh_of(data=1, fsdp=1, tensor=1):
    """A mesh without devices: the checks come before anything is placed."""
    return AbstractMesh((data, fsdp, tensor), MESH_AXES)


def small(**changes):
    fields = {name: getattr(SMALL, name) for name in ModelConfig.__slots__}
    return ModelConfig(**fields | changes)


@pytest.mark.parametrize(
    ("changes", "mesh", "wrong"),
    [
        ({}, {"tensor": 3}, ["8 query heads", "4 kv heads"]),
        ({"heads": 6, "kv_heads": 6}, {"tensor": 4}, ["6 query heads", "6 kv heads"]),
        ({"kv_heads": 2}, {"tensor": 4}, ["2 kv heads"]),
        ({"d_ff": 98}, {"tensor": 4}, ["98 mlp features"]),
        ({"vocab": 386}, {"tensor": 4}, ["386 vocabulary entries"]),
        ({"d_model": 66}, {"fsdp": 4}, ["66 model features"]),
        ({"d_model": 66, "vocab": 385}, {"fsdp": 4, "tensor": 2}, ["385 vocabulary entries", "66 model features"]),
    ],
)
def test_a_model_that_does_not_divide_is_refused_by_name(changes, mesh, wrong):
    mesh = mesh_of(**mesh)
    with pytest.raises(ConfigInvalid) as caught:
        load_base(RandomSource(small(**changes)), mesh, dtype="float32")
    assert f"mesh {describe(mesh)} does not fit this model" in caught.value.message
    assert re.findall(r"does not divide ([^;]+)", caught.value.message) == wrong


def test_more_devices_than_kv_heads_are_refused_with_what_to_choose():
    model = small(heads=64, kv_heads=8, d_ff=128, vocab=512)
    with pytest.raises(ConfigInvalid, match=r"tensor 16 does not divide 8 kv heads; choose tensor 8$"):
        check_model(mesh_of(tensor=16), model)


def test_smollm2_divides_by_three_and_not_by_two():
    check_model(mesh_of(2, 2, 3), SMOLLM2_CUT)
    with pytest.raises(ConfigInvalid, match="tensor 2 does not divide 9 query heads; tensor 2 does not divide 3 kv"):
        check_model(mesh_of(tensor=2), SMOLLM2_CUT)


def test_lanes_that_do_not_divide_are_refused_by_name():
    """By the trainer and the engine, before they allocate."""
    mesh = mesh_of(2, 3)
    check_lanes(mesh, 12, "rows")
    with pytest.raises(ConfigInvalid, match=r"mesh 2x3x1: 4 training lanes do not divide over data x fsdp = 6"):
        Trainer(None, mesh, [SPEC], lanes=4, lane_tokens=16, base_hash="")
    with pytest.raises(ConfigInvalid, match=r"mesh 2x3x1: 4 rows do not divide"):
        Engine(None, mesh, ENGINE, SPEC, None, None, "")


def test_a_mesh_needs_its_devices():
    count = len(jax.devices())
    with pytest.raises(ConfigInvalid, match=rf"a mesh of 1x{count + 1}x1 needs {count + 1} devices, there are {count}"):
        make_mesh(fsdp=count + 1)
    for sizes in ((0, 1, 1), (1, -1, 1), (1, 1, 0)):
        with pytest.raises(ConfigInvalid, match="at least 1"):
            make_mesh(*sizes)
