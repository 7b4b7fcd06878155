"""PEFT folders that we cannot hold exactly, or that are damaged or hostile: each is refused with its reason."""

from __future__ import annotations

import json
import time

import ml_dtypes
import numpy as np
import peft_world as world
import pytest
from safetensors.numpy import load_file

from jaxlora.core.errors import AdapterInvalid, AdapterNotFinite
from jaxlora.peft.reasons import MAX_DETAILS

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


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
    assert REFUSED_BY_PEFT_NAME[name] in error.value.message  # first, whatever its tensors are
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
    "rank_type": ({"r": 2.0}, None, "r must be an integer in [1, 1048576], got 2.0", "adapter_invalid"),
    "rank_zero": ({"r": 0}, None, "r must be an integer in [1, 1048576], got 0", "adapter_invalid"),
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
        "unexpected tensor: base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight",
        "adapter_invalid",
    ),
    "half_a_pair": (
        {},
        without(f"{Q0}.lora_B.weight"),
        "missing tensor: model.layers.0.self_attn.q_proj.lora_B.weight",
        "adapter_invalid",
    ),
    "missing_module": (
        {"target_modules": ["q_proj", "v_proj", "k_proj"]},
        None,
        "missing tensor: model.layers.0.self_attn.k_proj.lora_A.weight",
        "adapter_invalid",
    ),
    "mixed_prefix": (
        {},
        with_tensor("model.layers.0.x.lora_A.weight", shaped(2)),
        "unexpected tensor: ",
        "adapter_invalid",
    ),
    "two_names": (
        {},
        with_tensor(f"{Q0}.lora_A.default.weight", shaped(2, 32)),
        "unexpected tensor: ",
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
    monkeypatch.setattr("jaxlora.peft.targets.MATCH_SECONDS", 0.2)
    changes, tensors, message, code = REFUSED_BY_HAND[name]
    folder = world.write_folder(tmp_path, world.PLAIN | changes, world.plain_tensors() if tensors is None else tensors)
    started = time.monotonic()
    with pytest.raises(AdapterInvalid) as error:
        world.read_folder(folder, head_supported=name != "head")
    assert any(message in text for text in (error.value.message, *error.value.details))
    assert (error.value.status, error.value.code) == (400, code)
    assert time.monotonic() - started < 5


def refusal(tmp_path, config, tensors=None, **options) -> AdapterInvalid:
    """The error of a folder made by hand over the llama base: hidden 32, two layers."""
    folder = world.write_folder(tmp_path, world.PLAIN | config, world.plain_tensors() if tensors is None else tensors)
    with pytest.raises(AdapterInvalid) as error:
        world.read_folder(folder, **options)
    return error.value


def test_what_is_not_supported_comes_first_and_all_else_is_in_the_details(tmp_path):
    strange = shaped(2, 48)
    error = refusal(
        tmp_path,
        {"lora_alpha": "8", "use_dora": True, "bias": "all", "modules_to_save": ["embed_tokens"]},
        with_tensor(f"{Q0}.lora_A.weight", strange),
    )
    kinds = (
        "DoRA adapters are not supported (use_dora)",
        "trained biases are not supported (bias=all)",
        "modules_to_save ['embed_tokens'] is not supported: it replaces base weights",
    )
    assert error.message == f"adapter refused: {'; '.join(kinds)} (and 2 more)"
    assert error.details == (
        *kinds,
        "model.layers.0.self_attn.q_proj: lora_A is [2, 48], this base needs [2, 32]",
        "lora_alpha must be a number of at most 1e+06, got 8",
    )
    assert type(error) is AdapterInvalid


def test_one_reason_is_the_message_and_has_no_details(tmp_path):
    error = refusal(tmp_path, {"use_dora": True})
    assert (error.message, error.details) == ("adapter refused: DoRA adapters are not supported (use_dora)", ())


def scaled(tensors, hidden):
    """The tensors of an adapter over a base of another hidden size."""
    return {k: np.zeros([hidden if n == 32 else n for n in v.shape], v.dtype) for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("made_for", "theirs"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen3-0.6B"),
        ("/home/ana/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/c189", "Qwen3-0.6B"),
        ("C:\\models\\Qwen3-0.6B", "Qwen3-0.6B"),
        ("models/Qwen3-0.6B/", "Qwen3-0.6B"),
        (None, "another base"),
        (7, "another base"),
    ],
)
def test_an_adapter_of_another_base_is_told_by_name_and_size(made_for, theirs, tmp_path):
    tensors = scaled(world.plain_tensors(layers=(0, 1, 2)), 1024)
    error = refusal(tmp_path, {"base_model_name_or_path": made_for}, tensors, base_name="SmolLM2-135M")
    assert error.message == (
        f"adapter refused: it was made for {theirs} (hidden 1024), the base here is SmolLM2-135M (hidden 32); "
        "serve it over its own base"
    )
    assert error.code == "base_mismatch"
    assert "model.layers.2.self_attn.v_proj is not a linear layer of this base" in error.details
    # Both halves of q_proj in two layers, and A of v_proj, whose features out are not the hidden size.
    assert sum("this base needs" in detail for detail in error.details) == 6


@pytest.mark.parametrize(
    ("name", "tensors", "sentence"),
    [
        ("layers", world.plain_tensors(layers=range(4)), "(layers 4), the base here is tiny (layers 2)"),
        (
            "key width",
            world.plain_tensors(("q_proj",)) | {f"{Q0[:-6]}v_proj.lora_B.weight": shaped(64, 2)},
            "(key width 64), the base here is tiny (key width 16)",
        ),
    ],
)
def test_the_size_that_differs_is_told(name, tensors, sentence, tmp_path):
    assert sentence in refusal(tmp_path, {}, tensors, base_name="tiny").message


def test_one_strange_tensor_does_not_make_another_base(tmp_path):
    message = "model.layers.0.self_attn.q_proj: lora_A is [2, 48], this base needs [2, 32]"
    error = refusal(tmp_path, {}, with_tensor(f"{Q0}.lora_A.weight", shaped(2, 48)), base_name="tiny")
    assert (error.message, error.details) == (f"adapter refused: {message}", ())
    named = {"base_model_name_or_path": "meta/Llama-9"}
    error = refusal(tmp_path, named, with_tensor(f"{Q0}.lora_A.weight", shaped(2, 48)), base_name="tiny")
    assert error.message == f"adapter refused: {message}; its file names Llama-9 as its base, the base here is tiny"


def test_every_mismatch_is_a_detail(tmp_path):
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    error = refusal(tmp_path, {"r": 3, "target_modules": targets}, world.plain_tensors(targets))
    assert sum("config says 3" in detail for detail in error.details) == 8
    assert error.message == f"adapter refused: {error.details[0]} (and 7 more)"


def test_details_of_a_hostile_file_have_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlora.peft.reasons.MAX_DETAILS", 3)
    error = refusal(tmp_path, {}, world.plain_tensors() | {f"x{i}": shaped(1) for i in range(5)})
    assert len(error.details) == 4
    assert error.details[-1] == "and 2 more"


def test_a_changed_copy_of_the_head_is_refused():
    fixture, head = world.load_fixture("lm-head"), world.base_head("llama")
    world.read_folder(fixture.folder, head=head)
    world.read_folder(fixture.folder, head=head.astype(np.float32))
    for other in (None, head + np.float32(0.5), head[:64]):
        with pytest.raises(AdapterInvalid, match="modules_to_save"):
            world.read_folder(fixture.folder, head=other)


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
    "empty": (b"", "it has 0 bytes"),
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
    "no_shape": (raw_file(b'{"a":{"dtype":"F32"}}'), "must hold exactly dtype, shape and data_offsets"),
    "a_key_more": (raw_file(b'{"a":' + ENTRY[:-1] + b',"x":1}}', bytes(256)), "must hold exactly dtype"),
    "three_offsets": (raw_file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}}', bytes(4)), "whole numbers"),
    "nine_axes": (
        raw_file(b'{"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}}', bytes(4)),
        "short lists",
    ),
    "true": (raw_file(b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', bytes(4)), "whole numbers"),
    "no_name": (raw_file(b'{"a":{"dtype":4,"shape":[1],"data_offsets":[0,4]}}', bytes(4)), "dtype of a must be a name"),
    "dtype": (raw_file(b'{"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}', bytes(4)), "has dtype I32; only F32"),
    "nan": (raw_file(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)), "NaN is not JSON"),
    "many_tensors": (
        raw_file(
            b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(15_000)) + b"}"
        ),
        "unexpected tensor: ",
    ),
}


@pytest.mark.fault("A5")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_weights_file(name, tmp_path):
    data, message = HOSTILE[name]
    (tmp_path / "adapter_config.json").write_text(json.dumps(world.PLAIN))
    (tmp_path / "adapter_model.safetensors").write_bytes(data)
    started = time.thread_time()
    with pytest.raises(AdapterInvalid) as error:
        world.read_folder(tmp_path)
    assert any(message in text for text in (error.value.message, *error.value.details))
    assert len(error.value.message) < 3000
    assert len(error.value.details) <= MAX_DETAILS + 1
    assert time.thread_time() - started < 2


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


def test_not_finite_is_its_own_error(tmp_path):
    tensors = with_tensor(f"{Q0}.lora_A.weight", np.full((2, 32), np.nan, np.float16))
    with pytest.raises(AdapterNotFinite):
        world.read_folder(world.write_folder(tmp_path, world.PLAIN, tensors))
