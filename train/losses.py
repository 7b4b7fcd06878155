"""Per-token losses.  One signature: (log-probability of the target, weight) → loss, both [G, J]."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.shapes import shaped


@shaped
def cross_entropy(logprob_GJ: jax.Array, weight_GJ: jax.Array) -> jax.Array:
    """float32 [G, J]: -weight * logprob; 0, whatever the log-probability is, where the weight is 0."""
    return jnp.where(weight_GJ != 0, -weight_GJ * logprob_GJ, 0.0)
