"""Table of losses: per-token losses of one lane, all with one signature, chosen by a number that is data.

    (float32 [J] log-probability of each target, LossInputs) → float32 [J] loss, whose plain sum is the lane's loss

No loss divides by a batch; the caller chooses the divisor.  `token_losses` runs each lane through its own loss alone.

Shape letters: G lanes, J tokens of a lane.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax

from jaxlora.config.training import LOSSES
from pallas_kernels.shapes import shaped


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """Inputs of a lane's loss besides its log-probabilities; `token_losses` takes them with a lane axis in front."""

    segment_J: jax.Array  # int32 sequence within the lane
    weight_J: jax.Array  # float32 factor of each token's loss, signed; a token of weight 0 takes no part in anything
    reference_J: jax.Array  # float32 log-probability under the sampler, or under DPO's reference model
    advantage_J: jax.Array  # float32
    ratio_J: jax.Array  # bool: the token counts in the ratio of its sequence
    pair_J: jax.Array  # int32: 1 in a chosen completion, -1 in the rejected one, which is the next segment; 0 elsewhere
    low_J: jax.Array  # float32 bounds of the ratio
    high_J: jax.Array
    beta: jax.Array  # float32


def cross_entropy(logprob_J: jax.Array, of: LossInputs) -> jax.Array:
    """Returns -weight * logprob."""
    return -of.weight_J * logprob_J


def dpo(logprob_J: jax.Array, of: LossInputs) -> jax.Array:
    """Returns -log sigmoid(beta * margin) of each pair, spread evenly over its tokens.

    The margin is how much more than the reference the model prefers the chosen completion.
    Source: direct preference optimisation (arXiv 2305.18290).
    """
    pair_J = jnp.where(of.weight_J != 0, of.pair_J, 0)
    first_J = of.segment_J - (pair_J < 0)  # the segment of the chosen completion, in both
    margin_J = segment_sums(pair_J * of.weight_J * (logprob_J - of.reference_J), first_J)
    tokens_J = segment_sums(jnp.abs(pair_J).astype(jnp.float32), first_J)
    return jnp.where(pair_J != 0, jax.nn.softplus(-of.beta * margin_J) / jnp.maximum(tokens_J, 1.0), 0.0)


def importance_sampling(logprob_J: jax.Array, of: LossInputs) -> jax.Array:
    """Returns -weight * ratio * advantage, the ratio being that of the probabilities now and when sampled."""
    return -of.weight_J * jnp.exp(logprob_J - of.reference_J) * of.advantage_J


def ppo(logprob_J: jax.Array, of: LossInputs) -> jax.Array:
    """Returns -weight * min(ratio * advantage, clip(ratio) * advantage).  Source: arXiv 1707.06347."""
    return _clipped(logprob_J - of.reference_J, of)


def cispo(logprob_J: jax.Array, of: LossInputs) -> jax.Array:
    """Returns -weight * clip(ratio) * logprob * advantage; no gradient through the ratio.  Source: arXiv 2506.13585."""
    ratio_J = jnp.exp(lax.stop_gradient(logprob_J) - of.reference_J)
    return -of.weight_J * jnp.clip(ratio_J, of.low_J, of.high_J) * logprob_J * of.advantage_J


def dro(logprob_J: jax.Array, of: LossInputs) -> jax.Array:
    """Returns -weight * (logprob * advantage - beta / 2 * (logprob - reference)²).  Source: arXiv 2405.19107."""
    return -of.weight_J * (logprob_J * of.advantage_J - 0.5 * of.beta * (logprob_J - of.reference_J) ** 2)


def gspo(logprob_J: jax.Array, of: LossInputs) -> jax.Array:
    """Returns PPO's loss with the sequence's ratio: the geometric mean of its counted tokens' ratios, 1 if none counts.

    Its gradient goes to each token as if the ratio were that token's own.  Source: arXiv 2507.18071.
    """
    counted_J = of.ratio_J & (of.weight_J != 0)
    held_J = lax.stop_gradient(logprob_J)
    total_J = segment_sums(jnp.where(counted_J, held_J - of.reference_J, 0.0), of.segment_J)
    count_J = segment_sums(counted_J.astype(jnp.float32), of.segment_J)
    return _clipped(total_J / jnp.maximum(count_J, 1.0) + (logprob_J - held_J), of)


def _clipped(log_ratio_J: jax.Array, of: LossInputs) -> jax.Array:
    """Returns -weight * min(ratio * advantage, clip(ratio) * advantage); the gradient is zero where it is clipped."""
    held_J = jnp.exp(lax.stop_gradient(log_ratio_J))
    bound_J = jnp.clip(held_J, of.low_J, of.high_J)
    cut_J = bound_J * of.advantage_J < held_J * of.advantage_J
    ratio_J = jnp.exp(jnp.where(cut_J, 0.0, log_ratio_J))  # selected twice: an infinite ratio has no gradient either
    return -of.weight_J * jnp.where(cut_J, bound_J, ratio_J) * of.advantage_J


def segment_sums(x_J: jax.Array, segment_J: jax.Array) -> jax.Array:
    """Returns float32 [J]: for each token the sum of x over its segment.  Other segments are masked by selection."""
    return jnp.where(segment_J[:, None] == segment_J[None], x_J[None], 0.0).sum(1)


_FUNCTIONS = (cross_entropy, dpo, importance_sampling, ppo, cispo, dro, gspo)
TABLE = {loss.__name__: loss for loss in _FUNCTIONS}
# A loss's number is its index.  Checkpointed: a switch saves what any branch would, and segment_sums is [J, J].
BRANCHES = tuple(jax.checkpoint(TABLE[name]) for name in LOSSES)


@shaped
def token_losses(logprob_GJ: jax.Array, loss_G: jax.Array, of: LossInputs) -> jax.Array:
    """Returns float32 [G, J]: each lane's tokens under its own loss, the only one computed; 0 where the weight is 0.

    A lane's bits do not depend on losses or numbers of other lanes.  Inputs at a token of weight 0, NaN too, are
    masked by selection, for the gradient as well.
    """
    wanted_GJ = of.weight_J != 0
    clean = replace(
        of,
        reference_J=jnp.where(wanted_GJ, of.reference_J, 0.0),
        advantage_J=jnp.where(wanted_GJ, of.advantage_J, 0.0),
    )
    logprob_GJ = jnp.where(wanted_GJ, logprob_GJ, 0.0)
    lanes = (loss_G, logprob_GJ, clean)
    loss_GJ = lax.map(lambda lane: lax.switch(lane[0], BRANCHES, *lane[1:]), lanes)
    return jnp.where(wanted_GJ, loss_GJ, 0.0)
