"""A LoRA as a GGUF file, read back by the library that llama.cpp maintains and put together as llama.cpp does."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import peft_world as world
import pytest
from small_world import tiny_path
from typer.testing import CliRunner

from jaxlora.checkpoints.hf import HfSource
from jaxlora.core.errors import AdapterInvalid
from jaxlora.core.lora import ALL_TARGETS, LAYER_TARGETS, Adapter, AdapterRef, LoraSpec, ModuleException
from jaxlora.core.model_config import ModelConfig
from jaxlora.peft.folder import empty_weights
from jaxlora.peft.gguf import write_gguf_lora
from serve.cli import main as cli

NAMES = {  # as llama.cpp calls them
    "q_proj": "blk.{}.attn_q.weight",
    "k_proj": "blk.{}.attn_k.weight",
    "v_proj": "blk.{}.attn_v.weight",
    "o_proj": "blk.{}.attn_output.weight",
    "gate_proj": "blk.{}.ffn_gate.weight",
    "up_proj": "blk.{}.ffn_up.weight",
    "down_proj": "blk.{}.ffn_down.weight",
    "lm_head": "output.weight",
}


def config_of(name: str) -> ModelConfig:
    return HfSource(tiny_path(name)).config


def random_adapter(config: ModelConfig, spec: LoraSpec) -> Adapter:
    draw, weights = np.random.default_rng(1), {}
    for target, pair in empty_weights(spec, config).items():
        a, b = (draw.normal(size=x.shape).astype(np.float32) for x in pair)
        for layer in range(len(a)):
            rank, _ = spec.module(target, layer)
            a[layer, rank:], b[layer, rank:] = 0, 0
        weights[target] = a, b
    return Adapter(ref=AdapterRef("acme", "support", 3), spec=spec, base_hash="hash", weights=weights)


def read(path: Path) -> tuple[gguf.GGUFReader, dict[str, np.ndarray]]:
    """(the file, name → tensor)."""
    reader = gguf.GGUFReader(path)
    return reader, {t.name: t.data for t in reader.tensors}


def field(reader: gguf.GGUFReader, name: str):
    found = reader.get_field(name)
    return None if found is None else found.contents()


def changes(path: Path) -> dict[str, np.ndarray]:
    """What llama.cpp adds to each weight [Y, X]: alpha / rank * B A."""
    reader, tensors = read(path)
    alpha, found = field(reader, "adapter.lora.alpha"), {}
    for name, a in tensors.items():
        if name.endswith(".lora_a"):
            b = tensors[name.removesuffix("a") + "b"]
            found[name.removesuffix(".lora_a")] = alpha / a.shape[0] * (b.astype(np.float64) @ a)
    assert len(tensors) == 2 * len(found)
    return found


def by_hand(config: ModelConfig, adapter: Adapter, target: str, layer: int) -> np.ndarray:
    """scale * (A B) as [Y, X]; in a llama, rows of q and k as pairs that rotate together, head by head."""
    a, b = (w[layer].astype(np.float64) for w in adapter.weights[target])
    change = adapter.spec.scale(target, layer) * (b.T @ a)
    if config.family not in ("llama", "mistral") or target not in ("q_proj", "k_proj"):
        return change
    rows, half = [], config.head_dim // 2
    for head in range(len(change) // config.head_dim):
        for j in range(half):
            rows += [change[head * config.head_dim + j], change[head * config.head_dim + half + j]]
    return np.array(rows)


SPECS = {
    "plain": LoraSpec(rank=3, alpha=7.5, targets=ALL_TARGETS),
    "rslora": LoraSpec(rank=4, alpha=8.0, targets=LAYER_TARGETS, rslora=True),
    "exceptions": LoraSpec(
        rank=2,
        alpha=4.0,
        targets=("q_proj", "down_proj"),
        exceptions=(
            ModuleException(target="q_proj", layer=1, rank=5, alpha=3.0),
            ModuleException(target="down_proj", layer=0, rank=0, alpha=4.0),
        ),
    ),
    "rank 1": LoraSpec(rank=1, alpha=-2.0, targets=("k_proj",)),
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("model", "architecture"), [("tiny-llama-rope", "llama"), ("tiny-mistral", "llama"), ("tiny-qwen3", "qwen3")]
)
def test_what_llama_cpp_adds_is_the_adapter(tmp_path, model, architecture, spec):
    config = config_of(model)
    adapter = random_adapter(config, SPECS[spec])
    write_gguf_lora(tmp_path / "a.gguf", config, adapter, dtype="float32")
    reader, _ = read(tmp_path / "a.gguf")
    wanted = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": architecture}
    assert {name: field(reader, name) for name in wanted} == wanted
    got, seen = changes(tmp_path / "a.gguf"), set()
    for target in adapter.spec.targets:
        for layer in range(len(adapter.weights[target][0])):
            name = NAMES[target].format(layer)
            if adapter.spec.module(target, layer)[0]:
                np.testing.assert_allclose(got[name], by_hand(config, adapter, target, layer), rtol=1e-5, atol=1e-5)
                seen.add(name)
    assert seen == set(got)


def test_plain_tensors_are_those_of_the_adapter_bit_for_bit(tmp_path):
    """Where no scale has to be folded and no row moves."""
    config = config_of("tiny-qwen3")
    adapter = random_adapter(config, SPECS["plain"])
    write_gguf_lora(tmp_path / "a.gguf", config, adapter, dtype="float32")
    _, tensors = read(tmp_path / "a.gguf")
    for target, (a_LRX, b_LRY) in adapter.weights.items():
        for layer in range(len(a_LRX)):
            name = NAMES[target].format(layer)
            np.testing.assert_array_equal(tensors[f"{name}.lora_a"], a_LRX[layer])
            np.testing.assert_array_equal(tensors[f"{name}.lora_b"], b_LRY[layer].T)


def test_float16_is_the_nearest(tmp_path):
    config = config_of("tiny-qwen3")
    adapter = random_adapter(config, SPECS["plain"])
    write_gguf_lora(tmp_path / "a.gguf", config, adapter, dtype="float16")
    _, tensors = read(tmp_path / "a.gguf")
    assert {x.dtype for x in tensors.values()} == {np.dtype(np.float16)}
    wanted = adapter.weights["o_proj"][0][1].astype(np.float16)
    np.testing.assert_array_equal(tensors["blk.1.attn_output.weight.lora_a"], wanted)


def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    config = config_of("tiny-qwen3")
    adapter = random_adapter(config, SPECS["plain"])
    adapter.weights["q_proj"][1][0, 0, 0] = 1e6
    with pytest.raises(AdapterInvalid, match=r"blk.0.attn_q.weight.lora_b has values that float16 cannot hold"):
        write_gguf_lora(tmp_path / "a.gguf", config, adapter, dtype="float16")


def test_a_tied_head_is_refused(tmp_path):
    config = config_of("tiny-llama-tied")
    with pytest.raises(AdapterInvalid, match=r"no head of its own .* export it as `merged` instead"):
        write_gguf_lora(tmp_path / "a.gguf", config, random_adapter(config, SPECS["plain"]), dtype="float32")


def test_the_command_writes_a_folder_with_the_file(tmp_path):
    fixture = world.FIXTURES / "accepted" / "plain"
    options = ["--model", str(world.base_folder("llama")), "--form", "gguf-lora", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, ["export", str(fixture), *options])
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter.gguf", "jaxlora.json"]
    own = json.loads((tmp_path / "out/jaxlora.json").read_text())
    assert own["bytes"] == (tmp_path / "out/adapter.gguf").stat().st_size
    assert len(changes(tmp_path / "out" / "adapter.gguf")) == 14
