"""What is known of an HTTP request once it has been answered, for logs, metrics and traces.  Pure.

Nothing here holds what a client wrote, but for the name of a model that was found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import Scope

GENERATED, REFUSED = "generated", "refused"  # where the wires leave it in a request's state
HEALTH_PATH, READY_PATH, METRICS_PATH, STATS_PATH = "/health", "/ready", "/metrics", "/v1/stats"
POLLED = frozenset({HEALTH_PATH, READY_PATH, METRICS_PATH, STATS_PATH})  # by programs, again and again


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """What a model generated for a request."""

    operation: str  # as OpenTelemetry calls it: "chat" or "text_completion"
    model: str  # as requested; it exists
    prompt_tokens: int
    completion_tokens: int
    finishes: tuple[str, ...]  # of the choices that have ended


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """One request and its answer."""

    request_id: str
    method: str
    route: str | None  # its template; None: no route took the request
    status: int  # 499: the client was gone before there was any
    tenant: str | None  # None: refused before it was known, or a path that is open to all
    began_s: float  # since 1970
    duration_s: float  # to the last byte
    code: str | None  # of the error, which may have come after the status
    generated: Generated | None
    traceparent: str | None  # the client's header, unchecked


Listener = Callable[[Answered], None]  # called on the event loop; must not wait for anything


def note_generated(scope: Scope, generated: Generated) -> None:
    """Records for the listeners what a model generated for this request."""
    scope["state"][GENERATED] = generated


def note_refused(scope: Scope, code: str) -> None:
    """Records for the listeners by which error this request has ended."""
    scope.setdefault("state", {})[REFUSED] = code
