"""Log-probabilities of K >= 1 target tokens per position without the [T, V] logits, forward and backward.

Each lane's wanted positions are packed to its front and visited in chunks; the trip count is that of the lane with the
most targets, so prompt and padding tokens cost nothing.  The backward pass recomputes a chunk's logits.  LoRA on the
head is part of the chunk.  `dispatch` states which body runs.

On a mesh that splits the vocabulary each device keeps its part of the head: kernels' statistics of tokens are combined,
[G, J] and [G, J, K], and backward dx and dh are summed, as of any column-parallel product.

    logits_GJV[g] = x_GJD[g] @ head_DV + scale_G[g] * (x_GJD[g] @ a_GRD[g].T) @ b_GRV[g]

Shape letters: G lanes, J tokens of a lane, K targets of a token, D model, V vocabulary, R LoRA rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from pallas_kernels import tiling_cuda
from pallas_kernels.cross_entropy import pallas_tpu as cross_entropy_tpu
from pallas_kernels.dispatch import by_platform, known_dtypes
from pallas_kernels.loops import run_of, trips, with_run
from pallas_kernels.product.op import Packed, many_rows_fit, product, product_back
from pallas_kernels.rows.op import logsumexp
from pallas_kernels.segmented_lora.op import segmented_lora, shrink
from pallas_kernels.shapes import shaped
from pallas_kernels.sharding import Placement

FEW_ROWS = 64  # up to so many token rows in a product with the head, another order of operands is faster
HeadLora = tuple[jax.Array, jax.Array, jax.Array]  # a_GRD, b_GRV, scale_G
Head = jax.Array | Packed


@shaped
def target_logprob_reference(
    x_GJD: jax.Array, head_DV: jax.Array, target_GJK: jax.Array, wanted_GJ: jax.Array, lora: HeadLora | None
) -> tuple[jax.Array, jax.Array]:
    """Defines the op with all logits at once.  Returns what `target_logprob` does."""
    logits = _logits(jnp.where(wanted_GJ[..., None], x_GJD, 0), head_DV, lora)
    logprob_GJK = jnp.take_along_axis(jax.nn.log_softmax(logits), target_GJK, axis=-1)
    hit_GJK = jnp.take_along_axis(logits, target_GJK, axis=-1) >= logits.max(axis=-1, keepdims=True)
    return jnp.where(wanted_GJ[..., None], logprob_GJK, 0.0), hit_GJK & wanted_GJ[..., None]


@shaped
def target_logprob(
    x_GJD: jax.Array,
    head_DV: Head,
    back_VD: jax.Array,
    target_GJK: jax.Array,
    wanted_GJ: jax.Array,
    lora: HeadLora | None,
    *,
    chunk: int,
    tied: bool,
    placement: Placement | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns [G, J, K] (float32 log-probability of each target, bool: no token is likelier); 0, False where unwanted.

    Differentiable in x and in the head's LoRA; the head itself is frozen and gets no gradient.  Values of x where
    nothing is wanted, NaN too, are masked by selection.
    head_DV: plain, or packed for a CPU.
    back_VD: the head's transpose, which the gradient is multiplied by.
    chunk: tokens per lane and trip of the XLA body; must divide J.
    tied: back_VD, the embedding, is the array and head_DV its view, else the other way round; kernels read one of them.
    placement: mesh axes that split the head and its LoRA, on a mesh of several devices.
    Raises ValueError when chunk does not divide J.
    """
    if x_GJD.shape[1] % chunk:
        raise ValueError(f"target_logprob: chunk {chunk} does not divide the {x_GJD.shape[1]} tokens of a lane")
    order_GJ = jnp.argsort(~wanted_GJ, axis=1, stable=True)
    place_GJ = jnp.argsort(order_GJ, axis=1)
    x_GJD = jnp.take_along_axis(jnp.where(wanted_GJ[..., None], x_GJD, 0), order_GJ[..., None], axis=1)
    target_GJK = jnp.take_along_axis(target_GJK, order_GJ[..., None], axis=1)
    form = _Form(chunk=chunk, tied=tied, placement=placement)
    found = _packed(form, x_GJD, lora, head_DV, back_VD, target_GJK, wanted_GJ.sum(1))
    logprob_GJK, hit_GJK = (jnp.take_along_axis(y, place_GJ[..., None], axis=1) for y in found)
    return jnp.where(wanted_GJ[..., None], logprob_GJK, 0.0), hit_GJK & wanted_GJ[..., None]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Form:
    """The static arguments of an op."""

    chunk: int
    tied: bool
    placement: Placement | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _packed(form: _Form, x_GJD, lora: HeadLora | None, head_DV, back_VD, target_GJK, count_G):
    return _forward(form, x_GJD, lora, head_DV, back_VD, target_GJK, count_G)[0]


