"""hf.py, safetensors_map.py and base_files.py: config parsing, refusals, wrong files."""

import dataclasses
import json
import shutil

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import load_file, save_file
from small_world import TINY_MODELS, tiny_path

from jaxlora.checkpoints import load as base_files
from jaxlora.checkpoints.hf import HfSource, parse_config
from jaxlora.checkpoints.load import base_hash, open_model, resolve_model, smollm2_path
from jaxlora.checkpoints.safetensors import SafetensorsMap
from jaxlora.core.errors import ModelInvalid
from jaxlora.core.model_config import Llama3Rope, parameters

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 4096}
QWEN2 = LLAMA | {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 16}


def without(config, *fields):
    return {key: value for key, value in config.items() if key not in fields}


@pytest.fixture
def checkpoint(tmp_path):
    """A function: a private, writable copy of a tiny model, with fields of its config.json changed."""

    def copy(name, **changes):
        path = tmp_path / name
        shutil.copytree(tiny_path(name), path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))
        return path

    return copy


# config.json ------------------------------------------------------------------------------------------------------


def test_a_llama_config_field_by_field():
    c = parse_config(LLAMA)
    assert (c.family, c.layers, c.d_model, c.d_ff, c.heads, c.kv_heads, c.head_dim) == ("llama", 2, 32, 48, 4, 2, 8)
    assert (c.vocab, c.context, c.norm_eps, c.rope_theta) == (128, 256, 1e-5, 10000.0)
    assert (c.rope_scaling, c.window, c.qkv_bias, c.qk_norm, c.tied) == (None, None, False, False, False)


def test_what_the_families_change():
    assert parse_config(MISTRAL).window == 4096
    assert parse_config(MISTRAL | {"sliding_window": None}).window is None
    assert parse_config(QWEN2).qkv_bias
    assert parse_config(QWEN2).window is None
    assert parse_config(QWEN3).qk_norm
    assert parse_config(QWEN3).head_dim == 16
    assert parse_config(LLAMA | {"tie_word_embeddings": True}).tied
    assert parse_config(LLAMA | {"head_dim": None}).head_dim == 8
    assert parse_config(LLAMA | {"head_dim": 64}).head_dim == 64


