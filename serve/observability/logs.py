"""The server's log on stderr: lines for people, or JSON for programs; one line for each request.

What is logged of a request is its id, tenant, route, status, duration and tokens; never what a client wrote, nor a key.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Generator
from typing import TextIO

import structlog
from structlog.stdlib import ProcessorFormatter
from structlog.typing import Processor

from jaxlora.config.serving import LogLevel
from serve.http.drain import Starting
from serve.http.request_log import POLLED, Answered

LOGGERS = ("serve", "jaxlora")  # ours; those of libraries stay as they are
ACCESS = logging.getLogger("serve.access")


def naming(request_id: str) -> contextlib.AbstractContextManager[None]:
    """Has all that is logged within it, threads that it waits for included, name the request."""
    return structlog.contextvars.bound_contextvars(request_id=request_id)


def log_answered(answered: Answered) -> None:
    """A line for this request; a listener of the app.  Polls that were told that all is well, or goes well, are for debugging."""
    generated = answered.generated
    fields = {
        "method": answered.method,
        "route": answered.route,
        "status": answered.status,
        "code": answered.code,
        "tenant": answered.tenant,
        "model": None if generated is None else generated.model,
        "prompt_tokens": None if generated is None else generated.prompt_tokens,
        "completion_tokens": None if generated is None else generated.completion_tokens,
        "duration_ms": round(answered.duration_s * 1000, 1),
        "request_id": answered.request_id,
    }
    is_poll = answered.route in POLLED and (answered.status < 400 or answered.code == Starting.code)
    told = {name: value for name, value in fields.items() if value is not None}
    ACCESS.log(logging.DEBUG if is_poll else logging.INFO, "answered", extra=told)


class Stderr(io.TextIOBase):
    """sys.stderr as it is when something is written: a line that moves puts itself in its place."""

    def write(self, text: str) -> int:
        """Writes the text."""
        return sys.stderr.write(text)

    def flush(self) -> None:
        """Sends it on."""
        sys.stderr.flush()

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return sys.stderr.isatty()


@contextlib.contextmanager
def logging_to(stream: TextIO | None = None, *, as_json: bool, level: LogLevel = "info") -> Generator[None]:
    """Writes what our loggers say to the stream (stderr), from this level on; it ends as it was before."""
    both: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    to = Stderr() if stream is None else stream
    # Tracebacks as plain text: the richer forms tell local variables, and with them prompts and keys.
    last: list[Processor]
    if as_json:
        last = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        plain = structlog.dev.plain_traceback
        last = [structlog.dev.ConsoleRenderer(colors=to.isatty(), exception_formatter=plain, sort_keys=False)]
    handler = logging.StreamHandler(to)
    handler.setFormatter(
        ProcessorFormatter(foreign_pre_chain=both, processors=[ProcessorFormatter.remove_processors_meta, *last])
    )
    before = {name: (logging.getLogger(name).level, logging.getLogger(name).propagate) for name in LOGGERS}
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level.upper())
        logger.propagate = False
    try:
        yield
    finally:
        for name, (old_level, propagate) in before.items():
            logger = logging.getLogger(name)
            logger.removeHandler(handler)
            logger.setLevel(old_level)
            logger.propagate = propagate
