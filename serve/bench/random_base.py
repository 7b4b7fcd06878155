"""Bases of well-known shapes with random weights, for measuring a device that holds no checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models

from jaxlora.checkpoints.load import Opened
from jaxlora.checkpoints.tokenizer import Tokenizer
from jaxlora.config.base import ONE_DEVICE
from jaxlora.core.model_config import ModelConfig, parameters
from jaxlora.model.decoder import load_base
from jaxlora.model.mesh import make_mesh

BLOCK = 2**22  # random numbers that the weights repeat
DEVIATION = 0.02  # of a weight


def _config(
    family: str, *, layers: int, d: int, ff: int, heads: int, kv_heads: int, head: int, vocab: int, tied: bool
) -> ModelConfig:
    return ModelConfig(
        family=family,
        layers=layers,
        d_model=d,
        d_ff=ff,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head,
        vocab=vocab,
        context=131072,
        norm_eps=1e-5,
        rope_theta=5e5,
        rope_scaling=None,
        window=None,
        qkv_bias=False,
        qk_norm=family == "qwen3",
        tied=tied,
    )


SHAPES = {
    "tiny": _config("llama", layers=2, d=128, ff=256, heads=4, kv_heads=2, head=32, vocab=1024, tied=True),
    "1b": _config("llama", layers=16, d=2048, ff=8192, heads=32, kv_heads=8, head=64, vocab=128256, tied=True),
    "4b": _config("qwen3", layers=36, d=2560, ff=9728, heads=32, kv_heads=8, head=128, vocab=151936, tied=True),
    "8b": _config("llama", layers=32, d=4096, ff=14336, heads=32, kv_heads=8, head=128, vocab=128256, tied=False),
}


class RandomSource:
    """A checkpoint that lies nowhere: each array repeats one block of random numbers, norms are ones."""

    def __init__(self, config: ModelConfig):
        """Of this shape; the same numbers each time."""
        self.config = config
        self.block = np.random.default_rng(0).standard_normal(BLOCK, np.float32) * np.float32(DEVIATION)

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """Returns one base array by its name in `parameters`, without the layer axis."""
        shape = parameters(self.config)[name].shape[0 if layer is None else 1 :]
        return np.ones(shape, np.float32) if name.endswith("norm") else np.resize(self.block, shape)


def open_random(shape: str, dtype: str) -> Opened:
    """Returns a base of one of SHAPES on one device."""
    config, m = SHAPES[shape], ONE_DEVICE
    mesh = make_mesh(m.data, m.fsdp, m.tensor)
    return Opened(
        name=f"random-{shape}",
        path=Path(),
        base=load_base(RandomSource(config), mesh, dtype=dtype),
        base_hash=f"random-{shape}",
        weights_hash=f"random-{shape}",
        mesh=mesh,
        tokenizer=_tokenizer(config.vocab),
    )


def _tokenizer(vocab: int) -> Tokenizer:
    """Returns a tokenizer of so many words: numbers, of which the last ends an answer."""
    engine = tokenizers.Tokenizer(models.WordLevel({f"{i} ": i for i in range(vocab)}, unk_token="0 "))
    engine.decoder = decoders.ByteLevel()
    return Tokenizer(engine, chat_template=None, eos_ids=(vocab - 1,), bos_id=None, pad_id=None)