def _forward(form, *args):
    logprob_GJK, hit_GJK, lse_GJ = _dispatched(form, _forward_xla, _forward_kernels, args)
    return (logprob_GJK, hit_GJK), (*args, lse_GJ)


def _backward(form, saved, cotangent):
    *args, lse_GJ = saved
    dx_GJD, dlora = _dispatched(form, _backward_xla, _backward_kernels, args, lse_GJ, cotangent[0])
    return dx_GJD, dlora, None, None, None, None


_packed.defvjp(_forward, _backward)


def _dispatched(form: _Form, xla: Callable[..., tuple], run: Callable[..., tuple], args: Sequence, *more) -> tuple:
    """Runs the XLA body, or `_forward_kernels` or `_backward_kernels` with the platform's kernels."""
    by_word = cross_entropy_tpu.by_word(form.tied, args[0].shape[2])

    def placed(kernels: CrossEntropyKernels) -> Callable[..., tuple]:
        return functools.partial(run, kernels, form.placement)

    return by_platform(
        "target_logprob",
        *(*args, *more),
        xla=functools.partial(xla, form),
        pallas=(lambda interpret: placed(_tpu(by_word, interpret))) if _fits_tpu(form, *args) else None,
        triton=(lambda: placed(_cuda(form.tied))) if _fits_cuda(form, *args) else None,
    )


# ---- XLA --------------------------------------------------------------------------------------------------------------


def _logits(x_GJD: jax.Array, head_DV: Head, lora: HeadLora | None, placement: Placement | None = None) -> jax.Array:
    if isinstance(head_DV, Packed):
        (logits_TV,) = product(x_GJD.reshape(-1, x_GJD.shape[2]), [head_DV], jnp.int32(0), dtype=jnp.float32)
        logits = logits_TV.reshape(*x_GJD.shape[:2], -1)
    else:
        logits = jnp.einsum("gjd,dv->gjv", x_GJD, head_DV, preferred_element_type=jnp.float32)
    return logits if lora is None else logits + segmented_lora(x_GJD, [lora], placement)[0].astype(jnp.float32)


def _forward_xla(form, x_GJD, lora, head_DV, back_VD, target_GJK, count_G):
    chunk, placement = form.chunk, form.placement

    def body(trip, out):
        logits = _logits(run_of(x_GJD, trip, chunk), head_DV, lora, placement)
        best = logits.max(axis=-1)
        chosen = jnp.take_along_axis(logits, run_of(target_GJK, trip, chunk), axis=-1)
        lse = logsumexp(logits.reshape(-1, logits.shape[-1])).reshape(best.shape)
        new = (chosen - lse[..., None], chosen >= best[..., None], lse)
        return tuple(with_run(o, n, trip) for o, n in zip(out, new, strict=True))

    start = [jnp.zeros(target_GJK.shape[:n], t) for n, t in ((3, jnp.float32), (3, bool), (2, jnp.float32))]
    return lax.fori_loop(0, trips(count_G, chunk), body, tuple(start))


def _head_transposed(d_GJV: jax.Array, head_DV: Head, back_VD: jax.Array) -> jax.Array:
    """Returns float32 [G, J, D]: d_GJV times the head's transpose.

    A product with few rows on its left side keeps XLA's CPU backend from splitting its long sum: there the head is on the
    left.
    """
    few = d_GJV.shape[0] * d_GJV.shape[1] <= FEW_ROWS
    if isinstance(head_DV, Packed) and (few or many_rows_fit(d_GJV.dtype)):
        return product_back(d_GJV.reshape(-1, d_GJV.shape[2]), head_DV, jnp.int32(0)).reshape(*d_GJV.shape[:2], -1)
    if not few:
        return jnp.einsum("gjv,vd->gjd", d_GJV, back_VD, preferred_element_type=jnp.float32)
    return jnp.einsum("dv,gjv->dgj", head_DV, d_GJV, preferred_element_type=jnp.float32).transpose(1, 2, 0)


