"""PEFT folders: what real PEFT wrote comes in exactly, goes out bit for bit; everything else is refused with its reason."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import ml_dtypes
import numpy as np
import peft_world as world
import pytest
from safetensors.numpy import load_file

from jaxlora.errors import AdapterInvalid, AdapterNotFinite, AlreadyExists, BaseMismatch
from jaxlora.lora import LoraSpec, ModuleException
from jaxlora.peft import export_peft

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


REFUSED_BY_PEFT_NAME = {
    "alora": "alora_invocation_tokens is not supported",
    "bdlora": "use_bdlora is not supported",
    "bias": "trained biases are not supported (bias=lora_only)",
    "dora": "DoRA adapters are not supported (use_dora)",
    "embedding": "LoRA on embed_tokens is not supported",
    "ia3": "peft_type IA3 is not supported; only LORA",
    "kasa": "kasa_config is not supported",
    "layer-replication": "layer_replication is not supported",
    "lora-bias": "LoRA bias is not supported (lora_bias)",
    "modules-to-save": "modules_to_save ['lm_head'] is not supported: it replaces base weights",
    "monteclora": "monteclora_config is not supported",
    "olora": "init_lora_weights=olora changes the base weights; re-save the adapter with "
    "path_initial_model_for_weight_conversion",
    "pissa": "init_lora_weights=pissa changes the base weights",
    "pissa-niter": "init_lora_weights=pissa_niter_4 changes the base weights",
    "qalora": "use_qalora is not supported",
    "target-parameters": "target_parameters is not supported",
    "trainable-tokens": "trainable_token_indices is not supported",
    "velora": "velora_config is not supported",
}


@pytest.mark.parametrize("name", world.REFUSED)
def test_refused_file_of_real_peft(name):
    with pytest.raises(AdapterInvalid) as error:
        world.read_folder(world.FIXTURES / "refused" / name)
    assert REFUSED_BY_PEFT_NAME[name] in error.value.message
    assert (error.value.status, error.value.code) == (400, "adapter_invalid")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dora", "DoRA adapters are not supported (use_dora)"),
        ("lora-bias", "LoRA bias is not supported (lora_bias)"),
        ("bias", "trained biases are not supported (bias=lora_only)"),
        ("modules-to-save", "modules_to_save ['lm_head'] is not supported"),
        ("embedding", "LoRA on embed_tokens is not supported"),
        ("trainable-tokens", "trainable_token_indices is not supported"),
    ],
)
def test_tensors_alone_give_the_feature_away(name, message, tmp_path):
    """A config that hides the feature is no way in: PEFT itself would overwrite the base or drop tensors."""
    config = world.PLAIN | {"target_modules": ["q_proj"]}
    tensors = load_file(world.FIXTURES / "refused" / name / "adapter_model.safetensors")
    with pytest.raises(AdapterInvalid) as error:
        world.read_folder(world.write_folder(tmp_path, config, tensors))
    assert message in error.value.message


def without(key):
    return {k: v for k, v in world.plain_tensors().items() if k != key}


def with_tensor(key, value):
    return world.plain_tensors() | {key: value}


def shaped(*shape):
    return np.zeros(shape, np.float32)


# name → (changes to the config, tensors, message, code)
REFUSED_BY_HAND = {
    "task": ({"task_type": "SEQ_CLS"}, None, "task_type SEQ_CLS is not supported; only CAUSAL_LM", "adapter_invalid"),
    "bias_all": ({"bias": "all"}, None, "trained biases are not supported (bias=all)", "adapter_invalid"),
    "fan_in": ({"fan_in_fan_out": True}, None, "fan_in_fan_out is not supported for this base", "adapter_invalid"),
    "lora_ga": (
        {"init_lora_weights": "lora_ga"},
        None,
        "init_lora_weights=lora_ga changes the base",
        "adapter_invalid",
    ),
    "loftq": ({"init_lora_weights": "loftq"}, None, "init_lora_weights=loftq changes the base", "adapter_invalid"),
    "corda": ({"init_lora_weights": "corda"}, None, "init_lora_weights=corda changes the base", "adapter_invalid"),
    "strange_init": ({"init_lora_weights": "magic"}, None, "init_lora_weights=magic is not known", "adapter_invalid"),
    "arrow": ({"arrow_config": {"top_k": 1}}, None, "arrow_config is not supported", "adapter_invalid"),
    "unknown_field": ({"use_flux": 3}, None, "use_flux is not a known field", "adapter_invalid"),
    "rank_type": ({"r": 2.0}, None, "r must be an integer of at least 1, got 2.0", "adapter_invalid"),
    "rank_zero": ({"r": 0}, None, "r must be an integer of at least 1, got 0", "adapter_invalid"),
    "alpha_type": ({"lora_alpha": "16"}, None, "lora_alpha must be a number", "adapter_invalid"),
    "alpha_bomb": ({"lora_alpha": 1e9}, None, "lora_alpha must be a number of at most 1e+06", "adapter_invalid"),
    "alpha_zero": ({"lora_alpha": 0}, None, "lora_alpha must not be 0", "adapter_invalid"),
    "rslora_type": ({"use_rslora": "yes"}, None, "use_rslora must be true or false, got yes", "adapter_invalid"),
    "dropout": ({"lora_dropout": 1.0}, None, "lora_dropout must be a number in [0, 1)", "adapter_invalid"),
    "targets_type": ({"target_modules": 4}, None, "target_modules must be a string or a list", "adapter_invalid"),
    "targets_empty": ({"target_modules": []}, None, "target_modules is empty", "adapter_invalid"),
    "targets_nothing": ({"target_modules": "x.*"}, None, "matches no linear layer", "base_mismatch"),
    "targets_string_and_layers": (
        {"target_modules": ".*q_proj", "layers_to_transform": [0]},
        None,
        "cannot be combined with a target_modules string",
        "adapter_invalid",
    ),
    "layer_out_of_base": ({"layers_to_transform": [0, 7]}, None, "model.layers.7", "base_mismatch"),
    "pattern_matches_nothing": (
        {"rank_pattern": {"layers.9.q_proj": 4}},
        None,
        "rank_pattern key layers.9.q_proj matches no module",
        "adapter_invalid",
    ),
    "broken_pattern": ({"alpha_pattern": {"q_(proj": 4}}, None, "q_(proj is not a valid pattern", "adapter_invalid"),
    "broken_target": ({"target_modules": "*q"}, None, "target_modules *q is not a valid pattern", "adapter_invalid"),
    "pattern_type": ({"rank_pattern": [1]}, None, "rank_pattern must be an object, got [1]", "adapter_invalid"),
    "pattern_value": ({"rank_pattern": {"q_proj": 0}}, None, "rank_pattern of q_proj must be", "adapter_invalid"),
    "rank_limit": (
        {"r": 16},
        world.plain_tensors(rank=16),
        "rank 16 of model.layers.0.self_attn.q_proj exceeds the limit 8",
        "adapter_invalid",
    ),
    "rank_differs": (
        {"r": 4},
        None,
        "model.layers.0.self_attn.q_proj: tensors have rank 2, config says 4",
        "adapter_invalid",
    ),
    "rank_pattern_differs": (
        {"rank_pattern": {"v_proj": 3}},
        None,
        "model.layers.0.self_attn.v_proj: tensors have rank 2, config says 3",
        "adapter_invalid",
    ),
    "shape_a": (
        {},
        with_tensor(f"{Q0}.lora_A.weight", shaped(2, 48)),
        "model.layers.0.self_attn.q_proj: lora_A is [2, 48], this base needs [2, 32]",
        "base_mismatch",
    ),
    "shape_b": (
        {},
        with_tensor(f"{Q0}.lora_B.weight", shaped(64, 2)),
        "model.layers.0.self_attn.q_proj: lora_B is [64, 2], this base needs [32, 2]",
        "base_mismatch",
    ),
    "axes": ({}, with_tensor(f"{Q0}.lora_A.weight", shaped(64)), "lora_A is [64]", "base_mismatch"),
    "unknown_module": (
        {"target_modules": ["q_proj", "v_proj", "c_attn"]},
        None,
        "c_attn is not a linear layer of this base",
        "base_mismatch",
    ),
    "norm_module": ({"target_modules": ["norm"]}, None, "model.norm is not a linear layer", "base_mismatch"),
    "unknown_layer": (
        {},
        world.plain_tensors(layers=(0, 1, 2)),
        "model.layers.2.self_attn.q_proj is not a linear layer of this base",
        "base_mismatch",
    ),
    "extra": (
        {"target_modules": ["q_proj"]},
        None,
        "unexpected tensors: base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight",
        "adapter_invalid",
    ),
    "half_a_pair": (
        {},
        without(f"{Q0}.lora_B.weight"),
        "missing tensors: model.layers.0.self_attn.q_proj.lora_B.weight",
        "adapter_invalid",
    ),
    "missing_module": (
        {"target_modules": ["q_proj", "v_proj", "k_proj"]},
        None,
        "missing tensors: model.layers.0.self_attn.k_proj.lora_A.weight",
        "adapter_invalid",
    ),
    "mixed_prefix": (
        {},
        with_tensor("model.layers.0.x.lora_A.weight", shaped(2)),
        "unexpected tensors",
        "adapter_invalid",
    ),
    "two_names": (
        {},
        with_tensor(f"{Q0}.lora_A.default.weight", shaped(2, 32)),
        "unexpected tensors",
        "adapter_invalid",
    ),
    "full_weight": (
        {},
        with_tensor("base_model.model.lm_head.weight", shaped(4, 4)),
        "modules_to_save ['lm_head'] is not supported",
        "adapter_invalid",
    ),
    "expert": (
        {},
        with_tensor("base_model.model.x.experts.0.lora_A.weight", shaped(1)),
        "target_parameters",
        "adapter_invalid",
    ),
    "integers": (
        {},
        with_tensor(f"{Q0}.lora_A.weight", np.zeros((2, 32), np.int32)),
        "has dtype I32; only F32, F16, BF16 are read",
        "adapter_invalid",
    ),
    "nan": (
        {},
        with_tensor(f"{Q0}.lora_A.weight", np.full((2, 32), np.nan, np.float32)),
        f"{Q0}.lora_A.weight has non-finite values",
        "adapter_not_finite",
    ),
    "infinite": (
        {},
        with_tensor(f"{Q0}.lora_B.weight", np.full((32, 2), np.inf, ml_dtypes.bfloat16)),
        f"{Q0}.lora_B.weight has non-finite values",
        "adapter_not_finite",
    ),
    "finite_bomb": (
        {},
        with_tensor(f"{Q0}.lora_B.weight", np.full((32, 2), 1e30, np.float32)),
        "model.layers.0.self_attn.q_proj: scale * norm(A) * norm(B) is",
        "adapter_invalid",
    ),
    "head": (
        {"target_modules": ["lm_head"]},
        {
            "base_model.model.lm_head.lora_A.weight": shaped(2, 32),
            "base_model.model.lm_head.lora_B.weight": shaped(128, 2),
        },
        "LoRA on lm_head is not supported by this server",
        "adapter_invalid",
    ),
    "no_tensors": ({"target_modules": None}, {}, "holds no LoRA tensors", "adapter_invalid"),
    "slow_pattern": ({"target_modules": r"(.|[a-z_0-9.])+[^a-z]"}, None, "take longer than", "adapter_invalid"),
    "long_pattern": ({"target_modules": "q" * 5000}, None, "is longer than 4096 characters", "adapter_invalid"),
}


@pytest.mark.parametrize("name", REFUSED_BY_HAND)
def test_refused_by_hand(name, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlora.peft_match.MATCH_SECONDS", 0.2)
    changes, tensors, message, code = REFUSED_BY_HAND[name]
    folder = world.write_folder(tmp_path, world.PLAIN | changes, world.plain_tensors() if tensors is None else tensors)
    started = time.monotonic()
    with pytest.raises(AdapterInvalid) as error:
        world.read_folder(folder, head_supported=name != "head")
    assert message in error.value.message
    assert (error.value.status, error.value.code) == (400, code)
    assert time.monotonic() - started < 5


def test_all_reasons_in_one_message(tmp_path):
    config = world.PLAIN | {"use_dora": True, "lora_alpha": "8", "bias": "all"}
    with pytest.raises(AdapterInvalid) as error:
        world.read_folder(world.write_folder(tmp_path, config, world.plain_tensors()))
    for part in ("DoRA", "bias=all", "lora_alpha must be a number"):
        assert part in error.value.message


def test_first_five_mismatches_and_a_count(tmp_path):
    tensors = world.plain_tensors(("q_proj", "k_proj", "v_proj", "o_proj"))
    config = world.PLAIN | {"r": 3, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    with pytest.raises(AdapterInvalid) as error:
        world.read_folder(world.write_folder(tmp_path, config, tensors))
    assert error.value.message.count("config says 3") == 5
    assert "(and 3 more)" in error.value.message


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
    assert report.ignored == ("megatron_core", "peft_version", "revision")
    assert json.loads(json.dumps(report.to_json()))["parameters"] == 2 * (2 * 64 + 2 * 48)


def test_a_changed_copy_of_the_head_is_refused():
    fixture, head = world.load_fixture("lm-head"), world.base_head("llama")
    world.read_folder(fixture.folder, head=head)
    world.read_folder(fixture.folder, head=head.astype(np.float32))
    for other in (None, head + np.float32(0.5), head[:64]):
        with pytest.raises(AdapterInvalid, match="modules_to_save"):
            world.read_folder(fixture.folder, head=other)


def test_a_copy_of_a_bfloat16_head_is_accepted(tmp_path):
    """PEFT stores float32 over a bfloat16 base: the values are the base's, the dtype is not."""
    base = world.base_head("llama").astype(ml_dtypes.bfloat16)
    tensors = load_file(world.load_fixture("lm-head").folder / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.base_layer.weight"] = base.astype(np.float32)
    config = world.PLAIN | {"r": 4, "target_modules": ["lm_head", "q_proj"]}
    world.read_folder(world.write_folder(tmp_path, config, tensors), head=base)


def test_pickle_is_refused_by_suffix_and_by_magic(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(world.PLAIN))
    with pytest.raises(AdapterInvalid, match=r"adapter_model.safetensors is missing"):
        world.read_folder(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"anything")
    for path in (tmp_path, tmp_path / "adapter_model.bin"):
        with pytest.raises(AdapterInvalid, match="pickle weights are not accepted"):
            world.read_folder(path)
    for magic in (b"\x80\x04\x95\x10\x11\x12\x13\x14\x15", b"PK\x03\x04\x00\x00\x08\x08\x00"):
        (tmp_path / "adapter_model.safetensors").write_bytes(magic)
        with pytest.raises(AdapterInvalid, match="pickle weights are not accepted"):
            world.read_folder(tmp_path)


def raw_file(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


ENTRY = b'{"dtype":"F32","shape":[2,32],"data_offsets":[0,256]}'
HOSTILE = {
    "empty": (b"", "truncated"),
    "huge_length": ((2**60).to_bytes(8, "little") + b"{}", "truncated"),
    "big_header": (raw_file(b"{" + b" " * 1_000_001 + b"}"), "at most 1000000"),
    "not_json": (raw_file(b"{no"), "not valid JSON"),
    "not_an_object": (raw_file(b"[]"), "must be a JSON object"),
    "deep": (raw_file(b"[" * 100_000), "not valid JSON"),
    "twice": (raw_file(b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}", bytes(256)), "key a comes twice"),
    "gap": (raw_file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', bytes(8)), "overlap another"),
    "overlap": (raw_file(b'{"a":' + ENTRY + b',"b":' + ENTRY + b"}", bytes(256)), "overlap another"),
    "truncated_data": (raw_file(b'{"a":' + ENTRY + b"}", bytes(100)), "its header describes"),
    "trailing_data": (raw_file(b'{"a":' + ENTRY + b"}", bytes(300)), "its header describes"),
    "shape_lies": (
        raw_file(b'{"a":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,4]}}', bytes(4)),
        "do not hold",
    ),
    "negative": (raw_file(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}'), "whole numbers"),
    "no_shape": (raw_file(b'{"a":{"dtype":"F32"}}'), "must hold dtype, shape and data_offsets"),
    "many_tensors": (
        raw_file(
            b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(15_000)) + b"}"
        ),
        "unexpected tensors",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_weights_file(name, tmp_path):
    data, message = HOSTILE[name]
    (tmp_path / "adapter_config.json").write_text(json.dumps(world.PLAIN))
    (tmp_path / "adapter_model.safetensors").write_bytes(data)
    started = time.monotonic()
    with pytest.raises(AdapterInvalid) as error:
        world.read_folder(tmp_path)
    assert message in error.value.message
    assert len(error.value.message) < 3000
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"peft_type":"LORA","peft_type":"LORA"}', "comes twice"),
        (b'{"peft_type":"LORA","lora_alpha":NaN}', "NaN is not JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "must be a JSON object, got list"),
        (b" " * 1_000_001, "is larger than"),
    ],
)
def test_hostile_config_file(text, message, tmp_path):
    world.write_folder(tmp_path, world.PLAIN, world.plain_tensors())
    (tmp_path / "adapter_config.json").write_bytes(text)
    with pytest.raises(AdapterInvalid, match=message):
        world.read_folder(tmp_path)


def test_no_adapter_at_all(tmp_path):
    with pytest.raises(AdapterInvalid, match=r"no adapter_config.json found"):
        world.read_folder(tmp_path / "nothing")


def exported(tmp_path):
    adapter, _ = world.read_folder(world.load_fixture("plain").folder)
    export_peft(adapter, tmp_path / "out", world.base_config("llama"), base_name="org/base")
    return adapter, tmp_path / "out"


def test_our_export_remembers_its_base(tmp_path):
    adapter, folder = exported(tmp_path)
    own = json.loads((folder / "jaxlora.json").read_text())
    assert (own["format"], own["base_hash"], own["version"]) == (1, adapter.base_hash, 3)
    (folder / "jaxlora.json").write_text(json.dumps(own | {"base_hash": "other"}))
    with pytest.raises(BaseMismatch, match="adapter was trained on another base"):
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
    monkeypatch.setattr("jaxlora.peft.export_config", lambda *_: 1 / 0)
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


def test_not_finite_is_its_own_error(tmp_path):
    tensors = with_tensor(f"{Q0}.lora_A.weight", np.full((2, 32), np.nan, np.float16))
    with pytest.raises(AdapterNotFinite):
        world.read_folder(world.write_folder(tmp_path, world.PLAIN, tensors))
