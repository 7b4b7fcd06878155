"""Writes a Hugging Face directory with random weights in bfloat16 and the tokenizer of tiny-llama-tied, array by array."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from small_world import tiny_path

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Qwen3 base whose head is its embedding."""

    layers: int
    d_model: int
    d_ff: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the file."""
        D, F, Q, K = self.d_model, self.d_ff, self.heads * self.head_dim, self.kv_heads * self.head_dim
        linears = {"self_attn.q": (Q, D), "self_attn.k": (K, D), "self_attn.v": (K, D), "self_attn.o": (D, Q)}
        linears |= {"mlp.gate": (F, D), "mlp.up": (F, D), "mlp.down": (D, F)}
        norms = {"input_layer": D, "post_attention_layer": D}
        found = {"model.embed_tokens.weight": (self.vocab, D), "model.norm.weight": (D,)}
        for i in range(self.layers):
            at = f"model.layers.{i}."
            found |= {f"{at}{name}_proj.weight": size for name, size in linears.items()}
            found |= {f"{at}{name}norm.weight": (size,) for name, size in norms.items()}
            found |= {f"{at}self_attn.{name}_norm.weight": (self.head_dim,) for name in "qk"}
        return found


QWEN3_06B = Shape(layers=28, d_model=1024, d_ff=3072, heads=16, kv_heads=8, head_dim=128, vocab=151_936, context=40_960)
SCALED = Shape(layers=8, d_model=512, d_ff=1536, heads=8, kv_heads=4, head_dim=64, vocab=32_000, context=2048)


def write_random(folder: Path, shape: Shape) -> Path:
    """Writes the directory and returns it; its weights repeat one block of random numbers."""
    folder.mkdir(parents=True)
    config = json.loads((tiny_path("tiny-qwen3") / "config.json").read_text()) | {
        "hidden_size": shape.d_model,
        "intermediate_size": shape.d_ff,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": True,
        "layer_types": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER:
        shutil.copy(tiny_path("tiny-llama-tied") / name, folder / name)
    header, end = {}, 0
    for name, size in shape.tensors().items():
        begin, end = end, end + 2 * int(np.prod(size))
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    block = (np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while end > 0:
            file.write(block[: end // 2].tobytes())
            end -= block.nbytes
    return folder
