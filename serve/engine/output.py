"""Output processing of one request: it fills the request's rows of a batch and turns sampled tokens into deltas.

A failure in here ends this request, and no other.
"""

from __future__ import annotations

import functools
import logging
import secrets
from collections.abc import Callable

import jax
import numpy as np

from jaxlora.checkpoints.tokenizer import Tokenizer
from jaxlora.core.errors import AdapterInvalid, InvalidRequest, JaxLoraError
from jaxlora.core.lora import AdapterRef
from serve.engine.grammar import GrammarState
from serve.engine.logit_edits import ALL_BITS, AllowedTokens, LogitEdits, RowEdits
from serve.engine.request import Delta, FinishReason, PromptLogprob, Request, TokenLogprob
from serve.engine.sampling import PromptScores, StepOutput
from serve.engine.step import StepBatch

LOG = logging.getLogger("serve")


def failure_table(word: str) -> list[int]:
    """Returns for each prefix, at length - 1, the length of its longest proper suffix that is a prefix of the word."""
    table = [0] * len(word)
    length = 0
    for i in range(1, len(word)):
        while length and word[i] != word[length]:
            length = table[length - 1]
        if word[i] == word[length]:
            length += 1
        table[i] = length
    return table


class StopStrings:
    """Finds the first stop string in text that comes in pieces; holds back only what may still become one.

    The stop string that is complete first ends the text; of several complete at the same character, the longest.  How
    the text was cut never matters.  A character costs amortised constant time for each stop string.
    Source: Knuth, Morris, Pratt 1977.
    include: keep the stop string itself.  Nothing is held back then, since nothing already sent is ever cut.
    Raises InvalidRequest for an empty stop string.
    """

    def __init__(self, stops: tuple[str, ...], include: bool):
        if not all(stops):
            raise InvalidRequest("a stop string must not be empty; leave it out", param="stop")
        self._stops = stops
        self._tables = [failure_table(stop) for stop in stops]
        self._firsts = frozenset(stop[0] for stop in stops)
        self._matched = [0] * len(stops)  # how much of each stop string the text ends with
        self._include = include
        self._held = ""
        self._hit = False

    def push(self, text: str, *, armed: bool = True) -> tuple[str, bool]:
        """Returns (text that is safe to send, whether a stop string is complete).  After that, all text is dropped.

        armed: a stop string that becomes complete in this text counts; else it is text like any other.
        """
        if self._hit:
            return "", True
        if self._firsts.isdisjoint(text) and not any(self._matched):
            return text, False  # nothing is held back, and nothing begins
        seen = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            complete = self._step(char)
            if complete and armed:
                self._hit, self._held = True, ""
                return seen[: end if self._include else end - complete], True
        hold = 0 if self._include else max(self._matched, default=0)
        self._held = seen[len(seen) - hold :]
        return seen[: len(seen) - hold], False

    def flush(self) -> str:
        """Returns the text held back, at the end of a text that no stop string ended."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _step(self, char: str) -> int:
        """Returns the length of the longest stop string that this character completes, or 0."""
        complete = 0
        for i, (stop, table) in enumerate(zip(self._stops, self._tables, strict=True)):
            length = self._matched[i]
            while length and char != stop[length]:
                length = table[length - 1]
            if char == stop[length]:
                length += 1
            self._matched[i] = length
            if length == len(stop):
                complete = max(complete, length)
                self._matched[i] = table[-1]
        return complete


class OutputProcessor:
    """The state of one answer.  It is on the host and stays while its sequence is preempted, moved or computed again.

    Raises InvalidRequest for a token id that the model does not have.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, vocab: int):
        params = request.params
        self._id, self._prompt, self._params = request.id, request.prompt, params
        eos_ends = params.grammar is not None or not params.ignore_eos
        self._ends = frozenset(params.stop_token_ids) | (set(tokenizer.eos_ids) if eos_ends else set())
        self._grammar = None if params.grammar is None else params.grammar.start()
        self._edits = RowEdits(params, request.prompt, self._ends, vocab)
        self._seed = secrets.randbits(63) if params.seed is None else params.seed
        self._detokenizer = tokenizer.detokenizer()
        self._stops = StopStrings(params.stop, params.include_stop)
        self._generated = 0
        self._failed = False  # by an internal error, which is logged; `take` reports it
        self._prompt_logprobs: dict[int, PromptLogprob] = {}  # by place in the prompt

    # ---- inputs of a step -----------------------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Whether how a token is chosen depends on the one before."""
        return self._grammar is not None or self._edits.ever_used

    @property
    def edits_tokens(self) -> bool:
        """Whether the logits are changed before the next token is chosen."""
        return self._edits.used

    @property
    def has_grammar(self) -> bool:
        """Whether a grammar constrains the tokens."""
        return self._grammar is not None

    def choose(self, batch: StepBatch, row: int) -> None:
        """Writes into one row of NumPy arrays how its tokens are chosen; their position alone changes."""
        try:
            batch.sampling.fill(row, self._params, self._seed, 0)
        except BaseException:
            self._fail()

    def edit(self, edits: LogitEdits, row: int) -> None:
        """Writes into one row of NumPy arrays how the logits of its next token are changed."""
        try:
            must_end = self._grammar is not None and self._allow(edits.allowed, row, self._grammar)
            if self._edits.used:
                self._edits.fill(edits.tokens, row, must_end=must_end)
        except BaseException:
            self._fail()

    def _allow(self, allowed: AllowedTokens, row: int, grammar: GrammarState) -> bool:
        """Writes the tokens that the grammar allows into the row.  Returns whether they only end the answer."""
        bits_W: np.ndarray = np.asarray(allowed.bits_BW)[row]
        grammar.allow(bits_W)
        if grammar.error is not None:  # `take` reports it
            bits_W[:] = ALL_BITS
        allowed.used_B[row] = True
        rest_W = bits_W.copy()
        for end in self._ends:
            rest_W[end // 32] &= ~np.uint32(1 << end % 32)
        return not rest_W.any()

    def targets(self, start: int, count: int) -> tuple[int, ...]:
        """Returns the prompt tokens to score when `count` tokens from `start` on are computed."""
        if self._params.prompt_logprobs is None or self._generated:
            return ()
        return self._prompt[start + 1 : start + 1 + count]

    # ---- outputs of a step -----------------------------------------------------------------------------------------

    def score(self, scores: PromptScores, lane: int, start: int, count: int) -> None:
        """Keeps the scores of a lane that computed `count` prompt tokens from `start` on."""
        try:
            for j, token in enumerate(self.targets(start, count)):
                top = _pairs(
                    scores.top_token_GJM[lane, j], scores.top_logprob_GJM[lane, j], self._params.prompt_logprobs
                )
                self._prompt_logprobs[start + j + 1] = PromptLogprob(
                    token=token,
                    logprob=float(scores.logprob_GJ[lane, j]),
                    top=top,
                    rank=int(scores.rank_GJ[lane, j]),
                )
        except BaseException:
            self._fail()

    def take(self, out: StepOutput, row: int, adapter: AdapterRef | None, cached_tokens: int) -> Delta:
        """Returns the delta of this row's token; numbers that are not finite end the answer with an error.

        adapter: the version that made it.  cached_tokens: of the prompt, with its first token.
        """
        delta = functools.partial(Delta, request_id=self._id, adapter=adapter, cached_tokens=cached_tokens)
        if not self._failed:
            try:
                return self._take(out, row, delta)
            except BaseException:
                self._fail()
        return delta(error=JaxLoraError("this answer failed; the log has the reason"))

    def _fail(self) -> None:
        """Logs the exception that is handled.  Callers catch BaseException: a panic of the grammar library is no Exception."""
        LOG.exception("answer %s failed", self._id)
        self._failed = True

    def _take(self, out: StepOutput, row: int, delta: Callable[..., Delta]) -> Delta:
        error: Exception | None = None
        if not out.finite_B[row]:
            error = AdapterInvalid("the model gave non-finite numbers for this request; check its adapter")
        elif self._grammar is not None:
            error = self._grammar.error
        if error is not None:
            return delta(error=error)
        params, token = self._params, int(out.token_B[row])
        prompt_logprobs = ()
        if self._prompt_logprobs:
            prompt_logprobs = tuple(self._prompt_logprobs[i] for i in sorted(self._prompt_logprobs))
            self._prompt_logprobs.clear()
        if params.max_tokens == 0:
            return delta(finish=FinishReason.LENGTH, prompt_logprobs=prompt_logprobs)
        self._generated += 1
        self._edits.take(token)
        text, finish = self._text(token)
        logprobs = () if params.logprobs is None else (_logprob(out, row, params.logprobs),)
        return delta(text=text, tokens=(token,), logprobs=logprobs, prompt_logprobs=prompt_logprobs, finish=finish)

    def _text(self, token: int) -> tuple[str, FinishReason | None]:
        """Returns (text that may be sent now, why the answer ends with this token)."""
        ended = token in self._ends
        complete = self._grammar is not None and self._grammar.take(token)
        armed = self._generated > self._params.min_tokens
        text, hit = ("", False) if ended else self._stops.push(self._detokenizer.push(token), armed=armed)
        finish = None
        if ended or hit or complete:
            finish = FinishReason.STOP
        elif self._generated >= self._params.max_tokens:
            finish = FinishReason.LENGTH
        if finish is not None and not hit:
            tail, hit = self._stops.push(self._detokenizer.flush(), armed=armed)
            text += tail + ("" if hit else self._stops.flush())
        return text, finish


def _logprob(out: StepOutput, row: int, count: int) -> TokenLogprob:
    assert out.top_token_BM is not None, "this row asked for them"
    assert out.top_logprob_BM is not None
    top = _pairs(out.top_token_BM[row], out.top_logprob_BM[row], count)
    return TokenLogprob(token=int(out.token_B[row]), logprob=float(out.logprob_B[row]), top=top)


def _pairs(token_M: jax.Array, logprob_M: jax.Array, count: int | None) -> tuple[tuple[int, float], ...]:
    return tuple(zip(token_M[:count].tolist(), logprob_M[:count].tolist(), strict=True))
