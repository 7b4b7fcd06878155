"""What every client is asked, and what it must bring back.  Needs pydantic alone.

A client's script is run as `python use_NAME.py URL MODEL`, in an environment that holds the client and nothing of ours.
"""

from __future__ import annotations

import sys
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

URL, MODEL = sys.argv[1:3]
KEY = "none"
SYSTEM, QUESTION = "Answer in one sentence.", "When does spring begin?"
MESSAGES = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
TOKENS = 100  # at most; an answer in text ends before
GREEDY = {"temperature": 0}


class Day(BaseModel):
    """A day of spring."""

    model_config = ConfigDict(extra="forbid")
    month: Literal["March", "April", "May"]
    day: int = Field(ge=1, le=31)


def check_stream(pieces: list[str], whole: str) -> None:
    """A stream comes in pieces and says what the plain answer, as greedy, says."""
    assert whole.strip(), "the plain answer is empty"
    assert len([p for p in pieces if p]) > 3, f"the stream came in {len(pieces)} pieces: {pieces}"
    assert "".join(pieces) == whole, f"streamed {''.join(pieces)!r}, the plain answer is {whole!r}"


def check_day(day: object) -> None:
    """A structured answer is an object of the class, which has checked its values."""
    assert isinstance(day, Day), f"got {day!r} in place of a Day"
