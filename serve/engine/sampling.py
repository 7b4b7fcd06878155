"""Samples tokens from logits on the device, every row with its own parameters as data.

Steps in which no row draws, filters, edits or reports alternatives do not pay for it.  On a CPU one program finds that out
(`sample`); elsewhere the host knows it and starts the program that does no more (`choose` of a `Work`, `best_alternatives`):
a branch on the device would wait for the host, or copy the logits.

Shape letters: B rows, V vocabulary, M = 20 best tokens reported, G lanes and J tokens of a lane.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.rows.op import RowSummary, row_summary, top_k
from pallas_kernels.sampling.op import Choices, draw
from serve.engine.logit_edits import LogitEdits, all_edited, edited
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
    """One token per row, and its score (raw float32 log-softmax, before any edit): what the host reads of a step."""

    token_B: jax.Array  # int32
    logprob_B: jax.Array  # float32
    finite_B: jax.Array  # bool: all logits of the row were finite
    top_token_BM: jax.Array | None = (
        None  # int32, best first; where no row asked none, or zeros of one program that does all
    )
    top_logprob_BM: jax.Array | None = None  # float32
    scores: PromptScores | None = None  # of a step of prompt chunks


class Work(enum.IntEnum):
    """What a step's rows need; each does all that those before it do, with the same bits."""

    GREEDY = 0
    DRAWN = 1  # with a temperature, and min-p
    FILTERED = 2  # with top-k and top-p
    EDITED = 3  # with logit edits

    @staticmethod
    def of(batch: SamplingBatch, *, edited: bool) -> Work:
        """Returns the least work that serves all rows of a NumPy batch."""
        if edited:
            return Work.EDITED
        if _filters(batch).any():
            return Work.FILTERED
        return Work.DRAWN if (batch.temperature_B > 0).any() else Work.GREEDY


def choose(
    logits_BV: jax.Array, edits: LogitEdits | None, batch: SamplingBatch, work: Work
) -> tuple[StepOutput, jax.Array]:
    """Samples the next token of each float32 row as `sample` does, without a branch; reports no alternatives.

    edits: of EDITED alone.  Returns (output, float32 [B] the logarithms of the sums of the logits' exponentials).
    """
    raw = row_summary(logits_BV)
    x_BV, of_x = logits_BV, raw
    if edits is not None:
        x_BV = all_edited(logits_BV, edits)
        of_x = row_summary(x_BV)
    token_B, logit_B = of_x.best_T, of_x.most_T
    if work >= Work.DRAWN:
        drawn = draw(x_BV, of_x.most_T, _choices(batch), filtered=work >= Work.FILTERED)
        token_B, logit_B = (
            jnp.where(batch.temperature_B > 0, x_B, best_B)
            for x_B, best_B in zip(drawn, (token_B, logit_B), strict=True)
        )
    if edits is not None:
        logit_B = _at(logits_BV, token_B)
    return _output(raw, token_B, logit_B), raw.logsumexp_T


def sample(logits_BV: jax.Array, edits: LogitEdits, batch: SamplingBatch) -> StepOutput:
    """Samples the next token of each row.  A row's draw depends on its seed, choice, position, logits and edits alone."""
    logits_BV = logits_BV.astype(jnp.float32)
    raw = row_summary(logits_BV)

    # Edited logits are no value of their own here: a branch that gives back what it got would copy it.
    greedy_B = lax.cond(
        edits.used,
        lambda x_BV: row_summary(edited(x_BV, edits)).best_T,
        lambda x_BV: row_summary(x_BV).best_T,
        logits_BV,
    )
    hot = (batch.temperature_B > 0).any()
    token_B = lax.cond(
        hot, lambda x_BV, g_B: _draw(edited(x_BV, edits), g_B, batch), lambda _, g_B: g_B, logits_BV, greedy_B
    )
    alternatives = lax.cond(
        batch.logprobs_B.any(),
        lambda: best_alternatives(logits_BV, raw.logsumexp_T),
        lambda: no_alternatives(logits_BV),
    )
    return _output(raw, token_B, _at(logits_BV, token_B), *alternatives)


Alternatives = tuple[jax.Array, jax.Array]  # int32 [B, M] tokens, best first; float32 [B, M] raw log-probabilities


def best_alternatives(logits_BV: jax.Array, total_B: jax.Array) -> Alternatives:
    """Returns each row's likeliest tokens.  total_B: float32 logarithm of the sum of the row's exponentials."""
    value_BM, token_BM = top_k(logits_BV, min(MAX_TOP_LOGPROBS, logits_BV.shape[1]))
    return token_BM, value_BM - total_B[:, None]


def no_alternatives(logits_BV: jax.Array) -> Alternatives:
    """Returns zeros in the place of the likeliest tokens."""
    shape = logits_BV.shape[0], min(MAX_TOP_LOGPROBS, logits_BV.shape[1])
    return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)


def _output(
    raw: RowSummary,
    token_B: jax.Array,
    logit_B: jax.Array,
    top_token_BM: jax.Array | None = None,
    top_logprob_BM: jax.Array | None = None,
) -> StepOutput:
    return StepOutput(
        token_B=token_B,
        logprob_B=logit_B - raw.logsumexp_T,
        finite_B=raw.finite_T,
        top_token_BM=top_token_BM,
        top_logprob_BM=top_logprob_BM,
    )


def _at(x_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BV, token_B[:, None], axis=-1)[:, 0]


def _filters(batch: SamplingBatch) -> jax.Array:
    """Returns bool [B]: which rows draw with top-k or top-p."""
    return (batch.temperature_B > 0) & ((batch.top_k_B > 0) | (batch.top_p_B < 1))


def _draw(logits_BV: jax.Array, greedy_B: jax.Array, batch: SamplingBatch) -> jax.Array:
    """Returns int32 [B]: the draws of rows with a temperature, the greedy tokens of others."""
    choices = _choices(batch)

    def drawn(x_BV: jax.Array, *, filtered: bool) -> jax.Array:
        return draw(x_BV, row_summary(x_BV).most_T, choices, filtered=filtered)[0]

    filters = _filters(batch).any()
    token_B = lax.cond(filters, partial(drawn, filtered=True), partial(drawn, filtered=False), logits_BV)
    return jnp.where(batch.temperature_B > 0, token_B, greedy_B)


def _choices(batch: SamplingBatch) -> Choices:
    def uniform(seed_E: jax.Array, choice: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(seed_E, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, choice), position))

    return Choices(
        temperature_B=batch.temperature_B,
        top_p_B=batch.top_p_B,
        top_k_B=batch.top_k_B,
        min_p_B=batch.min_p_B,
        uniform_B=jax.vmap(uniform)(batch.seed_BE, batch.choice_B, batch.position_B),
    )
