"""Samples tokens from logits on the device, every row with its own parameters as data.

Rows that use no filter, and steps in which no row draws, do not pay for it (`pallas_kernels.sampling.op`).

Shape letters: B rows, V vocabulary, M = 20 best tokens reported, G lanes and J tokens of a lane.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.rows.op import logsumexp
from pallas_kernels.sampling.op import Choices, draw
from serve.engine.logit_edits import LogitEdits, edited
from serve.engine.request import MAX_TOP_LOGPROBS, SamplingParams

INT32_MAX = 2**31 - 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SamplingBatch:
    """How each row chooses its next token."""

    temperature_B: jax.Array  # float32; 0 is greedy
    top_p_B: jax.Array  # float32 in (0, 1]
    top_k_B: jax.Array  # int32; 0 is all
    min_p_B: jax.Array  # float32 in [0, 1]
    seed_BE: jax.Array  # uint32 [B, 2]: the request's seed
    choice_B: jax.Array  # uint32 which of n choices
    position_B: jax.Array  # uint32 place of the token that is chosen
    logprobs_B: jax.Array  # bool: report the best alternatives

    @staticmethod
    def idle(rows: int) -> SamplingBatch:
        """Returns NumPy rows that choose greedily and report nothing, for the host to fill."""
        kinds = {"top_k_B": np.int32, "choice_B": np.uint32, "position_B": np.uint32, "logprobs_B": bool}
        zero = {f.name: np.zeros(rows, kinds.get(f.name, np.float32)) for f in fields(SamplingBatch)}
        special = {"seed_BE": np.zeros((rows, 2), np.uint32), "top_p_B": np.ones(rows, np.float32)}
        return SamplingBatch(**zero | special)  # ty: ignore[invalid-argument-type]

    def fill(self, row: int, params: SamplingParams, seed: int, position: int) -> None:
        """Sets one row of a NumPy batch."""
        values = {
            "temperature_B": params.temperature,
            "top_p_B": params.top_p,
            "top_k_B": min(max(params.top_k, 0), INT32_MAX),
            "min_p_B": params.min_p,
            "seed_BE": (seed >> 32, seed & 0xFFFFFFFF),
            "choice_B": params.choice,
            "position_B": position,
            "logprobs_B": params.logprobs is not None,
        }
        for name, value in values.items():
            getattr(self, name)[row] = value


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PromptScores:
    """Scores of known tokens (raw float32 log-softmax); zeros in a step where none is wanted."""

    logprob_GJ: jax.Array  # float32
    rank_GJ: jax.Array  # int32; 1 is the likeliest token
    top_token_GJM: jax.Array  # int32, best first
    top_logprob_GJM: jax.Array  # float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """One token per row, and its score (raw float32 log-softmax, before any edit)."""

    token_B: jax.Array  # int32
    logprob_B: jax.Array  # float32
    finite_B: jax.Array  # bool: all logits of the row were finite
    top_token_BM: jax.Array  # int32, best first; zeros where no row asked
    top_logprob_BM: jax.Array  # float32
    scores: PromptScores | None = None  # of a step of prompt chunks


def sample(logits_BV: jax.Array, edits: LogitEdits, batch: SamplingBatch) -> StepOutput:
    """Samples the next token of each row.  A row's draw depends on its seed, choice, position, logits and edits alone."""
    logits_BV = logits_BV.astype(jnp.float32)

    # Edited logits are no value of their own here: a branch that gives back what it got would copy it.
    greedy_B = lax.cond(edits.used, lambda x_BV: _best(edited(x_BV, edits)), _best, logits_BV)
    hot = (batch.temperature_B > 0).any()
    token_B = lax.cond(
        hot, lambda x_BV, g_B: _draw(edited(x_BV, edits), g_B, batch), lambda _, g_B: g_B, logits_BV, greedy_B
    )
    total_B = logsumexp(logits_BV)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    count = min(MAX_TOP_LOGPROBS, logits_BV.shape[1])
    shape = (logits_BV.shape[0], count)

    def tops() -> tuple[jax.Array, jax.Array]:
        value_BM, token_BM = lax.top_k(logits_BV, count)
        return token_BM, value_BM - total_B[:, None]

    def none() -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    top_token_BM, top_logprob_BM = lax.cond(batch.logprobs_B.any(), tops, none)
    return StepOutput(
        token_B=token_B,
        logprob_B=chosen_B - total_B,
        finite_B=jnp.isfinite(logits_BV).all(axis=-1),
        top_token_BM=top_token_BM,
        top_logprob_BM=top_logprob_BM,
    )


def _best(x_BV: jax.Array) -> jax.Array:
    """Returns int32 [B]: the first of each row's largest entries; any where one is NaN.

    Two plain reductions over float32: XLA's CPU backend computes `argmax` element by element.  Indices are exact below 2**24.
    """
    V = x_BV.shape[1]
    is_best_BV = x_BV == x_BV.max(axis=-1, keepdims=True)
    first_B = jnp.where(is_best_BV, jnp.arange(V, dtype=jnp.float32), float(V - 1)).min(axis=-1)
    return first_B.astype(jnp.int32)


def _draw(logits_BV: jax.Array, greedy_B: jax.Array, batch: SamplingBatch) -> jax.Array:
    def uniform(seed_E: jax.Array, choice: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(seed_E, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, choice), position))

    choices = Choices(
        temperature_B=batch.temperature_B,
        top_p_B=batch.top_p_B,
        top_k_B=batch.top_k_B,
        min_p_B=batch.min_p_B,
        uniform_B=jax.vmap(uniform)(batch.seed_BE, batch.choice_B, batch.position_B),
    )
    return jnp.where(batch.temperature_B > 0, draw(logits_BV, choices), greedy_B)
