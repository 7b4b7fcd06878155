"""What was asked (Request, SamplingParams) and what comes back (Delta, Usage).  Pure: no jax here."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from jaxlora.errors import InvalidRequest
from jaxlora.lora import AdapterRef

MAX_TOP_LOGPROBS = 20


class FinishReason(enum.Enum):
    """Why a sequence ended.  The value is what OpenAI clients read."""

    STOP = "stop"  # end-of-sequence token, stop token id or stop string
    LENGTH = "length"  # max_tokens or the context is used up


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop.  All of it reaches the device as array values: changing it never compiles.

    Raises InvalidRequest, naming the field, for a value out of range.
    """

    max_tokens: int
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

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, wanted: str) -> None:
            if not ok:
                raise InvalidRequest(f"{name} must be {wanted}, got {getattr(self, name)}", param=name)

        need(self.max_tokens >= 1, "max_tokens", "at least 1")
        need(0.0 <= self.temperature <= 2.0, "temperature", "in [0, 2]")
        need(0.0 < self.top_p <= 1.0, "top_p", "in (0, 1]")
        need(self.top_k >= -1, "top_k", "-1 (all) or a positive count")
        need(0.0 <= self.min_p <= 1.0, "min_p", "in [0, 1]")
        need(self.seed is None or 0 <= self.seed < 2**63, "seed", "in [0, 2^63)")
        need(all(self.stop), "stop", "non-empty strings")
        need(self.logprobs is None or 0 <= self.logprobs <= MAX_TOP_LOGPROBS, "logprobs", f"in [0, {MAX_TOP_LOGPROBS}]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt for one adapter version.  `adapter` was resolved once, at admission; None is the base model.

    follow: later versions of the adapter reach the request while it runs; else it ends on the version it began with.
    """

    id: str
    tenant: str
    adapter: AdapterRef | None
    prompt: tuple[int, ...]
    params: SamplingParams
    follow: bool = False

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InvalidRequest("the prompt has no tokens; give at least one", param="prompt")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """Raw log-softmax (float32, before temperature and filters) of one generated token and its best alternatives."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token, logprob), best first


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """News of one request.  `finish` is set exactly once, on the last one; `error` ends it instead."""

    request_id: str
    text: str = ""  # whole UTF-8 characters, stop strings held back
    tokens: tuple[int, ...] = ()
    adapter: AdapterRef | None = None  # the version that made these tokens; None: the base, or no tokens
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    error: Exception | None = field(default=None)
