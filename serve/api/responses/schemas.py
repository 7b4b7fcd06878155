"""The body of the Responses API: text in and out, and functions.  What would need stored state is refused."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, FailFast, Field, JsonValue

from serve.api.openai.schemas import INT32_MAX, MAX_MESSAGES, MAX_PARTS, TextContent
from serve.api.openai.tools import MAX_TOOLS, FunctionName, ToolChoiceMode
from serve.engine.request import MAX_TOP_LOGPROBS
from serve.http.schema import Only, Strict, Text, Unbuilt, few_fields

LOGPROBS = "message.output_text.logprobs"
MAX_INCLUDED = 16


class InputPart(TextContent):
    """Text of a message.  A part of an earlier answer may be repeated as it came."""

    type: Annotated[str, Only(("input_text", "output_text"))]
    annotations: Annotated[JsonValue, Only(([],))] = None
    logprobs: JsonValue = None  # of an earlier answer; they change nothing
    prompt_cache_breakpoint: Unbuilt = None
    image_url: Unbuilt = None
    file_id: Unbuilt = None
    detail: Unbuilt = None
    refusal: Unbuilt = None


InputParts = Annotated[list[InputPart], Field(max_length=MAX_PARTS), FailFast()]


class InputItem(Strict):
    """A message, a call that an earlier answer made, or what it gave.  Each has its own fields; the others stay away."""

    type: Annotated[str | None, Only(("message", "function_call", "function_call_output"))] = None
    id: Text | None = None  # of an item that is repeated; changes nothing
    status: Text | None = None  # likewise
    role: Annotated[str | None, Only(("user", "assistant", "system", "developer"))] = None
    content: Text | InputParts | None = None
    phase: Annotated[str | None, Only(("final_answer",))] = None
    call_id: Text | None = None
    name: FunctionName | None = None
    arguments: Text | None = None
    output: Text | InputParts | None = None
    caller: Unbuilt = None
    namespace: Unbuilt = None


class ResponseTool(Strict):
    """A function that may be called."""

    type: Annotated[str, Only(("function",))]
    name: FunctionName | None = None
    description: Text | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None
    allowed_callers: Unbuilt = None
    defer_loading: Annotated[bool | None, Only((False,))] = None
    output_schema: Unbuilt = None


class ResponseToolChoice(Strict):
    type: Annotated[str, Only(("function",))]
    name: FunctionName | None = None


class TextFormat(Strict):
    type: Annotated[str, Only(("text", "json_object", "json_schema"))]
    name: Annotated[Text | None, Field(min_length=1, max_length=64)] = None
    description: Text | None = None
    schema_: Annotated[dict[str, JsonValue] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextConfig(Strict):
    format: TextFormat | None = None
    verbosity: Annotated[str | None, Only(("medium",))] = None


class ResponseStreamOptions(Strict):
    include_obfuscation: Annotated[bool | None, Only((False,))] = None


class ResponsesBody(Strict):
    model: Text
    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES), FailFast()]
    instructions: Text | None = None
    max_output_tokens: Annotated[int | None, Field(ge=1, le=INT32_MAX)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None
    include: Annotated[list[Text] | None, Field(max_length=MAX_INCLUDED)] = None
    text: TextConfig | None = None
    tools: Annotated[list[ResponseTool] | None, Field(max_length=MAX_TOOLS), FailFast()] = None
    tool_choice: ToolChoiceMode | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    # The client's own notes; change nothing.
    metadata: Annotated[dict[Text, Text] | None, Field(max_length=16), BeforeValidator(few_fields)] = None
    user: Text | None = None  # identifies the client's user; changes nothing
    safety_identifier: Text | None = None  # as `user`

    store: Annotated[bool | None, Only((False,), "nothing is stored here; leave it out")] = None
    background: Annotated[bool | None, Only((False,))] = None
    service_tier: Annotated[str | None, Only(("auto", "default"))] = None
    truncation: Annotated[str | None, Only(("disabled",))] = None
    reasoning: Annotated[JsonValue, Only(({}, {"effort": "none"}))] = None
    previous_response_id: Annotated[JsonValue, Only((), "send the whole conversation as input")] = None
    conversation: Annotated[JsonValue, Only((), "send the whole conversation as input")] = None
    access_programs: Unbuilt = None
    background_options: Unbuilt = None
    context_management: Unbuilt = None
    image: Unbuilt = None
    max_tool_calls: Unbuilt = None
    moderation: Unbuilt = None
    prompt: Unbuilt = None
    prompt_cache_key: Unbuilt = None
    prompt_cache_options: Unbuilt = None
    prompt_cache_retention: Unbuilt = None
