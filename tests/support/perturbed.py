"""Serving programs whose last bits differ from shape to shape, as they do on some CPUs: `pytest --perturb-shapes`.

A CPU's matrix kernels may sum a row in another order when a program has more rows, so the same request may meet other last
bits in the full program than in the quarter one.  Here they differ on every CPU: each program but the full decode one runs
with the last bit of some norm weights flipped, in every layer and before the head, so keys, values and logits all differ.
Nothing compiles for it.  Servers that a test starts as processes of their own are not perturbed.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np

from jaxlora.model.decoder import Base
from serve.engine.engine import Engine
from serve.engine.logit_edits import LogitEdits
from serve.engine.sampling import StepOutput
from serve.engine.step import PackedBatches

LAYER_NORMS = ("attn_norm", "mlp_norm")
FLIPPED = {  # (of prompt chunks, of full size) → which features
    (True, True): slice(None, None, 3),
    (True, False): slice(None, None, 2),
    (False, False): slice(1, None, 2),
}
exact_run = Engine._run


def perturbed_run(engine: Engine, packed: PackedBatches, edits: LogitEdits) -> StepOutput:
    """`Engine._run` with the base of the first batch's shape in place of the engine's."""
    batch = packed[0]
    prefill = batch.tokens > 1
    full = batch.lanes == (engine.config.prefill_lanes if prefill else engine.config.rows)
    base = engine.base
    engine.base = _perturbed_base(engine, prefill, full)
    try:
        return exact_run(engine, packed, edits)
    finally:
        engine.base = base


def _perturbed_base(engine: Engine, prefill: bool, full: bool) -> Base:
    """The engine's base with the bits of a shape flipped, made once for each engine and shape."""
    if (prefill, full) not in FLIPPED:
        return engine.base
    made = vars(engine).setdefault("perturbed_bases", {})
    if (prefill, full) not in made:
        base, features = engine.base, FLIPPED[prefill, full]
        assert isinstance(base.layers, dict)  # this is for CPUs
        norm, layers = _flip(base.arrays["norm"], features), {n: _flip(base.layers[n], features) for n in LAYER_NORMS}
        made[prefill, full] = replace(base, arrays=base.arrays | {"norm": norm}, layers=base.layers | layers)
    return made[prefill, full]


def _flip(weights: jax.Array, features: slice) -> jax.Array:
    """The weights with the last bit of these features flipped, in the place of the old ones."""
    host = np.array(jax.device_get(weights))
    host.view(f"u{host.dtype.itemsize}")[..., features] ^= 1
    return jax.device_put(host, weights.format)
