"""What the OpenAI wires answer, for the served document alone: nothing is checked or built with it, the tests hold us to it."""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

from pydantic import ConfigDict, JsonValue, with_config

CLOSED = ConfigDict(extra="forbid")
Reason = Literal["stop", "length", "tool_calls"]


@with_config(CLOSED)
class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    version: int | None
    rank: int | None
    state: Literal["base", "device", "host", "disk"]


@with_config(CLOSED)
class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]
    has_more: bool


@with_config(CLOSED)
class Alternative(TypedDict):
    token: str
    logprob: float | None
    bytes: list[int]


@with_config(CLOSED)
class TokenLogprob(TypedDict):
    token: str
    logprob: float | None
    bytes: list[int]
    top_logprobs: list[Alternative]


@with_config(CLOSED)
class ChatLogprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: None


@with_config(CLOSED)
class PromptToken(TypedDict):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptToken] | None]


@with_config(CLOSED)
class MadeFunction(TypedDict):
    name: str
    arguments: str


@with_config(CLOSED)
class MadeCall(TypedDict):
    id: str
    type: Literal["function"]
    function: MadeFunction


@with_config(CLOSED)
class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[MadeCall]]


@with_config(CLOSED)
class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason
    token_ids: NotRequired[list[int]]


@with_config(CLOSED)
class CachedTokens(TypedDict):
    cached_tokens: int


@with_config(CLOSED)
class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


@with_config(CLOSED)
class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    adapter_version: int | list[int] | None
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


@with_config(CLOSED)
class TextLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


@with_config(CLOSED)
class TextChoice(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


@with_config(CLOSED)
class TextCompletion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    adapter_version: int | list[int] | None
    choices: list[TextChoice]
    usage: Usage


@with_config(CLOSED)
class Tokens(TypedDict):
    tokens: list[int]
    count: int
    max_model_len: int


@with_config(CLOSED)
class Detokenized(TypedDict):
    prompt: str


@with_config(CLOSED)
class TokenizerInfo(TypedDict):
    eos_token: str | None
    bos_token: str | None
    pad_token: str | None
    chat_template: str | None
    vocab_size: int
    model_max_length: int


@with_config(CLOSED)
class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[JsonValue]
    logprobs: list[TokenLogprob]


@with_config(CLOSED)
class OutputMessage(TypedDict):
    id: str
    type: Literal["message"]
    status: Literal["completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


@with_config(CLOSED)
class OutputCall(TypedDict):
    id: str
    type: Literal["function_call"]
    status: Literal["completed", "incomplete"]
    call_id: str
    name: str
    arguments: str


@with_config(CLOSED)
class Incomplete(TypedDict):
    reason: Literal["max_output_tokens"]


@with_config(CLOSED)
class ReasoningTokens(TypedDict):
    reasoning_tokens: int


@with_config(CLOSED)
class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


@with_config(CLOSED)
class ResponseObject(TypedDict):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    adapter_version: int | list[int] | None
    output: list[OutputMessage | OutputCall]
    error: None
    incomplete_details: Incomplete | None
    usage: ResponseUsage
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    background: Literal[False]
    store: Literal[False]
    service_tier: Literal["default"]
    temperature: float
    top_p: float
    top_logprobs: int
    text: dict[str, JsonValue]
    tool_choice: str | dict[str, JsonValue]
    tools: list[dict[str, JsonValue]]
    truncation: Literal["disabled"]
    user: str | None


@with_config(CLOSED)
class Status(TypedDict):
    status: Literal["ok"]


@with_config(CLOSED)
class Version(TypedDict):
    version: str
