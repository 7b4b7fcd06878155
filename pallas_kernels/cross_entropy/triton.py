"""CUDA bodies of `target_logprob`, forward and backward: Triton kernels over tiles of tokens and words.

    statistics   logits = x @ head + h @ b on the chip, their maximum, sum of exponentials and the targets' own
    gradient     logits again, and from them d_logits of one trip, some tokens of every lane
    then         dx = d_logits @ head.T by XLA's product, dh and db by the kernel of `segmented_lora`

dx needs all words for all features of a token, more than a program can hold; many programs that add to one place would
add in any order.  So d_logits of a trip, in x's dtype, are in memory: never those of all tokens, and never logits.

Products in x's dtype, sums in float32 and in a fixed order.  Tokens come packed, wanted ones first: tiles of unwanted
tokens are skipped.  A tile belongs to one lane, so what one lane holds reaches no other.

Compiled for H100 and checked with Triton's interpreter; never run on a GPU.

Shape letters: G lanes, J tokens of a lane, C those of a trip, K targets of a token, D model, V vocabulary, R LoRA rank,
S parts of the vocabulary.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import triton  # ty: ignore[import-not-found]
import triton.language as tl  # ty: ignore[import-not-found]
from jax import lax

from pallas_kernels.loops import filled, run_of, trips, with_run
from pallas_kernels.segmented_lora.triton import expand_back, lane_tile
from pallas_kernels.tiling_cuda import WORD_ROWS, WORD_SPLITS, WordTile, power_of_two, word_tile
from pallas_kernels.triton_launch import launch

Halves = tuple[jax.Array, jax.Array]  # h_GJR scaled, b_GRV
STEP = 64  # features, or ranks, of a product that are loaded at once


@triton.jit
def _logits(
    x,
    head,
    h,
    b,
    token,
    word,
    J: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    BY_WORD: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    STEP: tl.constexpr,
    RANK: tl.constexpr,
):
    """Returns float32 [TOKENS, WORDS] logits of this lane; undefined past the ends."""
    total = tl.zeros((TOKENS, WORDS), tl.float32)
    for start in range(0, D, STEP):
        feature = start + tl.arange(0, STEP)
        if BY_WORD:
            place = word.to(tl.int64)[None, :] * D + feature[:, None]
        else:
            place = feature.to(tl.int64)[:, None] * V + word[None, :]
        inside = (feature < D)[:, None] & (word < V)[None, :]
        x_JD, head_DV = lane_tile(x, token, feature, J, D), tl.load(head + place, mask=inside, other=0.0)
        total = tl.dot(x_JD, head_DV.to(x_JD.dtype), total, input_precision="ieee")
    for start in range(0, R, RANK):
        rank = start + tl.arange(0, RANK)
        h_JR, b_RV = lane_tile(h, token, rank, J, R), lane_tile(b, rank, word, R, V)
        total = tl.dot(h_JR, b_RV.to(h_JR.dtype), total, input_precision="ieee")
    return total


@triton.jit
def _statistics(
    x,
    head,
    target,
    count,
    h,
    b,
    chosen,
    best,
    total,
    G: tl.constexpr,
    J: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    BY_WORD: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    STEP: tl.constexpr,
    RANK: tl.constexpr,
    PART: tl.constexpr,
    TARGETS: tl.constexpr,
):
    """Computes the statistics over PART words, for tiles of tokens that begin with a wanted one."""
    lane, first, part = tl.program_id(0), tl.program_id(1) * TOKENS, tl.program_id(2)
    if first < tl.load(count + lane):
        token, which = first + tl.arange(0, TOKENS), tl.arange(0, TARGETS)
        best_J = tl.full((TOKENS,), -1e38, tl.float32)  # finite: a row of NaN leaves it, and its sum is NaN
        total_J = tl.zeros((TOKENS,), tl.float32)
        chosen_JK = tl.zeros((TOKENS, TARGETS), tl.float32)
        for start in range(0, PART, WORDS):
            word = part * PART + start + tl.arange(0, WORDS)
            logits = _logits(x, head, h, b, token, word, J, D, V, R, BY_WORD, TOKENS, WORDS, STEP, RANK)
            for k in tl.static_range(K):
                target_J = tl.load(target + (lane * J + token) * K + k, mask=token < J, other=-1)
                own_J = tl.sum(tl.where(word[None, :] == target_J[:, None], logits, 0.0), 1)
                chosen_JK += tl.where(which[None, :] == k, own_J[:, None], 0.0)
            logits = tl.where((word < V)[None, :], logits, float("-inf"))
            new_J = tl.maximum(best_J, tl.max(logits, 1))
            total_J = total_J * tl.exp(best_J - new_J) + tl.sum(tl.exp(logits - new_J[:, None]), 1)
            best_J = new_J
        place = (part * G + lane) * J + token
        tl.store(best + place, best_J, mask=token < J)
        tl.store(total + place, total_J, mask=token < J)
        inside = (token < J)[:, None] & (which < K)[None, :]
        tl.store(chosen + place[:, None] * K + which[None, :], chosen_JK, mask=inside)


@triton.jit
def _gradient(
    x,
    head,
    target,
    count,
    lse,
    d,
    h,
    b,
    d_logits,
    J: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    BY_WORD: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    STEP: tl.constexpr,
    RANK: tl.constexpr,
):
    """Computes d_logits; zeros for tiles of tokens that begin with an unwanted one."""
    lane, first = tl.program_id(0), tl.program_id(1) * TOKENS
    token, word = first + tl.arange(0, TOKENS), tl.program_id(2) * WORDS + tl.arange(0, WORDS)
    total = tl.zeros((TOKENS, WORDS), tl.float32)
    if first < tl.load(count + lane):
        logits = _logits(x, head, h, b, token, word, J, D, V, R, BY_WORD, TOKENS, WORDS, STEP, RANK)
        lse_J = tl.load(lse + lane * J + token, mask=token < J, other=0.0)
        share = tl.exp(logits - lse_J[:, None])
        for k in tl.static_range(K):
            place = (lane * J + token) * K + k
            target_J = tl.load(target + place, mask=token < J, other=-1)
            d_J = tl.load(d + place, mask=token < J, other=0.0)
            hit = (word[None, :] == target_J[:, None]).to(tl.float32)
            total += d_J[:, None] * (hit - share)
    inside = (token < J)[:, None] & (word < V)[None, :]
    place = (lane * J + token).to(tl.int64)[:, None] * V + word[None, :]
    tl.store(d_logits + place, total.to(d_logits.dtype.element_ty), mask=inside)


def forward(
    x_GJD: jax.Array,
    head: jax.Array,
    target_GJK: jax.Array,
    count_G: jax.Array,
    lora: Halves | None,
    *,
    by_word: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns float32 (the targets' logits [G, J, K], the maximum logit, sum of exp(logits - maximum)), [G, J], packed.

    A target of -1 is in no device's vocabulary: its logit is 0.  Values are undefined where nothing is wanted.
    """
    G, J, K = target_GJK.shape
    tile, constants = _tile(x_GJD, head), _constants(x_GJD, head, K, lora, by_word)
    part = math.ceil(constants["V"] / WORD_SPLITS / tile.words) * tile.words
    S = math.ceil(constants["V"] / part)
    with jax.named_scope("target_logprob"):
        chosen, best, total = launch(
            *(x_GJD, head, target_GJK, count_G, *_operands(x_GJD, head, lora)),
            kernel=_statistics,
            name="target_logprob",
            out_type=tuple(jax.ShapeDtypeStruct((S, G, J, *more), jnp.float32) for more in ((K,), (), ())),
            grid=(G, math.ceil(J / tile.tokens), S),
            G=G,
            PART=part,
            TARGETS=1 << (K - 1).bit_length(),
            **constants,
        )
    best_GJ = best.max(0)
    return chosen.sum(0), best_GJ, (total * jnp.exp(best - best_GJ[None])).sum(0)


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
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Returns float32 (dx_GJD without LoRA's part, dh_GJR, db_GRV); zeros where nothing is wanted."""
    args, G = (x_GJD, target_GJK, count_G, lora, lse_GJ, d_GJK), len(count_G)
    lanes = WORD_ROWS // _tile(x_GJD, head).tokens
    if lanes >= G:
        return _backward_lanes(head, by_word, *args)
    blocks = jax.tree.map(lambda v: filled(v, lanes, axis=0).reshape(-1, lanes, *v.shape[1:]), args)
    found = lax.map(lambda block: _backward_lanes(head, by_word, *block), blocks)
    return jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:])[:G], found)


