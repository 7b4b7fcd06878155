"""The PEFT fixtures (written by make_peft_fixtures.py) and small hand-made PEFT folders, for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from jaxlora.core.lora import AdapterRef
from jaxlora.core.model_config import ModelConfig
from jaxlora.peft.folder import ImportReport, import_peft

FIXTURES = Path(__file__).parents[1] / "fixtures" / "peft"
ACCEPTED = tuple(sorted(p.name for p in (FIXTURES / "accepted").iterdir()))
REFUSED = tuple(sorted(p.name for p in (FIXTURES / "refused").iterdir()))
REF = AdapterRef("acme", "support", 3)
BASE_HASH = "sha256:base"


@dataclass(frozen=True, slots=True)
class Fixture:
    """One adapter that real PEFT wrote and loaded again."""

    folder: Path
    base: str  # name of a folder under bases/
    modules: dict[str, list]  # path → [rank, scale] as PEFT has them
    tokens: list[np.ndarray]
    logits: list[np.ndarray]  # float32 [T, V] of each token sequence


def base_folder(base: str) -> Path:
    """The tiny checkpoint in Hugging Face form."""
    return FIXTURES / "bases" / base


def base_config(base: str) -> ModelConfig:
    """The ModelConfig of a tiny checkpoint."""
    raw = json.loads((base_folder(base) / "config.json").read_text())
    return ModelConfig(
        family=raw["model_type"],
        layers=raw["num_hidden_layers"],
        d_model=raw["hidden_size"],
        d_ff=raw["intermediate_size"],
        heads=raw["num_attention_heads"],
        kv_heads=raw["num_key_value_heads"],
        head_dim=raw["head_dim"],
        vocab=raw["vocab_size"],
        context=raw["max_position_embeddings"],
        norm_eps=raw["rms_norm_eps"],
        rope_theta=raw["rope_parameters"]["rope_theta"],
        rope_scaling=None,
        window=None,
        qkv_bias=False,
        qk_norm=raw["model_type"] == "qwen3",
        tied=raw["tie_word_embeddings"],
    )


def base_head(base: str) -> np.ndarray:
    """The head [V, D] of a tiny checkpoint."""
    tensors = load_file(base_folder(base) / "model.safetensors")
    return tensors["model.embed_tokens.weight" if base_config(base).tied else "lm_head.weight"]


def base_logits(base: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(token sequences, their float32 logits [T, V]) of the base alone."""
    return stored_logits(base_folder(base) / "logits.npz")


def load_fixture(name: str) -> Fixture:
    """An accepted fixture with what PEFT says about it."""
    folder = FIXTURES / "accepted" / name
    truth = json.loads((folder / "truth.json").read_text())
    return Fixture(folder, truth["base"], truth["modules"], *stored_logits(folder / "logits.npz"))


def stored_logits(path: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(token sequences, their logits [T, V]) of a logits.npz."""
    stored = np.load(path)
    count = len(stored.files) // 2
    return [stored[f"tokens_{i}"] for i in range(count)], [stored[f"logits_{i}"] for i in range(count)]


def read_folder(
    folder: Path, base: str = "llama", *, max_rank: int = 8, head_supported: bool = True, head=None, base_name: str = ""
):
    """import_peft with the arguments that most tests share."""
    weights, report = import_peft(
        folder,
        base_config(base),
        base_hash=BASE_HASH,
        base_name=base_name,
        max_rank=max_rank,
        head_supported=head_supported,
        read_head=None if head is None else lambda: head,
    )
    return weights.named(REF), report


def scales(report: ImportReport) -> dict[str, list]:
    """path → [rank, scale], the form of Fixture.modules."""
    return {m.module: [m.rank, m.scale] for m in report.modules}


def plain_tensors(targets=("q_proj", "v_proj"), rank: int = 2, layers=(0, 1)) -> dict[str, np.ndarray]:
    """Tensors of a plain adapter over the llama base, by PEFT key."""
    features = {"q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "o_proj": (32, 32)}
    random = np.random.default_rng(5)
    tensors = {}
    for layer in layers:
        for target in targets:
            x, y = features[target]
            key = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            tensors[f"{key}.lora_A.weight"] = random.normal(size=(rank, x)).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = random.normal(size=(y, rank)).astype(np.float32)
    return tensors


PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


def write_folder(folder: Path, config: Mapping, tensors: Mapping[str, np.ndarray]) -> Path:
    """A hand-made PEFT folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