def _backward_xla(form, x_GJD, lora, head_DV, back_VD, target_GJK, count_G, lse_GJ, d_GJK):
    chunk, placement = form.chunk, form.placement
    vocab_11V = jnp.arange(head_DV.shape[1])[None, None]

    def body(trip, carry):
        dx_GJD, dlora = carry
        x, target = run_of(x_GJD, trip, chunk), run_of(target_GJK, trip, chunk)
        d, lse = run_of(d_GJK, trip, chunk), run_of(lse_GJ, trip, chunk)
        share = jnp.exp(_logits(x, head_DV, lora, placement) - lse[..., None])
        # Target by target, so that one loop over the logits suffices: a sum over K would first write all its terms.
        d_logits = functools.reduce(
            jnp.add,
            (d[:, :, k, None] * ((vocab_11V == target[:, :, k, None]) - share) for k in range(target.shape[2])),
        )
        dx = _head_transposed(d_logits.astype(x.dtype), head_DV, back_VD).astype(x.dtype)
        if lora is not None:
            _, pull = jax.vjp(lambda x, lora: segmented_lora(x, [lora], placement)[0], x, lora)
            dx_lora, dl = pull(d_logits.astype(x.dtype))
            dx, dlora = dx + dx_lora, jax.tree.map(jnp.add, dlora, dl)
        return with_run(dx_GJD, dx, trip), dlora

    start = jnp.zeros_like(x_GJD), jax.tree.map(jnp.zeros_like, lora)
    return lax.fori_loop(0, trips(count_G, chunk), body, start)


# ---- kernels ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossEntropyKernels:
    """Kernels for statistics of each token's logits, and for the gradients of x, h and b."""

    by_word: bool  # whether they read the head as [V, D]
    forward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    backward: Callable[..., tuple]  # dx_GJD, dh_GJR, db_GRV


def _tpu(by_word: bool, interpret: bool) -> CrossEntropyKernels:
    return CrossEntropyKernels(
        by_word=by_word,
        forward=functools.partial(cross_entropy_tpu.forward, by_word=by_word, interpret=interpret),
        backward=functools.partial(cross_entropy_tpu.backward, by_word=by_word, interpret=interpret),
    )


def _cuda(by_word: bool) -> CrossEntropyKernels:
    from pallas_kernels.cross_entropy import triton as cuda  # imports Triton

    return CrossEntropyKernels(
        by_word=by_word,
        forward=functools.partial(cuda.forward, by_word=by_word),
        backward=functools.partial(cuda.backward, by_word=by_word),
    )


def _fits_tpu(form: _Form, x_GJD, lora, head_DV, back_VD, target_GJK, count_G) -> bool:
    placement, by_word = form.placement, cross_entropy_tpu.by_word(form.tied, x_GJD.shape[2])
    if not _known(form, x_GJD, lora, head_DV):
        return False
    args = x_GJD, lora, back_VD if by_word else head_DV, target_GJK, count_G
    x, rows, head, target, _ = args if placement is None else placement.local(_specs(placement, lora, by_word), args)
    return cross_entropy_tpu.fits(x, head, target.shape[2], None if rows is None else rows[1], by_word=by_word)


def _fits_cuda(form: _Form, x_GJD, lora, head_DV, back_VD, target_GJK, count_G) -> bool:
    rank = 0 if lora is None else lora[0].shape[1]
    return tiling_cuda.installed() and rank <= tiling_cuda.RANK and _known(form, x_GJD, lora, head_DV)


def _known(form: _Form, x_GJD: jax.Array, lora: HeadLora | None, head_DV: Head) -> bool:
    """Returns whether kernels compute with these; with features split, logits would have to be summed over devices."""
    whole = form.placement is None or form.placement.x is None
    plain = not isinstance(head_DV, Packed)
    return whole and plain and known_dtypes(x_GJD, head_DV, *(() if lora is None else lora[:2]))