def _backward_lanes(
    head: jax.Array, by_word: bool, x_GJD, target_GJK, count_G, lora: Halves | None, lse_GJ, d_GJK
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Runs lanes whose trips fit WORD_ROWS."""
    G, J = lse_GJ.shape
    tokens = _tile(x_GJD, head).tokens
    C = min(math.ceil(J / tokens), WORD_ROWS // G // tokens) * tokens
    h_GJR, b_GRV = (None, None) if lora is None else lora
    whole = jax.tree.map(lambda v: filled(v, C, axis=1), (x_GJD, target_GJK, lse_GJ, d_GJK, h_GJR))

    def trip(i: jax.Array, out: tuple) -> tuple:
        x_GCD, target_GCK, lse_GC, d_GCK, h_GCR = jax.tree.map(lambda v: run_of(v, i, C), whole)
        halves = None if b_GRV is None else (h_GCR, b_GRV)
        d_GCV = _d_logits(x_GCD, head, target_GCK, count_G - i * C, halves, lse_GC, d_GCK, by_word)
        dx_GCD = jnp.einsum(
            "gcv,vd->gcd" if by_word else "gcv,dv->gcd", d_GCV, head, preferred_element_type=jnp.float32
        )
        dx_GJD, dh_GJR, db_GRV = out
        if halves is not None:
            dh_GCR, db = expand_back(d_GCV, *halves)
            dh_GJR, db_GRV = with_run(dh_GJR, dh_GCR, i), db_GRV + db
        return with_run(dx_GJD, dx_GCD, i), dh_GJR, db_GRV

    start = jax.tree.map(lambda v: jnp.zeros(v.shape, jnp.float32), (whole[0], whole[4], b_GRV))
    dx_GJD, dh_GJR, db_GRV = lax.fori_loop(0, trips(count_G, C), trip, start)
    return dx_GJD[:, :J], None if dh_GJR is None else dh_GJR[:, :J], db_GRV


@jax.named_scope("target_logprob_back")
def _d_logits(
    x_GCD: jax.Array,
    head: jax.Array,
    target_GCK: jax.Array,
    count_G: jax.Array,
    lora: Halves | None,
    lse_GC: jax.Array,
    d_GCK: jax.Array,
    by_word: bool,
) -> jax.Array:
    """Returns d_logits [G, C, V] in x's dtype."""
    G, C, K = target_GCK.shape
    tile, constants = _tile(x_GCD, head), _constants(x_GCD, head, K, lora, by_word)
    V = constants["V"]
    return launch(
        *(x_GCD, head, target_GCK, count_G, lse_GC, d_GCK, *_operands(x_GCD, head, lora)),
        kernel=_gradient,
        name="target_logprob_back",
        out_type=jax.ShapeDtypeStruct((G, C, V), x_GCD.dtype),
        grid=(G, C // tile.tokens, math.ceil(V / tile.words)),
        **constants,
    )


def _tile(x_GJD: jax.Array, head: jax.Array) -> WordTile:
    return word_tile(x_GJD.dtype.itemsize, head.dtype.itemsize)


def _operands(x_GJD: jax.Array, head: jax.Array, lora: Halves | None) -> Halves:
    """Returns h and b; with rank 0 nothing is read."""
    return (x_GJD, head) if lora is None else lora


def _constants(x_GJD: jax.Array, head: jax.Array, targets: int, lora: Halves | None, by_word: bool) -> dict:
    """Returns the constants of both kernels."""
    rank, tile = 0 if lora is None else lora[1].shape[1], _tile(x_GJD, head)
    return {
        "J": x_GJD.shape[1],
        "K": targets,
        "D": x_GJD.shape[2],
        "V": head.shape[0 if by_word else 1],
        "R": rank,
        "BY_WORD": by_word,
        "TOKENS": tile.tokens,
        "WORDS": tile.words,
        "STEP": STEP,
        "RANK": min(STEP, power_of_two(rank)) if rank else STEP,
        "num_warps": tile.warps,
    }
