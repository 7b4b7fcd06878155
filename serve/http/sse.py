"""Server-sent events as bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping

from fastapi.sse import format_sse_event

DONE = format_sse_event(data_str="[DONE]")


def sse(data: Mapping[str, object], event: str | None = None) -> bytes:
    """One event: a raw `data:` line and an empty line.  event: its name."""
    return format_sse_event(data_str=json.dumps(data, ensure_ascii=False, separators=(",", ":")), event=event)
