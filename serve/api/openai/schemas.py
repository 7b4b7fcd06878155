"""The OpenAI wires' JSON: what they answer, for the builders and the served document, and the bodies they take.

Each field of a body has its allowed values beside it.  See serve/http/schema.py for `Only(…)`.
"""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired, TypedDict

from pydantic import BeforeValidator, FailFast, Field, JsonValue
from pydantic_core import PydanticCustomError

from serve.api.document import Closed
from serve.api.openai.tools import MAX_CALLS, MAX_TOOLS, Tool, ToolCall, ToolChoice, ToolChoiceMode
from serve.engine.request import (
    LEAST_REPETITION,
    MAX_BIAS,
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOP_LOGPROBS,
    MOST_REPETITION,
)
from serve.http.errors import ErrorDetail
from serve.http.pagination import PageQuery
from serve.http.schema import Only, Strict, Text, Unbuilt, few_fields

Reason = Literal["stop", "length", "tool_calls"]
ChunkObject = Literal["chat.completion.chunk", "text_completion"]


class Model(Closed):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    version: int | None
    rank: int | None
    state: Literal["base", "device", "host", "disk"]


class ModelList(Closed):
    object: Literal["list"]
    data: list[Model]
    has_more: bool


class Alternative(Closed):
    token: str
    logprob: float | None
    bytes: list[int]


class TokenLogprob(Alternative):
    top_logprobs: list[Alternative]


class ChatLogprobs(Closed):
    content: list[TokenLogprob]
    refusal: None


class PromptToken(Closed):
    logprob: float
    rank: int
    decoded_token: str


PromptPlace = dict[str, PromptToken]  # the tokens that could stand there, by id
PromptLogprobs = list[PromptPlace | None]  # as vLLM writes them: nothing for the first token


class MadeFunction(Closed):
    name: str
    arguments: str


class MadeCall(Closed):
    id: str
    type: Literal["function"]
    function: MadeFunction


class ChatMessage(Closed):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[MadeCall]]


class ChatChoice(Closed):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason
    token_ids: NotRequired[list[int]]


class ArgumentsDelta(TypedDict):
    arguments: str


