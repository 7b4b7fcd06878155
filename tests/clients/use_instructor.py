"""Instructor in the modes TOOLS and JSON_SCHEMA: chat, stream of a growing object, structured output."""

from __future__ import annotations

import instructor
from openai import OpenAI
from shared import GREEDY, KEY, MESSAGES, MODEL, TOKENS, URL, Day, check_day, check_stream

plain = OpenAI(base_url=URL, api_key=KEY, max_retries=0)
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(plain, mode=mode)
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": TOKENS, **GREEDY}
    day = client.chat.completions.create(**asked, response_model=Day, max_retries=0)
    check_day(day)
    *_, last = growing = list(client.chat.completions.create_partial(**asked, response_model=Day, max_retries=0))
    assert len(growing) > 1
    assert last.model_dump() == day.model_dump()
    whole = client.chat.completions.create(**asked, response_model=None).choices[0].message.content
    chunks = client.chat.completions.create(**asked, response_model=None, stream=True)
    check_stream([c.choices[0].delta.content or "" for c in chunks if c.choices], whole)
