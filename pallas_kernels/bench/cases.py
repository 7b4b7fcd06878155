"""Benchmark cases: every op in the shapes of one layer of a model, beside its base product and alternatives.

The LoRA alternatives are those of other engines: gather each token's rows, multiply by all slots and mask, a one-hot
product over slots, `ragged_dot` over tokens sorted by slot.

Shape letters: T tokens, S slots, R LoRA rank, X Y features in, out, G J lanes and their tokens, N K query and kv heads,
H head, Z tokens per page, C pages per sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import NO_ADAPTER
from pallas_kernels.attention.op import packed_attention, packed_attention_reference
from pallas_kernels.cross_entropy.op import target_logprob, target_logprob_reference
from pallas_kernels.gathered_lora.op import gathered_lora
from pallas_kernels.gathered_lora.pool_rows import of_slots
from pallas_kernels.paged_attention.op import paged_attention, paged_attention_reference
from pallas_kernels.segmented_lora.op import segmented_lora

PAGE = 64  # tokens of a KV page


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a decoder layer and its head."""

    d: int
    heads: int
    kv_heads: int
    head: int
    ff: int
    vocab: int

    @property
    def reads(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Returns (features in, features out of every target that shares the read)."""
        q, kv = self.heads * self.head, self.kv_heads * self.head
        return {
            "qkv": (self.d, (q, kv, kv)),
            "o": (q, (self.d,)),
            "gate up": (self.d, (self.ff, self.ff)),
            "down": (self.ff, (self.d,)),
        }


MODELS = {
    "smollm2-135m": Model(d=576, heads=9, kv_heads=3, head=64, ff=1536, vocab=49152),
    "llama-3.2-1b": Model(d=2048, heads=32, kv_heads=8, head=64, ff=8192, vocab=128256),
    "qwen3-4b": Model(d=2560, heads=32, kv_heads=8, head=128, ff=9728, vocab=151936),
    "llama-3.1-8b": Model(d=4096, heads=32, kv_heads=8, head=128, ff=14336, vocab=128256),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How much work a case does."""

    rows: int  # decoding sequences
    adapters: int  # distinct adapters among them
    slots: int  # of the pool
    rank: int
    lanes: int
    tokens: int  # of a lane
    context: int  # tokens in the KV pages of a sequence

    def __post_init__(self) -> None:
        if not 1 <= self.adapters <= min(self.rows, self.slots):
            raise ValueError(f"{self.adapters} adapters are not between 1 and {self.rows} rows and {self.slots} slots")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One case, which is one line of the report."""

    shape: str
    bytes: int  # minimum memory traffic: each input once, each output once
    flops: int  # minimum computation
    forms: Mapping[str, tuple[Callable, tuple]]  # "ours", "base" and alternatives: function, arguments


# ---- LoRA alternatives: [T, Y] from x_TX, a_SRX, b_SRY, scale_S, slot_T ----------------------------------------------


def by_gather(x_TX, a_SRX, b_SRY, scale_S, slot_T) -> jax.Array:
    """Copies each token's rows out of the pool."""
    safe_T = jnp.maximum(slot_T, 0)
    h_TR = jnp.einsum("tx,trx->tr", x_TX, a_SRX[safe_T], preferred_element_type=jnp.float32) * scale_S[safe_T][:, None]
    y_TY = jnp.einsum("tr,try->ty", h_TR.astype(x_TX.dtype), b_SRY[safe_T], preferred_element_type=jnp.float32)
    return jnp.where((slot_T != NO_ADAPTER)[:, None], y_TY, 0)


def by_mask(x_TX, a_SRX, b_SRY, scale_S, slot_T) -> jax.Array:
    """Multiplies by all slots as one wide adapter and masks other slots' h.  A NaN of one slot reaches all."""
    S, R = a_SRX.shape[:2]
    h_TN = jnp.dot(x_TX, a_SRX.reshape(S * R, -1).T, preferred_element_type=jnp.float32)
    own_TS = slot_T[:, None] == jnp.arange(S)[None]
    h_TSR = jnp.where(own_TS[..., None], h_TN.reshape(-1, S, R) * scale_S[None, :, None], 0)
    return jnp.dot(
        h_TSR.reshape(-1, S * R).astype(x_TX.dtype), b_SRY.reshape(S * R, -1), preferred_element_type=jnp.float32
    )


def by_one_hot(x_TX, a_SRX, b_SRY, scale_S, slot_T) -> jax.Array:
    """Multiplies by a one-hot of the slot.  A NaN of one slot reaches all."""
    own_TS = (slot_T[:, None] == jnp.arange(a_SRX.shape[0])[None]).astype(x_TX.dtype)
    h_TSR = jnp.einsum("tx,srx->tsr", x_TX, a_SRX, preferred_element_type=jnp.float32)
    h_TSR = (h_TSR * scale_S[None, :, None]).astype(x_TX.dtype) * own_TS[..., None]
    return jnp.einsum("tsr,sry->ty", h_TSR, b_SRY, preferred_element_type=jnp.float32)


def by_ragged_dot(x_TX, a_SRX, b_SRY, scale_S, slot_T) -> jax.Array:
    """Sorts tokens by slot and calls `lax.ragged_dot` twice; base-model tokens are the last group, of zeros."""
    S = a_SRX.shape[0]
    group_T = jnp.where(slot_T == NO_ADAPTER, S, slot_T)
    order_T = jnp.argsort(group_T)
    count_S = jnp.bincount(group_T, length=S + 1)[:S].astype(jnp.int32)
    x_TX, safe_T = x_TX[order_T], jnp.minimum(group_T[order_T], S - 1)
    h_TR = lax.ragged_dot(x_TX, a_SRX.transpose(0, 2, 1), count_S, preferred_element_type=jnp.float32)
    h_TR = (h_TR * scale_S[safe_T][:, None]).astype(x_TX.dtype)
    y_TY = lax.ragged_dot(h_TR, b_SRY, count_S, preferred_element_type=jnp.float32)
    y_TY = jnp.where((group_T[order_T] < S)[:, None], y_TY, 0)
    return jnp.zeros_like(y_TY).at[order_T].set(y_TY)


GATHERED_ALTERNATIVES = {
    "gather": by_gather,
    "masked": by_mask,
    "one-hot": by_one_hot,
    "ragged_dot": by_ragged_dot,
}
SEGMENTED_ALTERNATIVES = {name: GATHERED_ALTERNATIVES[name] for name in ("masked", "one-hot", "ragged_dot")}


# ---- cases ------------------------------------------------------------------------------------------------------------


class _Draw:
    """Makes small random arrays of a dtype."""

    def __init__(self, dtype: str):
        self.rng, self.dtype = np.random.default_rng(0), dtype

    def __call__(self, *shape: int, dtype: str | None = None) -> jax.Array:
        return jnp.asarray(self.rng.standard_normal(shape, np.float32) * 0.02, dtype or self.dtype)


def _nbytes(*arrays: jax.Array) -> int:
    return sum(x.nbytes for x in arrays)


def _products(x_TX: jax.Array, weights: list[jax.Array]) -> tuple[jax.Array, ...]:
    return tuple(x_TX @ w for w in weights)


def _over_targets(form: Callable) -> Callable:
    def run(x_TX, rows, slot_T) -> tuple[jax.Array, ...]:
        return tuple(form(x_TX, *row, slot_T).astype(x_TX.dtype) for row in rows)

    return run


def gathered_cases(m: Model, dtype: str, n: Sizes) -> Iterator[Case]:
    """Yields decode cases: one token per sequence, with so many distinct adapters."""
    draw = _Draw(dtype)
    distinct = draw.rng.choice(n.slots, n.adapters, replace=False)
    slot_T = jnp.asarray(draw.rng.permutation(np.resize(distinct, n.rows)), jnp.int32)
    for name, (x, ys) in m.reads.items():
        x_TX, weights = draw(n.rows, x), [draw(x, y) for y in ys]
        rows = [(draw(1, n.slots, n.rank, x), draw(1, n.slots, n.rank, y), jnp.ones((1, n.slots))) for y in ys]
        flat = [tuple(half[0] for half in row) for row in rows]
        forms = {
            "ours": (gathered_lora, (x_TX, [of_slots(*row) for row in rows], jnp.int32(0), slot_T)),
            "base": (_products, (x_TX, weights)),
        } | {form: (_over_targets(f), (x_TX, flat, slot_T)) for form, f in GATHERED_ALTERNATIVES.items()}
        features, size = sum(x + y for y in ys), x_TX.dtype.itemsize
        moved = n.adapters * n.rank * features * size + n.rows * (x + sum(ys)) * size
        shape = f"{name}: {n.rows} rows, {n.adapters} adapters, rank {n.rank}"
        yield Case(shape=shape, bytes=moved, flops=2 * n.rows * n.rank * features, forms=forms)


def segmented_cases(m: Model, dtype: str, n: Sizes, *, backward: bool) -> Iterator[Case]:
    """Yields prefill and training cases, lanes of one adapter each: forward, or forward and backward."""
    draw = _Draw(dtype)
    slot_T = jnp.repeat(jnp.arange(n.lanes, dtype=jnp.int32), n.tokens)

    def sums(form: Callable) -> Callable:
        """Returns the forward pass, or the gradient by x and rows with the given cotangents."""
        if not backward:
            return lambda x, free, rest, ct: form(x, free, rest)
        return lambda x, free, rest, ct: jax.vjp(lambda x, free: form(x, free, rest), x, free)[1](ct)

    def lanes(x_TX, rows, slot_T) -> tuple[jax.Array, ...]:
        y_GJY = segmented_lora(x_TX.reshape(n.lanes, n.tokens, -1), rows)
        return tuple(y.reshape(len(x_TX), -1) for y in y_GJY)

    for name, (x, ys) in m.reads.items():
        T = n.lanes * n.tokens
        x_TX, weights, ct = draw(T, x), [draw(x, y) for y in ys], tuple(draw(T, y) for y in ys)
        rows = [(draw(n.lanes, n.rank, x), draw(n.lanes, n.rank, y), jnp.ones(n.lanes)) for y in ys]

        def base(x_TX, free, rest, ct) -> object:
            if not backward:
                return _products(x_TX, rest)
            y_TY, pull = jax.vjp(lambda x_TX: _products(x_TX, rest), x_TX)
            return y_TY, pull(ct)

        forms = {
            "ours": (sums(lanes), (x_TX, rows, slot_T, ct)),
            "base": (base, (x_TX, (), weights, ct)),
        } | {f: (sums(_over_targets(g)), (x_TX, rows, slot_T, ct)) for f, g in SEGMENTED_ALTERNATIVES.items()}
        features, passes = sum(x + y for y in ys), 3 if backward else 1
        moved = _nbytes(x_TX, *ct, *(half for row in rows for half in row)) * (2 if backward else 1)
        shape = f"{name}: {n.lanes} lanes x {n.tokens}, rank {n.rank}"
        yield Case(shape=shape, bytes=moved, flops=2 * T * n.rank * features * passes, forms=forms)


def attention_cases(m: Model, dtype: str, n: Sizes, *, backward: bool) -> Iterator[Case]:
    """Yields cases of packed lanes of one segment: forward, or forward and backward.  The base product is q_proj's."""
    draw = _Draw(dtype)
    q = draw(n.lanes, n.tokens, m.heads, m.head)
    k, v = (draw(n.lanes, n.tokens, m.kv_heads, m.head) for _ in range(2))
    segment_GJ = jnp.ones((n.lanes, n.tokens), jnp.int32)
    x_TX, weight = draw(n.lanes * n.tokens, m.d), draw(m.d, m.heads * m.head)

    def passes(op: Callable) -> Callable:
        def forward(q, k, v, segment_GJ) -> jax.Array:
            return op(q, k, v, segment_GJ, window=None)

        def both(q, k, v, segment_GJ) -> tuple:
            out, pull = jax.vjp(lambda *qkv: forward(*qkv, segment_GJ), q, k, v)
            return out, pull(q.astype(out.dtype))

        return both if backward else forward

    forms = {
        "ours": (passes(packed_attention), (q, k, v, segment_GJ)),
        "base": (_products, (x_TX, [weight])),
        "all scores": (passes(packed_attention_reference), (q, k, v, segment_GJ)),
    }
    products = 7 if backward else 2  # each over half of the pairs: forward, then its scores again and four of gradients
    yield Case(
        shape=f"{n.lanes} lanes x {n.tokens}",
        bytes=_nbytes(q, q, k, v) * (2 if backward else 1),
        flops=products * n.lanes * n.tokens**2 * m.heads * m.head,
        forms=forms,
    )


def paged_cases(m: Model, dtype: str, n: Sizes) -> Iterator[Case]:
    """Yields decode cases with full contexts.  The base product is q_proj's."""
    draw = _Draw(dtype)
    columns = -(-n.context // PAGE)
    q = draw(n.rows, 1, m.heads, m.head)
    k, v = (draw(1, n.rows * columns, PAGE, m.kv_heads * m.head) for _ in range(2))
    page_GC = jnp.asarray(draw.rng.permutation(n.rows * columns).reshape(n.rows, columns), jnp.int32)
    position_GJ = jnp.full((n.rows, 1), n.context - 1, jnp.int32)
    args = (q, k, v, jnp.int32(0), page_GC, position_GJ)
    forms = {
        "ours": (lambda *a: paged_attention(*a, window=None), args),
        "base": (_products, (draw(n.rows, m.d), [draw(m.d, m.heads * m.head)])),
        "gather pages": (lambda *a: paged_attention_reference(*a, window=None), args),
    }
    yield Case(
        shape=f"{n.rows} rows, {n.context} tokens of context",
        bytes=_nbytes(q, q) + 2 * n.rows * n.context * m.kv_heads * m.head * q.dtype.itemsize,
        flops=4 * n.rows * n.context * m.heads * m.head,
        forms=forms,
    )


class _Loss:
    """Arrays of a loss case, and the op and its reference over them: (x, head, LoRA of the head) → what the op returns."""

    def __init__(self, m: Model, dtype: str, n: Sizes):
        self.draw = draw = _Draw(dtype)
        self.x_GJD, self.head_DV = draw(n.lanes, n.tokens, m.d), draw(m.d, m.vocab)
        self.target_GJK = jnp.asarray(draw.rng.integers(0, m.vocab, (n.lanes, n.tokens, 1)), jnp.int32)
        self.wanted_GJ = jnp.ones((n.lanes, n.tokens), bool)
        self.chunk = next(c for c in (32, 16, 8, 4, 2, 1) if n.tokens % c == 0)

    def ours(self, x, w, lora) -> tuple[jax.Array, jax.Array]:
        return target_logprob(x, w, w.T, self.target_GJK, self.wanted_GJ, lora, chunk=self.chunk, tied=False)

    def all_logits(self, x, w, lora) -> tuple[jax.Array, jax.Array]:
        return target_logprob_reference(x, w, self.target_GJK, self.wanted_GJ, lora)


def loss_cases(m: Model, dtype: str, n: Sizes) -> Iterator[Case]:
    """Yields forward cases: log-probabilities of every token's target.  The base product is the head's."""
    of = _Loss(m, dtype, n)
    args = (of.x_GJD, of.head_DV, None)
    forms = {
        "ours": (of.ours, args),
        "base": (_products, (of.x_GJD.reshape(-1, m.d), [of.head_DV])),
        "all logits": (of.all_logits, args),
    }
    yield Case(
        shape=f"{n.lanes} lanes x {n.tokens}, {m.vocab} words",
        bytes=_nbytes(of.x_GJD, of.head_DV, of.target_GJK),
        flops=2 * n.lanes * n.tokens * m.d * m.vocab,
        forms=forms,
    )


def loss_grad_cases(m: Model, dtype: str, n: Sizes) -> Iterator[Case]:
    """Yields the same, forward and backward, with LoRA on the head.  The base product is the head's, in both."""
    of, tokens = _Loss(m, dtype, n), n.lanes * n.tokens
    halves = tuple(of.draw(n.lanes, n.rank, features, dtype="float32") for features in (m.d, m.vocab))
    args, scale_G = (of.x_GJD, of.head_DV, halves), jnp.ones(n.lanes)

    def gradient(op: Callable) -> Callable:
        def run(x, w, halves) -> tuple:
            return jax.grad(lambda x, halves: op(x, w, (*halves, scale_G))[0].sum(), argnums=(0, 1))(x, halves)

        return run

    forms = {
        "ours": (gradient(of.ours), args),
        "base": (lambda x, w: (x @ w) @ w.T, (of.x_GJD.reshape(-1, m.d), of.head_DV)),
        "all logits": (gradient(of.all_logits), args),
    }
    yield Case(
        shape=f"{n.lanes} lanes x {n.tokens}, {m.vocab} words, rank {n.rank}",
        bytes=_nbytes(of.x_GJD, of.x_GJD, of.head_DV, of.target_GJK, *halves, *halves),
        flops=4 * tokens * m.d * m.vocab + 6 * tokens * n.rank * (m.d + m.vocab),
        forms=forms,
    )


OPS: dict[str, Callable[[Model, str, Sizes], Iterator[Case]]] = {
    "gathered_lora": gathered_cases,
    "segmented_lora": functools.partial(segmented_cases, backward=False),
    "segmented_lora_grad": functools.partial(segmented_cases, backward=True),
    "attention": functools.partial(attention_cases, backward=False),
    "attention_grad": functools.partial(attention_cases, backward=True),
    "paged_attention": paged_cases,
    "target_logprob": loss_cases,
    "target_logprob_grad": loss_grad_cases,
}
