"""`llm`, with our server as one of its extra OpenAI models: chat, stream, structured output."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from shared import GREEDY, MODEL, QUESTION, SYSTEM, TOKENS, URL, Day, check_day, check_stream

with tempfile.TemporaryDirectory() as home:
    os.environ["LLM_USER_PATH"] = home  # read when llm is imported
    entry = {"model_id": "ours", "model_name": MODEL, "api_base": URL, "supports_schema": True}
    Path(home, "extra-openai-models.yaml").write_text(json.dumps([entry]))
    import llm

    model = llm.get_model("ours")
    whole = model.prompt(QUESTION, system=SYSTEM, stream=False, max_tokens=TOKENS, **GREEDY).text()
    check_stream(list(model.prompt(QUESTION, system=SYSTEM, max_tokens=TOKENS, **GREEDY)), whole)
    for stream in (False, True):
        answer = model.prompt(QUESTION, schema=Day, stream=stream, max_tokens=TOKENS, **GREEDY)
        check_day(Day.model_validate_json(answer.text()))
