"""TPU body of `paged_attention`: a Mosaic kernel that reads pages from the pool in place.

One grid step is one run of a lane's tokens with the next few pages of its sequence.  The grid is as long as the pages that
the runs attend to together: a lane without tokens is never visited, a short sequence costs its own pages, a window's
past nothing.  JAX's own kernels need pages without a layer axis, interleaved keys and values, and not 3 kv heads.

Shape letters: G lanes, J tokens of a lane, N query heads, K kv heads, M queries per kv head, H head, L layers, P pages,
Z tokens per page, C pages per sequence, F = K * H, S runs (G * runs of a lane), I rows of a run's kv head (tokens * M),
V visits, E keys of a visit.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.op import MASKED
from pallas_kernels.tiling_tpu import LANES, blocks, dot, padded_bytes

ROWS, KEYS = 512, 512  # at most, of a run's kv head and of a visit
SCALAR_BYTES = 2**18  # of page numbers and visits


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """How a call is divided into visits."""

    tokens: int  # of a run
    pages: int  # of a visit


def cut(q_GJNH: jax.Array, k_LPZF: jax.Array, page_GC: jax.Array) -> Cut | None:
    """Returns the largest run that fits the chip; None where none fits, or with too many pages for scalar memory."""
    (G, J, N, H), (Z, F), C = q_GJNH.shape, k_LPZF.shape[2:], page_GC.shape[1]
    pages = min(C, max(1, KEYS // Z))
    K, M = F // H, N * H // F
    for tokens in (n for n in range(J, 0, -1) if J % n == 0):
        rows, visits = tokens * M, G * (J // tokens) * math.ceil(C / pages)
        held = 2 * 2 * pages * padded_bytes(Z, F, k_LPZF.dtype)
        held += 2 * 2 * K * padded_bytes(rows, H, q_GJNH.dtype) + 2 * padded_bytes(rows, 1, jnp.int32)
        held += K * (2 * padded_bytes(rows, LANES, jnp.float32) + padded_bytes(rows, H, jnp.float32))
        scalars = 4 * (G * C + 2 * visits + 2 * G * (J // tokens))
        if rows <= max(ROWS, M) and held <= blocks().block_bytes and scalars <= SCALAR_BYTES:
            return Cut(tokens=tokens, pages=pages)
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
    P, Z, F = k_LPZF.shape[1:]
    C, K = page_GC.shape[1], F // H
    M = N // K
    size = cut(q_GJNH, k_LPZF, page_GC)
    assert size is not None, "asked for what has no room"
    runs, I, E = J // size.tokens, size.tokens * M, size.pages * Z
    S = G * runs
    q = (q_GJNH * H**-0.5).astype(q_GJNH.dtype)
    q_SKIH = q.reshape(S, size.tokens, K, M, H).transpose(0, 2, 1, 3, 4).reshape(S, K, I, H)
    position_SJ = position_GJ.reshape(S, size.tokens)
    first_S, last_S, run_V, block_V, count = _visits(position_SJ, E, math.ceil(C / size.pages), window)

    def page_spec(b: int) -> pl.BlockSpec:
        def index(i, layer, run, block, first, last, page) -> tuple:
            column = jnp.minimum(block[i] * size.pages + b, lax.div(jnp.maximum(last[run[i]], 0), Z))
            # Without visits the first fetch may still begin: of a page that exists.
            return layer[0], jnp.clip(page[lax.div(run[i], runs) * C + column], 0, P - 1), 0, 0

        return pl.BlockSpec((pl.squeezed, pl.squeezed, Z, F), index)

    def run_spec(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((pl.squeezed, *shape), lambda i, layer, run, *_: (run[i], *(0,) * len(shape)))

    if not interpret:  # else small pools would be copied whole into the chip's memory
        k_LPZF, v_LPZF = (pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (k_LPZF, v_LPZF))
    pages = [page_spec(b) for b in range(size.pages)]
    out_SKIH = pl.pallas_call(
        functools.partial(_visit, window=window, pages=size.pages),
        out_shape=jax.ShapeDtypeStruct(q_SKIH.shape, q_SKIH.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(count,),
            in_specs=[run_spec(K, I, H), run_spec(I, 1), *pages, *pages],
            out_specs=run_spec(K, I, H),
            scratch_shapes=[pltpu.VMEM((K, I, n), jnp.float32) for n in (LANES, LANES, H)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=blocks().vmem_bytes),
        interpret=interpret,
        name="paged_attention",
    )(
        *(layer.reshape(1), run_V, block_V, first_S, last_S, page_GC.reshape(-1)),
        *(q_SKIH, jnp.repeat(position_SJ, M, axis=1)[:, :, None]),
        *(k_LPZF,) * size.pages,
        *(v_LPZF,) * size.pages,
    )
    return out_SKIH.reshape(S, K, size.tokens, M, H).transpose(0, 2, 1, 3, 4).reshape(G, J, N, H)


def _visits(position_SJ: jax.Array, keys: int, most: int, window: int | None) -> tuple[jax.Array, ...]:
    """Returns (first block of keys and last position of each run, run and block of each visit, number of visits)."""
    last_S = position_SJ.max(1)
    first_S = jnp.zeros_like(last_S)
    if window is not None:
        least_S = jnp.where(position_SJ >= 0, position_SJ, jnp.iinfo(jnp.int32).max).min(1)
        first_S = jnp.where(last_S >= 0, jnp.maximum(least_S - window + 1, 0) // keys, 0)
    visits_S = jnp.where(last_S >= 0, last_S // keys + 1 - first_S, 0)
    end_S = jnp.cumsum(visits_S)
    visit_V = jnp.arange(last_S.shape[0] * most, dtype=jnp.int32)
    run_V = (end_S[None, :] <= visit_V[:, None]).sum(1, dtype=jnp.int32)
    run_V = jnp.minimum(run_V, last_S.shape[0] - 1)  # past the last visit
    block_V = (visit_V - (end_S - visits_S - first_S)[run_V]).astype(jnp.int32)
    return first_S, last_S, run_V, block_V, end_S[-1]


def _visit(layer, run, block, first, last, page, q_KIH, position_I1, *refs, window: int | None, pages: int) -> None:
    """Attends with one run to the keys and values of its next pages, under an online softmax."""
    del layer, page  # used by the fetches
    k_EF, v_EF = (
        jnp.concatenate([page_ZF[...] for page_ZF in half]) for half in (refs[:pages], refs[pages : 2 * pages])
    )
    out_KIH, best_KIL, total_KIL, acc_KIH = refs[2 * pages :]
    i = pl.program_id(0)
    s, E, (K, I, H) = run[i], k_EF.shape[0], q_KIH.shape

    @pl.when(block[i] == first[s])
    def start() -> None:
        best_KIL[...] = jnp.full(best_KIL.shape, MASKED, jnp.float32)
        total_KIL[...] = jnp.zeros(total_KIL.shape, jnp.float32)
        acc_KIH[...] = jnp.zeros(acc_KIH.shape, jnp.float32)

    held_E1 = block[i] * E + lax.broadcasted_iota(jnp.int32, (E, 1), 0) <= last[s]
    v_EF = jnp.where(held_E1, v_EF.astype(jnp.float32), 0).astype(v_EF.dtype)
    key_IE, position_IE = block[i] * E + lax.broadcasted_iota(jnp.int32, (I, E), 1), position_I1[...]
    seen_IE = key_IE <= position_IE
    if window is not None:
        seen_IE &= key_IE > position_IE - window
    for k in range(K):
        head = slice(k * H, (k + 1) * H)
        score_IE = jnp.where(seen_IE, dot(q_KIH[k], k_EF[:, head], (1, 1)), MASKED)
        best_I1 = jnp.maximum(best_KIL[k][:, :1], score_IE.max(1, keepdims=True))
        weight_IE, shrink_I1 = jnp.exp(score_IE - best_I1), jnp.exp(best_KIL[k][:, :1] - best_I1)
        total_I1 = total_KIL[k][:, :1] * shrink_I1 + weight_IE.sum(1, keepdims=True)
        acc_KIH[k] = acc_KIH[k] * shrink_I1 + dot(weight_IE.astype(v_EF.dtype), v_EF[:, head], (1, 0))
        best_KIL[k] = jnp.broadcast_to(best_I1, (I, LANES))
        total_KIL[k] = jnp.broadcast_to(total_I1, (I, LANES))

    @pl.when(block[i] == lax.div(last[s], E))
    def end() -> None:
        for k in range(K):
            out_KIH[k] = (acc_KIH[k] / total_KIL[k][:, :1]).astype(out_KIH.dtype)
