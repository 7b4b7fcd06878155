"""One request's answer: what its rows ask of the device, and what a sampled token means to its client."""

from __future__ import annotations

import secrets

from jaxlora.errors import AdapterInvalid
from jaxlora.tokenizer import Tokenizer
from serve.request import Delta, FinishReason, Request, TokenLogprob
from serve.sampling import SamplingBatch, StepOutput
from serve.stops import StopStrings


class Answer:
    """How far one answer is.  It is on the host and stays while its sequence is parked, moved or computed again."""

    def __init__(self, request: Request, tokenizer: Tokenizer):
        params = request.params
        self._id, self._params = request.id, params
        self._ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else set(tokenizer.eos_ids))
        self._seed = secrets.randbits(63) if params.seed is None else params.seed
        self._detokenizer = tokenizer.detokenizer()
        self._stops = StopStrings(params.stop, params.include_stop)
        self._generated = 0

    def fill(self, batch: SamplingBatch, row: int, position: int) -> None:
        """Says in one row of a NumPy batch how the token at this position is chosen."""
        batch.fill(row, self._params, self._seed, position)

    def take(self, out: StepOutput, row: int) -> Delta:
        """What the token of this row means to the client; numbers that are not finite end the answer with an error."""
        if not out.finite_B[row]:
            error = AdapterInvalid("the model gave non-finite numbers for this request; check its adapter")
            return Delta(request_id=self._id, error=error)
        params, token = self._params, int(out.token_B[row])
        self._generated += 1
        ended = token in self._ends
        text, hit = ("", False) if ended else self._stops.push(self._detokenizer.push(token))
        finish = None
        if ended or hit:
            finish = FinishReason.STOP
        elif self._generated >= params.max_tokens:
            finish = FinishReason.LENGTH
        if finish is not None and not hit:
            tail, hit = self._stops.push(self._detokenizer.flush())
            text += tail + ("" if hit else self._stops.flush())
        logprobs = () if params.logprobs is None else (_logprob(out, row, params.logprobs),)
        return Delta(request_id=self._id, text=text, tokens=(token,), logprobs=logprobs, finish=finish)


def _logprob(out: StepOutput, row: int, count: int) -> TokenLogprob:
    top = zip(out.top_token_BM[row, :count].tolist(), out.top_logprob_BM[row, :count].tolist(), strict=True)
    return TokenLogprob(token=int(out.token_B[row]), logprob=float(out.logprob_B[row]), top=tuple(top))
