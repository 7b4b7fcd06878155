"""Shapes in which the kernels are lowered and compiled: linears, attention and head of three models, and one step over all of them.

Nothing here runs: arrays are shapes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.op import packed_attention
from pallas_kernels.cross_entropy.op import target_logprob
from pallas_kernels.gathered_lora.op import gathered_lora, visits_by_slot
from pallas_kernels.gathered_lora.pool_rows import PoolRows, of_slots
from pallas_kernels.paged_attention.op import paged_attention
from pallas_kernels.segmented_lora.op import segmented_lora

# Instructions that make no array.
HANDS_ON = {"parameter", "get-tuple-element", "tuple", "while", "bitcast", "call", "conditional", "opt-barrier"}
SLOTS, ROWS, LANES, TOKENS, CHUNK = 64, 32, 4, 512, 32


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder's linears and heads."""

    layers: int
    d: int
    q: int
    kv: int
    ff: int
    vocab: int
    head: int
    tied: bool

    @property
    def reads(self) -> list[tuple[int, tuple[int, ...]]]:
        """(features in, features out of every target that shares the read) of a layer."""
        return [
            (self.d, (self.q, self.kv, self.kv)),
            (self.q, (self.d,)),
            (self.d, (self.ff,) * 2),
            (self.ff, (self.d,)),
        ]


MODELS = {
    "SmolLM2-135M": Model(layers=30, d=576, q=576, kv=192, ff=1536, vocab=49152, head=64, tied=True),
    "Qwen3-4B": Model(layers=36, d=2560, q=4096, kv=1024, ff=9728, vocab=151936, head=128, tied=True),
    "Llama-3.1-8B": Model(layers=32, d=4096, q=4096, kv=1024, ff=14336, vocab=128256, head=128, tied=False),
}


