"""TPU bodies of `target_logprob`, forward and backward: Mosaic kernels over tiles of the vocabulary.

Tokens come packed, wanted ones first.  A trip takes some tokens of every lane, several lanes in one block, so that their
product with a tile of the head is one; each lane's own rows are added to it.  Logits never leave the chip.

    forward    logits = x @ head + h @ b, their running maximum, sum of exponentials and the targets' own
    backward   logits again, d_logits, dx = d_logits @ head.T, dh = d_logits @ b.T, db += h.T @ d_logits

h = scale * (x @ a.T) is computed outside, dh is returned.  Products in x's dtype, sums in float32.  The head is read as
it lies in memory, by feature [D, V] or by word [V, D]: the other way would be a copy.  The last tile may reach past the
vocabulary: what it reads there is masked by selection.
tokamax's linear_softmax_cross_entropy_loss takes one label per token, returns their sum or mean, and has no LoRA.

Shape letters: G lanes, J tokens of a lane, C those of a trip, T = G * C, K targets of a token, D model, V vocabulary,
R LoRA rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.loops import filled, run_of, trips, with_run
from pallas_kernels.tiling_tpu import LANES, blocks, dot, padded_bytes

Halves = tuple[jax.Array, jax.Array]  # h_GJR scaled, b_GRV
ROW = 16  # a lane's tokens per trip are a multiple of it: whole tiles in bfloat16 and float32
WIDEST = 4  # most tiles of LANES words in a block


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """Block sizes of a grid step."""

    by_word: bool  # the head is read as [V, D]
    lanes: int
    tokens: int  # of each lane in a trip
    words: int


def by_word(tied: bool, features: int) -> bool:
    """Returns whether the head lies in memory as [V, D]: an embedding, unless XLA would have to pad its features.

    Of a matrix's two layouts XLA chooses the one with less padding.
    """
    return tied and features % LANES == 0


def cut(
    x_GJD: jax.Array, head: jax.Array, targets: int, b_GRV: jax.Array | None, *, by_word: bool, back: bool
) -> Cut | None:
    """Returns block sizes for one kernel, forward or backward: most tokens, then words, that fit; None if none fit."""
    (G, J, D), V = x_GJD.shape, head.shape[0 if by_word else 1]
    f32 = jnp.float32

    def needed(lanes: int, tokens: int, words: int) -> int:
        T = lanes * tokens
        tile = padded_bytes(*((words, D) if by_word else (D, words)), head.dtype)
        held = tile + padded_bytes(T, D, x_GJD.dtype)
        held += 2 * padded_bytes(T, targets, f32) + 2 * padded_bytes(T, 1, f32)
        if back:
            held += padded_bytes(T, D, f32)
        if b_GRV is not None:
            R = b_GRV.shape[1]
            held += padded_bytes(T, R, x_GJD.dtype) + lanes * padded_bytes(R, words, b_GRV.dtype)
            if back:
                held += padded_bytes(T, R, f32) + 2 * lanes * padded_bytes(R, words, f32)
        copies = 1 if head.dtype == jnp.bfloat16 else 3  # copies of the tile for products: float32 is split in three
        return 2 * held + copies * tile

    rows = blocks().tokens
    while rows >= ROW:
        tokens = min(math.ceil(J / ROW), max(rows // G // ROW, 1)) * ROW
        lanes = math.ceil(G / math.ceil(G * tokens / rows))
        for words in (min(n * LANES, V) for n in range(WIDEST, 0, -1)):
            if needed(lanes, tokens, words) <= blocks().block_bytes:
                return Cut(by_word=by_word, lanes=lanes, tokens=tokens, words=words)
        rows //= 2
    return None


def fits(x_GJD: jax.Array, head: jax.Array, targets: int, b_GRV: jax.Array | None, *, by_word: bool) -> bool:
    """Returns whether both kernels have a cut that fits the chip."""
    return None not in (cut(x_GJD, head, targets, b_GRV, by_word=by_word, back=back) for back in (False, True))


def forward(
    x_GJD: jax.Array,
    head: jax.Array,
    target_GJK: jax.Array,
    count_G: jax.Array,
    lora: Halves | None,
    *,
    by_word: bool,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns float32 (the targets' logits [G, J, K], the maximum logit, sum of exp(logits - maximum)), [G, J], packed.

    A target of -1 is in no device's vocabulary: its logit is 0.  Values are undefined where nothing is wanted.
    """
    G, J, K = target_GJK.shape
    size = cut(x_GJD, head, K, None if lora is None else lora[1], by_word=by_word, back=False)
    assert size is not None
    C = size.tokens
    h_GJR, b_GRV = (None, None) if lora is None else lora
    whole = jax.tree.map(lambda v: filled(v, C, axis=1), (x_GJD, target_GJK, h_GJR))

    def trip(i: jax.Array, out: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x_TD, target_TK, h_TR = jax.tree.map(lambda v: _rows(v, i, C), whole)
        new = _forward_trip(size, interpret, x_TD, head, target_TK, h_TR, b_GRV)
        return tuple(_put(o, n, i, C) for o, n in zip(out, new, strict=True))

    shape = (G, whole[0].shape[1])
    start = tuple(jnp.zeros((*shape, n), jnp.float32) for n in (K, 1, 1))
    chosen, best, total = lax.fori_loop(0, trips(count_G, C), trip, start)
    return chosen[:, :J], best[:, :J, 0], total[:, :J, 0]


def backward(
    x_GJD: jax.Array,
    head: jax.Array,
    target_GJK: jax.Array,
    count_G: jax.Array,
    lora: Halves | None,
    lse_GJ: jax.Array,
    d_GJK: jax.Array,
    *,
    by_word: bool,
    interpret: bool,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Returns float32 (dx_GJD without LoRA's part, dh_GJR, db_GRV); zeros where nothing is wanted."""
    J = x_GJD.shape[1]
    h_GJR, b_GRV = (None, None) if lora is None else lora
    size = cut(x_GJD, head, target_GJK.shape[2], b_GRV, by_word=by_word, back=True)
    assert size is not None
    C = size.tokens
    whole = jax.tree.map(lambda v: filled(v, C, axis=1), (x_GJD, target_GJK, lse_GJ[..., None], d_GJK, h_GJR))

    def trip(i: jax.Array, out: tuple) -> tuple:
        dx_GJD, dh_GJR, db_GRV = out
        x_TD, target_TK, lse_T1, d_TK, h_TR = jax.tree.map(lambda v: _rows(v, i, C), whole)
        rows = x_TD, head, target_TK, lse_T1, d_TK
        dx_TD, dh_TR, db_GRV = _backward_trip(size, interpret, *rows, h_TR, b_GRV, db_GRV)
        return _put(dx_GJD, dx_TD, i, C), None if dh_TR is None else _put(dh_GJR, dh_TR, i, C), db_GRV

    start = [None if v is None else jnp.zeros(v.shape, jnp.float32) for v in (whole[0], whole[4], b_GRV)]
    dx_GJD, dh_GJR, db_GRV = lax.fori_loop(0, trips(count_G, C), trip, tuple(start))
    return dx_GJD[:, :J], None if dh_GJR is None else dh_GJR[:, :J], db_GRV


def _rows(x: jax.Array, i: jax.Array, tokens: int) -> jax.Array:
    """Returns [T, ·] of a trip."""
    part = run_of(x, i, tokens)
    return part.reshape(-1, part.shape[2])


def _put(x: jax.Array, part: jax.Array, i: jax.Array, tokens: int) -> jax.Array:
    return with_run(x, part.reshape(x.shape[0], tokens, -1), i)


# ---- kernels ----------------------------------------------------------------------------------------------------------


def _forward_trip(size: Cut, interpret: bool, x_TD, head, target_TK, h_TR, b_GRV) -> list[jax.Array]:
    """Returns (the targets' logits [T, K], maximum [T, 1], sum [T, 1])."""
    V, (T, K) = head.shape[0 if size.by_word else 1], target_TK.shape
    lora = () if h_TR is None else (h_TR, b_GRV)

    def body(x, head, target, *refs) -> None:
        *lora, chosen, best, total = refs
        v = pl.program_id(1)

        @pl.when(v == 0)
        def start() -> None:
            chosen[...] = jnp.zeros(chosen.shape, jnp.float32)
            best[...] = jnp.full(best.shape, -jnp.inf, jnp.float32)
            total[...] = jnp.zeros(total.shape, jnp.float32)

        logits = _logits(size, x[...], head[...], [half[...] for half in lora])
        word = v * size.words + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        for k in range(K):
            own = jnp.where(word == target[:, k : k + 1], logits, 0).sum(1, keepdims=True)
            here = lax.broadcasted_iota(jnp.int32, chosen.shape, 1) == k
            chosen[...] += jnp.where(here, own, 0)
        logits = jnp.where(word < V, logits, -jnp.inf)
        new = jnp.maximum(best[...], logits.max(1, keepdims=True))
        total[...] = total[...] * jnp.exp(best[...] - new) + jnp.exp(logits - new).sum(1, keepdims=True)
        best[...] = new

    out = [jax.ShapeDtypeStruct((T, n), jnp.float32) for n in (K, 1, 1)]
    return _call(body, size, (x_TD, head, target_TK, *lora), out, interpret=interpret, name="target_logprob", added={})


def _backward_trip(
    size: Cut, interpret: bool, x_TD, head, target_TK, lse_T1, d_TK, h_TR, b_GRV, db_GRV
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Returns float32 (dx [T, D], dh [T, R], db_GRV with this trip's added)."""
    V, K = head.shape[0 if size.by_word else 1], target_TK.shape[1]
    lora = () if h_TR is None else (h_TR, b_GRV, db_GRV)
    last = math.ceil(V / size.words) - 1

    def body(x, head, target, lse, d, *refs) -> None:
        rows, (dx, *d_rows) = refs[: len(lora)], refs[len(lora) :]
        v = pl.program_id(1)

        @pl.when(v == 0)
        def start() -> None:
            for out in (dx, *d_rows[:1]):
                out[...] = jnp.zeros(out.shape, jnp.float32)

        def tile(words: int) -> None:
            """Processes a tile whose first `words` are in the vocabulary."""
            head_tile = _kept(head[...], words, 0 if size.by_word else 1)
            halves = [rows[0][...], _kept(rows[1][...], words, 2)] if lora else []
            logits = _logits(size, x[...], head_tile, halves)
            share = jnp.exp(logits - lse[...])
            word = v * size.words + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
            d_logits = jnp.zeros(logits.shape, jnp.float32)
            for k in range(K):
                d_logits += d[:, k : k + 1] * ((word == target[:, k : k + 1]).astype(jnp.float32) - share)
            d_logits = _kept(d_logits, words, 1).astype(x_TD.dtype)
            dx[...] += dot(d_logits, head_tile, (1, 0 if size.by_word else 1))
            if lora:
                _backward_rows(size, d_logits, halves, rows[2], *d_rows)

        if V % size.words:
            pl.when(v < last)(lambda: tile(size.words))
            pl.when(v == last)(lambda: tile(V % size.words))
        else:
            tile(size.words)

    inputs = (x_TD, head, target_TK, lse_T1, d_TK, *lora)
    shapes = [x_TD.shape, *(v.shape for v in (h_TR, db_GRV) if v is not None)]
    out = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    added = {len(inputs) - 1: 2} if lora else {}
    made = _call(body, size, inputs, out, interpret=interpret, name="target_logprob_back", added=added)
    dx_TD, dh_TR, db_GRV = made if lora else (*made, None, None)
    return dx_TD, dh_TR, db_GRV


def _backward_rows(size: Cut, d_logits: jax.Array, halves: list[jax.Array], old_db, dh, db) -> None:
    """Adds the gradients of each lane's h and b."""
    h_TR, b_GRV = halves
    for g in range(size.lanes):
        own = slice(g * size.tokens, (g + 1) * size.tokens)
        d_own = d_logits[own]
        dh[own, :] += dot(d_own, b_GRV[g].astype(d_own.dtype), (1, 1))
        db[g] = old_db[g] + dot(h_TR[own], d_own, (0, 0))


def _kept(tile: jax.Array, words: int, axis: int) -> jax.Array:
    """Returns the tile with zeros past the vocabulary."""
    if words == tile.shape[axis]:
        return tile
    return jnp.where(lax.broadcasted_iota(jnp.int32, tile.shape, axis) < words, tile, 0)


def _logits(size: Cut, x_TD: jax.Array, head: jax.Array, lora: list[jax.Array]) -> jax.Array:
    """Returns float32 [T, words]: logits with each lane's own rows."""
    logits = dot(x_TD, head, (1, 1 if size.by_word else 0))
    if not lora:
        return logits
    h_TR, b_GRV = lora
    rows = [h_TR[g * size.tokens : (g + 1) * size.tokens] for g in range(size.lanes)]
    parts = [dot(h, b_RV.astype(h.dtype), (1, 0)) for h, b_RV in zip(rows, b_GRV, strict=True)]
    return logits + jnp.concatenate(parts)


def _call(
    body: Callable[..., None], size: Cut, inputs: tuple, out: list, *, interpret: bool, name: str, added: dict[int, int]
) -> list[jax.Array]:
    """Runs the kernel over blocks of lanes, then tiles of the vocabulary.  The second input is the head."""
    x_TD, head, *rest = inputs
    D, V = head.shape[::-1] if size.by_word else head.shape
    T = size.lanes * size.tokens

    def spec(array: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        if len(array.shape) == 3:  # b and db
            return pl.BlockSpec((size.lanes, array.shape[1], size.words), lambda i, v: (i, 0, v))
        return pl.BlockSpec((T, array.shape[1]), lambda i, v: (i, 0))

    if size.by_word:
        head_spec = pl.BlockSpec((size.words, D), lambda i, v: (v, 0))
    else:
        head_spec = pl.BlockSpec((D, size.words), lambda i, v: (0, v))
    if not interpret:  # else a small head would be copied whole into the chip's memory
        head = pltpu.with_memory_space_constraint(head, pltpu.HBM)
    return pl.pallas_call(
        body,
        out_shape=out,
        grid=(math.ceil(x_TD.shape[0] / T), math.ceil(V / size.words)),
        in_specs=[spec(x_TD), head_spec, *map(spec, rest)],
        out_specs=[*map(spec, out)],
        input_output_aliases=added,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=blocks().vmem_bytes
        ),
        interpret=interpret,
        name=name,
    )(x_TD, head, *rest)
