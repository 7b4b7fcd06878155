"""A batch as one array: one transfer to the device in place of one for each field.

All fields have rows as their first axis and elements of four bytes, or bool.

Shape letters: G rows, W words of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclass(frozen=True, slots=True)
class Layout[T]:
    """Where the fields of a batch lie in a row.  Hashable, so that a program may depend on it."""

    tree: jax.tree_util.PyTreeDef
    fields: tuple[tuple[tuple[int, ...], str], ...]  # shape of a row and character of the dtype of each

    @classmethod
    def of(cls, batch: T) -> Layout[T]:
        """That of batches like this one, whatever their rows."""
        leaves, tree = jax.tree.flatten(batch)
        assert all(x.dtype.itemsize == 4 or x.dtype == bool for x in leaves)
        return cls(tree, tuple((x.shape[1:], x.dtype.char) for x in leaves))

    def pack(self, batch: T) -> np.ndarray:
        """int32 [G, W] of a NumPy batch."""
        leaves = self.tree.flatten_up_to(batch)
        words = [x.astype(np.int32) if x.dtype == bool else x.view(np.int32) for x in leaves]
        return np.concatenate([x.reshape(len(x), -1) for x in words], axis=1)

    def unpack(self, words_GW: jax.Array) -> T:
        """The batch again, bit for bit.  Within a program."""
        leaves, start = [], 0
        for shape, dtype in self.fields:
            end = start + math.prod(shape)
            x = words_GW[:, start:end].reshape(-1, *shape)
            leaves.append(x != 0 if dtype == "?" else lax.bitcast_convert_type(x, jnp.dtype(dtype)))
            start = end
        return self.tree.unflatten(leaves)
