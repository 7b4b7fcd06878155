"""The engine's input (Request, SamplingParams) and output (Delta).  Pure: no jax here."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from jaxlora.core.errors import InvalidRequest
from jaxlora.core.lora import AdapterRef
from serve.engine.grammar import Grammar

MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 300  # tokens with a bias
MAX_STOP_TOKEN_IDS = 64
MAX_BIAS = 100.0
LEAST_REPETITION, MOST_REPETITION = 0.01, 100.0  # beyond, all choices are equal or not finite


class FinishReason(enum.Enum):
    """Why a sequence ended.  The value is what OpenAI clients read."""

    STOP = "stop"  # end-of-sequence token, stop token id or stop string
    LENGTH = "length"  # max_tokens or the context is used up


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when the request stops.  All of it reaches the device as array values: changing it never compiles.

    Raises InvalidRequest, naming the field, for a value out of range.
    """

    max_tokens: int  # 0: the prompt is computed and nothing chosen
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # (0, 1]
    top_k: int = -1  # -1 or 0: all
    min_p: float = 0.0  # [0, 1]
    seed: int | None = None  # None: drawn at admission
    choice: int = 0  # index among n choices; folded into the seed
    stop: tuple[str, ...] = ()
    include_stop: bool = False  # keep the stop string in the text
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; k: the chosen token's and the top k
    prompt_logprobs: int | None = None  # the same of every prompt token but the first
    min_tokens: int = 0  # fewer tokens do not end the answer
    presence_penalty: float = 0.0  # [-2, 2], of tokens that were generated
    frequency_penalty: float = 0.0  # [-2, 2], each time
    repetition_penalty: float = 1.0  # of tokens of the prompt and the answer
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)
    grammar: Grammar | None = None  # constrains the answer; its end is the answer's, whatever ignore_eos says

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, wanted: str) -> None:
            if not ok:
                raise InvalidRequest(f"{name} must be {wanted}, got {getattr(self, name)}", param=name)

        def logprobs(name: str) -> None:
            count = getattr(self, name)
            need(count is None or 0 <= count <= MAX_TOP_LOGPROBS, name, f"in [0, {MAX_TOP_LOGPROBS}]")

        need(self.max_tokens >= 0, "max_tokens", "0 or more")
        need(0.0 <= self.temperature <= 2.0, "temperature", "in [0, 2]")
        need(0.0 < self.top_p <= 1.0, "top_p", "in (0, 1]")
        need(self.top_k >= -1, "top_k", "-1 (all) or a positive count")
        need(0.0 <= self.min_p <= 1.0, "min_p", "in [0, 1]")
        need(self.seed is None or 0 <= self.seed < 2**63, "seed", "in [0, 2^63)")
        need(all(self.stop), "stop", "non-empty strings")
        need(len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS, "stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS} ids")
        logprobs("logprobs")
        logprobs("prompt_logprobs")
        need(0 <= self.min_tokens <= self.max_tokens, "min_tokens", f"in [0, max_tokens = {self.max_tokens}]")
        need(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "in [-2, 2]")
        need(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "in [-2, 2]")
        least, most = LEAST_REPETITION, MOST_REPETITION
        need(least <= self.repetition_penalty <= most, "repetition_penalty", f"in [{least}, {most}]")
        many = len(dict(self.logit_bias)) < len(self.logit_bias) or len(self.logit_bias) > MAX_LOGIT_BIAS
        need(not many, "logit_bias", f"at most {MAX_LOGIT_BIAS} tokens, each once")
        need(all(abs(b) <= MAX_BIAS for _, b in self.logit_bias), "logit_bias", f"numbers in [-{MAX_BIAS}, {MAX_BIAS}]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt for one adapter version.  `adapter` was resolved once, at admission; None is the base model.

    follow: later versions of the adapter reach the request while it runs; else it ends on the version it began with.
    cache_salt: only requests with the same one share cached pages.
    """

    id: str
    tenant: str
    adapter: AdapterRef | None
    prompt: tuple[int, ...]
    params: SamplingParams
    follow: bool = False
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InvalidRequest("the prompt has no tokens; give at least one", param="prompt")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """Raw log-softmax (float32, before penalties, temperature and filters) of a token and its best alternatives."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token, logprob), best first


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptLogprob(TokenLogprob):
    """The log-probability of a prompt token after the tokens before it."""

    rank: int  # 1 is the likeliest token


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """New output of one request.  `finish` is set exactly once, on the last one; `error` ends it instead."""

    request_id: str
    text: str = ""  # whole UTF-8 characters, stop strings held back
    tokens: tuple[int, ...] = ()
    adapter: AdapterRef | None = None  # the version that made these tokens; None: the base, or no tokens
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[PromptLogprob, ...] = ()  # of all prompt tokens but the first, on the first delta
    cached_tokens: int = 0  # of the prompt, whose KV was cached; on the first delta
    finish: FinishReason | None = None
    error: Exception | None = field(default=None)