class CallDelta(TypedDict):
    """A part of a streamed call.  The first part has an id and a name."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: MadeFunction | ArgumentsDelta


class ChunkDelta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str | None
    tool_calls: list[CallDelta]


class ChatChunkChoice(TypedDict):
    index: int
    delta: ChunkDelta
    logprobs: ChatLogprobs | None
    finish_reason: Reason | None
    token_ids: NotRequired[list[int]]


class CachedTokens(Closed):
    cached_tokens: int


class Usage(Closed):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Heading(TypedDict):
    """What every part of one answer repeats."""

    id: str
    created: int
    model: str  # as requested
    adapter_version: int | list[int] | None  # that the name was resolved to, or that made the answer


class ChatCompletion(Closed, Heading):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


class TextLogprobs(Closed):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoiceFields(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


class TextChoice(Closed, TextChoiceFields):
    finish_reason: Literal["stop", "length"]


class TextChunkChoice(TextChoiceFields):
    finish_reason: Literal["stop", "length"] | None


class Chunk(Heading):
    """One event of a streamed chat or plain completion."""

    object: ChunkObject
    choices: list[ChatChunkChoice | TextChunkChoice]
    prompt_token_ids: NotRequired[list[int]]
    usage: NotRequired[Usage | None]


class TextCompletion(Closed, Heading):
    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage


class Tokens(Closed):
    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(Closed):
    prompt: str


class TokenizerInfo(Closed):
    eos_token: str | None
    bos_token: str | None
    pad_token: str | None
    chat_template: str | None
    vocab_size: int
    model_max_length: int


class OutputText(Closed):
    type: Literal["output_text"]
    text: str
    annotations: list[JsonValue]
    logprobs: list[TokenLogprob]


ItemStatus = Literal["in_progress", "completed", "incomplete"]  # in progress: in events alone


class OutputMessage(Closed):
    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class OutputCall(Closed):
    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


class Incomplete(Closed):
    reason: Literal["max_output_tokens"]


class ReasoningTokens(Closed):
    reasoning_tokens: int


class ResponseUsage(Closed):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class ResponseEcho(TypedDict):
    """What a response repeats of its request, with the defaults of what was absent."""

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


class ResponseObject(Closed, ResponseEcho):
    """A response, whole or in an event, where it may be in progress or failed."""

    id: str
    object: Literal["response"]
    created_at: int
    status: ItemStatus | Literal["failed"]
    model: str
    adapter_version: int | list[int] | None
    output: list[OutputMessage | OutputCall]
    error: ErrorDetail | None
    incomplete_details: Incomplete | None
    usage: ResponseUsage | None


class ResponseEvent(TypedDict):
    """One event of a streamed response."""

    type: str
    sequence_number: NotRequired[int]
    response: NotRequired[ResponseObject]
    output_index: NotRequired[int]
    item_id: NotRequired[str]
    item: NotRequired[OutputMessage | OutputCall]
    content_index: NotRequired[int]
    part: NotRequired[OutputText]
    delta: NotRequired[str]
    text: NotRequired[str]
    logprobs: NotRequired[list[TokenLogprob]]
    arguments: NotRequired[str]


class Status(Closed):
    status: Literal["ok"]
    detail: NotRequired[str]  # of a cluster without a replica: what starts one


class Version(Closed):
    version: str


MAX_N = 16  # choices for one prompt
MAX_PROMPTS = 64  # prompts of one completions request
MAX_CHOICES = 128  # prompts times n
MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_MESSAGES = 2048
MAX_CHOICE = 1000  # strings an answer may be one of
MAX_PARTS = 256  # of one message's content
MAX_SALT_CHARS = 256
MAX_TEMPLATE_KWARGS = 32
INT32_MAX = 2**31 - 1


def one_form(value: JsonValue) -> JsonValue:
    """A prompt in one of its four forms; unions of lists would explain a mixed list badly."""
    items = value if isinstance(value, list) else []
    texts = all(isinstance(x, str) for x in items)
    ids = all(isinstance(x, int) and not isinstance(x, bool) for x in items)
    if len(items) > MAX_PROMPTS and not ids:
        raise PydanticCustomError(
            "prompts", "may hold at most {most} prompts, not {got}", {"most": MAX_PROMPTS, "got": len(items)}
        )
    lists = all(isinstance(x, list) and all(isinstance(t, int) and not isinstance(t, bool) for t in x) for x in items)
    if isinstance(value, str) or (isinstance(value, list) and (texts or ids or lists)):
        return value
    raise PydanticCustomError(
        "prompt_form",
        "must be a string, a list of strings, a list of token ids or a list of lists of token ids, and never a mixture",
    )


def biases(value: object) -> object:
    """A bias for each token id, which JSON writes as a string."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_LOGIT_BIAS:
        raise PydanticCustomError("biases", "must not name over {most} tokens", {"most": MAX_LOGIT_BIAS})
    if not all(isinstance(k, str) and k.isascii() and k.isdigit() and len(k) < 12 for k in value):
        raise PydanticCustomError("bias_ids", "must have token ids as its keys")
    return {int(k): v for k, v in value.items()}


Prompt = Annotated[Text | list[Text] | list[int] | list[list[int]], BeforeValidator(one_form)]
StopString = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Annotated[bool | None, Only((False,))] = None


class JsonSchema(Strict):
    """Name and description are for readers; the schema is kept to whether `strict` or not."""

    name: Annotated[Text, Field(min_length=1, max_length=64)]
    description: Text | None = None
    schema_: Annotated[dict[str, JsonValue] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Annotated[str, Only(("text", "json_object", "json_schema"))]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Strict):
    """vLLM's: exactly one of the first five."""

    json_: Annotated[dict[str, JsonValue] | Text | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: Text | None = None
    choice: Annotated[list[Text] | None, Field(min_length=1, max_length=MAX_CHOICE)] = None
    grammar: Text | None = None
    disable_any_whitespace: bool | None = None
    disable_fallback: bool | None = None  # there is nothing to fall back to
    disable_additional_properties: Annotated[bool | None, Only((False,), "say so in the schema")] = None
    whitespace_pattern: Unbuilt = None
    structural_tag: Unbuilt = None


Guided = Annotated[JsonValue, Only((), "use structured_outputs")]  # vLLM's fields before structured_outputs


class SamplingBody(Strict):
    """What chat and plain completions share.  None is absent: the API's default."""

    model: Text
    max_tokens: Annotated[int | None, Field(ge=1, le=INT32_MAX)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, le=INT32_MAX)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    n: Annotated[int | None, Field(ge=1, le=MAX_N)] = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS), FailFast()] | None = None
    include_stop_str_in_output: bool | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOP_TOKEN_IDS), FailFast()] | None = None
    ignore_eos: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = None  # identifies the client's user; changes nothing

    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    repetition_penalty: Annotated[float | None, Field(ge=LEAST_REPETITION, le=MOST_REPETITION)] = None
    logit_bias: Annotated[
        dict[int, Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]] | None, BeforeValidator(biases)
    ] = None
    min_tokens: Annotated[int | None, Field(ge=0)] = None
    prompt_logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    guided_json: Guided = None
    guided_regex: Guided = None
    guided_choice: Guided = None
    guided_grammar: Guided = None
    guided_decoding_backend: Guided = None
    guided_whitespace_pattern: Guided = None
    # End on the version of the start, or let later ones reach it.
    adapter_update: Literal["pin", "follow"] | None = None
    priority: Annotated[int | None, Only((0,))] = None
    # Only requests with the same salt share cached prompts.
    cache_salt: Annotated[Text | None, Field(min_length=1, max_length=MAX_SALT_CHARS)] = None
    skip_special_tokens: Annotated[bool | None, Only((True,))] = None
    return_token_ids: bool | None = None


