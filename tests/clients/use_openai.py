"""The official client: chat, stream, structured output and tools, on chat completions and on responses."""

from __future__ import annotations

from openai import OpenAI
from shared import GREEDY, KEY, MESSAGES, MODEL, QUESTION, SYSTEM, TOKENS, URL, Day, check_day, check_stream

client = OpenAI(base_url=URL, api_key=KEY, max_retries=0)
asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": TOKENS, **GREEDY}
answer = client.chat.completions.create(**asked)
whole = answer.choices[0].message.content
chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
check_stream([c.choices[0].delta.content or "" for c in chunks if c.choices], whole)
assert chunks[-1].usage == answer.usage
check_day(client.chat.completions.parse(**asked, response_format=Day).choices[0].message.parsed)

function = {"name": "note", "description": "Notes a day.", "parameters": Day.model_json_schema()}
tools = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
(call,) = client.chat.completions.create(**asked, **tools, parallel_tool_calls=False).choices[0].message.tool_calls
check_day(Day.model_validate_json(call.function.arguments))

asked = {"model": MODEL, "input": QUESTION, "instructions": SYSTEM, "max_output_tokens": TOKENS, **GREEDY}
whole = client.responses.create(**asked).output_text
events = client.responses.create(**asked, stream=True)
check_stream([e.delta for e in events if e.type == "response.output_text.delta"], whole)
check_day(client.responses.parse(**asked, text_format=Day).output_parsed)