ROPES = {
    "by itself": {"rope_theta": 5e5},
    "transformers 5": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "both and equal": {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "null scaling": {"rope_theta": 5e5, "rope_scaling": None},
    "llama3, old": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "llama3, new": {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
}


@pytest.mark.parametrize("fields", ROPES.values(), ids=ROPES)
def test_rope_is_found_where_it_may_be(fields):
    c = parse_config(without(LLAMA, "rope_theta") | fields)
    assert c.rope_theta == 5e5
    scaled = "llama3" in json.dumps(fields)
    rope = Llama3Rope(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    assert c.rope_scaling == (rope if scaled else None)


BAD_CONFIGS = {
    "gemma": (LLAMA | {"model_type": "gemma3"}, "model_type 'gemma3'"),
    "no type": (without(LLAMA, "model_type"), "model_type None"),
    "type is a list": (LLAMA | {"model_type": ["llama"]}, "model_type"),
    **{f"no {field}": (without(LLAMA, field), field) for field in LLAMA if field not in ("model_type", "rope_theta")},
    "no rope_theta": (without(LLAMA, "rope_theta"), "no rope_theta"),
    "rope_parameters without theta": (without(LLAMA, "rope_theta") | {"rope_parameters": LLAMA3}, "no rope_theta"),
    "two thetas": (LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "two values"),
    "two scalings": (LLAMA | {"rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 10000.0}}, "differ"),
    "theta is text": (LLAMA | {"rope_theta": "10000"}, "rope_theta must be a positive number"),
    "theta is NaN": (LLAMA | {"rope_theta": float("nan")}, "rope_theta must be a positive number"),
    "theta is huge": (LLAMA | {"rope_theta": 10**400}, "rope_theta must be a positive number"),
    "yarn": (LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
    "linear, oldest key": (LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}}, "'linear' is not supported"),
    "dynamic": (LLAMA | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "'dynamic'"),
    "rope per layer type": (LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
    "llama3 without factor": (LLAMA | {"rope_scaling": without(LLAMA3, "factor")}, "factor must be a positive"),
    "llama3 without context": (
        LLAMA | {"rope_scaling": without(LLAMA3, "original_max_position_embeddings")},
        "original_max_position_embeddings",
    ),
    "llama3 upside down": (LLAMA | {"rope_scaling": LLAMA3 | {"high_freq_factor": 0.5}}, "high_freq_factor"),
    "partial rotary": (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "attention_bias": (LLAMA | {"attention_bias": True}, "attention_bias = true"),
    "mlp_bias": (LLAMA | {"mlp_bias": True}, "mlp_bias = true"),
    "qwen3 attention_bias": (QWEN3 | {"attention_bias": True}, "attention_bias = true"),
    "qwen2 sliding": (QWEN2 | {"use_sliding_window": True}, "use_sliding_window = true"),
    "qwen3 sliding": (QWEN3 | {"use_sliding_window": True}, "use_sliding_window = true"),
    "flag is text": (LLAMA | {"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    "mistral, window unsaid": (without(MISTRAL, "sliding_window"), "sliding_window"),
    "mistral, window 0": (MISTRAL | {"sliding_window": 0}, "sliding_window"),
    "qwen3 without head_dim": (without(QWEN3, "head_dim"), "head_dim"),
    "heads do not divide": (LLAMA | {"num_attention_heads": 5, "num_key_value_heads": 5}, "do not divide hidden_size"),
    "kv heads do not divide": (LLAMA | {"num_key_value_heads": 3}, "kv heads"),
    "mixed layers": (LLAMA | {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "gelu": (LLAMA | {"hidden_act": "gelu"}, "hidden_act"),
    "quantised": (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    "own code": (LLAMA | {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
    "a billion layers": (LLAMA | {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "layers true": (LLAMA | {"num_hidden_layers": True}, "num_hidden_layers"),
}


@pytest.mark.parametrize(("config", "words"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_config_refused_by_name(config, words):
    with pytest.raises(ModelInvalid, match=words):
        parse_config(config)


BAD_FILES = {
    "absent": (None, "cannot read"),
    "not JSON": ("{", "not JSON"),
    "a list": ("[]", "JSON object"),
    "deep": ("[" * 200_000, "not JSON"),
    "not text": (b"\xff\xfe\xff", "not JSON"),
}


@pytest.mark.parametrize(("content", "words"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_config_file_that_is_none(tmp_path, content, words):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelInvalid, match=words):
        HfSource(tmp_path)


# Tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_array_has_its_shape_and_the_stored_values(name):
    """Against the safetensors library, which reads the same files; linears are the transpose."""
    source = HfSource(tiny_path(name))
    stored = {k: v for file in tiny_path(name).glob("*.safetensors") for k, v in load_file(file).items()}
    for ours, parameter in parameters(source.config).items():
        layered = parameter.axes[0] == "layers"
        value = source.read(ours, 1 if layered else None)
        assert value.dtype == np.float32
        assert value.shape == (parameter.shape[1:] if layered else parameter.shape)
    k = stored["model.layers.1.self_attn.k_proj.weight"].astype(np.float32)
    np.testing.assert_array_equal(source.read("k_proj", 1), k.T)
    embed = stored["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(source.read("embed", None), embed)
    norm = stored["model.layers.0.post_attention_layernorm.weight"].astype(np.float32)
    np.testing.assert_array_equal(source.read("mlp_norm", 0), norm)


def test_the_fixtures_are_what_they_claim():
    configs = {name: HfSource(tiny_path(name)).config for name in TINY_MODELS}
    assert configs["tiny-llama-tied"].tied
    assert configs["tiny-llama-rope"].rope_scaling.original_context == 32
    assert configs["tiny-mistral"].window == 4
    assert configs["tiny-qwen2"].qkv_bias
    assert configs["tiny-qwen3"].heads * configs["tiny-qwen3"].head_dim == 2 * configs["tiny-qwen3"].d_model
    assert len(list(tiny_path("tiny-qwen3").glob("*.safetensors"))) == 2
    qwen2 = load_file(tiny_path("tiny-qwen2") / "model.safetensors")
    assert {v.dtype for v in qwen2.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert abs(HfSource(tiny_path("tiny-qwen2")).read("k_bias", 1)).min() > 0


def rewrite(path, change):
    """Saves model.safetensors again after change(tensors)."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def drop(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def swap_shape(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((32, 48), np.float32)


def add(tensors):
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)


def another_dtype(tensors):
    tensors["model.norm.weight"] = np.zeros(32, np.int32)


def not_a_number(tensors):
    tensors["model.norm.weight"] = np.full(32, np.nan, np.float32)


def another_head(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


CHANGES = {
    "missing": (drop, "no tensor model.layers.1.mlp.up_proj.weight"),
    "wrong shape": (swap_shape, r"up_proj.weight has shape \[32, 48\], expected \[48, 32\]"),
    "extra": (add, "1 tensors this llama does not have: model.layers.2.mlp.up_proj.weight"),
    "dtype": (another_dtype, "model.norm.weight has dtype I32; supported: F32, F16, BF16"),
    "NaN": (not_a_number, "model.norm.weight has values that are NaN"),
    "tied with another head": (another_head, "lm_head.weight differs"),
}


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_wrong_tensors_are_named(checkpoint, change, words):
    path = checkpoint("tiny-llama-tied")
    rewrite(path, change)

    def read_all():
        source = HfSource(path)
        return source.read("norm", None), source.read("embed", None)

    with pytest.raises(ModelInvalid, match=words):
        read_all()


def test_a_tied_checkpoint_may_store_the_same_head_and_old_buffers(checkpoint):
    path = checkpoint("tiny-llama-tied")

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)

    rewrite(path, change)
    assert HfSource(path).read("embed", None).shape == (320, 32)


def test_an_untied_config_over_a_tied_file_names_the_head(checkpoint):
    with pytest.raises(ModelInvalid, match=r"no tensor lm_head\.weight"):
        HfSource(checkpoint("tiny-llama-tied", tie_word_embeddings=False))


def test_float16_is_read(checkpoint):
    path = checkpoint("tiny-llama-tied")
    before = HfSource(path).read("q_proj", 0)
    rewrite(path, lambda tensors: tensors.update({k: v.astype(np.float16) for k, v in tensors.items()}))
    np.testing.assert_array_equal(HfSource(path).read("q_proj", 0), before.astype(np.float16).astype(np.float32))


def test_an_index_that_lies(checkpoint):
    path = checkpoint("tiny-qwen3")
    index = path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    names = sorted(set(good["weight_map"].values()))
    norm = "model.norm.weight"
    other = next(name for name in names if name != good["weight_map"][norm])
    cases = [
        ({norm: other}, f"says {norm} is in {other}"),
        ({norm: "../../model.safetensors"}, "names the file"),
        ({norm: "model.bin"}, "names the file"),
        ({norm: "absent.safetensors"}, "cannot open"),
        ({norm: 7}, "no weight_map"),
    ]
    for change, words in cases:
        index.write_text(json.dumps({"weight_map": good["weight_map"] | change}))
        with pytest.raises(ModelInvalid, match=words):
            HfSource(path)
    index.write_text(json.dumps({"weight_map": without(good["weight_map"], norm)}))
    with pytest.raises(ModelInvalid, match=f"does not list: {norm}"):
        HfSource(path)


def test_no_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(ModelInvalid, match=r"neither model\.safetensors nor"):
        HfSource(tmp_path)


# Safetensors files that lie ---------------------------------------------------------------------------------------


def safetensors(header, data=b"\0" * 16, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def row(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE = {
    "empty": (b"", "has 0 bytes"),
    "header of 2^60": (safetensors({}, length=1 << 60), "claims"),
    "header past the end": (safetensors({}, b"", length=3), "claims"),
    "not JSON": (safetensors(b"{x"), "its header is not valid JSON"),
    "deep": (safetensors(b"[" * 100_000), "its header is not valid JSON"),
    "a list": (safetensors([]), "must be a JSON object, got list"),
    "a name twice": (
        safetensors(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{}}'),
        "key a comes twice",
    ),
    "no offsets": (safetensors({"a": {"dtype": "F32", "shape": [4]}}), "exactly dtype"),
    "a key more": (safetensors({"a": row() | {"x": 1}}), "exactly dtype"),
    "negative": (safetensors({"a": row(offsets=(-16, 0))}), "whole numbers"),
    "true": (safetensors({"a": row(shape=(True,), offsets=(0, 4))}), "whole numbers"),
    "three offsets": (safetensors({"a": row(offsets=(0, 16, 32))}), "short lists of whole numbers"),
    "nine axes": (safetensors({"a": row(shape=(1,) * 8 + (4,))}), "short lists of whole numbers"),
    "NaN": (safetensors({"a": row(shape=(float("nan"),))}), "NaN is not JSON"),
    "large header": (safetensors(b"{" + b" " * (16 << 20) + b"}", b""), "at most 16777216"),
    "beyond any file": (safetensors({"a": row("I8", (2**48,))}), "whole numbers"),
    "overflowing shape": (safetensors({"a": row(shape=(2**33, 2**33))}), "do not hold"),
    "past the end": (safetensors({"a": row(shape=(64,), offsets=(0, 256))}), "is it cut off"),
    "gap": (safetensors({"a": row(shape=(2,), offsets=(8, 16))}), "leave a gap"),
    "overlap": (safetensors({"a": row(), "b": row()}), "overlap another"),
    "backwards": (safetensors({"a": row("I8", (), (16, 0))}), "overlap another"),
    "bytes left": (safetensors({"a": row(shape=(2,), offsets=(0, 8))}), "is it cut off"),
}


@pytest.mark.parametrize(("data", "words"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_safetensors(tmp_path, data, words):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelInvalid, match=words):
        SafetensorsMap(path)


# Where models are -------------------------------------------------------------------------------------------------


def test_open_model_of_a_directory():
    source, tokenizer = open_model(tiny_path("tiny-llama-tied"))
    assert source.config.vocab == 320
    assert tokenizer.eos_ids == (2, 3)
    with pytest.raises(ModelInvalid, match=r"no tokenizer\.json"):
        open_model(tiny_path("tiny-mistral"))


def test_open_model_refuses_tokens_without_an_embedding(tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny_path("tiny-llama-tied"), folder)
    described = json.loads((folder / "tokenizer.json").read_text())
    described["added_tokens"].append(described["added_tokens"][-1] | {"id": 320, "content": "<more>"})
    (folder / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(ModelInvalid, match="base has 321 tokens but an embedding of 320 rows"):
        open_model(folder)


def test_resolve_takes_what_is_there(tmp_path):
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(smollm2_path()) == smollm2_path()
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ModelInvalid, match=r"neither a directory nor a \.gguf file"):
        resolve_model(tmp_path / "weights.bin")
    for name in ("no/such/folder", "nothing", "../up", "a b/c", ""):
        if name:
            with pytest.raises(ModelInvalid, match="no such directory"):
                resolve_model(name)


def test_resolve_downloads_and_says_what_to_do_offline(monkeypatch, tmp_path):
    asked = []

    def download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("owner/model-1.5") == tmp_path
    assert asked[0][0] == "owner/model-1.5"
    assert "*.safetensors" in asked[0][1]
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in asked[0][1])

    def unreachable(name, *, allow_patterns):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelInvalid, match="pass a local model directory or a GGUF file"):
        resolve_model("owner/model")


def test_base_hash_follows_config_tokenizer_and_weights_only(checkpoint):
    path = checkpoint("tiny-llama-tied")
    seen = {base_hash(path)}
    (path / "README.md").write_text("words")
    assert base_hash(path) in seen
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        with (path / name).open("ab") as file:
            file.write(b" ")
        assert base_hash(path) not in seen
        seen.add(base_hash(path))
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelInvalid, match="no config"):
        base_hash(path)


def test_the_demo_model_must_be_the_one_we_know(monkeypatch):
    monkeypatch.setattr(base_files, "SMOLLM2_SHA256", "0" * 64)
    with pytest.raises(ModelInvalid, match="is not the expected file"):
        smollm2_path()
    monkeypatch.setattr(base_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelInvalid, match="uv sync --group demo"):
        smollm2_path()


def test_configs_are_complete():
    """No field of ModelConfig has a default, so a reader cannot forget one."""
    fields = dataclasses.fields(parse_config(LLAMA))
    assert all(field.default is dataclasses.MISSING for field in fields)
