"""PEFT folders: what real PEFT wrote comes in exactly and goes out bit for bit, and what a missing field means."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import ml_dtypes
import numpy as np
import peft_world as world
import pytest
from safetensors.numpy import load_file

from jaxlora.core.errors import AdapterInvalid, AlreadyExists, BaseMismatch
from jaxlora.core.lora import LoraSpec, ModuleException
from jaxlora.peft.folder import export_peft

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
DTYPES = {"bfloat16": "bfloat16", "float16": "float16"}  # of the fixtures that are not float32


def read_accepted(name):
    fixture = world.load_fixture(name)
    adapter, report = world.read_folder(fixture.folder, fixture.base, head=world.base_head(fixture.base))
    return fixture, adapter, report


@pytest.mark.parametrize("name", world.ACCEPTED)
def test_accepted_has_peft_ranks_scales_and_values(name):
    fixture, adapter, report = read_accepted(name)
    assert world.scales(report) == fixture.modules
    tensors = load_file(fixture.folder / "adapter_model.safetensors")
    seen = 0
    for target, (a_LRX, b_LRY) in adapter.weights.items():
        assert a_LRX.dtype == b_LRY.dtype == np.float32
        assert a_LRX.shape[1] == b_LRY.shape[1] == adapter.spec.max_rank
        for layer in range(len(a_LRX)):
            block = "self_attn" if target in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            path = "lm_head" if target == "lm_head" else f"model.layers.{layer}.{block}.{target}"
            rank, scale = fixture.modules.get(path, (0, 0.0))
            assert adapter.spec.scale(target, layer) == scale
            assert not a_LRX[layer, rank:].any()
            assert not b_LRY[layer, rank:].any()
            if rank:
                key = f"base_model.model.{path}"
                a, b = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
                assert np.array_equal(a_LRX[layer, :rank], a.astype(np.float32))
                assert np.array_equal(b_LRY[layer, :rank], b.T.astype(np.float32))
                seen += a.size + b.size
    assert report.parameters == seen == sum(t.size for k, t in tensors.items() if ".lora_" in k)
    assert report.base_name == f"fixtures/{fixture.base}"
    assert not report.base_verified


@pytest.mark.parametrize("name", world.ACCEPTED)
def test_round_trip_is_bit_for_bit(name, tmp_path):
    fixture, adapter, report = read_accepted(name)
    config = world.base_config(fixture.base)
    export_peft(adapter, tmp_path / "out", config, base_name="org/base", dtype=DTYPES.get(name, "float32"))
    before = load_file(fixture.folder / "adapter_model.safetensors")
    before.pop("base_model.model.lm_head.base_layer.weight", None)
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sorted(after) == sorted(before)
    for key, value in before.items():
        assert after[key].dtype == value.dtype, key
        assert after[key].tobytes() == value.tobytes(), key
    again, second = world.read_folder(tmp_path / "out", fixture.base)
    assert again.spec == adapter.spec
    assert second.modules == report.modules
    assert second.base_verified
    assert second.base_name == "org/base"


def test_fixtures_move_the_logits():
    for name in world.ACCEPTED:
        fixture = world.load_fixture(name)
        _, base = world.base_logits(fixture.base)
        assert max(np.abs(x - y).max() for x, y in zip(fixture.logits, base, strict=True)) > 0.01, name


def test_missing_fields_mean_what_they_mean_in_peft(tmp_path):
    config = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    folder = world.write_folder(tmp_path, config, world.plain_tensors(("q_proj",), rank=8))
    adapter, report = world.read_folder(folder)
    assert (adapter.spec.rank, adapter.spec.alpha, adapter.spec.rslora) == (8, 8.0, False)
    assert [m.scale for m in report.modules] == [1.0, 1.0]


def test_missing_target_modules_are_taken_from_the_tensors(tmp_path):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    tensors = world.plain_tensors(("q_proj", "k_proj"))
    adapter, report = world.read_folder(world.write_folder(tmp_path, config, tensors))
    assert adapter.spec.targets == ("q_proj", "k_proj")
    assert any("target_modules is missing" in note for note in report.notes)


def test_keys_without_the_prefix_are_read_if_all_lack_it(tmp_path):
    tensors = {k.removeprefix("base_model.model."): v for k, v in world.plain_tensors().items()}
    adapter, report = world.read_folder(world.write_folder(tmp_path, world.PLAIN, tensors))
    assert np.array_equal(adapter.weights["q_proj"][0][0], tensors["model.layers.0.self_attn.q_proj.lora_A.weight"])
    assert any("prefix" in note for note in report.notes)


def test_an_adapter_name_left_in_the_keys_is_read(tmp_path):
    tensors = {k.replace(".weight", ".default.weight"): v for k, v in world.plain_tensors().items()}
    adapter, _ = world.read_folder(world.write_folder(tmp_path, world.PLAIN, tensors))
    assert np.array_equal(adapter.weights["q_proj"][0][0], tensors[f"{Q0}.lora_A.default.weight"])


def test_a_folder_one_level_down_is_found(tmp_path):
    world.write_folder(tmp_path / "mine", world.PLAIN, world.plain_tensors())
    world.read_folder(tmp_path)
    world.write_folder(tmp_path / "other", world.PLAIN, world.plain_tensors())
    with pytest.raises(AdapterInvalid, match="several adapters"):
        world.read_folder(tmp_path)


def test_alpha_not_used_by_any_module_leaves_the_commonest(tmp_path):
    config = world.PLAIN | {"r": 64, "rank_pattern": {"q_proj": 2, "v_proj": 2}}
    adapter, report = world.read_folder(world.write_folder(tmp_path, config, world.plain_tensors()))
    assert adapter.spec.max_rank == 2
    assert {m.scale for m in report.modules} == {2.0}


def test_first_matching_pattern_wins(tmp_path):
    config = world.PLAIN | {"alpha_pattern": {"layers.0.self_attn.q_proj": 10, "q_proj": 6, r"self_attn\..*": 1}}
    _, report = world.read_folder(world.write_folder(tmp_path, config, world.plain_tensors()))
    assert {m.module.removeprefix("model.layers."): m.scale for m in report.modules} == {
        "0.self_attn.q_proj": 5.0,
        "1.self_attn.q_proj": 3.0,
        "0.self_attn.v_proj": 0.5,
        "1.self_attn.v_proj": 0.5,
    }


def test_layers_do_not_filter_whole_paths(tmp_path):
    """As in PEFT: an entry that is the whole path is meant, whatever layers_to_transform says."""
    config = world.PLAIN | {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": 1}
    tensors = world.plain_tensors(("q_proj",), layers=(0,)) | world.plain_tensors(("v_proj",), layers=(1,))
    _, report = world.read_folder(world.write_folder(tmp_path, config, tensors))
    assert [m.module for m in report.modules] == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]


def test_set_fields_without_effect_are_listed(tmp_path):
    config = world.PLAIN | {"revision": "main", "megatron_core": "x", "peft_version": "0.21.2", "future_thing": None}
    _, report = world.read_folder(world.write_folder(tmp_path, config, world.plain_tensors()))
    assert report.ignored == ("megatron_core", "revision")  # what PEFT writes into every folder is no news
    assert json.loads(json.dumps(asdict(report)))["parameters"] == 2 * (2 * 64 + 2 * 48)


def test_a_copy_of_a_bfloat16_head_is_accepted(tmp_path):
    """PEFT stores float32 over a bfloat16 base: the values are the base's, the dtype is not."""
    base = world.base_head("llama").astype(ml_dtypes.bfloat16)
    tensors = load_file(world.load_fixture("lm-head").folder / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.base_layer.weight"] = base.astype(np.float32)
    config = world.PLAIN | {"r": 4, "target_modules": ["lm_head", "q_proj"]}
    world.read_folder(world.write_folder(tmp_path, config, tensors), head=base)


def exported(tmp_path):
    adapter, _ = world.read_folder(world.load_fixture("plain").folder)
    export_peft(adapter, tmp_path / "out", world.base_config("llama"), base_name="org/base")
    return adapter, tmp_path / "out"


def test_our_export_remembers_its_base(tmp_path):
    adapter, folder = exported(tmp_path)
    own = json.loads((folder / "jaxlora.json").read_text())
    assert (own["format"], own["base_hash"], own["version"]) == (1, adapter.base_hash, 3)
    (folder / "jaxlora.json").write_text(json.dumps(own | {"base_hash": "other"}))
    with pytest.raises(BaseMismatch, match="it was trained on other weights than those of the base here"):
        world.read_folder(folder)
    (folder / "jaxlora.json").write_text(json.dumps(own | {"format": 2}))
    with pytest.raises(AdapterInvalid, match="format 2; this build reads format 1"):
        world.read_folder(folder)


def test_a_flipped_bit_in_our_export_is_found(tmp_path):
    _, folder = exported(tmp_path)
    data = bytearray((folder / "adapter_model.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(AdapterInvalid, match=r"is not the file that jaxlora\.json describes"):
        world.read_folder(folder)


def test_export_is_whole_or_not_there(tmp_path, monkeypatch):
    adapter, folder = exported(tmp_path)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["out"]
    with pytest.raises(AlreadyExists):
        export_peft(adapter, folder, world.base_config("llama"), base_name="org/base")
    (folder / "stray").touch()
    export_peft(adapter, folder, world.base_config("llama"), base_name="org/base", replace=True)
    assert not (folder / "stray").exists()
    monkeypatch.setattr("jaxlora.peft.folder.export_config", lambda *_: 1 / 0)
    for name in ("second", "out"):
        with pytest.raises(ZeroDivisionError):
            export_peft(adapter, tmp_path / name, world.base_config("llama"), base_name="org/base", replace=True)
    assert (folder / "adapter_config.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_export_refuses_what_it_cannot_write(tmp_path):
    adapter, _ = exported(tmp_path)
    config = world.base_config("llama")
    with pytest.raises(AdapterInvalid, match="export dtype must be one of"):
        export_peft(adapter, tmp_path / "x", config, base_name="b", dtype="int8")
    with pytest.raises(BaseMismatch, match="this base needs"):
        export_peft(adapter, tmp_path / "x", replace(config, d_ff=128), base_name="b")
    a_LRX, b_LRY = adapter.weights["q_proj"]
    large = replace(adapter, weights={**adapter.weights, "q_proj": (a_LRX * 1e7, b_LRY)})
    with pytest.raises(AdapterInvalid, match="float16 cannot hold"):
        export_peft(large, tmp_path / "x", config, base_name="b", dtype="float16")
    assert not (tmp_path / "x").exists()


def test_exported_patterns_catch_no_neighbour(tmp_path):
    """12 layers: a key for layer 1 must not match layers 10 and 11."""
    config = replace(world.base_config("llama"), layers=12)
    spec = LoraSpec(
        rank=2,
        alpha=4.0,
        targets=("q_proj",),
        exceptions=(
            ModuleException(target="q_proj", layer=1, rank=1, alpha=4.0),
            ModuleException(target="q_proj", layer=2, rank=0, alpha=4.0),
            ModuleException(target="q_proj", layer=3, rank=2, alpha=0.5),
        ),
    )
    adapter, _ = world.read_folder(world.load_fixture("plain").folder)
    a_LRX, b_LRY = np.ones((12, 2, 32), np.float32), np.ones((12, 2, 32), np.float32)
    a_LRX[1, 1:], b_LRY[1, 1:], a_LRX[2], b_LRY[2] = 0, 0, 0, 0
    made = replace(adapter, spec=spec, weights={"q_proj": (a_LRX, b_LRY)})
    export_peft(made, tmp_path / "out", config, base_name="b")
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["rank_pattern"] == {r"model\.layers\.1\.self_attn\.q_proj": 1}
    assert written["alpha_pattern"] == {r"model\.layers\.3\.self_attn\.q_proj": 0.5}
    assert len(written["target_modules"]) == 11
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 22
    assert tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].shape == (1, 32)


def test_an_export_replaces_an_older_one_whole(tmp_path, monkeypatch):
    adapter, folder = exported(tmp_path)
    newer = replace(adapter, ref=replace(adapter.ref, version=9))
    settings = {"base_name": "org/base", "replace": True}
    with monkeypatch.context() as broken:
        broken.setattr("jaxlora.peft.folder.export_config", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export_peft(newer, folder, world.base_config("llama"), **settings)
    assert json.loads((folder / "jaxlora.json").read_text())["version"] == 3
    (folder / "left.txt").write_text("of the old one")
    export_peft(newer, folder, world.base_config("llama"), **settings)
    assert json.loads((folder / "jaxlora.json").read_text())["version"] == 9
    assert not (folder / "left.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
