"""Adapters in our model give the logits that PEFT computes: of every fixture, of adapters trained here, of the demo model.

All at rank 8 with padding beside adapters of other ranks, through both forms of LoRA (see model_world.FORMS).
"""

from __future__ import annotations

import functools
import json

import numpy as np
import peft_world as world
import pytest
import trained_world
from model_world import FORMS, Lane, base_of, logits_of, pool_of
from safetensors.numpy import load_file
from small_world import smollm2_prompts
from smollm2_world import RANK

from jaxlora.checkpoints.hf import HfSource
from jaxlora.model.decoder import Base
from jaxlora.peft.folder import export_peft, import_peft

pytest_plugins = ["smollm2_fixtures"]
SMOLLM2_ATOL = 1e-3  # 30 layers, and adapters that move the logits by up to 20
ATOL = 1e-4  # float32, logits of order one to ten; peft-format.md's smallest silent error is 2e-3


@functools.cache
def tiny_base(name: str) -> Base:
    return base_of(HfSource(world.base_folder(name)))


def largest(got: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """The largest difference of a logit."""
    return max(float(np.abs(g - w).max()) for g, w in zip(got, wanted, strict=True))


def test_the_bases_alone():
    for name in ("llama", "llama-tied", "qwen3"):
        tokens, wanted = world.base_logits(name)
        (got,) = logits_of(tiny_base(name), [Lane(tokens)], 32)
        assert largest(got, wanted) < ATOL


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", ["llama", "llama-tied", "qwen3"])
def test_every_fixture_gives_the_logits_of_peft(base, form):
    fixtures = [f for f in map(world.load_fixture, world.ACCEPTED) if f.base == base]
    head = world.base_head(base)
    adapters = [world.read_folder(f.folder, base, head=head)[0] for f in fixtures]
    _, alone = world.base_logits(base)
    lanes = [Lane(f.tokens, slot) for slot, f in enumerate(fixtures)] + [Lane(fixtures[0].tokens)]
    got = logits_of(tiny_base(base), lanes, 32, pool_of(tiny_base(base), adapters), form)
    for g, fixture in enumerate(fixtures):
        assert largest(got[g], fixture.logits) < ATOL, fixture.folder.name
        assert largest(got[g], alone) > 100 * ATOL, fixture.folder.name
    assert largest(got[-1], alone) < ATOL  # the base beside them


def test_all_fixtures_are_seen():
    assert {world.load_fixture(name).base for name in world.ACCEPTED} == {"llama", "llama-tied", "qwen3"}


@pytest.fixture(scope="module")
def trained() -> trained_world.Trained:
    return trained_world.train()


@pytest.mark.fault("N7")
@pytest.mark.parametrize("name", trained_world.SPECS)
def test_a_committed_export_of_ours_gives_the_logits_of_peft(name, trained):
    folder = trained_world.FOLDER / name
    adapter, report = import_export(folder, trained)
    assert report.base_verified
    assert adapter.spec == trained_world.SPECS[name]
    tokens, wanted = world.stored_logits(folder / "logits.npz")
    (got,) = logits_of(trained.base, [Lane(tokens, 0)], 32, pool_of(trained.base, [adapter]))
    (alone,) = logits_of(trained.base, [Lane(tokens)], 32)
    assert largest(got, wanted) < ATOL
    assert largest(alone, wanted) > 0.5


@pytest.mark.fault("N7")
@pytest.mark.parametrize("name", trained_world.SPECS)
def test_what_is_trained_now_is_exported_as_the_committed_one_was(name, trained, tmp_path):
    losses, folder = trained.losses[name], tmp_path / name
    assert losses[-1] < 0.8 * losses[0]
    export_peft(trained.adapters[name], folder, trained.base.config, base_name=f"fixtures/{trained_world.BASE}")
    new, old = (load_file(f / "adapter_model.safetensors") for f in (folder, trained_world.FOLDER / name))
    assert {k: (v.shape, v.dtype) for k, v in new.items()} == {k: (v.shape, v.dtype) for k, v in old.items()}
    assert all(v.any() for v in new.values())
    configs = [json.loads((f / "adapter_config.json").read_text()) for f in (folder, trained_world.FOLDER / name)]
    assert configs[0] == configs[1]
    # Training is not the same to the last bit on every processor, and Adam may turn the sign of a gradient that is zero.
    tokens, wanted = world.stored_logits(trained_world.FOLDER / name / "logits.npz")
    adapter, _ = import_export(folder, trained)
    (got,) = logits_of(trained.base, [Lane(tokens, 0)], 32, pool_of(trained.base, [adapter]))
    assert largest(got, wanted) < 0.02


def import_export(folder, trained):
    return import_peft(
        folder,
        trained.base.config,
        base_hash=trained.base_hash,
        max_rank=trained_world.MAX_RANK,
        head_supported=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_eight_adapters_on_the_demo_model_give_the_logits_of_peft(smol, form):
    base, prompts = smol.opened.base, smollm2_prompts()[: len(smol.adapters)]
    lanes = [Lane([p.ids_T], slot) for slot, p in enumerate(prompts)]
    got = logits_of(base, lanes, 64, pool_of(base, smol.adapters, rank=RANK), form)
    with np.load(world.FIXTURES.parent / "smollm2_adapters.npz") as file:
        wanted = [file[f"logits_{i}"] for i in range(len(prompts))]
    for i, p in enumerate(prompts):
        assert largest([got[i][0][:, p.sampled_ids]], [wanted[i]]) < SMOLLM2_ATOL, smol.adapters[i]
        assert largest([p.logits_TV], [wanted[i]]) > 0.5, smol.adapters[i]
