"""Logit processing before a token is chosen: penalties, biases, min_tokens, grammars.

A row's changed tokens are a list, its allowed tokens bits.  Both are data of fixed shapes, made on the host from the
tokens so far.  Steps in which no row has any get arrays that lie on the device already, and skip the work.

Shape letters: B rows, V vocabulary, K changed tokens of a row, W = V / 32 words of bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jaxlora.core.errors import InvalidRequest
from jaxlora.model.mesh import place_rows
from serve.engine.request import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, SamplingParams

NOT_SEEN, IN_PROMPT = -1, 0  # of count_BK; from 1 on: how often it was generated
ALL_BITS = np.uint32(2**32 - 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TokenEdits:
    """Tokens whose logits change, at most K a row."""

    token_BK: jax.Array  # int32, each once; V is an empty place
    bias_BK: jax.Array  # float32 added first; -inf: the token may not be chosen
    count_BK: jax.Array  # int32 how often the row has generated the token; NOT_SEEN and IN_PROMPT beside
    repetition_B: jax.Array  # float32 divides positive logits of seen tokens, multiplies negative ones
    frequency_B: jax.Array  # float32 subtracted for each time it was generated
    presence_B: jax.Array  # float32 subtracted once if it was generated
    used_B: jax.Array  # bool: the row has such tokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class AllowedTokens:
    """Tokens that a grammar allows; all of them in rows without one."""

    bits_BW: jax.Array  # uint32; token t is bit t % 32 of word t // 32
    used_B: jax.Array  # bool: the row has a grammar


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LogitEdits:
    """All changes of the rows' logits."""

    tokens: TokenEdits
    allowed: AllowedTokens

    @property
    def used(self) -> jax.Array:
        """bool: whether some row has an edit."""
        return (self.tokens.used_B | self.allowed.used_B).any()

    @staticmethod
    def idle(rows: int, places: int, vocab: int) -> LogitEdits:
        """Returns NumPy rows without edits."""
        arrays = {
            "token_BK": np.full((rows, places), vocab, np.int32),
            "bias_BK": np.zeros((rows, places), np.float32),
            "count_BK": np.full((rows, places), NOT_SEEN, np.int32),
            "repetition_B": np.ones(rows, np.float32),
            "frequency_B": np.zeros(rows, np.float32),
            "presence_B": np.zeros(rows, np.float32),
            "used_B": np.zeros(rows, bool),
        }
        allowed = {"bits_BW": np.full((rows, -(-vocab // 32)), ALL_BITS, np.uint32), "used_B": np.zeros(rows, bool)}
        return LogitEdits(
            tokens=TokenEdits(**arrays),  # ty: ignore[invalid-argument-type]
            allowed=AllowedTokens(**allowed),  # ty: ignore[invalid-argument-type]
        )


def edited(logits_BV: jax.Array, edits: LogitEdits) -> jax.Array:
    """Returns float32 [B, V]: the edited logits.  Rows without edits come back bit for bit, steps without any skip the work."""
    tokens, allowed = edits.tokens, edits.allowed
    changed_BV = lax.cond(tokens.used_B.any(), lambda x: _change_tokens(x, tokens), lambda x: x, logits_BV)
    return lax.cond(allowed.used_B.any(), lambda x: _keep_allowed(x, allowed), lambda x: x, changed_BV)


def all_edited(logits_BV: jax.Array, edits: LogitEdits) -> jax.Array:
    """Returns what `edited` does, without a branch."""
    return _keep_allowed(_change_tokens(logits_BV, edits.tokens), edits.allowed)


def _change_tokens(logits_BV: jax.Array, edits: TokenEdits) -> jax.Array:
    """Bias, then the repetition penalty, then frequency and presence: the order of vLLM."""
    most = jnp.finfo(jnp.float32).max
    places_BK = jnp.minimum(edits.token_BK, logits_BV.shape[1] - 1)
    x_BK = jnp.take_along_axis(logits_BV, places_BK, axis=1) + edits.bias_BK
    repetition_BK = jnp.where(edits.count_BK != NOT_SEEN, edits.repetition_B[:, None], 1.0)
    x_BK = jnp.where(x_BK > 0, x_BK / repetition_BK, x_BK * repetition_BK)
    times_BK = jnp.maximum(edits.count_BK, 0)
    x_BK = x_BK - edits.frequency_B[:, None] * times_BK - jnp.where(times_BK > 0, edits.presence_B[:, None], 0.0)
    x_BK = jnp.where(edits.bias_BK == -jnp.inf, -jnp.inf, jnp.clip(x_BK, -most, most))
    return jax.vmap(lambda row_V, token_K, x_K: row_V.at[token_K].set(x_K, mode="drop"))(
        logits_BV, edits.token_BK, x_BK
    )


def _keep_allowed(logits_BV: jax.Array, allowed: AllowedTokens) -> jax.Array:
    bits_BW32 = (allowed.bits_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, :]) & 1
    bits_BV = bits_BW32.reshape(logits_BV.shape[0], -1)[:, : logits_BV.shape[1]]
    return jnp.where(bits_BV == 1, logits_BV, -jnp.inf)


class RowEdits:
    """One request's list of changed tokens, kept up to date as it generates.

    ends: the tokens that would end it, which may not come before min_tokens.
    Raises InvalidRequest for a token id that the model does not have.
    """

    def __init__(self, params: SamplingParams, prompt: Iterable[int], ends: Iterable[int], vocab: int):
        for name, ids in (("logit_bias", [t for t, _ in params.logit_bias]), ("stop_token_ids", params.stop_token_ids)):
            if wrong := [t for t in ids if not 0 <= t < vocab]:
                raise InvalidRequest(f"{name} has the token id {wrong[0]}; ids go from 0 to {vocab - 1}", param=name)
        self._params = params
        self._bias = dict(params.logit_bias)
        self._ends = tuple(ends) if params.min_tokens else ()
        self._penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) != (1, 0, 0)
        self._generated = 0
        self._place: dict[int, int] = {}  # of a token in the list
        seen = np.unique(np.fromiter(prompt, np.int32)) if params.repetition_penalty != 1 else np.zeros(0, np.int32)
        room = len(seen) + len(self._bias) + len(self._ends) + (params.max_tokens if self._penalties else 0)
        self._token, self._count = np.zeros(room, np.int32), np.full(room, NOT_SEEN, np.int32)
        self._bias_of = np.zeros(room, np.float32)
        for token in seen.tolist():
            self._count[self._at(token)] = IN_PROMPT
        for token, bias in self._bias.items():
            self._bias_of[self._at(token)] = bias
        for token in self._ends:
            self._bias_of[self._at(token)] = -np.inf

    @property
    def used(self) -> bool:
        """Whether the logits are changed before the next token is chosen."""
        return bool(self._place)

    @property
    def ever_used(self) -> bool:
        """Whether they are changed before some token, now or later."""
        return self._penalties or self.used

    def take(self, token: int) -> None:
        """Counts a token that the request has generated."""
        self._generated += 1
        if self._penalties:
            at = self._at(token)
            self._count[at] = max(self._count[at], 0) + 1
        if self._generated == self._params.min_tokens:
            for end in self._ends:
                self._bias_of[self._at(end)] = self._bias.get(end, 0.0)

    def fill(self, edits: TokenEdits, row: int, *, must_end: bool) -> None:
        """Writes the list into one row of a NumPy batch.  must_end: the grammar allows no other token, so min_tokens cannot be kept."""
        used = len(self._place)
        for array, values in (
            (edits.token_BK, self._token),
            (edits.bias_BK, self._bias_of),
            (edits.count_BK, self._count),
        ):
            array[row, :used] = values[:used]
        for end in self._ends if must_end else ():
            edits.bias_BK[row, self._place[end]] = self._bias.get(end, 0.0)
        edits.repetition_B[row] = self._params.repetition_penalty
        edits.frequency_B[row] = self._params.frequency_penalty
        edits.presence_B[row] = self._params.presence_penalty
        edits.used_B[row] = True

    def _at(self, token: int) -> int:
        at = self._place.setdefault(token, len(self._place))
        self._token[at] = token
        return at


class EditArrays:
    """Makes the edits of a step: NumPy arrays to fill where some row has edits, idle arrays on the device elsewhere."""

    def __init__(self, mesh: Mesh, *, max_tokens: int, vocab: int, ends: int):
        """max_tokens: of a sequence; ends: end-of-sequence tokens that the model has."""
        self._mesh, self._vocab = mesh, vocab
        self._places = min(vocab, max_tokens + MAX_LOGIT_BIAS + MAX_STOP_TOKEN_IDS + ends)  # the most of any request
        self._idle: dict[int, LogitEdits] = {}

    def make(self, rows: int, *, tokens: bool, allowed: bool) -> LogitEdits:
        """Returns the edits of so many rows; `tokens` and `allowed`: whether some row will fill that part."""
        if rows not in self._idle:
            self._idle[rows] = place_rows(self._mesh, LogitEdits.idle(rows, self._places, self._vocab))
        idle = self._idle[rows]
        if not tokens and not allowed:
            return idle
        fresh = LogitEdits.idle(rows, self._places, self._vocab)
        return LogitEdits(
            tokens=fresh.tokens if tokens else idle.tokens, allowed=fresh.allowed if allowed else idle.allowed
        )

    def are_idle(self, edits: LogitEdits) -> bool:
        """Whether these are the ones of `make` without edits, which lie on the device."""
        return edits is self._idle.get(len(edits.tokens.used_B))

    def place(self, edits: LogitEdits) -> LogitEdits:
        """Copies the edits to the device; idle ones of `make` lie there already."""
        return edits if self.are_idle(edits) else place_rows(self._mesh, edits)
