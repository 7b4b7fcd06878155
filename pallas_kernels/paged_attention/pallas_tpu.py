"""TPU body of `paged_attention`: a Mosaic kernel that reads pages from the pool in place.

One grid step is one run of a lane's tokens.  It copies the pages that its tokens attend to, and no others, block by block
into two buffers: while one block is computed with, the next is on its way, that of the next run after the last.  Runs
without tokens are never visited; a window's past is not read.  A step knows the page numbers of two runs alone, so the
number of rows and the length of their contexts are not limited by scalar memory.  Only blocks that hold a key which some
token of the run does not attend to are masked: without a window, the last ones.
JAX's own kernels need pages without a layer axis, interleaved keys and values, and not 3 kv heads.

Shape letters: G lanes, J tokens of a lane, N query heads, K kv heads, M queries per kv head, H head, L layers, P pages,
Z tokens per page, C pages per sequence, F = K * H, S runs (G * runs of a lane), I rows of a run's kv head (tokens * M),
D buffers (2), B pages of a block, E = B * Z keys of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.op import MASKED
from pallas_kernels.tiling_tpu import LANES, blocks, dot, padded_bytes

ROWS, KEYS = 512, 512  # at most, of a run's kv head and of a block
SCALAR_BYTES = 2**18  # of page numbers and runs
BUFFERS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """How a call is divided."""

    tokens: int  # of a run
    pages: int  # of a block


def cut(q_GJNH: jax.Array, k_LPZF: jax.Array, page_GC: jax.Array) -> Cut | None:
    """Returns the largest block of pages, then the largest run, that fit the chip; None where none fit."""
    (G, J, N, H), (Z, F), C = q_GJNH.shape, k_LPZF.shape[2:], page_GC.shape[1]
    K, M = F // H, N * H // F
    pages = min(C, max(1, KEYS // Z))
    while pages:
        for tokens in (n for n in range(J, 0, -1) if J % n == 0):
            rows = tokens * M
            held = 2 * BUFFERS * pages * padded_bytes(Z, F, k_LPZF.dtype)
            held += 2 * 2 * K * padded_bytes(rows, H, q_GJNH.dtype) + 2 * padded_bytes(rows, 1, jnp.int32)
            held += K * (2 * padded_bytes(rows, LANES, jnp.float32) + padded_bytes(rows, H, jnp.float32))
            scalars = 4 * (2 * 2 * C + 4 * G * (J // tokens))
            if rows <= max(ROWS, M) and held <= blocks().block_bytes and scalars <= SCALAR_BYTES:
                return Cut(tokens=tokens, pages=pages)
        pages //= 2
    return None


def attend(
    q_GJNH: jax.Array,
    k_LPZF: jax.Array,
    v_LPZF: jax.Array,
    layer: jax.Array,
    page_GC: jax.Array,
    position_GJ: jax.Array,
    *,
    window: int | None,
    interpret: bool,
) -> jax.Array:
    """Returns [G, J, N, H] in q's dtype; rows whose position is -1 are undefined."""
    G, J, N, H = q_GJNH.shape
    Z, F = k_LPZF.shape[2:]
    C, K = page_GC.shape[1], F // H
    M = N // K
    size = cut(q_GJNH, k_LPZF, page_GC)
    assert size is not None, "asked for what has no room"
    runs, I = J // size.tokens, size.tokens * M
    S = G * runs
    q = (q_GJNH * H**-0.5).astype(q_GJNH.dtype)
    q_SKIH = q.reshape(S, size.tokens, K, M, H).transpose(0, 2, 1, 3, 4).reshape(S, K, I, H)
    position_SJ = position_GJ.reshape(S, size.tokens)
    order_S, least_S, last_S, count = visited(position_SJ)

    def run_spec(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((pl.squeezed, *shape), lambda i, layer, order, *_: (order[i], *(0,) * len(shape)))

    def table_spec(ahead: int) -> pl.BlockSpec:
        """Page numbers of the lane of this step's run, or of one ahead."""

        def index(i, layer, order, *_) -> tuple:
            return lax.div(order[jnp.minimum(i + ahead, S - 1)], runs), 0, 0

        return pl.BlockSpec((pl.squeezed, 1, C), index, memory_space=pltpu.SMEM)

    if not interpret:  # else small pools would be copied whole into the chip's memory
        k_LPZF, v_LPZF = (pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (k_LPZF, v_LPZF))
    buffer = pltpu.VMEM((BUFFERS, size.pages, Z, F), k_LPZF.dtype)
    out_SKIH = pl.pallas_call(
        functools.partial(_attend_run, window=window),
        out_shape=jax.ShapeDtypeStruct(q_SKIH.shape, q_SKIH.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(count,),
            in_specs=[run_spec(K, I, H), run_spec(I, 1), table_spec(0), table_spec(1)]
            + [pl.BlockSpec(memory_space=pltpu.HBM)] * 2,
            out_specs=run_spec(K, I, H),
            scratch_shapes=[
                *(buffer, buffer),
                *(pltpu.VMEM((K, I, n), jnp.float32) for n in (LANES, LANES, H)),
                pltpu.SemaphoreType.DMA((BUFFERS,)),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=blocks().vmem_bytes),
        interpret=interpret,
        name="paged_attention",
    )(
        *(layer.reshape(1), order_S, least_S, last_S),
        *(q_SKIH, jnp.repeat(position_SJ, M, axis=1)[:, :, None]),
        *(page_GC[:, None], page_GC[:, None], k_LPZF, v_LPZF),
    )
    return out_SKIH.reshape(S, K, size.tokens, M, H).transpose(0, 2, 1, 3, 4).reshape(G, J, N, H)


def visited(position_SJ: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns int32 (runs, those with tokens first; least and last position of each run; how many have tokens)."""
    held_SJ = position_SJ >= 0
    least_S = jnp.where(held_SJ, position_SJ, jnp.iinfo(jnp.int32).max).min(1)
    order_S = jnp.argsort(~held_SJ.any(1), stable=True).astype(jnp.int32)
    return order_S, least_S, position_SJ.max(1), held_SJ.any(1).sum(dtype=jnp.int32)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Span:
    """The pages that a run attends to, as columns of its lane's table."""

    first: jax.Array
    end: jax.Array

    @classmethod
    def of(cls, least: jax.Array, last: jax.Array, page_tokens: int, window: int | None) -> _Span:
        first = 0 if window is None else lax.div(jnp.maximum(least - window + 1, 0), page_tokens)
        return cls(first=jnp.int32(first), end=lax.div(last, page_tokens) + 1)


def _attend_run(
    layer,
    order,
    least,
    last,
    q_KIH,
    position_I1,
    page_1C,
    next_page_1C,
    k_LPZF,
    v_LPZF,
    out_KIH,
    k_DBZF,
    v_DBZF,
    best_KIL,
    total_KIL,
    acc_KIH,
    arrived_D,
    turn,
    *,
    window: int | None,
) -> None:
    """Attends with one run to all pages that it sees, under an online softmax.

    turn: int32, the buffer into which the run before had its first block copied.
    """
    i, steps = pl.program_id(0), pl.num_programs(0)
    B, Z = k_DBZF.shape[1:3]
    s, next_s = order[i], order[jnp.minimum(i + 1, order.shape[0] - 1)]
    span, next_span = (_Span.of(least[n], last[n], Z, window) for n in (s, next_s))
    count = pl.cdiv(span.end - span.first, B)

    def copies(table_1C, span: _Span, b: jax.Array, d: jax.Array, act) -> None:
        """Starts the copies of block b's pages into buffer d, or waits for them."""
        begin = span.first + b * B

        def one(j: jax.Array, _: None) -> None:
            page = table_1C[0, begin + j]
            for pool, near in ((k_LPZF, k_DBZF), (v_LPZF, v_DBZF)):
                act(pltpu.make_async_copy(pool.at[layer[0], page], near.at[d, j], arrived_D.at[d]))

        lax.fori_loop(0, jnp.minimum(B, span.end - begin), one, None)

    def start(copy) -> None:
        copy.start()

    def wait(copy) -> None:
        copy.wait()

    @pl.when(i == 0)
    def first_of_all() -> None:
        turn[0] = jnp.int32(0)
        copies(page_1C, span, jnp.int32(0), jnp.int32(0), start)

    begun = turn[0]
    best_KIL[...] = jnp.full(best_KIL.shape, MASKED, jnp.float32)
    total_KIL[...] = jnp.zeros(total_KIL.shape, jnp.float32)
    acc_KIH[...] = jnp.zeros(acc_KIH.shape, jnp.float32)

    def block(b: jax.Array, _: None) -> None:
        d = lax.rem(begun + b, BUFFERS)

        @pl.when(b + 1 < count)
        def next_block() -> None:
            copies(page_1C, span, b + 1, 1 - d, start)

        @pl.when((b + 1 == count) & (i + 1 < steps))
        def next_run() -> None:
            copies(next_page_1C, next_span, jnp.int32(0), 1 - d, start)

        copies(page_1C, span, b, d, wait)
        key = (span.first + b * B) * Z
        whole = key + B * Z - 1 <= least[s]
        if window is not None:
            whole &= key > last[s] - window

        def attend(seen: Callable[[jax.Array], jax.Array] | None) -> None:
            online = best_KIL, total_KIL, acc_KIH
            _attend_block(q_KIH, k_DBZF.at[d], v_DBZF.at[d], seen, last[s] - key, online)

        def seen(place_IE: jax.Array) -> jax.Array:
            key_IE, position_IE = key + place_IE, position_I1[...]
            return (
                key_IE <= position_IE if window is None else (key_IE <= position_IE) & (key_IE > position_IE - window)
            )

        pl.when(whole)(lambda: attend(None))
        pl.when(jnp.logical_not(whole))(lambda: attend(seen))

    lax.fori_loop(0, count, block, None)
    turn[0] = lax.rem(begun + count, BUFFERS)
    for k in range(q_KIH.shape[0]):
        out_KIH[k] = (acc_KIH[k] / total_KIL[k][:, :1]).astype(out_KIH.dtype)


def _attend_block(
    q_KIH,
    k_BZF,
    v_BZF,
    seen: Callable[[jax.Array], jax.Array] | None,
    last: jax.Array,
    online: tuple,
) -> None:
    """Adds a block of keys and values to the online softmax.

    seen: which places of the block each row attends to; None where all do.  last: the last place that is the sequence's.
    """
    best_KIL, total_KIL, acc_KIH = online
    k_EF, v_EF = (jnp.concatenate([half[j] for j in range(half.shape[0])]) for half in (k_BZF, v_BZF))
    E, (K, I, H) = k_EF.shape[0], q_KIH.shape
    seen_IE = None
    if seen is not None:  # past the last key a buffer holds what was there before
        seen_IE = seen(lax.broadcasted_iota(jnp.int32, (I, E), 1))
        held_E1 = lax.broadcasted_iota(jnp.int32, (E, 1), 0) <= last
        v_EF = jnp.where(held_E1, v_EF.astype(jnp.float32), 0).astype(v_EF.dtype)
    for k in range(K):
        head = slice(k * H, (k + 1) * H)
        score_IE = dot(q_KIH[k], k_EF[:, head], (1, 1))
        if seen_IE is not None:
            score_IE = jnp.where(seen_IE, score_IE, MASKED)
        best_I1 = jnp.maximum(best_KIL[k][:, :1], score_IE.max(1, keepdims=True))
        weight_IE, shrink_I1 = jnp.exp(score_IE - best_I1), jnp.exp(best_KIL[k][:, :1] - best_I1)
        total_I1 = total_KIL[k][:, :1] * shrink_I1 + weight_IE.sum(1, keepdims=True)
        acc_KIH[k] = acc_KIH[k] * shrink_I1 + dot(weight_IE.astype(v_EF.dtype), v_EF[:, head], (1, 0))
        best_KIL[k] = jnp.broadcast_to(best_I1, (I, LANES))
        total_KIL[k] = jnp.broadcast_to(total_I1, (I, LANES))
