"""LiteLLM: chat, stream, structured output and tools."""

from __future__ import annotations

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it is fetched from GitHub
import litellm
from shared import GREEDY, KEY, MESSAGES, MODEL, TOKENS, URL, Day, check_day, check_stream

asked = {
    "model": f"openai/{MODEL}",
    "api_base": URL,
    "api_key": KEY,
    "messages": MESSAGES,
    "max_tokens": TOKENS,
    "num_retries": 0,
    **GREEDY,
}
whole = litellm.completion(**asked).choices[0].message.content
check_stream([c.choices[0].delta.content or "" for c in litellm.completion(**asked, stream=True)], whole)
check_day(Day.model_validate_json(litellm.completion(**asked, response_format=Day).choices[0].message.content))
function = {"name": "note", "description": "Notes a day.", "parameters": Day.model_json_schema()}
named = {"type": "function", "function": {"name": "note"}}
answer = litellm.completion(**asked, tools=[{"type": "function", "function": function}], tool_choice=named)
check_day(Day.model_validate_json(answer.choices[0].message.tool_calls[0].function.arguments))
