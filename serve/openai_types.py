"""The request bodies of the OpenAI wire: strict JSON types, no unknown field, and each field's allowed values beside it.

A field is honoured or refused, never ignored.  `Only(…)` marks a field that the API knows and we have not built: it may
be absent, null or one of the values that ask for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from jaxlora.errors import UnsupportedParameter
from serve.request import MAX_TOP_LOGPROBS

MAX_N = 16  # choices for one prompt
MAX_PROMPTS = 64  # prompts of one completions request
MAX_CHOICES = 128  # prompts times n
MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_STOP_IDS = 64
MAX_FIELDS = 100  # of one object
MAX_MESSAGES = 2048
MAX_PARTS = 256  # of one message's content
INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Only:
    """Marks a field that is not built: these values change nothing and pass, all others are refused."""

    values: tuple[JsonValue, ...] = ()


def few_fields(value: object) -> object:
    """The value, unless it is an object of very many fields: each bad one costs an error, and 4 MiB of them seconds."""
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        raise PydanticCustomError("fields", "must not have over {most} fields", {"most": MAX_FIELDS})
    return value


class Strict(BaseModel):
    """No unknown field, no coercion, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: object) -> object:
        return few_fields(value)


def refuse_unbuilt(body: Strict, prefix: str = "") -> None:
    """Raises UnsupportedParameter, naming the field, where the body asks for something that is not built."""
    for name, field in type(body).model_fields.items():
        if name not in body.model_fields_set:
            continue
        value = getattr(body, name)
        for rule in field.metadata:
            if isinstance(rule, Only) and value is not None and value not in rule.values:
                hint = f"only {', '.join(map(repr, rule.values))} is" if rule.values else "it is not"
                raise UnsupportedParameter(
                    f"{prefix}{name} is not supported as given ({hint} supported here); leave it out",
                    param=prefix + name,
                )
        for i, item in enumerate(value if isinstance(value, list) else []):
            if isinstance(item, Strict):
                refuse_unbuilt(item, f"{prefix}{name}[{i}].")
        if isinstance(value, Strict):
            refuse_unbuilt(value, f"{prefix}{name}.")


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


def unicode_text(value: str) -> str:
    """The text, if UTF-8 can hold it: JSON can name half a surrogate pair, which no answer could repeat."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("text", "must be Unicode text, without lone surrogates") from None
    return value


Text = Annotated[str, AfterValidator(unicode_text)]
Prompt = Annotated[Text | list[Text] | list[int] | list[list[int]], BeforeValidator(one_form)]
StopString = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Unbuilt = Annotated[JsonValue, Only()]


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Annotated[bool | None, Only((False,))] = None


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
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOP_IDS), FailFast()] | None = None
    ignore_eos: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = None  # says who asks; changes nothing

    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2), Only((0,))] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2), Only((0,))] = None
    repetition_penalty: Annotated[float | None, Field(gt=0), Only((1,))] = None
    logit_bias: Annotated[JsonValue, Only(({},))] = None
    min_tokens: Annotated[int | None, Field(ge=0), Only((0,))] = None
    adapter_update: Literal["pin", "follow"] | None = (
        None  # end on the version of the start, or let later ones reach it
    )
    priority: Annotated[int | None, Only((0,))] = None
    cache_salt: Unbuilt = None
    skip_special_tokens: Annotated[bool | None, Only((True,))] = None
    return_token_ids: Annotated[bool | None, Only((False,))] = None
    prompt_logprobs: Unbuilt = None


class ContentPart(Strict):
    type: Annotated[str, Only(("text",))]
    text: Text | None = None
    image_url: Unbuilt = None
    input_audio: Unbuilt = None
    file: Unbuilt = None
    refusal: Unbuilt = None


class Message(Strict):
    """One turn.  The fields that a client copies from an answer may stand there as null."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[ContentPart], Field(max_length=MAX_PARTS), FailFast()]
    tool_call_id: Text | None = None  # links a result to its call; the text is the content
    name: Unbuilt = None
    tool_calls: Annotated[JsonValue, Only(([],))] = None
    function_call: Unbuilt = None
    refusal: Unbuilt = None
    audio: Unbuilt = None
    annotations: Annotated[JsonValue, Only(([],))] = None


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES), FailFast()]


class ChatBody(SamplingBody):
    messages: Messages
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=INT32_MAX)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    metadata: Annotated[dict[str, str] | None, Field(max_length=16), BeforeValidator(few_fields)] = (
        None  # the client's own notes; change nothing
    )
    safety_identifier: Text | None = None  # as `user`
    store: Annotated[bool | None, Only((False,))] = None

    response_format: Annotated[JsonValue, Only(({"type": "text"},))] = None
    tools: Annotated[JsonValue, Only(([],))] = None
    tool_choice: Annotated[JsonValue, Only(("none", "auto"))] = None
    parallel_tool_calls: Annotated[bool | None, Only((True,))] = None
    functions: Annotated[JsonValue, Only(([],))] = None
    function_call: Annotated[JsonValue, Only(("none", "auto"))] = None
    service_tier: Annotated[str | None, Only(("auto", "default"))] = None
    modalities: Annotated[JsonValue, Only((["text"],))] = None
    reasoning_effort: Annotated[str | None, Only(("none",))] = None
    verbosity: Annotated[str | None, Only(("medium",))] = None
    chat_template_kwargs: Annotated[JsonValue, Only(({},))] = None
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

    max_tokens: Annotated[int | None, Field(ge=0, le=INT32_MAX)] = None  # 0 goes with echo alone
    echo: Annotated[bool | None, Only((False,))] = None
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


class DetokenizeBody(Strict):
    model: Text | None = None
    tokens: Annotated[list[int], FailFast()]


class ModelQuery(BaseModel):
    """Query of GET /v1/models; text, so not strict."""

    model_config = ConfigDict(extra="forbid")
    limit: Annotated[int | None, Field(ge=1, le=1000)] = None
    after: Text | None = None
    prefix: Text = ""
