"""Products of tokens with frozen weights that were packed once, when they were loaded.

    y_TY = (x_TX @ w_XY) * scale_Y      summed in float32

A block of BLOCK output features is contiguous; within it lie, for each input feature, the block's weights side by side: those
of two input features alternate in 16 bits, of four in 8, as instructions want them.  Both numbers of features are filled up
with zeros.  The array of all layers is passed with the layer's number, so that no layer is copied for a product.
Weights of 8 bits are whole numbers in [-127, 127] with a scale for each output feature; other weights have none.  With AVX512-VNNI or AMX the native body rounds x to 16 bits of its
row's largest number for them, and sums whole numbers.
`dispatch` states which body runs.

Shape letters: T tokens, X Y features in, out, L layers, B blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.dispatch import by_platform, known_dtypes
from pallas_kernels.native import library
from pallas_kernels.shapes import shaped

BLOCK = 32  # kernels.cc's
DEPTH = 32  # of input features there are a whole multiple, in 8 bits of twice that
FEW_ROWS = 24  # up to so many a gradient is the native body's; with AMX in bfloat16 any number
MOST = 127  # of weights of 8 bits
SOME = 128  # blocks that are packed at a time


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Packed:
    """One linear of all layers, packed."""

    blocks: jax.Array  # [L, B, X / P, BLOCK, P], X filled up; P is 1 of float32, 2 of bfloat16, 4 of int8
    scale: jax.Array | None = None  # float32 [L, B, BLOCK], of int8
    features_in: int = jax.tree.static()
    features_out: int = jax.tree.static()

    @property
    def shape(self) -> tuple[int, int]:
        """Returns (features in, features out): that of one layer's weights."""
        return self.features_in, self.features_out

    @property
    def dtype(self) -> jnp.dtype:
        """Returns the dtype of the stored weights."""
        return self.blocks.dtype


