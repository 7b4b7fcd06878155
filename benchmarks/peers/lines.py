"""The worker's end of workers.py: a JSON object a line on stdin, one on stdout.  The standard library alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable


def answer_lines(make: Callable[..., object]) -> None:
    """Makes a worker of the first line's values; has it do what each other line names, and prints what that returns."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print does not mix with answers
    worker: object = None
    for text in sys.stdin:
        line = json.loads(text)
        if worker is None:
            worker, answer = make(**line), {"ready": True}
        else:
            answer = getattr(worker, line.pop("do"))(**line)
        print(json.dumps(answer), file=answers, flush=True)