class TextContent(Strict):
    text: Text | None = None


class ContentPart(TextContent):
    type: Annotated[str, Only(("text",))]
    image_url: Unbuilt = None
    input_audio: Unbuilt = None
    file: Unbuilt = None
    refusal: Unbuilt = None


class Message(Strict):
    """One turn.  The fields that a client copies from an answer may stand there as null."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    # Null beside tool_calls alone.
    content: Text | Annotated[list[ContentPart], Field(max_length=MAX_PARTS), FailFast()] | None = None
    tool_call_id: Text | None = None  # links a result to its call; the text is the content
    name: Unbuilt = None
    tool_calls: Annotated[list[ToolCall] | None, Field(max_length=MAX_CALLS), FailFast()] = None
    function_call: Unbuilt = None
    refusal: Unbuilt = None
    audio: Unbuilt = None
    annotations: Annotated[JsonValue, Only(([],))] = None


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES), FailFast()]
Tools = Annotated[list[Tool] | None, Field(max_length=MAX_TOOLS), FailFast()]
# More variables of the chat template.
TemplateKwargs = Annotated[dict[Text, Text | bool | int | float | None] | None, Field(max_length=MAX_TEMPLATE_KWARGS)]


class ChatBody(SamplingBody):
    messages: Messages
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=INT32_MAX)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    # The client's own notes; change nothing.
    metadata: Annotated[dict[str, str] | None, Field(max_length=16), BeforeValidator(few_fields)] = None
    safety_identifier: Text | None = None  # as `user`
    store: Annotated[bool | None, Only((False,))] = None

    tools: Tools = None
    tool_choice: ToolChoiceMode | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateKwargs = None
    functions: Annotated[JsonValue, Only(([],))] = None
    function_call: Annotated[JsonValue, Only(("none", "auto"))] = None
    service_tier: Annotated[str | None, Only(("auto", "default"))] = None
    modalities: Annotated[JsonValue, Only((["text"],))] = None
    reasoning_effort: Annotated[str | None, Only(("none",))] = None
    verbosity: Annotated[str | None, Only(("medium",))] = None
    audio: Unbuilt = None
    moderation: Unbuilt = None
    prediction: Unbuilt = None
    prompt_cache_key: Unbuilt = None
    prompt_cache_options: Unbuilt = None
    prompt_cache_retention: Unbuilt = None
    web_search_options: Unbuilt = None


class CompletionBody(SamplingBody):
    prompt: Prompt
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None
    add_special_tokens: bool | None = None
    echo: bool | None = None

    max_tokens: Annotated[int | None, Field(ge=0, le=INT32_MAX)] = None  # 0 goes with echo alone
    best_of: Annotated[int | None, Field(ge=1), Only((1,))] = None
    suffix: Annotated[str | None, Only(("",))] = None


class TokenizeBody(Strict):
    """Exactly one of `prompt` and `messages`."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None  # of a prompt
    add_generation_prompt: bool | None = None  # of messages
    continue_final_message: bool | None = None  # of messages
    tools: Tools = None  # of messages
    chat_template_kwargs: TemplateKwargs = None  # of messages


class DetokenizeBody(Strict):
    model: Text | None = None
    tokens: Annotated[list[int], FailFast()]


class ModelQuery(PageQuery):
    """Query of GET /v1/models."""

    limit: Annotated[int | None, Field(ge=1, le=1000)] = None
    prefix: Text = ""