def shape(*sizes: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def pool(model: Model, rank: int) -> list[list[PoolRows]]:
    """bfloat16 serving rows of every read of a layer, then of the head."""

    def row(layers: int, x: int, y: int) -> PoolRows:
        halves = shape(layers, SLOTS, rank, x), shape(layers, SLOTS, rank, y)
        return jax.eval_shape(of_slots, *halves, shape(layers, SLOTS, dtype=jnp.float32))

    return [[row(model.layers, x, y) for y in ys] for x, ys in model.reads] + [[row(1, model.d, model.vocab)]]


def decode(pool: list, x_TD: jax.Array, slot_T: jax.Array) -> jax.Array:
    """[T, V]: every adapted linear of a decode step, each fed with what the one before made."""
    *reads, head = pool
    visits = visits_by_slot(slot_T)

    def layer(x_TD: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        for rows in reads:
            x_TX = jnp.resize(x_TD, (x_TD.shape[0], rows[0].a_LNRX.shape[-1]))
            for y_TY in gathered_lora(x_TX, rows, index, slot_T, visits):
                x_TD = x_TD + jnp.resize(y_TY, x_TD.shape)
        return x_TD, None

    x_TD, _ = lax.scan(layer, x_TD, jnp.arange(reads[0][0].a_LNRX.shape[0]))
    return gathered_lora(x_TD, head, jnp.int32(0), slot_T, visits)[0]


def decode_shapes(model: Model, rank: int) -> tuple:
    return pool(model, rank), shape(ROWS, model.d), shape(ROWS, dtype=jnp.int32)


def loss(rows: list, x: list) -> jax.Array:
    """The sum of everything that the reads of one layer and the head add to lanes."""
    return sum(
        y.astype(jnp.float32).sum() for x_GJX, read in zip(x, rows, strict=True) for y in segmented_lora(x_GJX, read)
    )


train = jax.grad(loss, argnums=(0, 1))


def train_shapes(model: Model, rank: int) -> tuple:
    """float32 rows of lanes, and bfloat16 tokens."""

    def row(x: int, y: int) -> tuple:
        return tuple(shape(*sizes, dtype=jnp.float32) for sizes in ((LANES, rank, x), (LANES, rank, y), (LANES,)))

    rows = [[row(x, y) for y in ys] for x, ys in model.reads] + [[row(model.d, model.vocab)]]
    return rows, [shape(LANES, TOKENS, x) for x, _ in model.reads] + [shape(LANES, CHUNK, model.d)]


PAGES, PAGE, COLUMNS, PROMPT = 200, 64, 16, 64


def pages_attend(pages: tuple, new: tuple, layer: jax.Array, ids: tuple, window: int | None = None) -> tuple:
    """One layer of a step: the new keys and values are written to the pages, the queries attend; (out, pages)."""
    q_GJNH, k_GJF, v_GJF = new
    page_GC, position_GJ = ids
    page_GJ = jnp.take_along_axis(page_GC, position_GJ // PAGE, axis=1)
    at = page_GJ.reshape(-1), position_GJ.reshape(-1) % PAGE
    k, v = (
        x.at[layer, *at].set(y.reshape(-1, y.shape[2]), mode="drop") for x, y in zip(pages, (k_GJF, v_GJF), strict=True)
    )
    return paged_attention(q_GJNH, k, v, layer, page_GC, position_GJ, window=window), (k, v)


def pages_shapes(model: Model, lanes: int, tokens: int, columns: int = COLUMNS) -> tuple:
    """Decode is one token a lane, a chunk of a prompt PROMPT.  columns: pages of the longest sequence."""
    q, k = (shape(lanes, tokens, *n) for n in ((model.q // model.head, model.head), (model.kv,)))
    page = shape(model.layers, PAGES, PAGE, model.kv)
    i32 = jnp.int32
    ids = shape(lanes, columns, dtype=i32), shape(lanes, tokens, dtype=i32)
    return (page, page), (q, k, k), shape(dtype=i32), ids


def lanes_loss(q_GJNH: jax.Array, k_GJKH: jax.Array, v_GJKH: jax.Array, segment_GJ: jax.Array) -> jax.Array:
    return packed_attention(q_GJNH, k_GJKH, v_GJKH, segment_GJ, window=None).astype(jnp.float32).sum()


lanes_attend = jax.grad(lanes_loss, argnums=(0, 1, 2))


def lanes_shapes(model: Model) -> tuple:
    q, k = (shape(LANES, TOKENS, n // model.head, model.head) for n in (model.q, model.kv))
    return q, k, k, shape(LANES, TOKENS, dtype=jnp.int32)


def words_train(model: Model, halves: tuple | None, x_GJD, scale_G, stored, target_GJK, wanted_GJ) -> tuple:
    """(sum of the targets' log-probabilities, its gradient by the halves of the head's LoRA and by x)"""
    head_DV, back_VD = (stored.T, stored) if model.tied else (stored, stored.T)

    def total(halves: tuple | None, x_GJD: jax.Array) -> jax.Array:
        lora = None if halves is None else (*halves, scale_G)
        options = {"chunk": CHUNK, "tied": model.tied}
        return target_logprob(x_GJD, head_DV, back_VD, target_GJK, wanted_GJ, lora, **options)[0].sum()

    return jax.value_and_grad(total, argnums=(0, 1))(halves, x_GJD)


def words_shapes(model: Model, rank: int, targets: int, dtype=jnp.bfloat16) -> tuple:
    """float32 rows of lanes (rank 0: none); the head as it is stored."""
    f32 = jnp.float32
    halves = (shape(LANES, rank, model.d, dtype=f32), shape(LANES, rank, model.vocab, dtype=f32)) if rank else None
    stored = shape(*((model.vocab, model.d) if model.tied else (model.d, model.vocab)), dtype=dtype)
    ids = shape(LANES, TOKENS, targets, dtype=jnp.int32), shape(LANES, TOKENS, dtype=bool)
    return halves, shape(LANES, TOKENS, model.d, dtype=dtype), shape(LANES, dtype=f32), stored, *ids


def kernels(stablehlo: str) -> list[str]:
    """Names of the Mosaic kernels of a lowered program."""
    return re.findall(r'kernel_name = "([a-z_]+)"', stablehlo)


def made_as_large_as(arrays: list, hlo: str) -> list[str]:
    """Instructions of a compiled program that make an array of one of these shapes; handing it on makes nothing."""
    sizes = {"[" + ",".join(map(str, a.shape)) + "]" for a in arrays}
    found = []
    for line in hlo.splitlines():
        match = re.match(r"\s*(?:ROOT )?%?\S+ = (.+?) ([a-z][a-z0-9-]*)\(", line)
        if match and match[2] not in HANDS_ON and any(s in match[1] for s in sizes):
            found.append(line.strip()[:1000])
    return found


def as_large_as_logits(tokens: int, words: int, hlo: str) -> set[str]:
    """Arrays of a compiled program that hold a number for every token and word, whichever their axes."""
    found = set(re.findall(r"\b(?:f32|s32|bf16|pred)\[([0-9,]+)\]", hlo))
    sizes = {text: [int(n) for n in text.split(",")] for text in found}
    return {text for text, axes in sizes.items() if words in axes and math.prod(axes) >= tokens * words}
