"""Log-probabilities of target tokens without the [T, V] logits, forward and backward.

Each lane's wanted positions are packed to its front and visited in chunks; the trip count is that of the lane with the
most targets, so prompt and padding tokens cost nothing.  The backward pass recomputes a chunk's logits.  LoRA on the
head is part of the chunk.

    logits_GJV[g] = x_GJD[g] @ head_DV + scale_G[g] * (x_GJD[g] @ a_GRD[g].T) @ b_GRV[g]

Shape letters: G lanes, J tokens of a lane, D model, V vocabulary, R LoRA rank.
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
    x_GJD: jax.Array, head_DV: jax.Array, target_GJ: jax.Array, wanted_GJ: jax.Array, lora: HeadLora | None
) -> tuple[jax.Array, jax.Array]:
    """The definition: all logits at once.  Returns what `target_logprob` does."""
    logits = _logits(jnp.where(wanted_GJ[..., None], x_GJD, 0), head_DV, lora)
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), target_GJ[..., None], axis=-1)[..., 0]
    hit = jnp.take_along_axis(logits, target_GJ[..., None], axis=-1)[..., 0] >= logits.max(axis=-1)
    return jnp.where(wanted_GJ, logprob, 0.0), hit & wanted_GJ


@shaped
def target_logprob(
    x_GJD: jax.Array,
    head_DV: jax.Array,
    back_VD: jax.Array,
    target_GJ: jax.Array,
    wanted_GJ: jax.Array,
    lora: HeadLora | None,
    *,
    chunk: int,
    placement: Placement | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(float32 log-probability of the target, bool: no token is likelier), both [G, J]; 0 and False where not wanted.

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
    target_GJ = jnp.take_along_axis(target_GJ, order_GJ, axis=1)
    trips = -(-wanted_GJ.sum(1).max() // chunk)
    logprob_GJ, hit_GJ = _chunked(x_GJD, lora, head_DV, back_VD, target_GJ, trips, chunk, placement)
    logprob_GJ = jnp.take_along_axis(logprob_GJ, place_GJ, axis=1)
    hit_GJ = jnp.take_along_axis(hit_GJ, place_GJ, axis=1)
    return jnp.where(wanted_GJ, logprob_GJ, 0.0), hit_GJ & wanted_GJ


def _logits(
    x_GJD: jax.Array, head_DV: jax.Array, lora: HeadLora | None, placement: Placement | None = None
) -> jax.Array:
    logits = jnp.einsum("gjd,dv->gjv", x_GJD, head_DV, preferred_element_type=jnp.float32)
    return logits if lora is None else logits + segmented_lora(x_GJD, [lora], placement)[0].astype(jnp.float32)


def _slice(x: jax.Array, trip: jax.Array, chunk: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, trip * chunk, chunk, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _chunked(x_GJD, lora: HeadLora | None, head_DV, back_VD, target_GJ, trips, chunk: int, placement):
    return _forward(x_GJD, lora, head_DV, back_VD, target_GJ, trips, chunk, placement)[0]


def _forward(x_GJD, lora, head_DV, back_VD, target_GJ, trips, chunk, placement):
    def body(trip, out):
        logits = _logits(_slice(x_GJD, trip, chunk), head_DV, lora, placement)
        best = logits.max(axis=-1)
        chosen = jnp.take_along_axis(logits, _slice(target_GJ, trip, chunk)[..., None], axis=-1)[..., 0]
        lse = best + jnp.log(jnp.exp(logits - best[..., None]).sum(-1))
        new = (chosen - lse, chosen >= best, lse)
        return tuple(lax.dynamic_update_slice_in_dim(o, n, trip * chunk, axis=1) for o, n in zip(out, new, strict=True))

    zeros = jnp.zeros(target_GJ.shape, jnp.float32)
    logprob_GJ, hit_GJ, lse_GJ = lax.fori_loop(0, trips, body, (zeros, jnp.zeros(target_GJ.shape, bool), zeros))
    return (logprob_GJ, hit_GJ), (x_GJD, lora, head_DV, back_VD, target_GJ, trips, lse_GJ)


def _backward(chunk, placement, saved, cotangent):
    x_GJD, lora, head_DV, back_VD, target_GJ, trips, lse_GJ = saved
    d_GJ, _ = cotangent
    vocab_11V = jnp.arange(head_DV.shape[1])[None, None]

    def body(trip, carry):
        dx_GJD, dlora = carry
        x, target = _slice(x_GJD, trip, chunk), _slice(target_GJ, trip, chunk)
        d, lse = _slice(d_GJ, trip, chunk), _slice(lse_GJ, trip, chunk)
        share = jnp.exp(_logits(x, head_DV, lora, placement) - lse[..., None])
        d_logits = d[..., None] * ((vocab_11V == target[..., None]) - share)
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