def _specs(placement: Placement, lora: HeadLora | None, by_word: bool) -> tuple:
    """Returns the specs of x, the head's LoRA, the head, targets and counts."""
    rows, y = P(placement.rows), placement.y
    head = P(y, None) if by_word else P(None, y)
    return rows, None if lora is None else (rows, P(placement.rows, None, y), rows), head, rows, rows


def _shrunk(x_GJD: jax.Array, lora: HeadLora) -> tuple[jax.Array, Callable[[jax.Array], tuple]]:
    """Returns (scaled h_GJR in x's dtype, dh → (dx, da, dscale))."""
    a_GRD, _, scale_G = lora
    return jax.vjp(lambda x, a, scale: shrink(x, [(a, scale)]), x_GJD, a_GRD, scale_G)


def _own_targets(target_GJK: jax.Array, words: int, axis: str | None) -> jax.Array:
    """Returns targets as indices into this device's part of the head; -1 for those of other devices."""
    if axis is None:
        return target_GJK
    own_GJK = target_GJK - lax.axis_index(axis) * words
    return jnp.where((own_GJK >= 0) & (own_GJK < words), own_GJK, -1)


def _forward_kernels(
    kernels: CrossEntropyKernels, placement: Placement | None, x_GJD, lora, head_DV, back_VD, target_GJK, count_G
):
    vocab = None if placement is None else placement.y

    def body(x_GJD, lora, head, target_GJK, count_G):
        halves = None if lora is None else (_shrunk(x_GJD, lora)[0], lora[1])
        own_GJK = _own_targets(target_GJK, head.shape[0 if kernels.by_word else 1], vocab)
        chosen_GJK, best_GJ, total_GJ = kernels.forward(x_GJD, head, own_GJK, count_G, halves)
        if vocab is not None:
            part_GJ, best_GJ = best_GJ, lax.pmax(best_GJ, vocab)
            chosen_GJK, total_GJ = lax.psum((chosen_GJK, total_GJ * jnp.exp(part_GJ - best_GJ)), vocab)
        visited_GJ = jnp.arange(x_GJD.shape[1])[None] < count_G[:, None]
        lse_GJ = jnp.where(visited_GJ, best_GJ + jnp.log(total_GJ), 0)
        return chosen_GJK - lse_GJ[..., None], chosen_GJK >= best_GJ[..., None], lse_GJ

    args = x_GJD, lora, back_VD if kernels.by_word else head_DV, target_GJK, count_G
    if placement is None:
        return body(*args)
    rows = P(placement.rows)
    return placement.on_each(body, _specs(placement, lora, kernels.by_word), (rows,) * 3)(*args)


def _backward_kernels(
    kernels: CrossEntropyKernels,
    placement: Placement | None,
    x_GJD,
    lora,
    head_DV,
    back_VD,
    target_GJK,
    count_G,
    lse_GJ,
    d_GJK,
):
    vocab = None if placement is None else placement.y

    def body(x_GJD, lora, head, target_GJK, count_G, lse_GJ, d_GJK):
        own_GJK = _own_targets(target_GJK, head.shape[0 if kernels.by_word else 1], vocab)
        args = x_GJD, head, own_GJK, count_G

        def summed(*parts: jax.Array) -> tuple[jax.Array, ...]:
            return parts if vocab is None else lax.psum(parts, vocab)

        if lora is None:
            dx_GJD, _, _ = kernels.backward(*args, None, lse_GJ, d_GJK)
            return summed(dx_GJD)[0].astype(x_GJD.dtype), None
        h_GJR, pull = _shrunk(x_GJD, lora)
        dx_GJD, dh_GJR, db_GRV = kernels.backward(*args, (h_GJR, lora[1]), lse_GJ, d_GJK)
        dx_GJD, dh_GJR = summed(dx_GJD, dh_GJR)
        more_GJD, da_GRD, dscale_G = pull(dh_GJR.astype(h_GJR.dtype))
        return (dx_GJD + more_GJD).astype(x_GJD.dtype), (da_GRD, db_GRV.astype(lora[1].dtype), dscale_G)

    args = x_GJD, lora, back_VD if kernels.by_word else head_DV, target_GJK, count_G
    if placement is None:
        return body(*args, lse_GJ, d_GJK)
    specs, rows = _specs(placement, lora, kernels.by_word), P(placement.rows)
    return placement.on_each(body, (*specs, rows, rows), specs[:2])(*args, lse_GJ, d_GJK)
