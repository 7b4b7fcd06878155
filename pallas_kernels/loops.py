"""Loops over the tokens of all lanes, a run at a time (for the loss), and padding of arrays to whole runs.

Shape letters: G lanes, J tokens of a lane, C tokens of a run.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def trips(count_G: jax.Array, tokens: int) -> jax.Array:
    """Returns how many runs cover the first `count_G` tokens of every lane."""
    return -(-count_G.max() // tokens)


def filled(x: jax.Array, size: int, axis: int) -> jax.Array:
    """Returns x with the axis padded with zeros to a multiple of the size."""
    return jnp.pad(x, [(0, -n % size if a == axis else 0) for a, n in enumerate(x.shape)])


def run_of(x_GJ: jax.Array, i: jax.Array, tokens: int) -> jax.Array:
    """Returns [G, C, ...]: run i of every lane."""
    return lax.dynamic_slice_in_dim(x_GJ, i * tokens, tokens, axis=1)


def with_run(x_GJ: jax.Array, run_GC: jax.Array, i: jax.Array) -> jax.Array:
    """Returns x with run i of every lane replaced."""
    return lax.dynamic_update_slice_in_dim(x_GJ, run_GC, i * run_GC.shape[1], axis=1)
