"""`jaxlora export`: what is written computes what base and adapter compute, and nothing is written by halves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import peft_world as world
import pytest
from model_world import Lane, base_of, logits_alone, logits_of, pool_of
from safetensors.numpy import load_file
from small_world import TINY_MODELS, smollm2_prompts, tiny_expected, tiny_path
from typer.testing import CliRunner

from jaxlora.checkpoints.gguf import GgufSource
from jaxlora.checkpoints.hf import HfSource, read_json
from jaxlora.checkpoints.load import base_hash, open_source, smollm2_path
from jaxlora.checkpoints.tokenizer import Tokenizer
from jaxlora.core.errors import AdapterInvalid, AdapterNotFound, InvalidRequest
from jaxlora.core.lora import ALL_TARGETS, LAYER_TARGETS, Adapter, AdapterRef, LoraSpec
from jaxlora.peft import export
from jaxlora.peft.folder import empty_weights, export_peft
from jaxlora.peft.merge import write_merged
from jaxlora.storage.adapter_store import AdapterStore
from serve.cli import main as cli

ATOL = 1e-4  # float32, logits of order one to ten
LENGTH = 64
MERGED = {("tiny-llama-tied", "head too"), ("tiny-qwen2", "layers")}  # by default: a head that is untied, and biases


def run(*arguments) -> str:
    """What an export that ends well says."""
    result = CliRunner().invoke(cli.app, ["export", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments) -> str:
    result = CliRunner().invoke(cli.app, ["export", *map(str, arguments)])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    return result.stderr


def random_adapter(source, path: Path, targets=ALL_TARGETS, strength=0.3, alpha=7.5) -> Adapter:
    """A strong adapter of rank 3 over a checkpoint."""
    made = LoraSpec(rank=3, alpha=alpha, targets=targets)
    draw, weights = np.random.default_rng(1), {}
    for target, (a, b) in empty_weights(made, source.config).items():
        a = draw.normal(size=a.shape) / a.shape[2] ** 0.5
        weights[target] = a.astype(np.float32), (strength * draw.normal(size=b.shape)).astype(np.float32)
    ref = AdapterRef("acme", "support", 1)
    return Adapter(ref=ref, spec=made, base_hash=base_hash(path), weights=weights)


def largest(got, wanted) -> float:
    return max(float(np.abs(g - w).max()) for g, w in zip(got, wanted, strict=True))


# merged


@pytest.mark.parametrize(
    "name", ["plain", "rslora", "rank-pattern", "lm-head", "lm-head-tied", "tied", "qwen3", "partial"]
)
def test_a_merged_peft_folder_gives_the_logits_of_peft(tmp_path, name):
    fixture = world.load_fixture(name)
    says = run(fixture.folder, "--model", world.base_folder(fixture.base), "--form", "merged", "--out", tmp_path / "m")
    merged = HfSource(tmp_path / "m")
    assert largest(logits_alone(base_of(merged), fixture.tokens, 32), fixture.logits) < ATOL
    own = json.loads((tmp_path / "m" / "jaxlora.json").read_text())
    assert own["base_hash"] == base_hash(world.base_folder(fixture.base))
    adapter = load_file(fixture.folder / "adapter_model.safetensors")
    trainable = sum(value.size for key, value in adapter.items() if ".lora_" in key)
    frozen = sum(value.size for value in load_file(world.base_folder(fixture.base) / "model.safetensors").values())
    written = sum(file.stat().st_size for file in (tmp_path / "m").iterdir() if file.name != "jaxlora.json")
    assert (own["trainable_parameters"], own["all_parameters"], own["bytes"]) == (
        trainable,
        frozen + trainable,
        written,
    )
    assert own["trainable_percent"] == pytest.approx(100 * trainable / (frozen + trainable))
    assert says.endswith(
        f"into {tmp_path / 'm'}; trainable params: {trainable:,} || all params: {frozen + trainable:,} || "
        f"trainable%: {own['trainable_percent']:.4f} || bytes: {written:,}\n"
    )
    assert ("the head is no longer the embedding" in says) == (name == "lm-head-tied")
    assert merged.config.tied == (name == "tied")


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        pytest.param(name, targets, id=f"{name}, {id}", marks=() if (name, id) in MERGED else pytest.mark.slow)
        for name in TINY_MODELS
        for id, targets in (("layers", LAYER_TARGETS), ("head too", ALL_TARGETS))
    ],
)
def test_every_family_merged_is_base_and_adapter(tmp_path, name, targets):
    """Biases, q/k norms, tied and untied heads, rope scaling, a window; several shards, so that their index is read."""
    source = open_source(tiny_path(name))
    adapter = random_adapter(source, tiny_path(name), targets)
    assert write_merged(tmp_path, source, adapter, dtype="float32", shard_bytes=20_000) > 2
    merged, base = HfSource(tmp_path), base_of(source)
    untied = source.config.tied and targets == ALL_TARGETS
    assert merged.config == dataclasses.replace(source.config, tied=source.config.tied and not untied)
    sequences = [e.ids_T for e in tiny_expected(name)]
    got = logits_alone(base_of(merged), sequences, LENGTH)
    lanes = [Lane([ids_T], 0) for ids_T in sequences]
    wanted = [found for (found,) in logits_of(base, lanes, LENGTH, pool_of(base, [adapter]))]
    assert largest(got, wanted) < ATOL
    assert largest(logits_alone(base, sequences, LENGTH), wanted) > 100 * ATOL


def test_bfloat16_is_the_float32_merge_rounded(tmp_path):
    source = open_source(tiny_path("tiny-qwen3"))
    adapter = random_adapter(source, tiny_path("tiny-qwen3"))
    for dtype in ("float32", "bfloat16"):
        (tmp_path / dtype).mkdir()
        assert write_merged(tmp_path / dtype, source, adapter, dtype=dtype) == 1
        assert read_json(tmp_path / dtype / "config.json")["torch_dtype"] == dtype
    wide, narrow = HfSource(tmp_path / "float32"), HfSource(tmp_path / "bfloat16")
    for name, layer in (("embed", None), ("q_proj", 1), ("down_proj", 0), ("head", None)):
        w, n = wide.read(name, layer), narrow.read(name, layer)
        assert np.abs(n / w - 1).max() <= 2**-8
        assert not np.array_equal(n, w)
    sizes = [(tmp_path / dtype / "model.safetensors").stat().st_size for dtype in ("bfloat16", "float32")]
    assert sizes[0] < 0.6 * sizes[1]


def test_what_the_base_brings_along_is_copied(tmp_path):
    base = tiny_path("tiny-llama-tied")
    write_merged(tmp_path, open_source(base), random_adapter(open_source(base), base), dtype="float32")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (base / name).read_bytes()
    mine, theirs = read_json(tmp_path / "config.json"), read_json(base / "config.json")
    assert mine | {"dtype": "float32", "tie_word_embeddings": True} == theirs | {"torch_dtype": "float32"}


def test_a_value_that_overflows_is_refused(tmp_path):
    source = open_source(tiny_path("tiny-qwen3"))
    adapter = random_adapter(source, tiny_path("tiny-qwen3"), strength=3e37, alpha=1e4)
    with pytest.raises(AdapterInvalid, match=r"q_proj.weight with acme/support@1 merged in has values that float32"):
        write_merged(tmp_path, source, adapter, dtype="float32")


@pytest.mark.slow
def test_the_demo_model_becomes_a_hugging_face_folder(tmp_path):
    """From a quantised GGUF, so only when that is asked for; tokenizer and template are written too."""
    source = GgufSource(smollm2_path())
    adapter = random_adapter(source, smollm2_path(), strength=0.1)
    export_peft(adapter, tmp_path / "peft", source.config, base_name="smollm2")
    arguments = (tmp_path / "peft", "--model", "smollm2", "--form", "merged", "--out", tmp_path / "merged")
    assert "is quantised (Q4_1, Q8_0)" in refused(*arguments)
    assert not (tmp_path / "merged").exists()
    run(*arguments, "--dequantise")
    merged = HfSource(tmp_path / "merged")
    assert merged.config == dataclasses.replace(source.config, tied=False)
    for name, layer in (("q_proj", 3), ("attn_norm", 29), ("embed", None)):
        value = source.read(name, layer)
        if name == "q_proj":
            a, b = adapter.weights[name]
            value = value + np.float32(2.5) * (a[layer].T @ b[layer])
        np.testing.assert_array_equal(merged.read(name, layer), value)
    ours, theirs = Tokenizer.from_gguf(source.metadata), Tokenizer.from_hf(tmp_path / "merged")
    talk = [{"role": "user", "content": "What is 12 + 345?"}]
    assert theirs.chat(talk) == ours.chat(talk)
    assert (theirs.eos_ids, theirs.bos_id, theirs.pad_id) == (ours.eos_ids, ours.bos_id, ours.pad_id)
    for prompt in smollm2_prompts():
        assert theirs.encode(prompt.text) == list(prompt.ids_T)


# where the adapter comes from, and where it goes


@pytest.fixture
def stored(tmp_path):
    """Two versions of acme/support, one of zoo/support, one of acme/tone, over tiny-qwen3; the store stays open."""
    source = open_source(tiny_path("tiny-qwen3"))
    store = AdapterStore(tmp_path / "store", host_bytes=10**6)
    for tenant, name, strength in (
        ("acme", "support", 0.1),
        ("acme", "support", 0.2),
        ("zoo", "support", 0.3),
        ("acme", "tone", 0.4),
    ):
        adapter = random_adapter(source, tiny_path("tiny-qwen3"), strength=strength)
        store.add(tenant, name, adapter)
    store.flush()
    yield tmp_path / "store", store
    store.close()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("tone", ("acme", 1)),
        ("acme/support", ("acme", 2)),
        ("acme/support@1", ("acme", 1)),
        ("zoo/support", ("zoo", 1)),
    ],
)
def test_a_stored_adapter_is_found_while_a_server_has_the_store_open(stored, name, found):
    root, store = stored
    adapter = export.read_stored(root, name)
    assert (adapter.ref.tenant, adapter.ref.version) == found
    for target, pair in store.get(adapter.ref).weights.items():
        for got, wanted in zip(adapter.weights[target], pair, strict=True):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("support", InvalidRequest, r"support belongs to acme, zoo; say which, as TENANT/support"),
        ("nobody", AdapterNotFound, r"no adapter nobody in .*; there are: support, tone"),
        ("zoo/tone", AdapterNotFound, r"no adapter zoo/tone"),
        ("tone@7", AdapterNotFound, r"no version 7 of tone in .*; there are: \[1\]"),
        ("tone@latest", InvalidRequest, r"a number as version, got 'tone@latest'"),
    ],
)
def test_a_name_that_is_not_there_or_not_clear(stored, name, error, says):
    with pytest.raises(error, match=says):
        export.read_stored(stored[0], name)


def test_from_a_store_to_peft_and_back(stored, tmp_path):
    base = ("--model", tiny_path("tiny-qwen3"), "--form", "peft")
    run("--adapters", stored[0], "--name", "tone", *base, "--out", tmp_path / "one")
    run(tmp_path / "one", *base, "--out", tmp_path / "two")
    files = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("one", "two")]
    assert files[0] == files[1]
    other = ("--model", tiny_path("tiny-qwen2"), "--form", "peft", "--out", tmp_path / "three")
    assert "trained on another base than tiny-qwen2" in refused("--adapters", stored[0], "--name", "tone", *other)


PLAIN = world.FIXTURES / "accepted" / "plain"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"--form": "onnx"}, "--form must be one of peft, merged, gguf-lora; got 'onnx'"),
        ({"--dtype": "float16"}, "--dtype of merged must be one of float32, bfloat16; got 'float16'"),
        ({"--name": "tone"}, "give a PEFT folder, or --adapters STORE with --name"),
        ({"--adapters": "store"}, "give a PEFT folder, or --adapters STORE with --name"),
        ({"--model": world.base_folder("qwen3")}, "made for llama (query width 32), the base here is qwen3"),
        ({"--model": "nowhere"}, "no such directory or .gguf file"),
    ],
    ids=lambda x: x if isinstance(x, str) else "".join(x),
)
def test_what_cannot_be_done_is_one_line_and_writes_nothing(tmp_path, changes, says):
    options = {"--model": world.base_folder("llama"), "--form": "merged", "--out": tmp_path / "out"} | changes
    assert says in refused(PLAIN, *(x for pair in options.items() for x in pair))
    assert list(tmp_path.iterdir()) == []


def test_only_an_earlier_export_is_replaced(tmp_path):
    out = tmp_path / "out"
    arguments = (PLAIN, "--model", world.base_folder("llama"), "--form", "merged", "--out", out)
    run(*arguments)
    assert f"{out} exists; name a new folder, or pass --replace" in refused(*arguments)
    (out / "stale").touch()
    run(*arguments, "--replace")
    assert not (out / "stale").exists()
    (out / "jaxlora.json").unlink()
    before = sorted(p.name for p in out.iterdir())
    assert "no export wrote it" in refused(*arguments, "--replace")
    assert sorted(p.name for p in out.iterdir()) == before


def test_a_full_disk_leaves_the_old_folder(tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = (PLAIN, "--model", world.base_folder("llama"), "--form", "merged", "--out", out)
    run(*arguments)
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxlora.peft.merge.save_file", full)
    assert f"{out} cannot be written: No space left on device" in refused(*arguments, "--replace")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
