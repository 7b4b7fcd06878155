"""What bases of known sizes look like.  Pure: no jax."""

from __future__ import annotations

from jaxlora.core.model_config import ModelConfig

SMOLLM2 = ModelConfig(
    family="llama",
    layers=30,
    d_model=576,
    d_ff=1536,
    heads=9,
    kv_heads=3,
    head_dim=64,
    vocab=49152,
    context=8192,
    norm_eps=1e-5,
    rope_theta=1e5,
    rope_scaling=None,
    window=None,
    qkv_bias=False,
    qk_norm=False,
    tied=True,
)
