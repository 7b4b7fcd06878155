"""The Responses API over the same engine: POST /v1/responses, whole or as events.  Nothing is stored, so nothing is found again."""

from __future__ import annotations

import json

from fastapi import APIRouter, Request
from fastapi.responses import Response

from jaxlora.checkpoints.chat_template import Turn
from jaxlora.checkpoints.tokenizer import Tokenizer
from jaxlora.core.errors import InvalidRequest, NotFound, UnsupportedParameter
from serve.access.caller import caller_of
from serve.api.openai.generation import Admission, Generation, answer
from serve.api.openai.logprobs import PromptView
from serve.api.openai.messages import Conversation, ToolUse, call_turn, need_form, plain_text, tool_use
from serve.api.openai.sampling import ANY_OBJECT
from serve.api.openai.schemas import ResponseEcho, ResponseObject, SamplingBody
from serve.api.openai.tools import Function, ToolChoiceMode
from serve.api.responses.render import ResponseWriter
from serve.api.responses.schemas import LOGPROBS, InputItem, ResponsesBody, ResponseToolChoice
from serve.engine.grammar import GrammarSource
from serve.http.errors import ERRORS
from serve.http.schema import ok, refuse_unbuilt
from serve.http.strict_json import JsonRoute
from serve.runtime.backend import Backend

OF_TYPE = {
    "message": {"role", "content", "phase"},
    "function_call": {"call_id", "name", "arguments"},
    "function_call_output": {"call_id", "output"},
}


class ResponsesRoutes:
    """The routes, over one backend.  default_max_tokens: as `OpenAIRoutes` takes it."""

    def __init__(self, backend: Backend, admission: Admission, default_max_tokens: int):
        self._backend, self._admission, self._default_max_tokens = backend, admission, default_max_tokens

    def router(self) -> APIRouter:
        """All routes of this wire."""
        router = APIRouter(responses=ERRORS, route_class=JsonRoute)
        created = ok(ResponseObject, events="events from response.created to response.completed, incomplete or failed")
        router.add_api_route("/v1/responses", self.create, methods=["POST"], response_model=None, responses=created)
        for method in ("GET", "DELETE"):
            router.add_api_route(
                "/v1/responses/{id}", self.find, methods=[method], status_code=404, response_model=None
            )
        return router

    async def create(self, request: Request, body: ResponsesBody) -> Response:
        """The answer to a conversation."""
        refuse_unbuilt(body)
        adapter = self._backend.resolve(caller_of(request).sees, body.model)
        for i, name in enumerate(body.include or ()):
            if name != LOGPROBS:
                raise UnsupportedParameter(f"include may name {LOGPROBS} alone; leave it out", param=f"include[{i}]")
        logprobs = LOGPROBS in (body.include or ())
        if body.top_logprobs and not logprobs:
            raise InvalidRequest(f"top_logprobs needs include: [{LOGPROBS}]", param="top_logprobs")
        grammar, tokenizer = text_grammar(body), self._backend.tokenizer
        tools = tool_use(
            response_functions(body),
            response_choice(body.tool_choice),
            body.parallel_tool_calls,
            tokenizer,
            grammar,
        )
        talk = input_conversation(body, tools, tokenizer)
        ids = await self._admission.tokenizing.run(
            caller_of(request).owner, lambda: tuple(talk.ids(tokenizer)), field="input", chars=[talk.chars]
        )
        job = Generation(
            id_prefix="resp_",
            operation="responses",
            prompts=[PromptView(tokens=ids, echo=None, logprobs=None, ranked=None)],
            adapter=adapter,
            max_tokens=body.max_output_tokens,
            fallback=self._default_max_tokens,
            max_tokens_field="max_output_tokens",
            prompt_field="input",
            logprobs=(body.top_logprobs or 0) if logprobs else None,
            prompt_logprobs=None,
            grammar=grammar if tools is None else tools.grammar,
        )
        sampling = SamplingBody(model=body.model, temperature=body.temperature, top_p=body.top_p)
        run = await self._admission.run(request, sampling, job)
        writer = ResponseWriter(run, echo(body), None if tools is None else tools.parser())
        return await answer(request, run, writer, bool(body.stream))

    async def find(self, id: str) -> Response:
        """Always 404: responses are not stored."""
        raise NotFound("no such response; this server stores none", param="id")


