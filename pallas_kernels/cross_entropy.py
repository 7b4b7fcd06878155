"""Log-probabilities of K >= 1 target tokens per position without the [T, V] logits, forward and backward.

Each lane's wanted positions are packed to its front and visited in chunks; the trip count is that of the lane with the
most targets, so prompt and padding tokens cost nothing.  The backward pass recomputes a chunk's logits.  LoRA on the
head is part of the chunk.

    logits_GJV[g] = x_GJD[g] @ head_DV + scale_G[g] * (x_GJD[g] @ a_GRD[g].T) @ b_GRV[g]

Shape letters: G lanes, J tokens of a lane, K targets of a token, D model, V vocabulary, R LoRA rank.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.placement import Placement
from pallas_kernels.segmented_lora import segmented_lora
from pallas_kernels.shapes import shaped

HeadLora = tuple[jax.Array, jax.Array, jax.Array]  # a_GRD, b_GRV, scale_G


@shaped
def target_logprob_oracle(
    x_GJD: jax.Array, head_DV: jax.Array, target_GJK: jax.Array, wanted_GJ: jax.Array, lora: HeadLora | None
) -> tuple[jax.Array, jax.Array]:
    """The definition: all logits at once.  Returns what `target_logprob` does."""
    logits = _logits(jnp.where(wanted_GJ[..., None], x_GJD, 0), head_DV, lora)
    logprob_GJK = jnp.take_along_axis(jax.nn.log_softmax(logits), target_GJK, axis=-1)
    hit_GJK = jnp.take_along_axis(logits, target_GJK, axis=-1) >= logits.max(axis=-1, keepdims=True)
    return jnp.where(wanted_GJ[..., None], logprob_GJK, 0.0), hit_GJK & wanted_GJ[..., None]


@shaped
def target_logprob(
    x_GJD: jax.Array,
    head_DV: jax.Array,
    back_VD: jax.Array,
    target_GJK: jax.Array,
    wanted_GJ: jax.Array,
    lora: HeadLora | None,
    *,
    chunk: int,
    placement: Placement | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(float32 log-probability of each target, bool: no token is likelier), both [G, J, K]; 0 and False where not wanted.

    Differentiable in x and in the head's LoRA; the head itself is frozen and gets no gradient.  What x holds where
    nothing is wanted, NaN too, is selected away.
    back_VD: the head's transpose, which the gradient is multiplied by.
    `chunk`: tokens per lane and trip; must divide J.
    placement: where the arrays of the head's LoRA lie, on a mesh of several devices.
    Raises ValueError when it does not.
    """
    if x_GJD.shape[1] % chunk:
        raise ValueError(f"target_logprob: chunk {chunk} does not divide the {x_GJD.shape[1]} tokens of a lane")
    order_GJ = jnp.argsort(~wanted_GJ, axis=1, stable=True)
    place_GJ = jnp.argsort(order_GJ, axis=1)
    x_GJD = jnp.take_along_axis(jnp.where(wanted_GJ[..., None], x_GJD, 0), order_GJ[..., None], axis=1)
    target_GJK = jnp.take_along_axis(target_GJK, order_GJ[..., None], axis=1)
    trips = -(-wanted_GJ.sum(1).max() // chunk)
    found = _chunked(x_GJD, lora, head_DV, back_VD, target_GJK, trips, chunk, placement)
    logprob_GJK, hit_GJK = (jnp.take_along_axis(y, place_GJ[..., None], axis=1) for y in found)
    return jnp.where(wanted_GJ[..., None], logprob_GJK, 0.0), hit_GJK & wanted_GJ[..., None]


def _logits(
    x_GJD: jax.Array, head_DV: jax.Array, lora: HeadLora | None, placement: Placement | None = None
) -> jax.Array:
    logits = jnp.einsum("gjd,dv->gjv", x_GJD, head_DV, preferred_element_type=jnp.float32)
    return logits if lora is None else logits + segmented_lora(x_GJD, [lora], placement)[0].astype(jnp.float32)


def _slice(x: jax.Array, trip: jax.Array, chunk: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, trip * chunk, chunk, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _chunked(x_GJD, lora: HeadLora | None, head_DV, back_VD, target_GJK, trips, chunk: int, placement):
    return _forward(x_GJD, lora, head_DV, back_VD, target_GJK, trips, chunk, placement)[0]


def _forward(x_GJD, lora, head_DV, back_VD, target_GJK, trips, chunk, placement):
    def body(trip, out):
        logits = _logits(_slice(x_GJD, trip, chunk), head_DV, lora, placement)
        best = logits.max(axis=-1)
        chosen = jnp.take_along_axis(logits, _slice(target_GJK, trip, chunk), axis=-1)
        lse = best + jnp.log(jnp.exp(logits - best[..., None]).sum(-1))
        new = (chosen - lse[..., None], chosen >= best[..., None], lse)
        return tuple(lax.dynamic_update_slice_in_dim(o, n, trip * chunk, axis=1) for o, n in zip(out, new, strict=True))

    start = [jnp.zeros(target_GJK.shape[:n], t) for n, t in ((3, jnp.float32), (3, bool), (2, jnp.float32))]
    logprob_GJK, hit_GJK, lse_GJ = lax.fori_loop(0, trips, body, tuple(start))
    return (logprob_GJK, hit_GJK), (x_GJD, lora, head_DV, back_VD, target_GJK, trips, lse_GJ)


def _backward(chunk, placement, saved, cotangent):
    x_GJD, lora, head_DV, back_VD, target_GJK, trips, lse_GJ = saved
    d_GJK, _ = cotangent
    vocab_11V = jnp.arange(head_DV.shape[1])[None, None]

    def body(trip, carry):
        dx_GJD, dlora = carry
        x, target = _slice(x_GJD, trip, chunk), _slice(target_GJK, trip, chunk)
        d, lse = _slice(d_GJK, trip, chunk), _slice(lse_GJ, trip, chunk)
        share = jnp.exp(_logits(x, head_DV, lora, placement) - lse[..., None])
        # Target by target, so that one loop over the logits does it all: a sum over K would first write all its terms.
        d_logits = functools.reduce(
            jnp.add,
            (d[:, :, k, None] * ((vocab_11V == target[:, :, k, None]) - share) for k in range(target.shape[2])),
        )
        dx = jnp.einsum("gjv,vd->gjd", d_logits.astype(x.dtype), back_VD, preferred_element_type=jnp.float32).astype(
            x.dtype
        )
        if lora is not None:
            _, pull = jax.vjp(lambda x, lora: segmented_lora(x, [lora], placement)[0], x, lora)
            dx_lora, dl = pull(d_logits.astype(x.dtype))
            dx, dlora = dx + dx_lora, jax.tree.map(jnp.add, dlora, dl)
        return lax.dynamic_update_slice_in_dim(dx_GJD, dx, trip * chunk, axis=1), dlora

    dx_GJD, dlora = lax.fori_loop(0, trips, body, (jnp.zeros_like(x_GJD), jax.tree.map(jnp.zeros_like, lora)))
    return dx_GJD, dlora, jnp.zeros_like(head_DV), jnp.zeros_like(back_VD), None, None


_chunked.defvjp(_forward, _backward)