def packed_shape(features_in: int, features_out: int, dtype: jax.typing.DTypeLike) -> tuple[int, ...]:
    """Returns the shape of one layer's blocks."""
    P = 4 // jnp.dtype(dtype).itemsize
    depth = 2 * DEPTH if P == 4 else DEPTH
    X, B = -(-features_in // depth) * depth, -(-features_out // BLOCK)
    return B, X // P, BLOCK, P


def pack(w_XY: np.ndarray, blocks: np.ndarray, scale: np.ndarray | None = None) -> None:
    """Writes one layer's weights, cast, into its blocks on the host (`packed_shape`); some at a time, as a head is large.

    scale: float32 [B, BLOCK], written; the weights are then rounded to 8 bits, the largest of an output feature to MOST.
    """
    X, Y = w_XY.shape
    B, rows, _, P = blocks.shape
    for start in range(0, B, SOME):
        count = min(SOME, B - start)
        first, last = start * BLOCK, min((start + count) * BLOCK, Y)
        some = np.zeros((rows * P, count * BLOCK), blocks.dtype if scale is None else np.float32)
        some[:X, : last - first] = w_XY[:, first:last]
        if scale is not None:
            most = np.abs(some).max(axis=0)
            scale[start : start + count] = (most / MOST).reshape(count, BLOCK)
            np.rint(some * (MOST / np.where(most == 0, 1, most)), out=some)
        parts = some.reshape(rows, P, count, BLOCK).transpose(2, 0, 3, 1)  # [count, X / P, BLOCK, P]
        blocks[start : start + count] = parts


def unpacked(weight: Packed, layer: jax.Array | int) -> jax.Array:
    """Returns one layer's weights as they are stored, [X, Y]."""
    parts_BXDP = _parts(weight, layer)
    whole = parts_BXDP.transpose(1, 3, 0, 2)
    return whole.reshape(-1, parts_BXDP.shape[0] * BLOCK)[: weight.features_in, : weight.features_out]


def unpacked_back(weight: Packed, layer: jax.Array | int) -> jax.Array:
    """Returns the transpose of one layer's weights as they are stored, [Y, X]."""
    parts_BXDP = _parts(weight, layer)
    whole = parts_BXDP.transpose(0, 2, 1, 3)
    return whole.reshape(parts_BXDP.shape[0] * BLOCK, -1)[: weight.features_out, : weight.features_in]


def plain_back(weight: Packed, layer: jax.Array | int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns the transpose of one layer's weights with their scale, [Y, X]."""
    back_YX = unpacked_back(weight, layer)
    if weight.scale is None:
        return back_YX
    return (back_YX.astype(jnp.float32) * _scale(weight, layer).T).astype(dtype)


def outputs(weight: Packed, feature_T: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns the weights of these output features, one layer's, [T, X]: of a tied head, the embeddings of tokens."""
    parts_BXDP = _parts(weight, 0)
    found = parts_BXDP[feature_T // BLOCK, :, feature_T % BLOCK].reshape(feature_T.shape[0], -1)[
        :, : weight.features_in
    ]
    return (found.astype(jnp.float32) * _scale(weight, 0)[0, feature_T, None]).astype(dtype)


def _scale(weight: Packed, layer: jax.Array | int) -> jax.Array:
    """Returns one layer's scale, [1, Y]; one for weights without."""
    if weight.scale is None:
        return jnp.ones((1, weight.features_out), jnp.float32)
    scale = lax.dynamic_index_in_dim(weight.scale, layer, keepdims=False)
    return scale.reshape(1, -1)[:, : weight.features_out]


def _parts(weight: Packed, layer: jax.Array | int) -> jax.Array:
    """Returns [B, X / P, BLOCK, P], P the input features that alternate."""
    return lax.dynamic_index_in_dim(weight.blocks, layer, keepdims=False)


@shaped
def product_reference(x_TX: jax.Array, weights: Sequence[Packed], layer: jax.Array) -> tuple[jax.Array, ...]:
    """Defines the op: returns float32 [T, Y] of each weight."""
    wide_TX = x_TX.astype(jnp.float32)
    products = (jnp.dot(wide_TX, unpacked(w, layer).astype(jnp.float32), precision="highest") for w in weights)
    return tuple(y_TY * _scale(w, layer) for w, y_TY in zip(weights, products, strict=True))


@shaped
def product(
    x_TX: jax.Array, weights: Sequence[Packed], layer: jax.Array, *, dtype: jax.typing.DTypeLike | None = None
) -> tuple[jax.Array, ...]:
    """Returns [T, Y] of each weight, of x's dtype or of `dtype`, float32.  They share one read of x.

    Differentiable in x.  A token's result has the same bits in any row and beside any others
    where the native body runs.
    """
    return _products(jnp.dtype(dtype or x_TX.dtype), x_TX, tuple(weights), layer)


def _forward(dtype, x_TX, weights, layer):
    return _products(dtype, x_TX, weights, layer), (weights, layer, x_TX[:0])


def _backward(dtype, saved, cotangents):
    weights, layer, kind = saved[0], saved[1], saved[2].dtype
    back = [product_back(d.astype(kind), w, layer) for w, d in zip(weights, cotangents, strict=True)]
    return sum(back[1:], back[0]), None, None


@shaped
def product_back_reference(d_TY: jax.Array, weight: Packed, layer: jax.Array) -> jax.Array:
    """Defines the transposed product: returns float32 [T, X]."""
    wide_TY = d_TY.astype(jnp.float32) * _scale(weight, layer)
    return jnp.dot(wide_TY, unpacked_back(weight, layer).astype(jnp.float32), precision="highest")


def many_rows_fit(dtype: jax.typing.DTypeLike) -> bool:
    """Returns whether a transposed product of many rows of this dtype reads the packed weights in place, on a CPU."""
    return dtype == jnp.bfloat16 and library.instruction_set() == "amx"


@shaped
def product_back(d_TY: jax.Array, weight: Packed, layer: jax.Array) -> jax.Array:
    """Returns [T, X] in d's dtype: d times the transposed weights.  Rows that are many, unless `many_rows_fit`, are
    worth unpacking the layer for XLA.

    A scale is d's: so weights of 8 bits are never held in another form, but for a layer of XLA's body.
    """
    if weight.scale is not None:
        d_TY = (d_TY.astype(jnp.float32) * _scale(weight, layer)).astype(d_TY.dtype)

    def xla(d_TY: jax.Array, weight: Packed, layer: jax.Array) -> jax.Array:
        return d_TY @ unpacked_back(weight, layer).astype(d_TY.dtype)

    def native(d_TY: jax.Array, weight: Packed, layer: jax.Array) -> jax.Array:
        results = [((d_TY.shape[0], weight.features_in), d_TY.dtype)]
        return library.call("jaxlora_back", results, d_TY, layer, weight.blocks)[0]

    few = d_TY.shape[0] <= FEW_ROWS or many_rows_fit(d_TY.dtype)
    fits = few and known_dtypes(d_TY) and weight.dtype in (d_TY.dtype, jnp.int8)
    return by_platform("product_back", d_TY, weight, layer, xla=xla, native=native if fits else None)


def _body(dtype, x_TX, weights, layer):
    def xla(x_TX: jax.Array, weights: tuple[Packed, ...], layer: jax.Array) -> tuple[jax.Array, ...]:
        found = []
        for w in weights:
            y_TY = jnp.dot(x_TX, unpacked(w, layer).astype(x_TX.dtype), preferred_element_type=jnp.float32)
            found.append((y_TY if w.scale is None else y_TY * _scale(w, layer)).astype(dtype))
        return tuple(found)

    def native(x_TX: jax.Array, weights: tuple[Packed, ...], layer: jax.Array) -> tuple[jax.Array, ...]:
        results = [((x_TX.shape[0], w.features_out), dtype) for w in weights]
        # Each target's blocks, and where weights have 8 bits its scale after them.
        arrays = (x for w in weights for x in (w.blocks, w.scale) if x is not None)
        return tuple(library.call("jaxlora_product", results, x_TX, layer, *arrays))

    fits = known_dtypes(x_TX) and all(w.dtype == weights[0].dtype in (x_TX.dtype, jnp.int8) for w in weights)
    return by_platform("product", x_TX, weights, layer, xla=xla, native=native if fits else None)


_products = jax.custom_vjp(_body, nondiff_argnums=(0,))
_products.defvjp(_forward, _backward)