def echo(body: ResponsesBody) -> ResponseEcho:
    """What a response repeats of its request, with the defaults of what was absent."""
    form = None if body.text is None else body.text.format
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "background": False,
        "store": False,
        "service_tier": "default",
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "top_logprobs": body.top_logprobs or 0,
        "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)},
        "tool_choice": body.tool_choice.model_dump(exclude_none=True)
        if isinstance(body.tool_choice, ResponseToolChoice)
        else body.tool_choice or "auto",
        "tools": [t.model_dump(exclude_unset=True) for t in body.tools or ()],
        "truncation": "disabled",
        "user": body.user,
    }


def text_grammar(body: ResponsesBody) -> GrammarSource | None:
    """Returns the source of the text's grammar, if the body has one.  Raises InvalidRequest for an unclear one."""
    form = None if body.text is None else body.text.format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        if form.schema_ is not None:
            raise InvalidRequest("a schema needs type: json_schema", param="text.format.schema")
        return GrammarSource(kind="json", text=json.dumps(ANY_OBJECT), param="text.format")
    for name, value in (("name", form.name), ("schema", form.schema_)):
        if value is None:
            raise InvalidRequest(f"text.format.{name} is required", param=f"text.format.{name}")
    return GrammarSource(kind="json", text=json.dumps(form.schema_), param="text.format.schema")


def response_functions(body: ResponsesBody) -> list[Function]:
    """The tools' functions.  Raises InvalidRequest for one without a name."""
    out = []
    for i, tool in enumerate(body.tools or ()):
        if tool.name is None:
            raise InvalidRequest(f"tools[{i}].name is required", param=f"tools[{i}].name")
        fields = tool.model_dump(include={"description", "parameters", "strict"}, exclude_none=True)
        out.append(Function(name=tool.name, **fields))
    return out


def response_choice(choice: ToolChoiceMode | ResponseToolChoice | None) -> tuple[ToolChoiceMode, str | None]:
    """(how to choose, the one function that must be called).  Raises InvalidRequest for a choice of no function."""
    if not isinstance(choice, ResponseToolChoice):
        return choice or "auto", None
    if choice.name is None:
        raise InvalidRequest("tool_choice.name is required", param="tool_choice.name")
    return "required", choice.name


def input_conversation(body: ResponsesBody, tools: ToolUse | None, tokenizer: Tokenizer) -> Conversation:
    """Instructions and input as the template takes them.  Raises InvalidRequest, naming the field."""
    turns: list[Turn] = [{"role": "system", "content": body.instructions}] if body.instructions is not None else []
    if isinstance(body.input, str):
        turns.append({"role": "user", "content": body.input})
    else:
        for i, item in enumerate(body.input):
            add_item(turns, item, f"input[{i}]", tokenizer)
    return Conversation(turns=turns, tools=tools, variables={}, add_generation_prompt=True, continue_final=False)


def add_item(turns: list[Turn], item: InputItem, where: str, tokenizer: Tokenizer) -> None:
    """Adds one item.  Calls join the assistant's turn before them.  Raises InvalidRequest, naming the field."""
    kind = item.type or "message"
    for name in sorted(set().union(*OF_TYPE.values())):
        given = getattr(item, name) is not None
        if given and name not in OF_TYPE[kind]:
            message = f"{where}.{name} has no meaning in an item of type {kind}; leave it out"
            raise InvalidRequest(message, param=f"{where}.{name}")
        if not given and name in OF_TYPE[kind] and name != "phase":
            raise InvalidRequest(f"{where}.{name} is required (type: {kind})", param=f"{where}.{name}")
    if kind == "message":
        role = "system" if item.role == "developer" else item.role
        turns.append({"role": role, "content": plain_text(item.content or "", f"{where}.content")})
        return
    need_form(tokenizer, f"{where}.type")
    if kind == "function_call_output":
        content = plain_text(item.output or "", f"{where}.output")
        turns.append({"role": "tool", "content": content, "tool_call_id": item.call_id})
        return
    call = call_turn(item.call_id or "", item.name or "", item.arguments or "", f"{where}.arguments")
    last = turns[-1] if turns else {}
    if last.get("role") == "assistant":
        earlier = last.get("tool_calls")
        turns[-1] = {**last, "tool_calls": [*(earlier if isinstance(earlier, list) else ()), call]}
    else:
        turns.append({"role": "assistant", "content": "", "tool_calls": [call]})
