"""LangChain's ChatOpenAI: chat, stream, structured output by schema and by function, tools; also over responses."""

from __future__ import annotations

from langchain_core.messages import ToolMessage
from langchain_openai import ChatOpenAI
from shared import GREEDY, KEY, MESSAGES, MODEL, QUESTION, TOKENS, URL, Day, check_day, check_stream

settings = {"base_url": URL, "api_key": KEY, "model": MODEL, "max_retries": 0, **GREEDY}
for responses in (False, True):
    model = ChatOpenAI(**settings, max_tokens=TOKENS, use_responses_api=responses)
    answer = model.invoke(MESSAGES)
    pieces = list(model.stream(MESSAGES))
    check_stream([str(p.text) for p in pieces], str(answer.text))
    assert 3 < answer.usage_metadata["output_tokens"] < TOKENS
    for method in ("json_schema", "function_calling"):
        check_day(model.with_structured_output(Day, method=method).invoke(QUESTION))
    calling = model.bind_tools([Day], tool_choice="any", parallel_tool_calls=False).invoke(MESSAGES)
    (call,) = calling.tool_calls
    check_day(Day(**call["args"]))
    told = ToolMessage("noted", tool_call_id=call["id"])
    assert model.bind_tools([Day]).invoke([*MESSAGES, calling, told]).usage_metadata["input_tokens"] > 100
